"""A run measures one step: no bit changes, the figures stand beside the plan's, a miss is said by its kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distlora.config import TrainConfig, UserError
from distlora.parallel import Ranks
from distlora.planner.memory import measured
from distlora.planner.memory.measured import MeasuredRank
from distlora.training import memory_meter, worker
from distlora.training.loop import Trainer
from distlora.training.memory_meter import measured_step
from distlora.training.reporter import Reporter
from distlora.training.trial import Trial
from small_models import make_run, read_metrics
from worlds import World, start_world

HELD = {"codes": 500_000_000, "adapters": 100_000_000}


def plan(moments: dict[str, dict[str, int]]) -> dict[str, Any]:
    worst = max(moments.values(), key=lambda kinds: sum(kinds.values()))
    by_kind = HELD | worst
    peak = sum(by_kind.values())
    return {"device": {"by_kind": by_kind, "held": HELD, "moments": moments, "peak": peak, "total": peak}}


def rank(part: str, **kinds: int) -> MeasuredRank:
    by_kind: Any = HELD | kinds
    return MeasuredRank(rank=3, peak=sum(by_kind.values()), by_kind=by_kind, part=part)


BLOCK = {"kept": 200_000_000, "working": 150_000_000, "scratch": 50_000_000}
PLAN = plan({"block": BLOCK, "head": {"kept": 200_000_000, "logits": 100_000_000}})


def test_a_peak_within_5_percent_is_no_miss_and_a_kind_that_makes_it_one_is_named() -> None:
    assert measured.warning(rank("block", **BLOCK), PLAN) is None
    assert measured.warning(rank("block", **BLOCK | {"kept": 249_000_000}), PLAN) is None
    assert measured.warning(rank("block", **BLOCK | {"kept": 300_000_000}), PLAN) == (
        "WARNING: a step took 1.1 GB at its peak on rank 3, 9.1% more than the 1 GB that were planned; most of it is "
        "kept: 300 MB measured, 200 MB planned"
    )
    # Scratch and what a block works with are one in a measurement; the codes are not what is off.
    less = measured.warning(rank("block", kept=190_000_000, working=120_000_000), PLAN)
    assert less is not None
    assert "9.9% less" in less
    assert less.endswith("most of it is working, logits, scratch, gradients: 120 MB measured, 200 MB planned")


def test_kinds_are_held_to_those_of_the_moment_that_was_the_peak() -> None:
    said = measured.warning(rank("head", kept=200_000_000, logits=500_000_000), PLAN)
    assert said is not None
    assert said.endswith("working, logits, scratch, gradients: 500 MB measured, 100 MB planned")
    # There the plan has no moment: what it has at its own peak.
    said = measured.warning(rank("forward", gathered=700_000_000), PLAN)
    assert said is not None
    assert said.endswith("most of it is gathered, communication: 700 MB measured, 0 B planned")


def test_what_a_plan_took_for_granted_of_a_gpu_it_did_not_know_is_no_miss() -> None:
    off = rank("block", **BLOCK | {"kept": 300_000_000})
    for machine, warns in (
        ({"is_gpu": True, "gpu": None}, False),
        ({"is_gpu": True, "gpu": "h100"}, True),
        ({"is_gpu": False, "gpu": None}, True),
    ):
        record = PLAN | {"machine": machine}
        assert (measured.warning(off, record) is not None) == warns
        assert measured.figures(off, record)["memory/planned"] == 1_000_000_000


def test_a_plan_whose_peak_is_before_the_first_step_is_held_to_its_steps() -> None:
    loading = plan({"block": BLOCK, "loading": {"working": 900_000_000}})
    assert measured.warning(rank("block", **BLOCK), loading) is None
    assert measured.figures(rank("block", **BLOCK), loading)["memory/planned"] == 1_000_000_000


def test_without_a_plan_there_are_the_measured_figures_alone() -> None:
    peak = rank("block", kept=200_000_000)
    assert measured.warning(peak, {}) is None
    kinds = {"memory/codes": 500_000_000, "memory/adapters": 100_000_000, "memory/kept": 200_000_000}
    assert measured.figures(peak, {}) == {"memory/peak": 800_000_000, **kinds}
    found = measured.figures(peak, PLAN)
    assert found["memory/planned"] == 1_000_000_000
    assert found["memory_planned/working"] == 150_000_000


@pytest.mark.parametrize(
    ("settings", "first", "step"),
    [
        ({}, 0, 1),
        ({"eval_every": 2}, 0, 1),
        ({"eval_every": 2}, 1, 3),
        ({"eval_every": 2, "sample_every": 3, "sample_prompts": ("a",)}, 1, 5),
        ({"eval_every": 1}, 0, None),
        ({"sample_every": 1, "sample_prompts": ("a",)}, 0, None),
    ],
)
def test_the_first_step_from_the_second_on_that_follows_a_step_is_measured(
    settings: dict[str, Any], first: int, step: int | None
) -> None:
    assert measured_step(first, TrainConfig(**settings)) == step


def test_a_damaged_plan_is_refused_before_a_model_is_loaded(folders: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", folders, plan={"measure": True})
    (tmp_path / "run" / "plan.json").write_text('{"device": {"peak": "much"}}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "start_run_model", None)
        with pytest.raises(UserError, match=r"plan\.json"):
            worker.run(tmp_path / "run", Ranks(0, 1, torch.device("cpu"), None))


def run_and_listen(ranks: Ranks, *, run_dir: Path) -> list[str]:
    """Return the warnings of a run."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "event", lambda self, text: said.append(text))
        worker.run(run_dir, ranks)
    return [line for line in said if line.startswith("WARNING")]


