"""Keep the keys and values of many rows in blocks of tokens, and attend to them (PagedAttention, arXiv:2309.06180).

transformers' attention modules hand their new keys and values to `update` and then call the attention function, which
here reads the blocks. A forward either starts rows (their prompts, padded on the right) or continues each by one token.

Letters: N rows, T tokens of a forward, H query heads, K key and value heads, E head size, S tokens per block, L tokens
that the longest row sees.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlora.model.batch_invariant import attend_rows
from distlora.system.transfer import to_device
from distlora_kernels.dispatch import uses_triton
from distlora_kernels.paged_attention import attend_blocks, attend_places, seen_places

if TYPE_CHECKING:
    from transformers import Cache

NAME = "distlora_paged"
"""Name of the attention function in transformers' AttentionInterface."""
BLOCK = 16
"""Tokens per block."""


def cache_name(decoder: nn.Module) -> str:
    """Return a decoder's keyword for its cache: transformers has been renaming past_key_values since 5.2x."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


@dataclass(frozen=True, slots=True)
class CacheStep:
    """Places in the cache of one forward."""

    places: Tensor
    """(W,) int64: block * BLOCK + token, where each new token is written."""
    sources: Tensor
    """(W,) int64: the new tokens' positions in the flattened rows (N T); padding is left out."""
    tables: Tensor | None = None
    """(N, blocks) int64: blocks of each row; None: the rows start with this forward."""
    lengths: Tensor | None = None
    """(N,) int64: tokens that each row sees, the new one included."""
    longest: int = 0
    """The largest of `lengths`; the host knows it."""


class PagedCache:
    """Blocks of keys and values of all layers, with the attention function that reads them."""

    def __init__(self, num_blocks: int, *, batch_invariant: bool = False) -> None:
        """Hold this many blocks. `batch_invariant`: attend as training does then (batch_invariant.py)."""
        self.num_blocks, self._batch_invariant = num_blocks, batch_invariant
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values (blocks S, K, E) by layer, allocated at the first update."""
        self._step: CacheStep | None = None
        self._seen: dict[int | None, tuple[Tensor, Tensor]] = {}
        """Places of the rows' keys by window: once per step, not per layer (`seen_places`)."""
        self._pending: tuple[int, Tensor] | None = None

    def resize(self, num_blocks: int) -> None:
        """Hold this many blocks from here on; what was written is lost."""
        self.num_blocks = num_blocks
        self._layers.clear()

    @contextlib.contextmanager
    def step(self, step: CacheStep) -> Iterator[None]:
        """Use these places within this context, in which the decoder runs once."""
        self._step = step
        try:
            yield
        finally:
            self._step = self._pending = None
            self._seen.clear()

    @contextlib.contextmanager
    def attending(self, decoder: Any) -> Iterator[None]:
        """Have the decoder's attention modules use this cache's attention function within this context."""
        from transformers import AttentionInterface

        before = decoder.config._attn_implementation
        # Without a mask function of this name transformers makes no masks.
        AttentionInterface.register(NAME, self.attend)
        decoder.set_attn_implementation(NAME)
        try:
            yield
        finally:
            decoder.set_attn_implementation(before)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (N, K, T, E) of a layer, and return them."""
        assert self._step is not None, "the cache is used outside of a step"
        if layer not in self._layers:
            self._layers[layer] = (self._allocate(key), self._allocate(value))
        for blocks, new in zip(self._layers[layer], (key, value), strict=True):
            rows = new.transpose(1, 2).flatten(0, 1)
            tokens = rows if self._step.tables is not None else rows[self._step.sources]
            blocks.index_copy_(0, self._step.places, tokens)
        self._pending = (layer, key)
        return key, value

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values (blocks S, K, E) of a layer that has had a forward."""
        return self._layers[number]

    def _allocate(self, new: Tensor) -> Tensor:
        return new.new_zeros(self.num_blocks * BLOCK, new.shape[1], new.shape[3])

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend: query (N, H, T, E) to the row's keys -> (N, T, H, E). Raises TypeError for any other attention."""
        assert self._step is not None, "the cache is used outside of a step"
        if attention_mask is not None or softcap is not None or kwargs.get("s_aux") is not None:
            raise TypeError("attention with a mask, a cap or sinks is not computed here")
        if self._pending is None or self._pending[1] is not key:
            raise TypeError("attention to keys that were not written by this layer is not computed here")
        if self._step.tables is None and self._batch_invariant:
            first = torch.zeros(len(query), dtype=torch.int64)
            output = self._attend_alike(query, key, value, first, scaling, sliding_window)
        elif self._step.tables is None:
            output = _attend_within(query, key, value, scaling, sliding_window)
        else:
            output = self._attend_to_blocks(self._pending[0], query, scaling, sliding_window)
        self._pending = None
        return output, None

    def _attend_to_blocks(self, layer: int, query: Tensor, scaling: float | None, window: int | None) -> Tensor:
        """Attend with one query per row (N, H, 1, E) -> (N, 1, H, E)."""
        step, (keys, values) = self._step, self._layers[layer]
        assert step is not None
        assert step.tables is not None
        assert step.lengths is not None
        if uses_triton(query):
            one = query.squeeze(2)
            output = attend_blocks(
                one, keys, values, step.tables, step.lengths, block=BLOCK, scale=scaling, window=window
            )
            return output[:, None]
        if window not in self._seen:
            self._seen[window] = seen_places(step.tables, step.lengths, step.longest, BLOCK, window)
        places, seen = self._seen[window]
        if self._batch_invariant:
            key, value = (tokens[places].transpose(1, 2) for tokens in (keys, values))
            return self._attend_alike(query, key, value, step.lengths - 1, scaling, window)
        return attend_places(query.squeeze(2), keys, values, places, seen, scaling)[:, None]

    def _attend_alike(
        self, query: Tensor, key: Tensor, value: Tensor, first: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """Attend from positions `first` (N,) on: query (N, H, T, E) to (N, K, L, E) -> (N, T, H, E)."""
        assert scaling is not None, "attention without a scale is not computed here"
        queries, keys, values = (each.transpose(1, 2) for each in (query, key, value))
        return attend_rows(queries, keys, values, first, scaling, None if window is None else window - 1)

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the tokens of some blocks to others, in all layers."""
        tensors = [tokens for pair in self._layers.values() for tokens in pair]
        if not tensors:
            return
        from_blocks, to_blocks = to_device(torch.tensor([list(sources), list(targets)]), tensors[0].device)
        for tokens in tensors:
            blocks = tokens.view(-1, BLOCK, *tokens.shape[1:])
            blocks.index_copy_(0, to_blocks, blocks[from_blocks])


def _attend_within(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Attend causally within each row (N, H, T, E) -> (N, T, H, E)."""
    length = query.shape[2]
    mask = None
    if window is not None and window < length:
        at = torch.arange(length, device=query.device)
        distance = at[:, None] - at
        mask = (distance >= 0) & (distance < window)
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    return output.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Past:
    """Earlier context of generation. Training has none."""

    attention_mask: Tensor | None
    """(B, tokens in the cache + T) int64: 0 on the padding to the left of a prompt."""
    cache: Cache | PagedCache | None
    """Keys and values of earlier tokens, to which the decoder adds the new ones; None: every token is passed again."""
    last: Tensor | None = None
    """(B,) the token of each row after which the logits are wanted; None: the last of the T."""
    grid_shift: int | None = None
    """Added to a token's position for that in time, height and width, behind a prompt with images (M-RoPE)."""
