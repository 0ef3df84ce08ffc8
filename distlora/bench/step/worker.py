"""Train one rank of a cell: `python -m distlora.bench.step.worker JOB` (requests.StepJob).

stdout is for the parent, one line of JSON each: {"imported": anonymous bytes}, {"ran": class of the model}, then the
figures of each turn; or {"failed": reason}. All other output goes to stderr.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distlora.bench.host_counters import anonymous_bytes
from distlora.bench.peer_models import describe
from distlora.bench.processes import libraries_print_to_stderr
from distlora.bench.requests import StepJob, from_argument
from distlora.bench.step.prepare import read_rows
from distlora.bench.step.turns import Turns
from distlora.bench.trial import Started
from distlora.config import Config
from distlora.config.file import build
from distlora.data.rows import PackedRows
from distlora.parallel import Ranks, join_ranks
from distlora.training.reporter import Reporter
from distlora.weights.peft_folder import read_peft_adapter
from distlora_kernels.nf4_cpu import has_bitsandbytes

STEPS = 10**6
"""Steps of the run at a constant learning rate: more than any measurement takes."""


class Losses(Reporter):
    """A reporter that writes nothing and keeps the newest loss."""

    def __init__(self, config: Config) -> None:
        super().__init__(Path(), config, rank=1, world=2, total_steps=STEPS, start_step=0)  # Only rank 0 writes.

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the loss."""
        self.newest = metrics["loss"]


def config_of(job: StepJob, world: int) -> Config:
    """Return the settings of our run."""
    adapter = read_peft_adapter(Path(job.adapter)).settings
    sections: dict[str, Any] = {
        "model": {"path": job.model},
        "data": {"path": "none", "sequence_length": job.length},
        "adapter": adapter | {"init_from": job.adapter},
        "quant": {"method": job.base, "cache": False},
        "train": {
            "checkpointing": job.checkpointing,
            "global_batch": job.rows,
            "micro_batch": job.rows // world,
            "max_steps": STEPS,
            "save_minutes": None,
            "compile": job.compile,
        },
        "optim": {"lr": job.lr, "schedule": "constant", "warmup_ratio": 0.0},
        "tracker": {"name": "none"},
        "run_dir": "none",
    }
    return build(Config, sections)


def train(job: StepJob, rows: PackedRows, ranks: Ranks, turns: Turns) -> None:
    """Train with our trainer until there are no more turns."""
    config = config_of(job, ranks.world)
    losses = Losses(config)
    trainer, trial = Started.of(config, ranks).trainer(rows, reporter=losses)
    trainer.begin([trial])
    turns.answer(ran=describe(trainer.model))
    for _ in turns:
        trainer.advance()
        turns.note(losses.newest)


def work(job: StepJob, ranks: Ranks, turns: Turns) -> None:
    """Train as the job's way until there are no more turns."""
    run: Callable[[StepJob, PackedRows, Ranks, Turns], None] = train
    if job.runs != "ours":
        from distlora.bench.step import peers

        run = getattr(peers, job.runs)
    # Libraries import these when they build the model; they are not part of a step's memory.
    importlib.import_module("transformers.models.llama.modeling_llama")
    has_bitsandbytes()
    turns.answer(imported=anonymous_bytes() if Path("/proc/self/status").exists() else 0)
    run(job, read_rows(Path(job.data)), ranks, turns)


def main() -> None:
    """Run the worker: measure as the request says, and print."""
    warnings.simplefilter("ignore")
    job = from_argument(StepJob)
    with os.fdopen(os.dup(1), "w") as answers, libraries_print_to_stderr():
        ranks = join_ranks()
        turns = Turns(ranks.device, answers)
        try:
            work(job, ranks, turns)
        except Exception as error:
            traceback.print_exc()
            turns.answer(failed=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        sys.stderr.flush()
        os._exit(0)  # Ranks that leave one after the other would wait for each other, or complain.


if __name__ == "__main__":
    main()
