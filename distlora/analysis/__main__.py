"""`python -m distlora.analysis REQUEST`: the worker, with Ctrl-C in order while it imports."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the worker on the command line's one argument; returns the exit code."""
    # torch takes seconds to import, and Ctrl-C would print where in it the user lost patience.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from distlora.analysis.worker import main as work

    signal.signal(signal.SIGINT, signal.default_int_handler)
    return work(sys.argv[1])


if __name__ == "__main__":
    sys.exit(main())
