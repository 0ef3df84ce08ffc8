"""Check ends before the last step (non-finite loss or gradient, early stopping) and the kept state."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.checkpoint.state import load_state
from distlora.parallel import Ranks
from distlora.run_folder.error_file import write
from distlora.run_folder.layout import TRAINER_NAME, newest, step_of, steps
from distlora.training import worker
from distlora.training.objectives import Losses, NextToken
from distlora.training.trial import LossWatchdogError, NonFiniteError, Trial
from support.closeness import assert_same_run
from support.small_models import make_run, read_metrics
from support.tiers import ci
from support.worlds import World

SINGLE = Ranks(0, 1, torch.device("cpu"), None)
PATIENT = {"eval_every": 1, "max_steps": 7, "early_stopping_patience": 2, "global_batch": 6}
CONSTANT = {"lr": 2e-3, "eps": 1e-4, "schedule": "constant", "warmup_ratio": 0.0}


def run_with_bad_step(ranks: Ranks, *, run_dir: Path, bad_step: int, value: float, where: str) -> str:
    """Run the worker with one row's loss of rank 0 (or its rows' gradients) spoilt in one step.

    Returns the error's text.
    """
    train_step, losses_of = worker.Trainer._train_step, NextToken.losses
    spoiling = False

    def spoilt_step(self: worker.Trainer) -> None:
        nonlocal spoiling
        spoiling = self.trial.done == bad_step and ranks.rank == 0
        train_step(self)

    def spoilt_losses(self: NextToken, *arguments: Any) -> Losses:
        nonlocal spoiling
        losses = losses_of(self, *arguments)
        if spoiling:
            spoiling = False
            spoil = torch.zeros_like(losses.rows)
            spoil[-1] = value
            # An infinite loss may have a finite gradient, and the other way round.
            rows = losses.rows + (spoil if where == "loss" else _NanGradient.apply(losses.rows))
            losses = losses._replace(rows=rows)
        return losses

    worker.Trainer._train_step, NextToken.losses = spoilt_step, spoilt_losses  # type: ignore[method-assign]
    try:
        worker.run(run_dir, ranks)
    except NonFiniteError as error:
        return str(error)
    finally:
        worker.Trainer._train_step, NextToken.losses = train_step, losses_of  # type: ignore[method-assign]
    return "no error"


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor) -> Tensor:
        return torch.zeros_like(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.full_like(gradient, float("nan"))


def saved(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


BAD = {"max_steps": 5, "log_every": 4}


@pytest.mark.parametrize(
    ("size", "accumulate", "where", "value"),
    [
        ci(1, "step", "loss", math.inf),
        (2, "block", "gradient", 0.0),
        ci(1, "step", "gradient", 0.0),
        ci(2, "step", "loss", math.nan),
        ci(2, "block", "loss", math.inf),
    ],
)
def test_the_last_finite_state_is_saved_and_the_step_and_its_rows_are_named(
    world: World, folders: Path, tmp_path: Path, size: int, accumulate: str, where: str, value: float
) -> None:
    settings, model = BAD | {"accumulate": accumulate}, "mixtral" if size == 1 else "llama"
    make_run(tmp_path / "good", folders, model, train=settings | {"save_every": 2, "keep": 9})
    world.run(size, run_with_bad_step, run_dir=tmp_path / "good", bad_step=-1, value=value, where=where)
    make_run(tmp_path / "bad", folders, model, train=settings)
    messages = world.run(size, run_with_bad_step, run_dir=tmp_path / "bad", bad_step=2, value=value, where=where)
    assert len(set(messages)) == 1, "every rank stops, at the same place"
    assert messages[0].startswith("step 3: the ")
    assert ("gradient of rows" if where == "gradient" else "loss of row ") in messages[0]
    folder, expected = (tmp_path / run / "checkpoints" / "step_00000002" for run in ("bad", "good"))
    assert newest(tmp_path / "bad" / "checkpoints") == (folder, [])
    assert all(torch.equal(saved(expected)[name], tensor) for name, tensor in saved(folder).items())
    loads = [load_state(path).progress.expert_tokens for path in (folder, expected)]
    assert loads[0] is None, "the load of the steps that are not saved is in it"
    assert (loads[1] is None) == (model == "llama")
    optimizer = [safetensors.torch.load_file(path / TRAINER_NAME) for path in (folder, expected)]
    assert all(torch.equal(optimizer[1][name], tensor) for name, tensor in optimizer[0].items())
    assert [line["step"] for line in read_metrics(tmp_path / "bad") if "loss" in line] == [1, 2, 3]


def test_a_first_step_that_is_not_finite_saves_nothing(folders: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", folders, train={"max_steps": 3})
    message = run_with_bad_step(SINGLE, run_dir=tmp_path / "run", bad_step=0, value=float("nan"), where="loss")
    assert "nothing was trained before it" in message
    assert not (tmp_path / "run" / "checkpoints").exists()


class BrokenError(RuntimeError):
    """What an evaluation of the tests raises."""


@pytest.mark.parametrize("after", [ci(0), 2, ci(4)])
def test_an_evaluation_that_fails_costs_no_step_and_is_named(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    means_of = worker.Trainer._means_of

    def broken(self: worker.Trainer, batches: Any) -> Any:
        if self.trial.done == after:
            raise BrokenError("no memory")
        return means_of(self, batches)

    settings = {"max_steps": 4, "eval_every": 2, "save_every": 3, "log_every": 4}
    for name in ("run", "whole"):
        make_run(tmp_path / name, folders, train=settings)
    with monkeypatch.context() as patch:
        patch.setattr(worker.Trainer, "_means_of", broken)
        with pytest.raises(BrokenError) as raised:
            worker.run(tmp_path / "run", SINGLE)
    write(tmp_path / "error.json", raised.value)
    saved = f"the state after step {after} is saved" if after else "nothing was trained before it"
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message == f"no memory\n(in the evaluation after step {after}; {saved})"
    assert [step_of(folder) for folder in steps(tmp_path / "run" / "checkpoints")] == {0: [], 2: [2], 4: [3, 4]}[after]
    for name in ("run", "whole"):
        worker.run(tmp_path / name, SINGLE)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    held_out = [
        {line["step"]: line["eval_loss"] for line in read_metrics(tmp_path / name) if "eval_loss" in line}
        for name in ("run", "whole")
    ]
    assert held_out[0] == held_out[1]


def test_a_loss_that_stays_high_ends_the_run_and_keeps_the_checkpoint_before(folders: Path, tmp_path: Path) -> None:
    watched = {"max_steps": 6, "save_every": 1, "log_every": 2, "loss_watchdog_patience": 2}
    make_run(tmp_path / "run", folders, train=watched | {"loss_watchdog_threshold": 0.1})
    with pytest.raises(LossWatchdogError, match=r"^step 2: .*threshold=0\.1 for 2 steps in a row"):
        worker.run(tmp_path / "run", SINGLE)
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line] == [1, 2]
    assert not (tmp_path / "run" / "checkpoints").exists(), "a state of high loss was saved"


@pytest.fixture(scope="module")
def falling(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of three steps in which the held-out loss falls."""
    run_dir = tmp_path_factory.mktemp("falling") / "run"
    make_run(run_dir, folders, train=PATIENT | {"max_steps": 3}, optim=CONSTANT)
    worker.run(run_dir, SINGLE)
    return run_dir


