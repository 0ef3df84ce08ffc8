"""Check MLPs that backward recomputes, whole or in tiles of tokens.

The numbers are the same, and no more than a tile of a row's inner columns is kept.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distlora.model.adapters import StepRows
from distlora.model.build import CausalLM
from distlora.model.experts import place_routers
from distlora.model.mlp import place_mlps
from support.closeness import relative_error
from support.family_models import load_ours, tokens, write_family_folder
from support.tiers import ci

TILE = 24
"""Of 64 tokens: 24, 24 and 16."""
EXPERTS = ["qwen3-moe", "gpt-oss"]
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("llama-biases", "qwen3", "gemma3-text", "mixtral")]
POSITIONS = torch.stack([torch.arange(64), torch.cat([torch.arange(23), torch.arange(41)])]).repeat(2, 1)


def load(folder: Path, name: str, **adapter: object) -> CausalLM:
    write_family_folder(folder, name)
    return load_ours(folder, adapter={"target_modules": "all-linear", "r": 4, **adapter})[0]


def losses_and_gradients(
    model: CausalLM, *, checkpointing: bool = False, num_micro: int = 2, choice: Tensor | None = None
) -> list[Tensor]:
    """Row losses of four rows, then the gradient of each adapter, in training: with dropout, where there is any."""
    model.set_num_micro(num_micro)
    for block in model.blocks:
        block.checkpointing = checkpointing
    input_ids = tokens(4, 64)
    at = StepRows(3, torch.tensor([7, 2, 9, 4]))
    losses = model(input_ids, POSITIONS, input_ids.roll(-1, dims=1), choice, step_rows=at)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [losses.detach(), *torch.autograd.grad(losses.sum() / input_ids.numel(), parameters)]


def set_tile(model: CausalLM, tile: int | None) -> None:
    for block in model.blocks:
        block.inner.mlp.tile = tile


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", ["phi3", "gpt-oss", ci("gemma2"), ci("qwen3-moe"), *MORE])
def test_selective_and_block_and_none_are_equal_bit_for_bit_and_tiles_within_rounding(
    name: str, tmp_path: Path
) -> None:
    dropout = 0.0 if name in (*EXPERTS, "mixtral") else 0.3
    model = load(tmp_path, name, lora_dropout=dropout, use_dora=name == "llama-biases")
    run = functools.partial(losses_and_gradients, model)
    if name in ("phi3", "gpt-oss"):
        run = functools.partial(run, choice=torch.tensor([0, -1, 0, 0]))
    if (experts := model.architecture.kinds[0].experts) is not None:
        model.router_aux_loss = 0.5
        place_routers(model.blocks, [experts.router] * len(model.blocks), experts.chosen)
    names = [model.hf_name(path) for path, _ in model.named_parameters()]
    expected = run()
    assert_equal(run(checkpointing=True), expected)
    place_mlps(model.blocks, model.architecture, tile=None)
    assert sorted(model.hf_name(path) for path, _ in model.named_parameters()) == sorted(names)
    assert_equal(run(), expected)
    assert all(block.context._balance is None for block in model.blocks), "a router's word stands for the next layer's"
    if experts is not None:
        return
    set_tile(model, TILE)
    tiled = run()
    assert_equal(run(checkpointing=True), tiled)
    # Sums over 24 rows at a time, and a norm's two gradients added before the residual's.
    assert relative_error(tiled[0], expected[0]) <= 1e-6
    for actual, gradient in zip(tiled[1:], expected[1:], strict=True):
        assert relative_error(actual, gradient) <= 3e-6
    with torch.no_grad():
        ids = tokens(4, 64)
        set_tile(model, None)
        whole = model(ids, POSITIONS, ids.roll(-1, dims=1))
        set_tile(model, TILE)
        assert relative_error(model(ids, POSITIONS, ids.roll(-1, dims=1)), whole) <= 1e-6
