"""The process that prepares the data of a run: `python -m distlora.data RUN`, as the launcher starts it."""

from __future__ import annotations

import sys

from distlora.architecture.tokens import tokenize_alone
from distlora.data.prepare import prepare_and_print
from distlora.system.exit_codes import run_to_exit_code

if __name__ == "__main__":
    tokenize_alone()
    advice = "free some space, or set data.cache_dir to another disk"
    sys.exit(run_to_exit_code(lambda: prepare_and_print(sys.argv[1]), full_disk=advice))
