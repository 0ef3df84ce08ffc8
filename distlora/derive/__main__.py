"""Print the architecture of a config.json on standard input: `python -m distlora.derive PLACE < config.json`."""

from __future__ import annotations

import sys

import torch

from distlora.config import UserError
from distlora.derive import derive
from distlora.system.exit_codes import BAD_INPUT

if __name__ == "__main__":
    torch.set_num_threads(1)  # Small tensors gain nothing from threads, which spin while they wait.
    try:
        print(derive(sys.stdin.read(), sys.argv[1]))
    except UserError as error:
        print(error)
        sys.exit(BAD_INPUT)
