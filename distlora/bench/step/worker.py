"""One process of a cell: `python -m distlora.bench.step.worker JOB`, JOB as JSON (`compare.job_of` makes it).

stdout is for its parent, a line of JSON each: {"imported": anonymous bytes}, {"ran": what the way became}, then what
each turn took; or {"failed": why}. Whatever else is printed goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distlora.bench.memory import anonymous_bytes
from distlora.bench.processes import own_stdout
from distlora.bench.step.rows import read_rows
from distlora.bench.step.turns import Turns
from distlora.parallel import Ranks, join_ranks
from distlora_kernels.nf4_cpu import has_bitsandbytes

WAYS = {
    "ours": ("ours", "train"),
    "loop": ("peers", "loop"),
    "trainer": ("peers", "trainer"),
    "fsdp2": ("peers", "fsdp2"),
}
"""What a job's `runs` stands for: a module beside this one, and its function."""


def work(job: Mapping[str, Any], ranks: Ranks, turns: Turns) -> None:
    module, name = WAYS[job["runs"]]
    run = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    # What each of them imports by itself as late as it makes the model, which is no part of a step's memory.
    importlib.import_module("transformers.models.llama.modeling_llama")
    has_bitsandbytes()
    turns.tell(imported=anonymous_bytes() if Path("/proc/self/status").exists() else 0)
    run(job, read_rows(Path(job["data"])), ranks, turns)


def main() -> None:
    warnings.simplefilter("ignore")
    job = json.loads(sys.argv[1])
    with os.fdopen(os.dup(1), "w") as answers, own_stdout():
        ranks = join_ranks()
        turns = Turns(ranks.device, answers)
        try:
            work(job, ranks, turns)
        except Exception as error:
            traceback.print_exc()
            turns.tell(failed=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        sys.stderr.flush()
        os._exit(0)  # Ranks that leave one after the other would wait for each other, or complain.


if __name__ == "__main__":
    main()
