"""A run that stops at a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from distlora.parallel import Ranks
from distlora.training import worker
from distlora.training.trial import Trial

SINGLE = Ranks(0, 1, torch.device("cpu"), None)


class Stopped(Exception):
    pass


def run_until(ranks: Ranks, *, run_dir: Path, stop_before: int | None) -> dict[int, list[int]]:
    """Run the worker to its end, or stop it as it begins the given step.

    Returns the rows of each step that it made, in order.
    """
    original = worker.Trainer._train_step
    rows: dict[int, list[int]] = {}

    def step(self: worker.Trainer, trials: Sequence[Trial]) -> None:
        (trial,) = trials
        if trial.done == stop_before:
            raise Stopped
        rows[trial.done] = [row for row in trial.loader.rows_of_ranks(trial.done).flatten().tolist() if row >= 0]
        original(self, trials)

    worker.Trainer._train_step = step  # type: ignore[method-assign]
    try:
        worker.run(run_dir, ranks)
    except Stopped:
        pass
    finally:
        worker.Trainer._train_step = original  # type: ignore[method-assign]
    return rows
