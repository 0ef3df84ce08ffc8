"""What a row's tokens cost in memory beside the weights: what a forward keeps for backward and what a block at work
takes, in each checkpointing mode, calculated from config.json's sizes; and what is computed a second time.

Counted are the tensors that the code keeps, each storage once, with attention by documents (no mask is kept):

    attention half   norm, [norms of queries and keys], its output X, X A^T; queries, keys, values, the output O and a
                     number a head (log-sum-exp); O A^T; [the norm after attention]
    MLP half         norm, its output X, X A^T; gate, up, act(gate), their product P, P A^T; [the norm after the MLP]

A norm of transformers keeps an fp32 copy of its input, liger-kernel's (`fused`) the input itself; its gated MLP keeps
no act(gate). What an adapter's linear reads is kept for dA; a linear without one keeps nothing. tests/
test_activations.py holds the sums to what autograd saves, within 5 %.

Not counted: experts, DoRA (which keeps each linear's output too), dense masks and the scores of eager attention, the
weights that full fine-tuning gathers or copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distlora.families import Family
from distlora.shapes import attention_columns, sizes_of

Mode = Literal["none", "block", "selective", "offload"]

LOGITS_AT_ONCE = 2**24
"""What distlora.head has of fp32 logits at a time."""
_LOGIT_BYTES = 16
"""A logit of a chunk in the dtype of the run, in fp32, its gradient in both."""
_NORM_STEPS = 20
"""Five fp32 tensors of a norm of transformers in backward, bytes a column."""
_HEAD_NORM_STEPS = 16
"""The same of the queries' norm, less what is counted as their gradient and gone by then."""
_OFFLOADED_IN_FLIGHT = 2
"""Boundary inputs on the device with `offload`: the one in use and the one on its way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """The sizes of a decoder of dense blocks."""

    hidden: int
    inner: int
    """Columns of gate, of up and of their product."""
    queries: int
    """Columns of the queries: heads x head size."""
    keys: int
    """Columns of the keys, and of the values."""
    heads: int
    key_heads: int
    layers: int
    vocabulary: int
    norms_after: bool
    """Whether a norm follows attention and another the MLP (Gemma)."""
    head_norms: bool
    """Whether queries and keys have norms."""

    @classmethod
    def of(cls, model: Mapping[str, Any], family: Family) -> Decoder:
        """From a config.json. Raises ValueError for a mixture of experts, which is not counted."""
        if family.experts is not None:
            raise ValueError(f"what {family.model_type} keeps depends on where its router sends tokens")
        settings = sizes_of(model, family)
        heads, (queries, keys) = settings["num_attention_heads"], attention_columns(settings)
        return cls(
            hidden=settings["hidden_size"],
            inner=settings["intermediate_size"],
            queries=queries,
            keys=keys,
            heads=heads,
            key_heads=keys // (queries // heads),
            layers=settings["num_hidden_layers"],
            vocabulary=settings["vocab_size"],
            norms_after=family.mlp_norms[1] is not None,
            head_norms=family.head_norms,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedRanks:
    """The ranks of a block's adapters, added up over the linears that read the same tensor; 0: none of them has one."""

    qkv: int = 0
    o: int = 0
    gate_up: int = 0
    down: int = 0

    @classmethod
    def of(cls, ranks: Mapping[str, int]) -> AdaptedRanks:
        """From the rank of each adapted linear of a block, by its path or its name."""
        inputs = {"o_proj": "o", "down_proj": "down"}
        inputs |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "qkv")
        inputs |= dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "gate_up")
        sums = dict.fromkeys(inputs.values(), 0)
        for path, rank in ranks.items():
            sums[inputs[path.rpartition(".")[2]]] += rank
        return cls(**sums)


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes of one rank in a training step."""

    kept: float
    """On the device from forward to backward: what the blocks keep, and the rotary tables."""
    kept_on_host: float
    head_forward: float
    """On the device while the head is at work, after the last norm."""
    head_backward: float
    """On the device in their backward."""
    working: float
    """On the device while a block is at work in backward: what it recomputes, and gradients."""
    recomputed: float
    """Share of the operations of a forward that backward does again."""

    @property
    def peak(self) -> float:
        """On the device."""
        return self.kept + max(self.head_forward, self.head_backward, self.working)


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Bytes a token of one block, with what its settings keep."""

    decoder: Decoder
    ranks: AdaptedRanks
    dtype_bytes: int = 2
    """Of the run's dtype."""
    fused: bool = False
    """Whether norms and MLPs are liger-kernel's."""

    @property
    def boundary(self) -> int:
        """The input of a block."""
        return self.dtype_bytes * self.decoder.hidden

    @property
    def attention(self) -> int:
        """What the attention half keeps."""
        sizes, ranks, b = self.decoder, self.ranks, self.dtype_bytes
        norms = self._norm(sizes.hidden) * (2 if sizes.norms_after else 1)
        if sizes.head_norms:
            norms += self._norm(sizes.queries, sizes.heads) + self._norm(sizes.keys, sizes.key_heads)
        own = b * (2 * sizes.queries + 2 * sizes.keys) + 4 * sizes.heads
        return norms + own + self._read(sizes.hidden, ranks.qkv) + b * ranks.o

    @property
    def mlp(self) -> int:
        """What the MLP half keeps where it is not recomputed."""
        sizes, ranks, b = self.decoder, self.ranks, self.dtype_bytes
        norms = self._norm(sizes.hidden) * (2 if sizes.norms_after else 1)
        gated = b * (2 if self.fused else 3) * sizes.inner
        return norms + self._read(sizes.hidden, ranks.gate_up) + gated + self._read(sizes.inner, ranks.down)

    def _norm(self, columns: int, rows: int = 1) -> int:
        return (self.dtype_bytes if self.fused else 4) * columns + 4 * rows

    @property
    def _norm_steps(self) -> int:
        """What a norm of hidden columns takes in backward beside what it keeps, the gradient that comes in among it."""
        return 3 * self.boundary if self.fused else _NORM_STEPS * self.decoder.hidden

    def _read(self, columns: int, ranks: int) -> int:
        """What linears keep of the tensor that they read: it, and its products with A."""
        return self.dtype_bytes * (columns + ranks) if ranks else 0

    @property
    def _tables(self) -> int:
        """The rotary tables, cos and sin, of all blocks together."""
        return 2 * self.dtype_bytes * (self.decoder.queries // self.decoder.heads)

    def kept(self, mode: Mode) -> int:
        """By a block, on the device or the host."""
        if mode == "none":
            return self.attention + self.mlp
        return self.boundary + (self.attention if mode == "selective" else 0)

    def working(self, mode: Mode, tokens: int, tile: int | None = None) -> int:
        """Bytes of one block in backward, of `tokens` that it runs at once, beside what it keeps and the gradient that
        comes in: the most that its MLP half, then its attention half need.
        """
        sizes, b = self.decoder, self.dtype_bytes
        recomputed = tokens * self.attention if mode in ("block", "offload") else 0
        # The product's gradient becomes those of act(gate) and up, when a product that was kept is gone. liger-kernel
        # writes over gate and up.
        gradients = 1 if self.fused else 2 if self.ranks.down else 3
        # A norm after a half is the first in its backward, when all that the half keeps is there.
        steps = max(gradients * b * sizes.inner, self._norm_steps if sizes.norms_after else 0)
        of_mlp = steps + (0 if mode == "none" else self.mlp)
        of_attention = max(b * (2 * sizes.queries + 2 * sizes.keys), 0 if self.fused else self._unfused_attention())
        if sizes.norms_after:
            of_attention = max(of_attention, self._norm_steps)
        # With tiles, the half's input, which selective keeps anyway, and its gradient are the row's.
        of_row = 0 if tile is None else (1 if mode == "selective" else 2) * tokens * self.boundary
        mlp = of_row + (tokens if tile is None else min(tile, tokens)) * of_mlp
        return recomputed + max(mlp, tokens * of_attention)

    def _unfused_attention(self) -> int:
        """What transformers' own norms and rotary embedding take in backward, beside all that the half keeps: after the
        attention proper, when queries, keys, values and output are gone, the gradients of the first three and products
        of them with the tables; of the norms of queries, fp32 steps; last those of the half's own norm, alone."""
        sizes, b = self.decoder, self.dtype_bytes
        own, gradients = b * (2 * sizes.queries + 2 * sizes.keys), b * (sizes.queries + 2 * sizes.keys)
        rotary = gradients + 4 * b * sizes.queries - own
        head_norms = gradients + _HEAD_NORM_STEPS * sizes.queries - own if sizes.head_norms else 0
        norm = self._norm(sizes.hidden) + self._norm_steps - self.attention
        return max(rotary, head_norms, norm)

    def head_forward(self, tokens: int) -> int:
        """Bytes of the head, of `tokens` at once, in its forward, which takes the gradient of its input too."""
        kept = self._norm(self.decoder.hidden) + 2 * self.boundary
        return tokens * kept + _LOGIT_BYTES * min(LOGITS_AT_ONCE, tokens * self.decoder.vocabulary)

    def head_backward(self, tokens: int) -> int:
        """Bytes of the head's backward, which scales that gradient in fp32, or of that of the norm before it."""
        hidden = self.decoder.hidden
        return tokens * (self._norm(hidden) + max(2 * self.boundary + 4 * hidden, self._norm_steps))

    def step(self, mode: Mode, *, at_once: int, kept_tokens: int | None = None, tile: int | None = None) -> Activations:
        """A step that runs `at_once` tokens at a time and keeps `kept_tokens` of them (train.accumulate=block: those of
        all its micro-batches); one document a row, for the operations of attention."""
        tokens = at_once if kept_tokens is None else kept_tokens
        layers, kept = self.decoder.layers, self.kept(mode)
        offloads = mode == "offload"
        # The gradient of all tokens comes in, and those of the slices that were run before the last are kept for it.
        gradients = (2 * tokens - at_once) * self.boundary
        # The newest input is a slice of the last block's, which stays whole with it until backward.
        newest = max(0, tokens - _OFFLOADED_IN_FLIGHT * at_once) * self.boundary if offloads else 0
        kept_here = at_once * _OFFLOADED_IN_FLIGHT if offloads else tokens * layers
        return Activations(
            kept=kept_here * kept + tokens * self._tables,
            kept_on_host=tokens * layers * kept if offloads else 0,
            head_forward=self.head_forward(tokens) + newest,
            head_backward=self.head_backward(tokens) + newest,
            working=gradients + self.working(mode, at_once, tile),
            recomputed=self.recomputed(mode, at_once),
        )

    def recomputed(self, mode: Mode, tokens: int) -> float:
        """Share of the operations of a forward over a row of `tokens` that backward does again."""
        sizes = self.decoder
        attention: float = 2 * sizes.hidden * (2 * sizes.queries + 2 * sizes.keys)
        # A token attends to half of the row, 2 operations for each column of its score and as many of its output.
        attention += 4 * sizes.queries * tokens / 2
        mlp = 6 * sizes.hidden * sizes.inner
        whole = sizes.layers * (attention + mlp) + 2 * sizes.vocabulary * sizes.hidden
        again = {"none": 0.0, "selective": mlp}.get(mode, attention + mlp)
        return sizes.layers * again / whole
