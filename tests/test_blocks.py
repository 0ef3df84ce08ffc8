"""Seam 1: the block wrapper slices what has a batch dimension, refuses what it does not know, and changes no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distlora.model.adapters import BlockContext, Rows, StepRows
from distlora.model.layer_wrapper import Block


class Layer(nn.Module):
    """A decoder layer as transformers calls one; remembers what it was given."""

    attention_type = "full_attention"

    def __init__(self, context: BlockContext) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.context = context
        self.seen: list[dict[str, Any]] = []

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.seen.append({**kwargs, "rows": self.context.rows.adapters, "step_rows": self.context.rows.places})
        cos, _ = kwargs["position_embeddings"]
        return torch.tanh(self.linear(hidden_states)) * cos + kwargs["scale"]


def block_and_inputs(num_micro: int, checkpointing: bool) -> tuple[Block, Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    context = BlockContext()
    block = Block(Layer(context), context)
    block.num_micro, block.checkpointing = num_micro, checkpointing
    kwargs = {
        "attention_mask": None,
        "position_embeddings": (torch.randn(6, 5, 8), torch.randn(1, 5, 8)),
        "use_cache": False,
        "scale": 2.0,
    }
    return block, torch.randn(6, 5, 8, requires_grad=True), kwargs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("num_micro", [2, 3, 6])
def test_slices_give_the_whole_batch_and_its_gradients(num_micro: int, checkpointing: bool) -> None:
    whole, x, kwargs = block_and_inputs(1, False)
    expected = whole(x, **kwargs)
    expected_dx = torch.autograd.grad(expected.square().sum(), x)[0]
    block, x, kwargs = block_and_inputs(num_micro, checkpointing)
    actual = block(x, **kwargs)
    # A CPU's matrix products may sum in another order for another number of rows (Intel with AMX does for one row).
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(actual.square().sum(), x)[0], expected_dx, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_slice_sees_its_own_rows_in_recomputation_too(checkpointing: bool) -> None:
    block, x, kwargs = block_and_inputs(3, checkpointing)
    block.rows = Rows(torch.tensor([0, 1, 2, 3, 4, 5]), StepRows(7, torch.tensor([10, 11, 12, 13, 14, 15])))
    block(x, **kwargs).sum().backward()
    seen = [call["rows"].tolist() for call in block.inner.seen]  # type: ignore[union-attr]
    assert seen[:3] == [[0, 1], [2, 3], [4, 5]]
    assert sorted(seen[3:]) == (sorted(seen[:3]) if checkpointing else [])
    for call in block.inner.seen:  # type: ignore[union-attr]
        assert call["step_rows"].step == 7
        assert call["step_rows"].rows.tolist() == [10 + choice for choice in call["rows"].tolist()]
    shapes = [tuple(t.shape) for t in block.inner.seen[0]["position_embeddings"]]  # type: ignore[index, union-attr]
    assert shapes == [(2, 5, 8), (1, 5, 8)], "what has one row is shared, what has six is cut"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mask", torch.zeros(4, 5), "shape \\(4, 5\\)"),
        ("cache", object(), "object"),
        ("masks", (torch.zeros(2),), "shape \\(2,\\)"),
    ],
)
def test_an_argument_that_may_hide_a_batch_is_refused(name: str, value: Any, message: str) -> None:
    block, x, kwargs = block_and_inputs(3, False)
    with pytest.raises(TypeError, match=f"'{name}'.*{message}"):
        block(x, **kwargs, **{name: value})


def test_a_batch_that_slices_do_not_divide_is_refused() -> None:
    block, x, kwargs = block_and_inputs(4, False)
    with pytest.raises(ValueError, match="6 rows cannot be run in 4 equal slices"):
        block(x, **kwargs)


def test_plain_attributes_of_the_layer_are_reachable_through_the_wrapper() -> None:
    block, _, _ = block_and_inputs(1, False)
    assert block.attention_type == "full_attention"
    with pytest.raises(AttributeError):
        _ = block.no_such_thing
