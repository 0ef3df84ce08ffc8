"""Compare a plan's host memory and disk sizes with the code that allocates and writes them.

Folders of whole runs are compared where the runs are: tests/support/planned.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distlora.config import Config
from distlora.loading.peft_format import adapter_tensors
from distlora.parallel import Shards, zero3
from distlora.planner import plan_of
from distlora.planner.model import model_in
from distlora.planner.storage import trained_tensors
from distlora.planner.workload import Workload
from distlora.system import host_memory
from distlora.training.setup import require_offload_memory
from support.plan_inputs import cpu_machine, model_of
from support.runs import build_run_model
from support.small_models import config_with

ALL: dict[str, Any] = {"target_modules": "all-linear", "r": 4}


def config_of(folder: Path, **sections: dict[str, Any]) -> Config:
    base: dict[str, Any] = {
        "model": {"path": str(folder)},
        "data": {"path": "none.jsonl", "sequence_length": 64},
        "adapter": ALL,
    }
    return config_with(base, sections)


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        ("llama", ALL | {"use_dora": True}),
        ("llama-tied", ALL | {"trainable_token_indices": [5, 7]}),
        ("llama-tied", ALL | {"modules_to_save": ["lm_head"]}),
        ("qwen3", {"target_modules": "qv", "rank_pattern": {"v_proj": 2}, "r": 8}),
        ("mixtral", ALL),
        ("llama-tied", {"method": "full"}),
    ],
)
def test_what_is_trained_has_the_names_and_shapes_of_its_file(
    folders: Path, model: str, adapter: dict[str, Any]
) -> None:
    full = adapter.get("method") == "full"
    config = config_of(folders / model, adapter=adapter, quant={"method": "none"} if full else {})
    planned = trained_tensors(Workload.of(config), model_in(folders / model).shapes)
    built = build_run_model(config)
    saved = built.hf_state_dict() if full else adapter_tensors(built)
    assert {tensor.name: tensor.shape for tensor in planned} == {name: tuple(p.shape) for name, p in saved.items()}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("method", ["nf4", "none"])
def test_an_offloaded_base_is_what_zero3_takes(folders: Path, ranks: int, method: str) -> None:
    parallel = {"backend": "zero3", "offload_base": True}
    config = config_of(folders / "qwen3", parallel=parallel, quant={"method": method})
    # Where the CPU is the device, it counts as what that has.
    plan = plan_of(config, model_in(folders / "qwen3"), replace(cpu_machine(ranks), is_gpu=True))
    assert plan.host.base == zero3.host_bytes(build_run_model(config), Shards(0, ranks, None))


def test_offloaded_inputs_are_what_a_start_reserves(folders: Path) -> None:
    train = {"checkpointing": "offload", "accumulate": "block", "global_batch": 12, "micro_batch": 3}
    config = config_of(folders / "llama", train=train)
    plan = plan_of(config, model_in(folders / "llama"), cpu_machine(2))
    backend: Any = SimpleNamespace(ranks=SimpleNamespace(world=2), require_host_memory=lambda *_: None)
    length = config.data.sequence_length
    count, nbytes = require_offload_memory(build_run_model(config), config.spec, config.train, length, backend)
    assert count == 3 * 2
    assert plan.host.inputs == host_memory.bytes_of([nbytes] * count)


@pytest.mark.parametrize("adapter", [ALL | {"r": 8192}, ALL | {"r": 4096, "modules_to_save": ["lm_head"]}])
def test_copies_of_a_save_take_what_a_snapshot_takes(folders: Path, adapter: dict[str, Any]) -> None:
    """On rank 0 of one process, where nothing is cut: A and B, then of each its step and two moments."""
    config = config_of(folders / "llama", adapter=adapter)
    own = list(adapter_tensors(build_run_model(config)).values())
    moments = [tensor for p in own for tensor in (torch.empty((), device="meta"), p, p)]
    plan = plan_of(config, model_in(folders / "llama"), cpu_machine(1))
    assert plan.host.copies == host_memory.bytes_like([*own, *moments]) > 2 * host_memory.CHUNK_BYTES


@pytest.mark.parametrize(("init", "measured"), [("pissa", 562), ("pissa_niter_4", 84), ("kaiming", 0)])
def test_loading_has_room_for_a_decomposition(init: str, measured: int) -> None:
    """As measured of a weight of 4096 x 14336, MiB over the weight itself (docs/benchmarks.md)."""
    config = config_of(Path("8B"), adapter=ALL | {"r": 16, "init": init})
    model = model_of("8b")
    plain = plan_of(config_of(Path("8B")), model, cpu_machine(16)).host.loading
    planned = plan_of(config, model, cpu_machine(16)).host.loading
    if measured:
        assert measured * 2**20 <= planned - 2 * 4096 * 14_336 <= 1.3 * measured * 2**20
    else:
        assert planned == plain
