"""Runs of DPO, KTO and reward models: their first loss, that it falls, any number of ranks, a resume, the wire."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distlora.config import Config
from support.closeness import adapter_of, assert_adapters_close, assert_losses_close, assert_same_run
from support.family_models import SINGLE
from support.planned import traffic_of
from support.runs import run_once, run_until
from support.small_models import make_run, read_metrics
from support.tiers import ci
from support.worlds import World

START = {"dpo": math.log(2), "kto": 0.5, "reward": None}
"""Loss of a step whose adapter adds nothing; of a reward model it depends on the score's start."""
FALL = {"dpo": 0.01, "kto": 0.02, "reward": 0.05}
"""By which the held-out loss falls at least."""


def prepare(
    run_dir: Path, folders: Path, preferences: Path, objective: str, *, length: int = 160, **train: Any
) -> Config:
    """Prepare a run of steps of six rows, with one to several pairs or judged answers in each."""
    data, steps, optim = preferences, 6, {}
    if objective == "kto":
        data, steps, optim = run_dir.with_suffix(".jsonl"), 3, {"lr": 1e-2, "warmup_ratio": 0.0}
        pairs = [json.loads(line) for line in preferences.read_text().splitlines()]
        sides = ["rejected" if number % 5 == 2 else "chosen" for number in range(36)]  # Mostly good ones: KL grows.
        judged = [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for pair, side in zip(pairs, sides, strict=False)
        ]
        data.write_text("".join(json.dumps(line) + "\n" for line in judged))
    return make_run(
        run_dir,
        folders,
        data={"path": str(data), "sequence_length": length, "eval_fraction": 0.2},
        train={"objective": objective, "max_steps": steps, "global_batch": 6, **train},
        optim=optim,
    )


@pytest.fixture(scope="module")
def alone(
    world: World, folders: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return the run of an objective on one rank, with all rows of a step at once and nothing recomputed."""

    @functools.cache
    def run(objective: str) -> Path:
        run_dir = tmp_path_factory.mktemp("alone") / "run"
        prepare(run_dir, folders, preferences, objective, micro_batch=6, checkpointing="none")
        world.run(1, run_once, run_dir=run_dir)
        return run_dir

    return run


@pytest.mark.parametrize("objective", START)
def test_a_run_starts_where_its_adapter_adds_nothing_and_raises_the_held_out_margin(
    alone: Callable[[str], Path], objective: str
) -> None:
    metrics = read_metrics(alone(objective))
    before, after = (line for line in metrics if "eval_loss" in line)
    first, *_, last = (line for line in metrics if "loss" in line)
    if (start := START[objective]) is not None:
        assert [before["eval_loss"], first["loss"]] == pytest.approx([start, start], rel=2e-6)
        assert before["eval_rewards/margins"] == first["rewards/margins"] == 0, "the two models are one"
    assert after["eval_loss"] < before["eval_loss"] - FALL[objective]
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"] + 0.02
    if objective == "kto":
        assert before["eval_kl"] == first["kl"] == 0 < last["kl"]
        assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
        assert 0.4 < first["answers/chosen"] < 0.9
    else:
        assert after["eval_rewards/accuracies"] > 0.6


@pytest.mark.parametrize("objective", START)
@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (2, {"micro_batch": 3, "accumulate": "block"}),
        ci(3, {"micro_batch": 1, "accumulate": "block", "checkpointing": "offload"}),
        ci(2, {"micro_batch": 1}),
    ],
    ids=str,
)
def test_ranks_and_micro_batches_change_nothing(
    world: World,
    folders: Path,
    preferences: Path,
    tmp_path: Path,
    alone: Callable[[str], Path],
    objective: str,
    size: int,
    settings: dict[str, Any],
) -> None:
    """Bytes on the wire are as planned: of DPO those of SFT, of a reward model those without an LM head."""
    config = prepare(tmp_path / "run", folders, preferences, objective, **settings)
    metrics, expected = world.run(size, run_once, run_dir=tmp_path / "run")[0], read_metrics(alone(objective))
    for name in ("loss", "eval_loss"):
        assert_losses_close(*([line[name] for line in lines if name in line] for lines in (metrics, expected)))
    for name in ("kl", "eval_kl", "eval_rewards/margins"):
        found, wanted = ([line[name] for line in lines if name in line] for lines in (metrics, expected))
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6), name
    assert_adapters_close(adapter_of(tmp_path / "run"), adapter_of(alone(objective)))
    planned, of_sft = (traffic_of(config.with_settings(more), world=size) for more in ({}, {"train.objective": "sft"}))
    if objective != "kto":  # Whose mismatched rows depend on the data.
        assert (metrics[-2]["gathered_bytes"], metrics[-2]["reduced_bytes"]) == (planned.gathered, planned.reduced)
    if objective == "reward":
        assert of_sft.gathered - planned.gathered >= 1001 * 96 * 4  # The LM head in fp32, padded to the ranks.


@pytest.mark.parametrize(
    ("size", "settings"), [(2, {"micro_batch": 1}), ci(3, {"micro_batch": 1, "accumulate": "block"})], ids=str
)
def test_a_step_of_kto_carries_what_is_planned(
    world: World, folders: Path, preferences: Path, tmp_path: Path, size: int, settings: dict[str, Any]
) -> None:
    """With an answer in each row, so that there are as many mismatched rows."""
    config = prepare(tmp_path / "run", folders, preferences, "kto", length=24, **settings)
    metrics = world.run(size, run_once, run_dir=tmp_path / "run")[0]
    line = next(line for line in metrics if line.get("step") == 2 and "loss" in line)
    assert line["answers"] == 6, "several answers share a row"
    assert line["gathered_bytes"] == traffic_of(config, world=size).gathered


@pytest.mark.parametrize("objective", [ci("kto"), "reward"])
def test_a_stopped_run_resumes_bit_for_bit(folders: Path, preferences: Path, tmp_path: Path, objective: str) -> None:
    for name in ("whole", "stopped"):
        settings = {"save_every": 1, "max_steps": 3, "micro_batch": 6}
        prepare(tmp_path / name, folders, preferences, objective, **settings)
    run_until(SINGLE, run_dir=tmp_path / "whole", stop_before=None)
    for stop_before in (2, None):
        run_until(SINGLE, run_dir=tmp_path / "stopped", stop_before=stop_before)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_steps_of_a_single_answer_have_no_kl(folders: Path, preferences: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "run", folders, preferences, "kto", length=24, global_batch=1, eval_every=None)
    run_until(SINGLE, run_dir=tmp_path / "run", stop_before=None)
    last = next(line for line in read_metrics(tmp_path / "run") if line.get("step") == 3 and "loss" in line)
    assert (last["answers"], last["kl"]) == (1, 0)
    assert last["loss"] != pytest.approx(0.5, abs=1e-4), "the adapter has moved"
