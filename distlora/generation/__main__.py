"""`python -m distlora.generation REQUEST`: the worker."""

import sys

from distlora.commands.ending import run_worker

if __name__ == "__main__":
    sys.exit(run_worker("distlora.generation.worker"))
