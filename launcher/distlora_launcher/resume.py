"""`distlora resume RUN`: continue a run from its folder, which holds all of its settings."""

from __future__ import annotations

from pathlib import Path

from distlora.config import UserError

USAGE = """usage: distlora resume RUN

Continue the run in the folder RUN from its newest whole checkpoint, with the settings in RUN/config.yaml. On the same
number of processes the result equals that of a run that was never stopped, bit for bit. A run of cluster=slurm is
submitted again."""


def main(arguments: list[str]) -> int:
    """Continue the run that the one argument names."""
    if arguments in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if len(arguments) != 1:
        extra = [word for word in arguments if "=" in word]
        reason = f"the settings of a run are fixed, {extra[0]} cannot change them" if extra else "give one run folder"
        raise UserError(f"distlora resume takes one run folder and nothing else: {reason}; write `distlora resume RUN`")
    from distlora.config_file import load_config
    from distlora_launcher.jobs.submit import is_job, resume_run
    from distlora_launcher.local import resume

    run_dir = Path(arguments[0])
    return resume_run(run_dir) if is_job(load_config(run_dir.expanduser())) else resume(run_dir)
