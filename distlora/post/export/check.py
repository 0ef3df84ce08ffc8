"""`python -m distlora.post.export.check REQUEST`: loads an export with its real client, as whoever gets it would.

A process of its own, so that nothing of how it was written is left. Its last line on stdout is JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from distlora.post.export.formats import FORMATS
from distlora.post.export.probe import onto_original, our_logits
from distlora.post.export.request import Export, Request
from distlora.system.exit_codes import DONE, run_to_exit_code, run_worker
from distlora.system.progress_lines import Progress, quieten, say


def run(request: Request) -> dict[str, Any]:
    """The readings of the format's client."""
    assert request.place is not None
    trained = request.name.read()
    with onto_original(trained) if request.onto == "original" else contextlib.nullcontext(trained) as meant:
        ours = our_logits(meant)
    export = Export(request=request, trained=trained, place=Path(request.place), say=say, progress=Progress())
    module: Any = importlib.import_module(FORMATS[request.format].module)
    readings = module.check(export, ours)
    return {
        "tokens": ours.tokens.shape[1],
        "moved": ours.moved,
        "readings": [dataclasses.asdict(reading) for reading in readings],
    }


def main(argument: str) -> int:
    quieten()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # Between PEFT and transformers.

    def work() -> int:
        print(json.dumps(run(Request.read(argument))))
        return DONE

    return run_to_exit_code(work)


if __name__ == "__main__":
    sys.exit(run_worker("distlora.post.export.check"))