def run_with_a_broken_instrument(ranks: Ranks, *, run_dir: Path, broken: str) -> list[str]:
    def fail(*given: object, **named: object) -> None:
        raise RuntimeError("no events")

    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == 1:
            patch.setattr(memory_meter, broken, fail)
        return run_and_listen(ranks, run_dir=run_dir)


@pytest.mark.parametrize("broken", ["account", pytest.param("profile", marks=pytest.mark.slow)])
def test_a_measurement_that_fails_on_a_rank_is_said_and_the_run_goes_on(
    world: World, folders: Path, tmp_path: Path, broken: str
) -> None:
    make_run(tmp_path / "run", folders, train={"max_steps": 2}, plan={"measure": True})
    said = world.run(2, run_with_a_broken_instrument, run_dir=tmp_path / "run", broken=broken)
    reason = "WARNING: what memory this step took was not measured on rank 1: RuntimeError: no events"
    assert said[0] == [reason]
    steps = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(steps) == 2
    assert not any("memory/peak" in line for line in steps)


def test_a_fault_of_the_step_that_is_measured_is_the_runs(folders: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", folders, train={"max_steps": 2}, plan={"measure": True})
    whole = Trainer._train_step

    def fail(self: Trainer, trials: Sequence[Trial]) -> None:
        whole(self, trials)
        if trials[0].done == 2:
            raise RuntimeError("of the step")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", fail)
        with pytest.raises(RuntimeError, match="of the step"):
            worker.run(tmp_path / "run", Ranks(0, 1, torch.device("cpu"), None))


def weights(run_dir: Path) -> dict[str, bytes]:
    """All that a run has saved of what it trained."""
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in sorted(run_dir.rglob("*.safetensors"))}


