"""A run that is asked to stop: all ranks at one step, everything saved, and the rest is the uninterrupted run's."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.checkpoint.saver import Saver
from distlora.checkpoint.state import RunProgress
from distlora.loading import load_base
from distlora.parallel import Ranks
from distlora.run_folder.layout import steps
from distlora.system import stop_signals
from distlora.training import worker
from distlora.training.objectives import Losses, NextToken
from support.closeness import figures_of
from support.small_models import make_run
from support.tiers import ci
from support.worlds import World

SETTINGS = {
    "max_steps": 8,
    "save_every": 4,
    "eval_every": 3,
    "log_every": 2,
    "keep": 9,
    "global_batch": 6,
    "micro_batch": 1,
    "sample_every": 3,
    "sample_prompts": ["What is a list?", "What is a set?"],
    "sample_tokens": 3,
}


def ask_at(monkeypatch: pytest.MonkeyPatch, point: str, ask: Callable[[], None]) -> None:
    """Send a request at a point of the run."""
    asked = False

    def when(reached: bool) -> None:
        nonlocal asked
        if reached and not asked:
            asked = True
            ask()

    losses_of, train_step, evaluate = NextToken.losses, worker.Trainer._train_step, worker.Trainer.evaluate
    segments_of, save = load_base.segments_of, Saver.save
    micro_batches, evaluating = 0, -1

    def losses(self: NextToken, *arguments: Any) -> Losses:
        nonlocal micro_batches
        step = arguments[-1]
        micro_batches += 1
        when(step is not None and point == f"micro-batch {micro_batches} of step {step + 1}")
        when(step is None and point == f"evaluation {evaluating}")
        return losses_of(self, *arguments)

    def a_step(self: worker.Trainer) -> None:
        nonlocal micro_batches
        micro_batches = 0
        train_step(self)
        when(point == f"step {self.trial.done}")

    def an_evaluation(self: worker.Trainer) -> None:
        nonlocal evaluating
        evaluating = self.trial.done
        evaluate(self)

    def a_weight(*arguments: Any, **named: Any) -> Any:
        when(point == "loading")
        return segments_of(*arguments, **named)

    def a_save(self: Saver, progress: RunProgress) -> None:
        when(point == f"save {progress.step}")
        save(self, progress)

    monkeypatch.setattr(NextToken, "losses", losses)
    monkeypatch.setattr(worker.Trainer, "_train_step", a_step)
    monkeypatch.setattr(worker.Trainer, "evaluate", an_evaluation)
    monkeypatch.setattr(load_base, "segments_of", a_weight)
    monkeypatch.setattr(Saver, "save", a_save)


def run_asked(
    ranks: Ranks, *, run_dir: Path, point: str | None, asked: tuple[int, ...] = (), times: int = 1
) -> list[int]:
    """Run the worker with requests to stop at a point of the run, on the given ranks; return its steps."""
    done: list[int] = []

    def ask() -> None:
        for signum in [signal.SIGUSR1, signal.SIGTERM][:times]:
            stop_signals.request(signum)

    with pytest.MonkeyPatch.context() as monkeypatch:
        if point is not None and ranks.rank in asked:
            if point == "start":
                ask()
            else:
                ask_at(monkeypatch, point, ask)
        train_step = worker.Trainer._train_step

        def counted(self: worker.Trainer) -> None:
            train_step(self)
            done.append(self.trial.done)

        monkeypatch.setattr(worker.Trainer, "_train_step", counted)
        try:
            worker.run(run_dir, ranks)
        finally:
            stop_signals.forget()
    return done


def state(run_dir: Path) -> dict[str, Tensor]:
    """Return the last checkpoint of a run: trained tensors and optimizer states."""
    files = steps(run_dir / "checkpoints")[-1].glob("*.safetensors")
    return {f"{path.stem}/{name}": part for path in files for name, part in safetensors.torch.load_file(path).items()}


def assert_same_state(run_dir: Path, other: Path) -> None:
    first, second = state(run_dir), state(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(part, second[name]) for name, part in first.items())


def stops(per_step: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Return the stop requests of successive starts: where, on which ranks, how often, and the step saved then.

    All ranks act at the boundary after the first request; a step has `per_step` boundaries.
    """
    lag = 0 if per_step > 1 else 1
    return [
        ("start", (0, 1), 2, 0),
        ("loading", (1,), 1, 0),
        ("evaluation 0", (1,), 1, 0),
        ("step 1", (0,), 1, 1 + lag),
        ("evaluation 3", (1,), 2, 3),
        ("loading", (0,), 1, 3),
        ("save 4", (1,), 1, 4 + lag),
        ("micro-batch 1 of step 6", (1,), 1, 5 + lag),
        ("evaluation 8", (0, 1), 1, 8),
    ]


FULL = {"adapter": {"method": "full"}, "quant": {"method": "none"}}


@pytest.mark.parametrize(
    ("size", "sections"),
    [
        ci(2, {}),
        pytest.param(3, {"train": {"accumulate": "block"}}, marks=pytest.mark.slow),
        pytest.param(2, FULL, marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "3 ranks, by blocks", "full"],
)
def test_a_run_that_is_stopped_anywhere_equals_the_uninterrupted_run(
    world: World,
    folders: Path,
    tmp_path: Path,
    size: int,
    sections: dict[str, dict[str, Any]],
) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, run_dir):
        make_run(folder, folders, **{**sections, "train": SETTINGS | sections.get("train", {})})
    world.run(size, run_asked, run_dir=whole, point=None)
    done: list[int] = []
    per_step = 1 if "train" in sections else 6 // size
    for point, asked, times, saved in stops(per_step):
        ranks_did = world.run(size, run_asked, run_dir=run_dir, point=point, asked=asked, times=times)
        assert ranks_did == [ranks_did[0]] * size, "all ranks stop after the same step"
        done += ranks_did[0]
        record = json.loads((run_dir / "stopped.json").read_text())
        name = f"checkpoints/step_{saved:08d}" if saved else None
        assert (record["step"], record["checkpoint"], record["signal"]) == (saved, name, "SIGUSR1"), point
        assert name is None or (run_dir / name / "manifest.json").is_file()
        assert not any((run_dir / name).exists() for name in ("adapter", "model"))
    done += world.run(size, run_asked, run_dir=run_dir, point=None)[0]
    assert done == list(range(1, 9)), "no whole step was lost"
    assert not (run_dir / "stopped.json").exists()
    assert_same_state(run_dir, whole)
    assert figures_of(run_dir) == figures_of(whole), "each step once, with the same numbers"
    assert (run_dir / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


@pytest.mark.ci
def test_saves_by_the_clock_change_nothing_and_come_after_whole_steps(
    world: World, folders: Path, tmp_path: Path
) -> None:
    settings = {"max_steps": 5, "log_every": 5, "keep": 9, "global_batch": 4, "micro_batch": 1}
    for name, minutes in (("whole", None), ("saved", 1e-6)):
        train_settings = settings | {"save_minutes": minutes}
        make_run(tmp_path / name, folders, train=train_settings, data={"eval_fraction": 0.0})
        world.run(2, run_asked, run_dir=tmp_path / name, point=None)
    saved = [folder.name for folder in steps(tmp_path / "saved" / "checkpoints")]
    assert saved == [f"step_{step:08d}" for step in range(1, 6)], (
        "at the end of each step that began after the last save"
    )
    assert [folder.name for folder in steps(tmp_path / "whole" / "checkpoints")] == ["step_00000005"]
    assert_same_state(tmp_path / "saved", tmp_path / "whole")
    assert figures_of(tmp_path / "saved") == figures_of(tmp_path / "whole")
