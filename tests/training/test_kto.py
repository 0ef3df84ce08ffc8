"""KTO's estimate of KL is of the whole step: on any number of ranks, after a resume, and in the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distlora.config import Config
from distlora.config.objectives import OBJECTIVES, means_of
from support.closeness import adapter_of, assert_adapters_close, assert_losses_close, figures_of
from support.family_models import SINGLE
from support.planned import traffic_of
from support.runs import run_once, run_until
from support.small_models import make_run, read_metrics
from support.tiers import ci
from support.trl_models import pairs
from support.worlds import World


def prepare(run_dir: Path, folders: Path, *, length: int = 160, **train: Any) -> Config:
    """Prepare a run of three steps of six rows, with one to several answers in each."""
    data = run_dir.with_suffix(".jsonl")
    sides = ["rejected" if number % 5 == 2 else "chosen" for number in range(36)]  # Mostly good ones: KL grows.
    lines = [
        {"prompt": f"{pair['prompt']} {number}", "completion": pair[side], "label": side == "chosen"}
        for number, (pair, side) in enumerate(zip(3 * pairs(), sides, strict=True))
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return make_run(
        run_dir,
        folders,
        data={"path": str(data), "sequence_length": length, "eval_fraction": 0.2},
        train={"objective": "kto", "max_steps": 3, "global_batch": 6, **train},
        optim={"lr": 1e-2, "warmup_ratio": 0.0},
    )


@pytest.fixture(scope="module")
def alone(world: World, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Tensor]]:
    """Return metrics and adapter of one rank with all rows of a step at once and nothing recomputed."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    prepare(run_dir, folders, micro_batch=6, checkpointing="none")
    return world.run(1, run_once, run_dir=run_dir)[0], adapter_of(run_dir)


def test_a_run_starts_at_one_half_and_raises_the_held_out_margin(alone: Any) -> None:
    metrics, _ = alone
    before, after = (line for line in metrics if "eval_loss" in line)
    first, last = (line for line in metrics if line.get("step") in (1, 3) and "loss" in line)
    for line, prefix in ((before, "eval_"), (first, "")):
        assert line[f"{prefix}loss"] == pytest.approx(0.5, rel=1e-6)
        assert line[f"{prefix}kl"] == line[f"{prefix}rewards/margins"] == 0, "the adapter adds nothing yet"
        assert 0.4 < line[f"{prefix}answers/chosen"] < 0.9
        assert line[f"{prefix}logps/chosen"] < 0
    assert last["kl"] > 0
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    assert after["eval_loss"] < 0.48
    assert after["eval_rewards/margins"] > 0.02


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (2, {"micro_batch": 1}),
        ci(3, {"micro_batch": 1, "accumulate": "block", "checkpointing": "offload"}),
    ],
    ids=str,
)
def test_ranks_and_micro_batches_change_nothing(
    world: World, folders: Path, tmp_path: Path, alone: Any, size: int, settings: dict[str, Any]
) -> None:
    prepare(tmp_path / "run", folders, **settings)
    metrics = world.run(size, run_once, run_dir=tmp_path / "run")[0]
    expected, adapter = alone
    for name in ("loss", "eval_loss", "kl", "eval_kl"):
        found, wanted = ([line[name] for line in lines if name in line] for lines in (metrics, expected))
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6), name
    assert_losses_close(*([line["loss"] for line in lines if "loss" in line] for lines in (metrics, expected)))
    assert_adapters_close(adapter_of(tmp_path / "run"), adapter)


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (2, {"micro_batch": 1}),
        ci(3, {"micro_batch": 1, "accumulate": "block"}),
    ],
    ids=str,
)
def test_a_step_carries_what_is_planned(
    world: World, folders: Path, tmp_path: Path, size: int, settings: dict[str, Any]
) -> None:
    """With an answer in each row, so that there are as many mismatched rows."""
    config = prepare(tmp_path / "run", folders, length=24, **settings)
    metrics = world.run(size, run_once, run_dir=tmp_path / "run")[0]
    line = next(line for line in metrics if line.get("step") == 2 and "loss" in line)
    assert line["answers"] == 6, "several answers share a row"
    assert line["gathered_bytes"] == traffic_of(config, world=size).gathered


def test_a_stopped_run_resumes_with_the_same_bits(folders: Path, tmp_path: Path) -> None:
    for name in ("whole", "stopped"):
        prepare(tmp_path / name, folders, micro_batch=3, save_every=1)
    run_until(SINGLE, run_dir=tmp_path / "whole", stop_before=None)
    for stop_before in (2, None):
        run_until(SINGLE, run_dir=tmp_path / "stopped", stop_before=stop_before)
    whole, resumed = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert figures_of(tmp_path / "stopped") == figures_of(tmp_path / "whole")
    assert read_metrics(tmp_path / "whole")[0]["eval_kl"] == 0


def test_steps_of_a_single_answer_have_no_kl(folders: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "run", folders, length=24, global_batch=1, eval_every=None)
    run_until(SINGLE, run_dir=tmp_path / "run", stop_before=None)
    last = next(line for line in read_metrics(tmp_path / "run") if line.get("step") == 3 and "loss" in line)
    assert last["answers"] == 1
    assert last["kl"] == 0
    assert last["loss"] != pytest.approx(0.5, abs=1e-4), "the adapter has moved"


def test_a_mean_over_answers_of_one_kind_is_left_out_where_there_are_none() -> None:
    needs = OBJECTIVES["kto"]
    sums = {"loss": 2.0, "rewards/chosen": 3.0, "logps/chosen": -6.0, "answers/chosen": 3.0}
    means = means_of(needs, [sums.get(name, 0.0) for name in ("loss", *needs.figures)], units=4)
    expected = {"loss": 0.5, "rewards/chosen": 1, "logps/chosen": -2, "answers/chosen": 0.75, "answers/rejected": 0}
    assert means == expected | {"kl": 0}
