"""The memory of a step is what the allocator gave and took, each byte of one kind; a run measures one step."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from distlora.architecture.config_checks import read_config
from distlora.architecture.shapes import shapes_of
from distlora.config import Config
from distlora.parallel import Ranks
from distlora.planner.workload import padded
from distlora.training import worker
from distlora.training.memory_meter import Event, StepMemory, account, mark, recorded_events, start_recording
from distlora.training.reporter import Reporter
from support.memory_steps import measure_step
from support.planned import held_bytes
from support.small_models import config_with, make_run, read_metrics
from support.tiers import ci
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


def measured_step_of(ranks: Ranks, *, folder: Path, **sections: dict[str, Any]) -> StepMemory:
    return measure_step([config_for(folder, **sections)], ranks)


@pytest.mark.parametrize("size", [ci(1), ci(2), pytest.param(3, marks=pytest.mark.slow)])
def test_what_a_rank_holds_and_gathers_is_what_its_tensors_take(world: World, folders: Path, size: int) -> None:
    folder = folders / "llama"
    shapes = shapes_of(read_config(folder), folder / "config.json")
    adapters = sum(each.numel for block in shapes.adapters(config_for(folder).adapter) for each in block)
    matrix = 2 * padded((shapes.vocabulary, shapes.hidden), size)
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
            assert found.at_peak["gathered"] == 2 * matrix + 2 * padded((shapes.hidden,), size)


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


def run_and_listen(ranks: Ranks, *, run_dir: Path) -> list[str]:
    """Return the warnings of a run."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "event", lambda self, text: said.append(text))
        worker.run(run_dir, ranks)
    return [line for line in said if line.startswith("WARNING")]


def weights(run_dir: Path) -> dict[str, bytes]:
    """All that a run has saved of what it trained."""
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in sorted(run_dir.rglob("*.safetensors"))}


def compare(world: World, folders: Path, tmp_path: Path, size: int, sections: dict[str, dict[str, Any]]) -> None:
    """Compare a measured run with a plan that keeps nothing, and with a run that is not measured."""
    settings = {"max_steps": 3, "save_every": 2, **sections.get("train", {})}
    for name, measure in (("plain", False), ("measured", True)):
        make_run(tmp_path / name, folders, **{**sections, "train": settings, "plan": {"measure": measure}})
    planned = {"codes": 10**9, "kept": 0}
    record = {"by_kind": planned, "held": planned, "moments": {}, "peak": 10**9, "total": 10**9}
    (tmp_path / "measured" / "plan.json").write_text(json.dumps({"device": record}))
    assert world.run(size, run_and_listen, run_dir=tmp_path / "plain")[0] == []
    warnings = world.run(size, run_and_listen, run_dir=tmp_path / "measured")
    (warning,) = warnings[0]
    assert "less than the 1 GB that were planned" in warning
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
    assert figures["memory/planned"] == 10**9
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
        pytest.param(1, {"train": {"checkpointing": "offload"}}, id="1 rank, offload", marks=pytest.mark.ci),
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