def compare(world: World, folders: Path, tmp_path: Path, size: int, sections: dict[str, dict[str, Any]]) -> None:
    """Compare a measured run with a plan that keeps nothing, and with a run that is not measured."""
    settings = {"max_steps": 3, "save_every": 2, **sections.get("train", {})}
    for name, measure in (("plain", False), ("measured", True)):
        make_run(tmp_path / name, folders, **{**sections, "train": settings, "plan": {"measure": measure}})
    planned = {"codes": 10**6, "kept": 0}
    record = {"by_kind": planned, "held": planned, "moments": {}, "peak": 10**6, "total": 10**6}
    (tmp_path / "measured" / "plan.json").write_text(json.dumps({"device": record}))
    assert world.run(size, run_and_listen, run_dir=tmp_path / "plain")[0] == []
    warnings = world.run(size, run_and_listen, run_dir=tmp_path / "measured")
    (warning,) = warnings[0]
    assert "than the 1 MB that were planned" in warning
    assert weights(tmp_path / "plain") == weights(tmp_path / "measured")
    plain, found = read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "measured")
    # What is measured takes longer than other steps, whose speed is said.
    assert [("tokens_per_second" in line, "memory/peak" in line) for line in found if "loss" in line].count(
        (False, True)
    ) == 1
    for line in (*plain, *found):
        line.pop("time"), line.pop("tokens_per_second", None), line.pop("peak_memory_bytes", None)
    memory = [{name: line.pop(name) for name in list(line) if name.startswith("memory")} for line in found]
    assert plain == found
    (figures,) = [each for each in memory if each]
    assert figures["memory/planned"] == 10**6
    kinds = {name: nbytes for name, nbytes in figures.items() if name.startswith("memory/")}
    assert sum(kinds.values()) - kinds["memory/planned"] == 2 * figures["memory/peak"]
    summary = json.loads((tmp_path / "measured" / "summary.json").read_text())
    assert figures.items() <= summary.items()
    # Nor is it among those whose time is the run's.
    timed = [
        json.loads((tmp_path / name / "checkpoints" / "step_00000003" / "state.json").read_text())["progress"]["tokens"]
        for name in ("plain", "measured")
    ]
    assert 2 * timed[0] == 3 * timed[1]


@pytest.mark.parametrize(
    ("size", "sections"),
    [
        pytest.param(1, {"train": {"checkpointing": "offload"}}, id="1 rank, offload"),
        pytest.param(2, {"train": {"accumulate": "block"}}, id="2 ranks, accumulate=block"),
        pytest.param(2, {"parallel": {"resident_blocks": "auto"}}, id="resident", marks=pytest.mark.slow),
        pytest.param(
            3,
            {"adapter": {"method": "full", "target_modules": "attention"}, "quant": {"method": "none"}},
            id="full",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_is_measured_is_bit_for_bit_the_one_that_is_not(
    world: World, folders: Path, tmp_path: Path, size: int, sections: dict[str, dict[str, Any]]
) -> None:
    compare(world, folders, tmp_path, size, sections)


@pytest.mark.slow
def test_zero3_measured_is_bit_for_bit_zero3(folders: Path, tmp_path: Path) -> None:
    with start_world(2, regroups=True) as alone:
        compare(alone, folders, tmp_path, 2, {"parallel": {"backend": "zero3"}})


@pytest.mark.slow
def test_dpo_and_a_resume_are_measured_too(world: World, folders: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    sections: dict[str, Any] = {
        "data": {"path": str(tmp_path / "pairs.jsonl")},
        "train": {"objective": "dpo", "save_every": 1, "keep": 3, "global_batch": 4, "micro_batch": 2},
    }
    compare(world, folders, tmp_path, 2, sections)
    trained = weights(tmp_path / "measured")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "measured" / "checkpoints" / f"step_{step:08d}")
    (tmp_path / "measured" / "plan.json").unlink()
    assert world.run(2, run_and_listen, run_dir=tmp_path / "measured")[0] == []
    assert weights(tmp_path / "measured") == trained
    lines = [line for line in read_metrics(tmp_path / "measured") if "memory/peak" in line]
    assert [line["step"] for line in lines] == [3], "steps 2 and 3 were done again"
    assert "memory/planned" not in lines[0]
