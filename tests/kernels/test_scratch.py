"""Dequantized weights: their memory on a GPU, and layers that keep dense copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from distlora.config import QuantConfig, UserError
from distlora.config.file import as_mapping, load_config
from distlora.model.adapters import BlockContext
from distlora.model.layer_wrapper import Block
from distlora_kernels import scratch
from distlora_kernels.operands import FrozenWeight
from support.dequantized_layers import SHAPES, Layer
from support.small_models import make_run


def two_blocks(*, checkpointing: bool) -> nn.Sequential:
    blocks = []
    for _ in range(2):
        context = BlockContext()
        block = Block(Layer(context), context)
        block.checkpointing, block.num_micro = checkpointing, 2
        blocks.append(block)
    return nn.Sequential(*blocks)


def gradients_and_dequantizations(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> tuple[list[Tensor], int]:
    """Return the gradients of the input and all adapters, and the number of dequantizations."""
    calls: list[tuple[int, int]] = []
    dense = FrozenWeight.dense

    def counted(self: FrozenWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if self.format is not None:
            calls.append(self.shape)
        return dense(self, dtype, out)

    x = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(7), requires_grad=True)
    with monkeypatch.context() as patch:
        patch.setattr(FrozenWeight, "dense", counted)
        y = model(x)
        adapters = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(y.square().sum(), [x, *adapters])
    return [y.detach(), *gradients], len(calls)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dense_layer_is_dequantized_once_and_computes_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """One of two layers is dense, in two steps of two micro-batches."""
    plain, model = (two_blocks(checkpointing=checkpointing) for _ in range(2))
    first = model.get_submodule("0")
    assert isinstance(first, Block)
    first.dense_dtype = torch.float32
    for once in (len(SHAPES), 0):
        expected, all_weights = gradients_and_dequantizations(monkeypatch, plain)
        actual, count = gradients_and_dequantizations(monkeypatch, model)
        # A layer's last product is not recomputed.
        assert all_weights == (3 * 4 * len(SHAPES) - 4 if checkpointing else 2 * 4 * len(SHAPES))
        assert count == all_weights // 2 + once
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_all_weights_share_one_buffer_which_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_buffers", {})
    cpu = torch.device("cpu")
    scratch.reserve(cpu, 1024)
    reserved = scratch.buffer(cpu).data_ptr()
    for shape, dtype in (((4, 64), torch.float32), ((2, 3), torch.bfloat16)):
        assert scratch._place(shape, dtype, cpu).fill_(1).sum() == shape[0] * shape[1]
        assert scratch._place(shape, dtype, cpu).data_ptr() == reserved
    assert scratch._place((8, 64), torch.float32, cpu).fill_(1).sum() == 512
    assert scratch.buffer(cpu).nbytes == 2048


def test_settings_without_an_effect_are_refused(folders: Path, tmp_path: Path) -> None:
    def refused(match: str, *, quant: dict[str, Any], **sections: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=match):
            make_run(tmp_path / match[:8], folders, quant=quant, **sections)

    refused("dense_layers=2 has no effect with quant=none", quant={"dense_layers": 2, "method": "none"})
    refused("dense_layers=-1 is not a valid number", quant={"dense_layers": -1})
    sharded = {"cluster": {"gpus_per_node": 2}, "parallel": {"backend": "zero3"}}
    refused("dense_layers=2 keeps layers as FSDP2 .* parallel=fsdp2", quant={"dense_layers": 2}, **sharded)
    with pytest.raises(UserError, match=r"keep_dequantized; quant.dense_layers keeps"):
        make_run(tmp_path / "old", folders, train={"keep_dequantized": True})
    path = tmp_path / "earlier" / "config.yaml"
    config = as_mapping(make_run(path.parent, folders))
    path.write_text(yaml.safe_dump({**config, "train": {**config["train"], "keep_dequantized": True}}))
    assert as_mapping(load_config(path.parent)) == config
    with pytest.raises(UserError, match="dense_layers=4 is more than the 3 layers"):
        QuantConfig(dense_layers=4).check_layers(3)
