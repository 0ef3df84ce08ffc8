"""Answer what only transformers and torch can tell, in a process of its own, on standard output.

`python -m distlora.derive PLACE < config.json`: the architecture of a config.json.
`python -m distlora.derive --images PLACE < JSON`: how a model takes images (`distlora.derive.images`).
`python -m distlora.derive --gguf FILE FOLDER`: gguf.json of a GGUF file, whose config.json and tokenizer it writes.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch

from distlora.config import UserError
from distlora.derive import derive
from distlora.derive.gguf import describe
from distlora.derive.images import derive_images
from distlora.system.exit_codes import BAD_INPUT

if __name__ == "__main__":
    torch.set_num_threads(1)  # Small tensors gain nothing from threads, which spin while they wait.
    answers, sys.stdout = sys.stdout, sys.stderr  # Libraries print too.
    asks, place = sys.argv[1], sys.argv[min(2, len(sys.argv) - 1)]
    try:
        if asks == "--gguf":
            answer = describe(Path(place), Path(sys.argv[3]))
        else:
            answer = (derive_images if asks == "--images" else derive)(sys.stdin.read(), place)
        print(answer, file=answers)
    except UserError as error:
        print(error, file=answers)
        sys.exit(BAD_INPUT)
    except Exception as error:  # Of a model's own code, which may fail in any way.
        traceback.print_exc()
        line = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__} in {line.name}, line {line.lineno} of {line.filename}: {error}"
        reason = " ".join(reason.split())
        what = "it cannot be described" if asks == "--gguf" else "a small model of it cannot be checked"
        print(f"{place}: {what} ({reason}); set {{model.path}} to another model", file=answers)
        sys.exit(BAD_INPUT)
