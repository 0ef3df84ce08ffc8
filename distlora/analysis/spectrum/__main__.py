"""`python -m distlora.analysis.spectrum REQUEST`: the worker."""

import sys

from distlora.commands.ending import run_worker

if __name__ == "__main__":
    sys.exit(run_worker("distlora.analysis.spectrum.worker"))
