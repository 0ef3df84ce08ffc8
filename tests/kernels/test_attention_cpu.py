"""CPU attention in bf16, by library products and by attention.cpp, agrees with its contract in fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from distlora.architecture import shapes
from distlora.model import attention
from distlora_kernels import attention as compiled_attention
from distlora_kernels import native, processor
from support import cpu_paths
from support.closeness import assert_close, relative_error
from support.tiers import diagonal

LENGTHS = [[300], [0, 1, 1, 37, 0, 261, 0], [128, 129, 43], [2, 298]]
"""Of documents: one tile and a part, none and one token, a tile to the token and one more."""
HEADS = [(4, 4, 32), (6, 2, 48), (8, 1, 80), (4, 2, 16), (2, 1, 256)]
"""Of queries and of keys, and their size: alone, in groups of three, all on one."""
Attend = Callable[..., Tensor]


@pytest.fixture(params=cpu_paths.each_path())
def cpu_path(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from cpu_paths.used(request.param)


@pytest.fixture(params=[attention.attend_on_cpu, compiled_attention.attend], ids=["products", "compiled"])
def attend(request: pytest.FixtureRequest, compiler: None, cpu_path: str) -> Attend:
    chosen: Attend = request.param
    if chosen is compiled_attention.attend:
        reason = native.unavailable_reason() or compiled_attention.unsupported_reason(1, 16)
        if reason is not None:
            pytest.skip(f"not compiled: {reason}")
    return chosen


def inputs_of(length: int, heads: tuple[int, int, int], *, spread: float = 1.0, seed: int = 0) -> list[Tensor]:
    """query, key, value, and the output's gradient; scores before the scale have this spread times sqrt(E)."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys, size = heads
    query, key, value, gradient = (
        torch.randn(length, number, size, generator=generator) for number in (queries, keys, keys, queries)
    )
    return [(query * spread).bfloat16(), key.bfloat16(), value.bfloat16(), gradient.bfloat16()]


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def results(op: Any, inputs: list[Tensor], bounds: Tensor, left: int | None = None) -> list[Tensor]:
    """Return the output and the gradients of query, key and value."""
    *tensors, gradient = inputs
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = op(*leaves, bounds, int(bounds.diff().max()), leaves[0].shape[-1] ** -0.5, left)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def exact(inputs: list[Tensor], bounds: Tensor, left: int | None = None) -> list[Tensor]:
    def in_fp64(*arguments: Any) -> Tensor:
        *_, size = arguments[0].shape
        outputs = []
        for start, end in itertools.pairwise(bounds.tolist()):
            query, key, value = (tensor[start:end].transpose(0, 1) for tensor in arguments[:3])
            groups = query.shape[0] // key.shape[0]
            key, value = (tensor.repeat_interleave(groups, dim=0) for tensor in (key, value))
            far = torch.arange(end - start)[:, None] - torch.arange(end - start)
            seen = (far >= 0) & (far <= (end if left is None else left))
            scores = (query @ key.transpose(1, 2) * size**-0.5).masked_fill(~seen, -torch.inf)
            outputs.append((torch.softmax(scores, dim=-1) @ value).transpose(0, 1))
        return torch.cat(outputs)

    return results(in_fp64, [tensor.double() for tensor in inputs], bounds, left)


@pytest.mark.parametrize(("heads", "left"), diagonal(HEADS, [None, 0, 63, 200]), ids=str)
def test_it_is_its_contract_to_three_roundings(attend: Attend, heads: tuple[int, int, int], left: int | None) -> None:
    """Weights, product and result are rounded once each; gradients have one more rounding, of the output's gradient."""
    for lengths in LENGTHS:
        inputs, bounds = inputs_of(sum(lengths), heads), bounds_of(lengths)
        actual, expected = results(attend, inputs, bounds, left), exact(inputs, bounds, left)
        for ours, wanted in zip(actual, expected, strict=True):
            if left == 0 and not wanted.any():  # A token that sees itself alone: queries and keys have no gradient.
                assert ours.abs().max() < 1e-2
            else:
                assert_close(ours, wanted, ulps=1.5)


def test_large_scores_are_rounded_less_than_products_round_them(attend: Attend) -> None:
    """Scores reach 50, whose bf16 is 1/8 off: eager attention in bf16 is far off, flash attention is not."""
    heads, bounds = (4, 2, 64), bounds_of([256])
    inputs = inputs_of(256, heads, spread=12)
    expected = exact(inputs, bounds)
    ours, eager = (
        [relative_error(a, e) for a, e in zip(results(op, inputs, bounds), expected, strict=True)]
        for op in (attend, attention.reference)
    )
    assert max(ours) < 1.5 * 2**-8
    assert all(theirs > 2 * error for error, theirs in zip(ours[:3], eager[:3], strict=True))


