"""Dequantized weights: their memory on a GPU, and keeping them from recomputation to backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from distlora.config import AdapterConfig, QuantConfig, UserError
from distlora.config.file import as_mapping, load_config
from distlora.model.adapters import AdaptedLinear, BlockContext
from distlora.model.frozen_linear import FrozenLinear, link_shared_inputs
from distlora.model.layer_wrapper import Block
from distlora_kernels import nf4, scratch
from distlora_kernels.operands import FrozenWeight
from small_models import make_run

SHAPES = {"q_proj": (64, 64), "k_proj": (32, 64), "o_proj": (64, 64)}


class Layer(nn.Module):
    """Two projections of one input and one of their output, quantized."""

    def __init__(self, context: BlockContext) -> None:
        super().__init__()
        for index, (name, (out, features)) in enumerate(SHAPES.items()):
            linear = AdaptedLinear(features, out, bias=False, quantized=True, dtype=torch.float32, context=context)
            linear.add_adapter("default", AdapterConfig(r=4), path=name, seed=0)
            generator = torch.Generator().manual_seed(index)
            parts = nf4.nf4_quantize(torch.randn(out, features, generator=generator) / 8)
            for part, value in zip(("codes", "scales", "group_scale"), parts, strict=False):
                setattr(linear, part, nn.Parameter(value, requires_grad=False))
            linear.offset = parts[3]
            for pair in linear.pairs:
                pair.A = nn.Parameter(torch.randn(4, features, generator=generator))
                pair.B = nn.Parameter(torch.randn(out, 4, generator=generator))
            self.add_module(name, linear)
        link_shared_inputs({name: m for name, m in self.named_children() if isinstance(m, FrozenLinear)})

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k = self.q_proj(hidden_states), self.k_proj(hidden_states)
        return hidden_states + self.o_proj(torch.tanh(q * torch.cat((k, k), dim=-1)))


def two_blocks(*, checkpointing: bool, keep: bool, num_micro: int = 1) -> nn.Sequential:
    blocks = []
    for _ in range(2):
        context = BlockContext()
        block = Block(Layer(context), context)
        block.checkpointing, block.keep_dequantized, block.num_micro = checkpointing, keep, num_micro
        blocks.append(block)
    return nn.Sequential(*blocks)


def gradients_and_dequantizations(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> tuple[list[Tensor], int]:
    """Return the gradients of the input and all adapters, and the number of dequantizations."""
    calls: list[tuple[int, int]] = []
    dense = FrozenWeight.dense

    def counted(self: FrozenWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if self.quantized:
            calls.append(self.shape)
        return dense(self, dtype, out)

    x = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(7), requires_grad=True)
    with monkeypatch.context() as patch:
        patch.setattr(FrozenWeight, "dense", counted)
        y = model(x)
        adapters = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(y.square().sum(), [x, *adapters])
    return [y.detach(), *gradients], len(calls)


@pytest.mark.parametrize("num_micro", [1, 2])
def test_kept_weights_are_dequantized_twice_a_step_instead_of_three_times(
    monkeypatch: pytest.MonkeyPatch, num_micro: int
) -> None:
    expected, without = gradients_and_dequantizations(
        monkeypatch, two_blocks(checkpointing=True, keep=False, num_micro=num_micro)
    )
    actual, kept = gradients_and_dequantizations(
        monkeypatch, two_blocks(checkpointing=True, keep=True, num_micro=num_micro)
    )
    weights = 2 * len(SHAPES) * num_micro
    # A layer's last product is not recomputed, unless its weight is kept.
    assert (without, kept) == (3 * weights - 2 * num_micro, 2 * weights)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dense_layer_is_dequantized_once_and_computes_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """One of two layers is dense, in two steps of two micro-batches."""
    plain, model = (two_blocks(checkpointing=checkpointing, keep=False, num_micro=2) for _ in range(2))
    first = model.get_submodule("0")
    assert isinstance(first, Block)
    first.dense_dtype = torch.float32
    for once in (len(SHAPES), 0):
        expected, all_weights = gradients_and_dequantizations(monkeypatch, plain)
        actual, count = gradients_and_dequantizations(monkeypatch, model)
        assert all_weights >= 2 * 2 * 2 * len(SHAPES)
        assert count == all_weights // 2 + once
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("reserved", [pytest.param(False, marks=pytest.mark.ci), True])
def test_weights_kept_in_an_arena_are_those_of_backward(triton_device: torch.device, reserved: bool) -> None:
    """Each weight of a layer keeps its place from recomputation on, also when the arena grows."""
    x = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(7)).to(triton_device).requires_grad_()
    results = []
    for keep in (False, True):
        scratch.reserve(triton_device, largest=0, block=scratch.block_bytes([*SHAPES.values()], x.dtype) * reserved)
        place = scratch.arena(triton_device).kept.data_ptr()
        model = two_blocks(checkpointing=True, keep=keep).to(triton_device)
        y = model(x)
        adapters = [p for p in model.parameters() if p.requires_grad]
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *adapters])])
        if keep:
            assert scratch.arena(triton_device).kept_bytes == scratch.block_bytes([*SHAPES.values()], x.dtype)
            assert (scratch.arena(triton_device).kept.data_ptr() == place) == reserved
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_nothing_dequantized_outlives_its_block() -> None:
    """Without a checkpoint nothing is kept, and with one what is saved in forward is dropped."""
    for checkpointing in (False, True):
        saved: list[Tensor] = []
        model = two_blocks(checkpointing=checkpointing, keep=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            model(torch.randn(4, 5, 64, requires_grad=True))
        assert not [t for t in saved if tuple(t.shape) in SHAPES.values() and t.dtype == torch.float32]


def test_an_arena_reuses_one_place_and_keeps_a_blocks_weights_apart() -> None:
    own = scratch.Arena(torch.device("cpu"))
    first, second = own.take_one((8, 64), torch.float32), own.take_one((4, 64), torch.bfloat16)
    assert first.data_ptr() == second.data_ptr()
    own.kept = torch.empty(4096, dtype=torch.uint8)
    own.start_keeping()
    kept = [own.take_kept((3, 5), torch.bfloat16), own.take_kept((7, 64), torch.bfloat16)]
    assert kept[1].data_ptr() - kept[0].data_ptr() == 512
    assert own.kept.data_ptr() != own.one.data_ptr()
    before = own.take_kept((1, 1), torch.float32).data_ptr()
    own.start_keeping()
    assert own.take_kept((3, 5), torch.bfloat16).data_ptr() < before
    assert own.take_kept((64, 64), torch.float32).fill_(1.0).sum() == 4096, "grows beyond what was reserved"
    assert scratch.block_bytes([(3, 5), (7, 64)], torch.bfloat16) == 512 + 1024


def test_settings_without_an_effect_are_refused(folders: Path, tmp_path: Path) -> None:
    def refused(match: str, *, quant: dict[str, Any], **sections: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=match):
            make_run(tmp_path / match[:8], folders, quant=quant, **sections)

    refused(
        "recomputed has no effect with train.checkpointing=none",
        quant={"dense_layers": "recomputed"},
        train={"checkpointing": "none"},
    )
    refused("dense_layers=2 has no effect with quant=none", quant={"dense_layers": 2, "method": "none"})
    refused("dense_layers=-1 is not a valid number", quant={"dense_layers": -1})
    sharded = {"cluster": {"gpus_per_node": 2}, "parallel": {"backend": "zero3"}}
    refused("dense_layers=2 keeps layers as FSDP2 .* parallel=fsdp2", quant={"dense_layers": 2}, **sharded)
    with pytest.raises(UserError, match=r"keep_dequantized; write quant.dense_layers=recomputed"):
        make_run(tmp_path / "old", folders, train={"keep_dequantized": True})
    path = tmp_path / "earlier" / "config.yaml"
    config = as_mapping(make_run(path.parent, folders))
    for kept, value in ((True, "recomputed"), (False, 0)):
        path.write_text(yaml.safe_dump({**config, "train": {**config["train"], "keep_dequantized": kept}}))
        assert load_config(path.parent).quant.dense_layers == value
    with pytest.raises(UserError, match="dense_layers=4 is more than the 3 layers"):
        QuantConfig(dense_layers=4).check_layers(3)
