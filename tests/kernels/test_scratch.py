"""Dequantized weights: their memory on a GPU, and layers that keep dense copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from distlora.config import UserError
from distlora.config.file import as_mapping, load_config
from distlora.model.adapters import BlockContext
from distlora.model.layer_wrapper import Block
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
    first.dense_dtype = torch.float32
    for once in (len(SHAPES), 0):
        expected, all_weights = gradients_and_dequantizations(monkeypatch, plain)
        actual, count = gradients_and_dequantizations(monkeypatch, model)
        # A layer's last product is not recomputed.
        assert all_weights == (3 * 4 * len(SHAPES) - 4 if checkpointing else 2 * 4 * len(SHAPES))
        assert count == all_weights // 2 + once
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_an_old_setting_is_refused_and_still_read_from_a_run(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"keep_dequantized; quant.dense_layers keeps"):
        make_run(tmp_path / "old", folders, train={"keep_dequantized": True})
    path = tmp_path / "earlier" / "config.yaml"
    config = as_mapping(make_run(path.parent, folders))
    path.write_text(yaml.safe_dump({**config, "train": {**config["train"], "keep_dequantized": True}}))
    assert as_mapping(load_config(path.parent)) == config
