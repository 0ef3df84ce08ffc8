"""A checkpoint loaded into a rank's shard, and the rows that it should hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from distlora.model.build import CausalLM
from distlora.parallel import Backend, Ranks
from distlora.training.setup import start_run_model
from distlora_kernels.formats import nf4
from support.family_models import SINGLE, config_for


def loaded(folder: Path, ranks: Ranks = SINGLE, **sections: dict[str, Any]) -> tuple[CausalLM, Backend]:
    model, backend, _ = start_run_model(config_for(folder, **sections), ranks)
    return model, backend


def own_rows(ranks: Ranks, *, folder: Path, **sections: dict[str, Any]) -> dict[str, tuple[Tensor, int]]:
    """Return this rank's rows of each parameter of the base and the first row's index; buffers whole."""
    model, backend = loaded(folder, ranks, **sections)
    rows: dict[str, tuple[Tensor, int]] = {}
    for name, parameter in model.named_parameters():
        if ".adapters." not in name:
            local, first = backend.local_rows(parameter)
            rows[model.hf_name(name)] = (local.clone(), first)
    for name, buffer in model.named_buffers():
        if name.endswith(".offset"):
            rows[model.hf_name(name)] = (buffer.clone(), 0)
    return rows


def check_slices(by_rank: list[dict[str, tuple[Tensor, int]]], folder: Path) -> None:
    """Check that the `own_rows` of all ranks together are the quantization of the whole weights in `folder`."""
    source, size = safetensors.torch.load_file(folder / "model.safetensors"), len(by_rank)
    for name, weight in source.items():
        if name.endswith("_proj.weight"):
            expected = dict(zip(("codes", "scales", "group_scale", "offset"), nf4.nf4_quantize(weight), strict=True))
            expected = {name.replace("weight", part): tensor for part, tensor in expected.items()}
        else:
            expected = {name: weight}
        for part, tensor in expected.items():
            rows = [ranks_rows[part] for ranks_rows in by_rank]
            if tensor.dim() == 0:
                assert all(torch.equal(local, tensor) for local, _ in rows), part
                continue
            assert torch.equal(torch.cat([local for local, _ in rows]), tensor), part
            assert [first for _, first in rows] == [min(r * -(-len(tensor) // size), len(tensor)) for r in range(size)]