@pytest.mark.parametrize("load_best", [ci(False), True])
def test_a_run_that_gets_worse_stops_and_keeps_its_best_adapter(
    folders: Path, tmp_path: Path, falling: Path, load_best: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = Trial.evaluated

    def rising_after_step_3(self: Trial, held_out: dict[str, float]) -> None:
        evaluated(self, held_out)
        self.progress.evaluations[self.progress.step] += max(self.progress.step - 3, 0)

    monkeypatch.setattr(Trial, "evaluated", rising_after_step_3)
    make_run(tmp_path / "run", folders, train=PATIENT | {"load_best_at_end": load_best}, optim=CONSTANT)
    worker.run(tmp_path / "run", SINGLE)
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best_step"] == 3
    kept, final = saved(tmp_path / "run" / "best"), saved(tmp_path / "run" / "adapter")
    assert all(torch.equal(kept[name], tensor) for name, tensor in saved(falling / "adapter").items())
    assert all(torch.equal(kept[name], final[name]) for name in kept) == load_best
    # Started again, it has nothing left to do and ends the same.
    worker.run(tmp_path / "run", SINGLE)
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5]
    assert all(torch.equal(final[name], tensor) for name, tensor in saved(tmp_path / "run" / "adapter").items())
    assert not (tmp_path / "run" / "adapter" / "step.json").exists()
    if load_best:  # A best whose step a kill kept from being saved is not taken for the one that is known.
        (tmp_path / "run" / "best" / "step.json").write_text('{"step": 4}')
        worker.run(tmp_path / "run", SINGLE)
        last = saved(tmp_path / "run" / "checkpoints" / "step_00000005")
        assert all(torch.equal(last[name], tensor) for name, tensor in saved(tmp_path / "run" / "adapter").items())


def test_nothing_stops_while_the_held_out_loss_falls(falling: Path) -> None:
    losses = [line["eval_loss"] for line in read_metrics(falling) if "eval_loss" in line]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(*(next(iter(saved(falling / name).values())) for name in ("best", "adapter")))
