"""`distlora demo`; see README.md beside this file."""


def main(arguments: list[str]) -> int:
    """Run the demo; returns the exit code."""
    # Here and not above: the demo's helper processes import this package without the launcher.
    from distlora_launcher.demo.run import main as run

    return run(arguments)
