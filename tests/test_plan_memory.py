"""Memory is calculated from config.json and settings, and is what ranks have: what stays to the byte."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distlora.adapters import adapter_parameters
from distlora.bench.traffic import our_step
from distlora.config import Config
from distlora.config_file import build
from distlora.optim import build_optimizer
from distlora.parallel import Ranks
from distlora.plan.machine import Machine
from distlora.plan.memory import device_bytes
from distlora.plan.model import model_in
from distlora.startup import start_adapters, start_model
from distlora.train import trained_parameters
from worlds import World

LENGTH = 16


def config_of(folder: Path, ranks: int, **sections: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder)},
        "data": {"path": "none.jsonl", "sequence_length": LENGTH},
        "adapter": {"target_modules": "all-linear", "r": 8},
        "quant": {"cache": False},
        "train": {"micro_batch": 2, "global_batch": 2 * ranks},
        "cluster": {"gpus_per_node": ranks},
    }
    values = {name: base.get(name, {}) | sections.get(name, {}) for name in base.keys() | sections.keys()}
    return build(Config, {**values, "run_dir": "none"})


def cpus(ranks: int) -> Machine:
    """CPU processes of one machine."""
    unknown = dict.fromkeys(
        ("card", "usable_bytes", "host_bytes", "flops", "bandwidth", "link", "host_link", "network")
    )
    return Machine(name="CPU", is_gpu=False, ranks=ranks, ranks_per_machine=ranks, **unknown)  # type: ignore[arg-type]


def held_bytes(ranks: Ranks, *, config: Config) -> Counter[str]:
    """What this rank has after a step, each storage once: of the base, of adapters, gradients and the optimizer."""
    model, backend, _ = start_model(config, ranks)
    trained = trained_parameters(model)
    backend.reduce_gradients_of(trained.values(), config.parallel.bucket_mb)
    optimizer = build_optimizer(backend.updated(trained), config.optim)
    start_adapters(model, config, backend, restores=False, say=lambda line: None)
    our_step(model, backend, config, 1)
    optimizer.step(1e-4, torch.ones((), dtype=torch.bool))
    seen: set[int] = set()
    found: Counter[str] = Counter()

    def add(kind: str, tensor: Tensor | None) -> None:
        if tensor is None:
            return
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            found[kind] += storage.nbytes()

    adapters = set(adapter_parameters(model).values())
    for parameter in model.parameters():
        add("adapters" if parameter in adapters else "base", parameter.data)
        add("gradients", parameter.grad)
    for name, buffer in model.named_buffers():
        add("adapters" if name.endswith("row_norms_squared") else "base", buffer)
    for start in (start for block in model.blocks for start in block.started.values()):
        add("adapters", start)
    for state in optimizer.inner.state.values():
        for value in state.values():
            add("optimizer", value if isinstance(value, Tensor) else None)
    return found


NONE = {"method": "none"}
WHOLE = ["embed_tokens", "lm_head"]
CELLS: list[tuple[str, int, dict[str, dict[str, Any]]]] = [
    # (model, ranks, settings). 1,001 rows and 3 blocks of odd shapes are cut unevenly by every number of ranks.
    ("llama", 1, {"adapter": {"use_dora": True, "rank_pattern": {"down_proj": 3}}}),
    ("llama", 2, {"optim": {"name": "adamw_8bit"}, "adapter": {"r": 64}}),
    ("llama", 3, {"quant": NONE, "train": {"dtype": "fp32"}}),
    ("llama-tied", 4, {"parallel": {"shard_degree": 2}}),
    ("llama-tied", 2, {"adapter": {"modules_to_save": WHOLE}}),
    ("llama", 3, {"adapter": {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [6, 7]}}}),
    ("llama", 1, {"quant": NONE, "adapter": {"method": "full"}}),
    ("qwen3", 4, {"quant": NONE, "adapter": {"method": "full"}}),
]


@pytest.mark.parametrize(("model", "size", "settings"), CELLS, ids=str)
def test_what_a_rank_holds_is_calculated_to_the_byte(
    world: World, folders: Path, model: str, size: int, settings: dict[str, dict[str, Any]]
) -> None:
    config = config_of(folders / model, size, **settings)
    plan = device_bytes(config, model_in(folders / model), cpus(size))
    kinds = {"codes": "base", "scales": "base", "weights": "base", "embeddings": "base", "norms": "base"}
    expected: Counter[str] = Counter()
    for kind, nbytes in plan.held.items():
        expected[kinds.get(kind, kind)] += nbytes
    expected["gradients"] += plan.moments["update"].get("gradients", 0)  # Of what is cut, until they are let go.
    most, *others = world.run(size, held_bytes, config=config)
    assert most == expected
    assert all(found <= most for found in others), "the first rank has the most rows of every tensor"
