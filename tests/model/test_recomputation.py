"""Count the products that a recomputation of each kind of layer runs: those whose outputs backward needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distlora.derive.shrink import shrink
from distlora.model.adapters import AdaptedLinear
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import FrozenLinear
from distlora.model.mlp import place_mlps
from distlora.planner.model import model_in
from distlora.planner.speed.timing import step_flops
from distlora.planner.workload import Workload
from support.closeness import relative_error
from support.family_models import config_for, load_ours, positions_of, tokens
from support.model_types import config_of
from support.plan_inputs import cpu_machine
from support.tiers import ci

ROWS, LENGTH, RANK = 2, 16, 4
LAST: dict[str, tuple[str, ...]] = {
    "llama": ("mlp.down_proj",),
    "granite@scaled": ("mlp.down_proj",),
    "phi": ("self_attn.dense", "mlp.fc2"),  # Attention and MLP read the same states: sums alone take both.
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "cohere": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma2": (),  # A norm reads the MLP's output.
    "qwen3_moe": (),  # The gradient of the routers' weights reads the experts' outputs.
    "qwen2_moe": (),  # So does that of the shared expert's gate.
    "glm4_moe": ("mlp.shared_experts.down_proj",),
}
"""Linears of the last kind of layer whose outputs backward does not need."""


def write_model(folder: Path, name: str) -> None:
    import transformers

    config = shrink(config_of(name))
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    hf_config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForCausalLM.from_config(hf_config).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))


class Products(TorchDispatchMode):
    """Count the operations of the products of linears; attention runs others."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            (rows, inner), (_, columns) = args[-2].shape, args[-1].shape
            self.flops += 2 * rows * inner * columns
        return func(*args, **(kwargs or {}))


def counted(model: CausalLM) -> tuple[int, int, list[Tensor]]:
    """Return the operations of the layers' forward and backward, and the gradients of the adapters."""
    ids = tokens(ROWS, LENGTH) % model.embedding.weight.shape[0]
    with Products() as forward:
        states = model.hidden_states(ids, positions_of(ids))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = torch.randn(states.shape, generator=torch.Generator().manual_seed(3))
    with Products() as backward:
        gradients = torch.autograd.grad(states, parameters, gradient)
    return forward.flops, backward.flops, list(gradients)


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("llama", {}),
        ("llama", {"target_modules": "qv"}),
        ("llama", {"use_dora": True}),
        ci("granite@scaled", {}),
        ("phi", {}),
        ("phi", {"target_modules": "mlp"}),
        ci("falcon", {}),
        ci("gpt_neox", {}),
        ci("cohere", {}),
        ("gemma2", {}),
        ("qwen3_moe", {}),
        ci("qwen2_moe", {}),
        ("glm4_moe", {}),
    ],
)
def test_recomputation_runs_no_product_whose_output_nobody_reads(
    name: str, adapter: dict[str, Any], tmp_path: Path
) -> None:
    write_model(tmp_path, name)
    sections = {"adapter": {"target_modules": "all-linear", "r": RANK, **adapter}, "quant": {"method": "none"}}
    model, _ = load_ours(tmp_path, **sections)
    architecture, planned = model.architecture, model_in(tmp_path)
    assert architecture.kinds[-1].unread == LAST[name]
    assert name != "falcon" or architecture.kinds[-1].mlp is None, "the norm before its MLP is attention's too"
    for block in model.blocks:
        block.checkpointing = False
    of_forward, of_backward, expected = counted(model)
    for mode in ("block", "selective", "tiles"):
        train = {"global_batch": ROWS, "dtype": "fp32", "checkpointing": mode.replace("tiles", "block")}
        work = Workload.of(config_for(tmp_path, **sections, train=train, data={"path": "-", "sequence_length": LENGTH}))
        if mode != "block":
            if any(kind.mlp is None for kind in architecture.kinds) or (mode == "tiles" and architecture.has_experts):
                continue
            if mode == "selective":
                place_mlps(model.blocks, architecture, tile=None)
            for block in model.blocks:
                mlp = block.inner.get_submodule(architecture.kinds[0].mlp[0])  # type: ignore[index]
                mlp.tile = LENGTH // 2 if mode == "tiles" else None
        for block in model.blocks:
            block.checkpointing = mode != "selective"
        _, with_recomputation, gradients = counted(model)
        if mode != "tiles":
            assert all(map(torch.equal, gradients, expected))
        assert max(map(relative_error, gradients, expected)) <= 1e-5
        again, flops = with_recomputation - of_backward, step_flops(work, planned, cpu_machine(1)).by_kind
        of_linears = flops["recomputation"]
        if adapter.get("use_dora"):
            assert mode != "block" or again == of_forward
        elif not architecture.has_experts:
            assert again == of_linears
        elif mode == "block":  # With the routers.
            linears = [m for m in model.modules() if isinstance(m, FrozenLinear) and m.unread is not None]
            ranks = [RANK if isinstance(linear, AdaptedLinear) else 0 for linear in linears]
            weights = sum(each.numel + rank * each.out_features for each, rank in zip(linears, ranks, strict=True))
            assert of_forward - again == 2 * ROWS * LENGTH * weights
            assert again - of_linears == of_forward - flops["forward"] - flops["adapters"] // 3
