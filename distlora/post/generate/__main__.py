"""`python -m distlora.post.generate REQUEST`: the worker."""

import sys

from distlora.system.exit_codes import run_worker

if __name__ == "__main__":
    sys.exit(run_worker("distlora.post.generate.worker"))