def test_a_token_that_takes_all_the_weight_leaves_the_others_gradients_right(attend: Attend) -> None:
    """An attention sink leaves the other gradients exact, although D cancels the sink's dO.v up to rounding."""
    heads, bounds = (4, 4, 64), bounds_of([256])
    query, key, value, gradient = inputs_of(256, heads)
    direction = torch.nn.functional.normalize(torch.ones(64), dim=0)
    query = (query.float() + 11 * direction).bfloat16()
    key[0] = (12 * direction).bfloat16()
    inputs = [query, key, value, gradient]

    def flash(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        heads_first = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        return scaled_dot_product_attention(*heads_first, is_causal=True)[0].transpose(0, 1)

    expected = exact(inputs, bounds)
    ours, theirs = results(attend, inputs, bounds), results(flash, inputs, bounds)
    for index in (1, 2):
        assert_close(ours[index], expected[index], ulps=3)
        assert relative_error(theirs[index], expected[index]) > 4 * 3 * 2**-8


@pytest.mark.parametrize("room", [2**20, 12_000])
def test_documents_are_the_same_to_the_bit_wherever_they_are_packed(
    attend: Attend, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """With little memory for scores, long documents have short tiles."""
    monkeypatch.setattr(shapes, "_SCORES", room)
    heads, lengths = (4, 2, 32), [300, 5, 129, 300]
    bounds = bounds_of(lengths)
    inputs = inputs_of(sum(lengths), heads)
    packed = results(attend, inputs, bounds)
    order = [2, 0, 3, 1]
    pieces = [slice(start, end) for start, end in itertools.pairwise(bounds.tolist())]
    moved = [torch.cat([tensor[pieces[index]] for index in order]) for tensor in inputs]
    again = results(attend, moved, bounds_of([lengths[index] for index in order]))
    for first, second in zip(packed, again, strict=True):
        assert torch.equal(torch.cat([first[pieces[index]] for index in order]), second)
    for piece, length in zip(pieces, lengths, strict=True):
        alone = results(attend, [tensor[piece] for tensor in inputs], bounds_of([length]))
        assert all(torch.equal(whole[piece], one) for whole, one in zip(packed, alone, strict=True))


def test_what_is_not_finite_is_seen(attend: Attend) -> None:
    for place in range(3):
        inputs, bounds = inputs_of(40, (2, 1, 32)), bounds_of([40])
        inputs[place][7] = torch.nan
        assert results(attend, inputs, bounds)[0][7].isnan().all()


def test_threads_and_rows_apart_change_nothing(attend: Attend) -> None:
    """Heads of a joined tensor, as some families have them, and as many threads as there are heads."""
    inputs, bounds = inputs_of(210, (4, 2, 32)), bounds_of([150, 60])
    expected = results(attend, inputs, bounds)
    joined = torch.cat([tensor.flatten(1) for tensor in inputs[:3]], dim=1)
    apart = [part.unflatten(1, (-1, 32)) for part in joined.split([128, 64, 64], dim=1)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        actual = results(attend, [*apart, inputs[3]], bounds)
    finally:
        torch.set_num_threads(threads)
    # torch's fp32 product, of a path that widens, sums in another order with more threads.
    exact = attend is compiled_attention.attend or not processor.widens()
    errors = [relative_error(first, second) for first, second in zip(actual, expected, strict=True)]
    assert max(errors) <= (0 if exact else 2**-8)


def test_tiles_cover_what_is_seen_and_little_more() -> None:
    for length, groups, window in ((1, 1, None), (300, 4, None), (2048, 4, None), (2048, 1, 256), (40_000, 8, None)):
        tile = shapes.tile_length(length, groups)
        left = None if window is None else window - 1
        found = list(shapes.tiles(length, tile, left))
        assert [start for start, _, _ in found] == [0, *(end for _, end, _ in found[:-1])]
        assert found[-1][1] == length
        seen = sum(min(at + 1, window or length) for at in range(length))
        computed = shapes.computed_pairs(length, groups, window)
        assert computed == sum((end - start) * (end - key) for start, end, key in found)
        assert seen <= computed <= seen + length * tile
        scores = shapes.scores_at_once(length, groups, 8)
        assert all(groups * (end - start) * (end - key) <= scores for start, end, key in found)
