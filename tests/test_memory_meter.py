"""The memory of a step is what the allocator gave and took, each byte of one kind."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from distlora.architecture.families import read_config
from distlora.architecture.shapes import shapes_of
from distlora.bench.memory import measure_step
from distlora.config import Config
from distlora.parallel import Ranks
from distlora.planner import traffic
from distlora.training.memory_meter import Event, Recorder, StepMemory, account, mark
from small_models import config_with
from worlds import World, start_world

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
    recorder, events = Recorder(device), list[Event]()
    recorder.start()
    yield events
    recorder.stop()
    events += recorder.events()


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


def measured(ranks: Ranks, *, folder: Path, **sections: dict[str, Any]) -> StepMemory:
    return measure_step([config_for(folder, **sections)], ranks)


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_a_rank_holds_and_gathers_is_what_its_tensors_take(world: World, folders: Path, size: int) -> None:
    folder = folders / "llama"
    shapes = shapes_of(read_config(folder), folder / "config.json")
    adapters = sum(each.numel for block in shapes.adapters(config_for(folder).adapter) for each in block)
    matrix = 2 * traffic.padded((shapes.vocabulary, shapes.hidden), size)
    for found in world.run(size, measured, folder=folder):
        held = found.held
        base = sum(held.get(kind, 0) for kind in ("codes", "scales", "weights", "embeddings", "norms"))
        # Beside the parameters there are the offset of each quantized weight and the rotary frequencies.
        assert base - traffic.held_bytes(shapes, size, quantized=True, itemsize=2) == pytest.approx(4 * 21 + 48, abs=48)
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
        found, other = alone.run(2, measured, folder=folders / "llama", parallel={"backend": "zero3"})
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
