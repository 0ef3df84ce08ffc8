"""The memory of a step is what the allocator gave and took, each byte of one kind; a run measures one step."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from distlora.architecture.config_checks import read_config
from distlora.architecture.shapes import shapes_of
from distlora.bench.memory import measure_step
from distlora.config import Config, UserError
from distlora.config.training import Cadence
from distlora.parallel import Ranks
from distlora.planner import traffic
from distlora.planner.memory import measured
from distlora.planner.memory.measured import MeasuredRank
from distlora.training import memory_meter, worker
from distlora.training.memory_meter import (
    Event,
    StepMemory,
    account,
    mark,
    measured_step,
    recorded_events,
    start_recording,
)
from distlora.training.reporter import Reporter
from support.planned import held_bytes
from support.small_models import config_with, make_run, read_metrics
from support.worlds import World, start_world

CPU = torch.device("cpu")


def config_for(folder: Path, **sections: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder)},
        "data": {"path": "none", "sequence_length": 64},
        "adapter": {"r": 8, "target_modules": "all-linear"},
        "train": {"global_batch": 12, "micro_batch": 3},
        "quant": {"cache": False},
    }
    return config_with(base, sections)


def taken(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


@contextlib.contextmanager
def recorded(device: torch.device) -> Iterator[list[Event]]:
    """Yield a list that is filled when the block ends."""
    events: list[Event] = []
    recorder = start_recording()
    yield events
    recorder.__exit__(None, None, None)
    events += recorded_events(recorder, device)


def test_each_allocation_of_known_size_is_counted_where_it_is_made_and_while_it_lasts() -> None:
    earlier, moment, kept = taken(50_000), taken(300), {}
    with recorded(CPU) as events:
        mark("start")
        mark("forward")
        kept["activation"] = taken(1_000)
        gathered = taken(0)
        with record_function("FSDP::all_gather (a block)"):
            gathered.untyped_storage().resize_(7_000)  # No operation makes this one.
        of_block = taken(20)
        del of_block
        mark("head")
        logits = taken(400)
        mark("block")
        del logits
        with record_function("FSDP::post_backward_reshard"):
            gathered.untyped_storage().resize_(0)
        gradient = taken(5_000)
        gathered.untyped_storage().resize_(60)
        kept.clear()
        mark("update")
        state = taken(90)
        del gradient
    found = account(events, {(moment.data_ptr(), 300): "optimizer"}, {(state.data_ptr(), 90): "optimizer"})
    # 7000 + 1000 + 20 in forward; then 400 in the place of the 20.
    assert found.part == "head"
    assert found.at_peak == {"kept": 1_000, "gathered": 7_000, "logits": 400}
    assert found.peaks == {"start": 0, "forward": 8_020, "head": 8_400, "block": 8_400, "update": 5_150}
    assert (found.held, found.persistent, found.peak) == ({"optimizer": 300}, 300, 8_700)
    assert found.left == 60
    assert earlier.nbytes == 50_000


def test_what_another_thread_lets_go_of_ends_with_its_collective() -> None:
    with recorded(CPU) as events:
        mark("forward")
        with record_function("FSDP::all_gather (a block)"):
            outputs = [taken(4_000)]
        with record_function("FSDP::all_gather (the next)"):
            outputs.append(taken(3_000))
        mark("head")
        logits = taken(500)
        mark("update")
        thread = threading.Thread(target=outputs.clear)  # As gloo's: nobody sees what it frees.
        thread.start()
        thread.join()
        state = taken(90)
    found = account(events, {}, {(state.data_ptr(), 90): "optimizer"})
    assert found.peaks == {"forward": 4_000, "head": 500, "update": 590}
    assert (found.peak, found.left) == (4_000, 500)
    assert logits.nbytes == 500


def measured_step_of(ranks: Ranks, *, folder: Path, **sections: dict[str, Any]) -> StepMemory:
    return measure_step([config_for(folder, **sections)], ranks)


def test_a_step_of_sampled_answers_is_refused(folders: Path) -> None:
    sections: dict[str, Any] = {"train": {"objective": "grpo", "global_batch": 8}, "data": {"rewards": ["math"]}}
    with pytest.raises(UserError, match=r"train\.objective=grpo trains on answers .*; set train\.objective=sft"):
        measured_step_of(Ranks(0, 1, CPU, None), folder=folders / "llama", rollout={"max_new_tokens": 8}, **sections)


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_a_rank_holds_and_gathers_is_what_its_tensors_take(world: World, folders: Path, size: int) -> None:
    folder = folders / "llama"
    shapes = shapes_of(read_config(folder), folder / "config.json")
    adapters = sum(each.numel for block in shapes.adapters(config_for(folder).adapter) for each in block)
    matrix = 2 * traffic.padded((shapes.vocabulary, shapes.hidden), size)
    for found in world.run(size, measured_step_of, folder=folder):
        held = found.held
        base = sum(held.get(kind, 0) for kind in ("codes", "scales", "weights", "embeddings", "norms"))
        # Beside the parameters there are the offset of each quantized weight and the rotary frequencies.
        assert base - held_bytes(shapes, size, format="nf4", itemsize=2) == pytest.approx(4 * 21 + 48, abs=48)
        assert (held["adapters"], held["gradients"]) == (4 * adapters, 4 * adapters)
        assert held["optimizer"] == pytest.approx(8 * adapters, rel=1e-3)  # A number of steps for each tensor.
        assert found.left == 0
        assert found.peak == sum(found.by_kind.values())
        if size > 1:
            # The head out of its all-gather, and the last norm, which stays gathered.
            assert found.part == "head"
            assert found.at_peak["gathered"] == 2 * matrix + 2 * traffic.padded((shapes.hidden,), size)


@pytest.mark.ci
def test_zero3_is_measured_alike(folders: Path) -> None:
    with start_world(2, regroups=True) as alone:
        found, other = alone.run(2, measured_step_of, folder=folders / "llama", parallel={"backend": "zero3"})
    assert found.held == other.held
    assert found.at_peak["gathered"] > 0
    assert found.left == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: its allocator's events beside its own counters")
def test_on_a_gpu_the_peak_is_what_torch_counts() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    layers = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4))).to(device)

    def step() -> None:
        layers(torch.ones(512, 1024, device=device)).square().sum().backward()
        for parameter in layers.parameters():
            parameter.grad = None

    step()  # Takes the workspaces of the products.
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with recorded(device) as events:
        mark("start")
        step()
    found = account(events, {}, {})
    assert found.peak == torch.cuda.max_memory_allocated(device) - before
    assert found.left == torch.cuda.memory_allocated(device) - before


HELD = {"codes": 500_000_000, "adapters": 100_000_000}


def plan_with(moments: dict[str, dict[str, int]]) -> dict[str, Any]:
    worst = max(moments.values(), key=lambda kinds: sum(kinds.values()))
    by_kind = HELD | worst
    peak = sum(by_kind.values())
    return {"device": {"by_kind": by_kind, "held": HELD, "moments": moments, "peak": peak, "total": peak}}


def rank(part: str, **kinds: int) -> MeasuredRank:
    by_kind: Any = HELD | kinds
    return MeasuredRank(rank=3, peak=sum(by_kind.values()), by_kind=by_kind, part=part)


BLOCK = {"kept": 200_000_000, "working": 150_000_000, "scratch": 50_000_000}
PLAN = plan_with({"block": BLOCK, "head": {"kept": 200_000_000, "logits": 100_000_000}})


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


def test_without_a_plan_there_are_the_measured_figures_alone() -> None:
    peak = rank("block", kept=200_000_000)
    assert measured.warning(peak, {}) is None
    kinds = {"memory/codes": 500_000_000, "memory/adapters": 100_000_000, "memory/kept": 200_000_000}
    assert measured.figures(peak, {}) == {"memory/peak": 800_000_000, **kinds}
    found = measured.figures(peak, PLAN)
    assert found["memory/planned"] == 1_000_000_000
    assert found["memory_planned/working"] == 150_000_000


@pytest.mark.parametrize(
    ("between", "first", "step"),
    [
        ([], 0, 1),
        ([(1, 2)], 0, 1),
        ([(1, 2)], 1, 3),
        ([(1, 2), (1, 3)], 1, 5),
        ([(2, 3), (1, 2)], 2, 7),
        ([(1, 1)], 0, None),
        ([(5, 3)], 0, None),
    ],
)
def test_the_first_step_from_the_second_on_that_follows_a_step_is_measured(
    between: list[tuple[int, int]], first: int, step: int | None
) -> None:
    assert measured_step(first, [Cadence(*each) for each in between]) == step


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
    assert said[0] == ["WARNING: the memory of this step was not measured on rank 1; its log says why"]
    steps = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(steps) == 2
    assert not any("memory/peak" in line for line in steps)


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
    (peak,) = {line["memory/peak"] for line in found if "memory/peak" in line}
    # Progress shows tensors, as the plan counts them, from the measured step on, and nothing where none is measured.
    assert [line.get("peak_memory_bytes") for line in found if "loss" in line][1:] == [peak] * 2
    assert not any("peak_memory_bytes" in line for line in plain)
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
