"""The number of steps of a run, and when it evaluates and saves."""

from __future__ import annotations

import pytest

from distlora.config import TrainConfig
from distlora.config.training import Cadence


def due(cadence: Cadence | None, total: int) -> list[int]:
    return [step for step in range(total + 1) if cadence is not None and cadence.is_due(step)]


@pytest.mark.parametrize(
    ("epochs", "rows", "steps"),
    [(1.0, 33, 5), (3.0, 33, 15), (0.5, 33, 3), (2.5, 33, 13), (0.1, 240, 3), (0.7, 800, 70), (0.001, 33, 1)],
)
def test_part_of_an_epoch_is_rounded_up_to_whole_steps(epochs: float, rows: int, steps: int) -> None:
    assert TrainConfig(epochs=epochs).total_steps(rows) == steps
    assert TrainConfig(epochs=epochs, max_steps=7).total_steps(rows) == 7


def test_evaluations_and_saves_per_epoch_are_evenly_spaced_and_end_with_it() -> None:
    train = TrainConfig(evals_per_epoch=4, saves_per_epoch=1, epochs=2)
    assert due(train.evaluations(rows=264, held_out=1), 66) == [9, 17, 25, 33, 42, 50, 58, 66]
    assert due(train.saves(rows=264), 66) == [33, 66]
    assert due(TrainConfig(evals_per_epoch=9).evaluations(rows=16, held_out=1), 4) == [1, 2, 3, 4]
    assert due(TrainConfig(eval_every=3).evaluations(rows=264, held_out=1), 10) == [3, 6, 9]
    assert TrainConfig().saves(rows=264) is None


def test_five_evaluations_by_default_unless_they_cost_too_much() -> None:
    auto = TrainConfig()
    assert due(auto.evaluations(rows=800, held_out=10), 100) == [20, 40, 60, 80, 100]
    assert due(auto.evaluations(rows=800, held_out=60), 100) == [34, 67, 100], "160 of 800 are affordable"
    assert auto.evaluations(rows=800, held_out=170) is None
    assert due(auto.evaluations(rows=120, held_out=1), 15) == [5, 10, 15], "not less than five steps apart"
    assert auto.evaluations(rows=72, held_out=1) is None
    asks = TrainConfig(early_stopping_patience=2)
    assert due(asks.evaluations(rows=800, held_out=900), 100) == [20, 40, 60, 80, 100]
    assert due(TrainConfig(load_best_at_end=True).evaluations(rows=24, held_out=1), 3) == [1, 2, 3]
    kept = [train.keeps_best("full") for train in (TrainConfig(), TrainConfig(eval_every=5), asks)]
    assert kept == [False, True, True], "auto alone writes no whole model"
    assert TrainConfig().keeps_best("lora")
    assert TrainConfig(eval_every=None).evaluations(rows=800, held_out=1) is None
