"""Print the architecture of a config.json on standard input: `python -m distlora.derive PLACE < config.json`."""

from __future__ import annotations

import sys
import traceback

import torch

from distlora.config import UserError
from distlora.derive import derive
from distlora.system.exit_codes import BAD_INPUT

if __name__ == "__main__":
    torch.set_num_threads(1)  # Small tensors gain nothing from threads, which spin while they wait.
    answers, sys.stdout = sys.stdout, sys.stderr  # Libraries print too.
    try:
        print(derive(sys.stdin.read(), sys.argv[1]), file=answers)
    except UserError as error:
        print(error, file=answers)
        sys.exit(BAD_INPUT)
    except Exception as error:  # Of a model's own code, which may fail in any way.
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__} in {place.name}, line {place.lineno} of {place.filename}: {error}"
        reason = " ".join(reason.split())
        print(
            f"{sys.argv[1]}: a small model of it cannot be checked ({reason}); set {{model.path}} to another model",
            file=answers,
        )
        sys.exit(BAD_INPUT)
