"""List the operations of a decoder layer: the activations that each keeps and the memory that its backward takes.

Numbers are bytes per token unless a name says otherwise, read off the code that allocates, which the docstrings name;
tests/planner/test_activations.py measures them. In the dtype of the run, of b bytes:

    attention   norm, linears (X, X A^T), [norms of queries and keys], rotary embedding, attention proper, linear,
                [norm after it]
    MLP         norm, linears (X, X A^T), act(gate) up, linear (P, P A^T), [norm after it]
    experts     norm, router, rows of the chosen experts, linear, act(gate) up, linear, weighted sum

A norm of transformers keeps an fp32 copy of its input, a fused one (`fused`) the input itself; a fused gated MLP keeps
no act(gate). What an adapter's linear reads is kept for dA; a linear without one keeps nothing. With DoRA a linear
keeps its output for the magnitude's gradient, unless something else keeps that very tensor. A token has one row per
expert that it chooses, so nothing depends on balanced routing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from distlora.architecture.shapes import EXTRA, scores_at_once, tile_length
from distlora.planner.decoder_sizes import Decoder, ExpertSizes, KernelOptions, LayerLinear, Linears, ScaledHalf
from distlora_kernels import extension
from distlora_kernels.buffers import (
    COLUMNS_PER_CALL,
    COUNTER_BYTES,
    COUNTERS,
    RANK_MULTIPLE,
    STRIPE_BYTES,
    parts_bytes,
)
from distlora_kernels.format_layouts import GROUP, is_nf4

_ROWS_A_DOCUMENT, _DOCUMENT = 128, 256
"""Of flash attention's accumulators beside the tokens; tokens of a document, where nothing says."""


def flash_accumulators(processors: int, heads: int, tokens: int, rows: int, *, deterministic: bool) -> float:
    """Return the number of fp32 copies of dQ in flash attention 2's backward (flash_api.cpp, mha_varlen_bwd).

    There is one copy with atomics, or one for each program that walks over the same queries, with up to 128 rows more
    per document. Returns the larger count of sequences with one document and with documents of 256 tokens.
    """
    fewest = 2 * rows - 1  # Between rows stands an empty document (distlora.model.attention.cu_seqlens).

    def copies(documents: int) -> float:
        programs = -(-processors // (documents * heads)) if deterministic else 1
        return programs * (1 + _ROWS_A_DOCUMENT * documents / tokens)

    return max(copies(documents) for documents in (fewest, max(fewest, tokens // _DOCUMENT)))


def tiles_make(sizes: Decoder, longest: int) -> tuple[int, int]:
    """Return the bytes of CPU attention by tiles in forward and backward (model/attention.py): scores, wide keys."""
    groups, size = sizes.heads // sizes.key_heads, sizes.head_size
    scores = 2 * scores_at_once(longest, groups, sizes.key_heads)
    wide = 2 * (size + EXTRA) * sizes.key_heads * longest
    queries = sizes.heads * tile_length(longest, groups)
    rows, of_keys = 2 * (size + EXTRA) * queries, 2 * sizes.keys * longest
    forward = scores + wide + rows + (2 * size + 4) * queries
    backward = 2 * scores + 2 * wide + 4 * of_keys + 2 * rows + of_keys + 2 * size * queries
    return forward, backward


class TransientMemory(NamedTuple):
    """Memory that is alive for a while."""

    bytes: float
    """A token."""
    fixed: float = 0
    """Bytes whatever the number of tokens, of adapters."""
    dense: float = 0
    """Bytes of dequantized weights that are tensors like others."""


class Peak(NamedTuple):
    """Bytes at the most."""

    bytes: float
    dense: float = 0
    """Bytes of dequantized weights among them."""

    def plus(self, nbytes: float, dense: float = 0) -> Peak:
        """Return the peak with `nbytes` and dequantized weights added."""
        return Peak(self.bytes + nbytes + dense, self.dense + dense)


class Operation(NamedTuple):
    """An operation of a decoder layer, or a few that follow each other."""

    keeps: float
    """Bytes a token from forward to backward."""
    backward: tuple[TransientMemory, ...]
    """Memory that its backward makes, beside kept activations and the incoming gradient, less what is freed by then."""
    leaves: float
    """Bytes per token of the gradient that it hands on."""
    forward: float = 0
    """Most bytes per token of its forward beside what it and those before it keep."""
    dense: float = 0
    """Most bytes of dequantized weights in its forward, where they are tensors like others."""
    gradients: float = 0
    """Bytes of gradients of trained weights that its backward leaves to be added up."""
    stacks: float = 0
    """Bytes from forward to backward of several trials' adapters side by side."""
    joins: float = 0
    """Bytes beside them while it runs."""


def kept(operations: Sequence[Operation]) -> float:
    """Bytes a token."""
    return sum(operation.keeps for operation in operations)


def stacked(operations: Sequence[Operation]) -> float:
    """Bytes that stay with what is kept, whatever the number of tokens."""
    return sum(operation.stacks for operation in operations)


def backward_peak(operations: Sequence[Operation], tokens: int) -> Peak:
    """Return the peak of the backward with kept activations and recomputation, without the incoming gradient."""
    peaks, held, incoming, gradients, beside = [], 0.0, 0.0, 0.0, 0.0
    for operation in operations:
        held, beside = held + operation.keeps, beside + operation.stacks
        peaks.append(Peak(tokens * (held + operation.forward) + beside + operation.joins))
    for operation in reversed(operations):
        for moment in operation.backward:
            alive = tokens * (held + incoming + moment.bytes) + gradients + beside + moment.fixed + moment.dense
            peaks.append(Peak(alive, moment.dense))
        held, incoming, beside = held - operation.keeps, operation.leaves, beside - operation.stacks
        gradients += operation.gradients
    return max(peaks)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRun(KernelOptions):
    """A running decoder layer: its sizes, linears and kernels, and the tokens that it runs."""

    decoder: Decoder
    linears: Linears
    tokens: int = 1
    """Tokens that it runs at once; some memory has a bound for all of them."""
    row: int = 1
    """Tokens per sequence, which dense masks and scores grow with."""
    document: int | None = None
    """Tokens of the longest document, which attention by `tiles` has memory for; None: a row."""
    accumulators: float = 0
    """fp32 copies of the queries' gradient that the backward of attention by `documents` has (`flash_accumulators`); it
    then makes gradients of keys and values for each head of the queries."""
    remakes: bool = False
    """True if outputs of compiled norms and gated products are made again in backward and not kept."""
    groups_experts: bool = False
    """True if experts are one grouped product (distlora_kernels.experts.runs_grouped)."""
    balances: bool = False
    """True if a loss balances the routers."""
    adds_up_gradients: bool = False
    """True if gradients of the trained base stay whole, in the run's dtype, until the layer's backward is done, as
    with sharding."""

    @property
    def is_adapted(self) -> bool:
        """True if the layer has adapters."""
        return any(linear.rank for group in self.linears.values() for linear in group)

    def norm(self, columns: int, rows: int = 1) -> Operation:
        """Return a norm of `rows` vectors per token with `columns` columns together.

        LlamaRMSNorm and similar keep x in fp32 and its inverse root mean square; backward takes five fp32 tensors. The
        residual stream is fp32 in an fp32 run. A fused norm keeps x, and makes the gradient of x.
        """
        b = self.itemsize
        if "norms" in self.fused:
            return Operation(b * columns + 4 * rows, (TransientMemory(2 * b * columns),), b * columns)
        # What a trained scale is multiplied with.
        normalized = (4 if self.norms_in_fp32 else b) * columns if self.trains_base else 0
        return Operation(
            4 * columns + 4 * rows + normalized,
            (TransientMemory(20 * columns - b * columns - normalized),),
            b * columns,
        )

    def reads(
        self, group: Sequence[LayerLinear], *, made: bool = False, kept: Collection[LayerLinear] = ()
    ) -> Operation:
        """Return linears that read one tensor, `made` by a norm or a gated product (lora_torch.py, lora_gpu.py).

        `kept`: linears whose output the next operation keeps itself.
        """
        inputs = group[0].inputs if group else 0
        if self.trains_base:
            return self._trained(inputs, group)
        b, adapted = self.itemsize, [linear for linear in group if linear.rank]
        # Of a pack a row has the columns of its own trial's adapter; on a GPU all have as many.
        largest = sum(linear.largest for linear in group)
        columns = largest if self.is_gpu else sum(linear.rank for linear in group) / self.trials
        keeps = b * (inputs + columns) if adapted else 0
        if self.dora:
            # Of v + bias and of v beside x W^T backward reads v, a tensor of its own; else y itself.
            shared = [] if self.dropout else [linear for linear in kept if not linear.has_bias]
            keeps += b * sum(linear.outputs for linear in adapted if linear not in shared)
        moments = self._on_gpu(inputs, group) if self.is_gpu else self._on_cpu(inputs, group)
        if made and self.remakes and keeps and not self.is_gpu:
            keeps -= b * inputs
            moments = [moment._replace(bytes=moment.bytes + b * inputs) for moment in moments]
        # dA and dB of all of them, in fp32.
        fixed = sum(4 * linear.rank * (inputs + linear.outputs) for linear in adapted)
        stacks = joins = 0.0
        if self.trials > 1:
            stacks = fixed
            # B of each row's own adapter, as it lies in memory alone (lora_torch.py).
            joins = sum(4 * linear.rank * linear.outputs for linear in adapted) if not self.is_gpu else 0
        backward = tuple(moment._replace(fixed=moment.fixed + fixed + joins) for moment in moments)
        # Forward goes from one weight to the next as backward does, in the other order.
        dense = max((moment.dense for moment in moments), default=0)
        return Operation(keeps, backward, b * inputs, dense=dense, stacks=stacks, joins=joins)

    def _trained(self, inputs: int, group: Sequence[LayerLinear]) -> Operation:
        """Return trained linears, which keep their input and make dX and dW; one process casts dW to fp32."""
        b, sizes = self.itemsize, [inputs * linear.outputs for linear in group]
        if self.adds_up_gradients:
            whole = b * sum(sizes)
            return Operation(b * inputs, (TransientMemory(2 * b * inputs, whole),), b * inputs, gradients=whole)
        fixed = max(sizes) * (b if b == 4 else b + 4)
        made = b * inputs * (1 if len(group) == 1 else 2)
        return Operation(b * inputs, (TransientMemory(made, fixed),), b * inputs)

    def _on_cpu(self, inputs: int, group: Sequence[LayerLinear]) -> list[TransientMemory]:
        """Return the backward on the CPU, from the last linear to the first: one dX each, added to the others.

        A dequantized weight lives until the next linear has its own, made of its fp32 absmax (nf4_cpu.py). Dropout of
        trials trained together is applied in place, one trial after the other.
        """
        b, moments, before = self.itemsize, [], 0.0
        for index, linear in enumerate(reversed(group)):
            weight = b * inputs * linear.outputs if linear.format is not None else 0
            total, own = (b * inputs if index else 0), 0.0
            if linear.rank:
                if self.dora:  # k dY, and with dropout (k - 1) dY.
                    own = b * linear.outputs * (2 if self.dropout else 1)
                    moments.append(TransientMemory(total + own + self._stripe(linear.outputs), dense=before))
                if self.dropout:  # Random words, the mask made of them, what it leaves of x.
                    words = (3 * inputs + self._counters(inputs)) / self.trials
                    moments.append(TransientMemory(total + own + inputs * (1 - 1 / self.trials) + words, dense=before))
                    own += inputs
                    moments.append(TransientMemory(total + own + b * inputs / self.trials, dense=before))
            moments.append(TransientMemory(total + own, dense=before + weight * (1 + 4 / 64 / b)))
            dropped = self.dropout and linear.rank and self.trials == 1
            moments.append(TransientMemory(total + own + b * inputs * (2 if dropped else 1), dense=weight))
            before = weight
        return moments

    def _stripe(self, columns: int) -> float:
        """Return the bytes that DoRA takes at once for the gradient of a magnitude."""
        if self.trials == 1:
            return self._at_most(12 * columns, STRIPE_BYTES)
        return min(12 * columns * self.row, STRIPE_BYTES) / self.tokens

    def _on_gpu(self, inputs: int, group: Sequence[LayerLinear]) -> list[TransientMemory]:
        """Return the backward on a GPU: adapter gradients linear by linear, then one dX for all.

        Products over tokens are made in parts of one adapter's columns.
        """
        b, adapted = self.itemsize, [linear for linear in group if linear.rank]
        scaled = self._copied(inputs, adapted)
        moments = []
        for linear in adapted:
            folds = is_nf4(linear.format) and not self.dropout and b == 2
            if self.dora and not folds:
                # k dY: of all linears in the place of dY without dropout; with it, (k - 1) dY of all of them.
                scaled += b * linear.outputs
                moments.append(TransientMemory(scaled + (b * linear.outputs if self.dropout else 0)))
            parts = parts_bytes("dy", self.tokens, linear.outputs, linear.largest, b)
            moments.append(TransientMemory(scaled, parts))
        if adapted:  # dA: of those that see the same input together.
            ranks = [linear.largest for linear in adapted]
            parts = max(
                parts_bytes("grad", self.tokens, inputs, rank, b) for rank in (ranks if self.dropout else [sum(ranks)])
            )
            moments.append(TransientMemory(scaled, parts))
        if self.dropout and len(adapted) > 1:
            moments.append(TransientMemory(scaled + 2 * b * inputs))
        if self.dropout and self.dora:
            moments.append(TransientMemory(scaled + 2 * b * inputs + 3 * inputs + self._counters(inputs)))
        return [*moments, TransientMemory(scaled + b * inputs)]

    def _copied(self, inputs: int, adapted: Sequence[LayerLinear]) -> float:
        """Return the bytes per token of a dY that is copied for dX (distlora_kernels.extension)."""
        if self.dora or self.dropout or self.trials > 1:
            return 0.0
        outs = [linear.outputs for linear in adapted if linear.format is not None]
        rank = sum(linear.largest for linear in adapted)
        carrier = extension.carrier(self.tokens, inputs, dict(enumerate(outs)), rank, self.itemsize)
        return 0.0 if carrier is None else self.itemsize * (outs[carrier] + extension.padded(rank))

    def _counters(self, inputs: int) -> float:
        """Return the bytes that generating a dropout mask takes."""
        return self._at_most(
            inputs / COLUMNS_PER_CALL * COUNTER_BYTES, COUNTERS["cuda" if self.is_gpu else "cpu"] * COUNTER_BYTES
        )

    def _at_most(self, of_token: float, bound: float) -> float:
        """Bytes a token of what has a bound for all of them."""
        return min(of_token, bound / self.tokens)

    def rotary(self) -> Operation:
        """Return apply_rotary_pos_emb: gradients of inputs, four products with the tables; fused, in place."""
        b, sizes = self.itemsize, self.decoder
        made = 0 if "rotary" in self.fused else 4 * b * sizes.queries
        return Operation(0, (TransientMemory(made),), b * (sizes.queries + 2 * sizes.keys))

    def attends(self) -> Operation:
        """Return attention proper: it keeps queries, keys, values, the output, and a log-sum-exp per head."""
        b, sizes = self.itemsize, self.decoder
        leaves = b * (sizes.queries + 2 * sizes.keys)
        # Values that are a part of what one linear gives keep all of it.
        values = sizes.keys if len(self.linears["qkv"]) > 1 else sizes.queries + 2 * sizes.keys
        keeps = b * (2 * sizes.queries + sizes.keys + values) + 4 * sizes.heads
        if self.attention == "tiles":
            forward, backward = tiles_make(sizes, self.document or self.row)
            return Operation(keeps, (TransientMemory(leaves, backward),), leaves, forward / self.tokens)
        if self.attention == "documents":
            rounded = -(-sizes.head_size // 32) * 32
            made = leaves + 4 * self.accumulators * sizes.heads * rounded
            if self.accumulators and sizes.keys < sizes.queries:
                made += 2 * b * sizes.queries
            return Operation(keeps, (TransientMemory(made),), leaves)
        # Keys and values are repeated for each head of the queries.
        if self.attention == "sdpa":
            keeps = 4 * b * sizes.queries + 4 * sizes.heads + b * self.row
            return Operation(keeps, (TransientMemory(3 * b * sizes.queries),), leaves)
        return self._eager(leaves)

    def _eager(self, leaves: float) -> Operation:
        """Return eager attention, which keeps the scores of a sequence for all heads.

        With a cap it keeps the tanh and the probabilities in fp32 and in the run's dtype (Gemma 2); backward has two
        fp32 gradients. With sinks it keeps probabilities and the position of each maximum.
        """
        b, sizes = self.itemsize, self.decoder
        scores = self.row * sizes.heads
        keeps = 4 * b * sizes.queries
        if sizes.sinks:
            keeps += b * (scores + sizes.heads) + 8 * sizes.heads
            # In forward with the masked scores, those with the sinks, and those less their maximum.
            return Operation(keeps, (TransientMemory(2 * b * scores),), leaves, 2 * b * scores)
        copy = b * scores if b < 4 else 0
        of_scores = 4 * scores + copy + (b * scores if sizes.caps_scores else 0)
        # The CPU widens scores for its softmax, beside what that makes.
        widened = 2 * 4 * scores + copy if not self.is_gpu else 0
        backward = (TransientMemory(8 * scores - copy), TransientMemory((b + 4) * scores))
        return Operation(keeps + of_scores, backward, leaves, max(0, widened - of_scores))

    def gates(self) -> Operation:
        """Return act(gate) * up, which keeps gate, up and act(gate), and makes gradients of act(gate) and up.

        A fused product keeps no act(gate), and writes gradients over gate and up.
        """
        b, inner = self.itemsize, self.decoder.inner
        if "mlps" in self.fused:
            return Operation(2 * b * inner, (TransientMemory(0),), 2 * b * inner)
        return Operation(3 * b * inner, (TransientMemory(2 * b * inner),), 2 * b * inner)


def attention_half(run: LayerRun) -> list[Operation]:
    """Return the operations from a layer's input to the output of attention."""
    sizes, qkv, o = run.decoder, run.linears["qkv"], run.linears["o"]
    # Values go to attention as the linear gives them, queries and keys rotated.
    as_given = run.attention in ("documents", "tiles") or sizes.keys == sizes.queries
    operations = [run.norm(sizes.hidden), run.reads(qkv, made=True, kept=qkv[-1:] if as_given else ())]
    if sizes.head_norms:
        # The gradients of queries, keys and values are there together.
        leaves = run.itemsize * (sizes.queries + 2 * sizes.keys)
        operations.append(run.norm(sizes.queries, sizes.heads)._replace(leaves=leaves))
        operations.append(run.norm(sizes.keys, sizes.key_heads)._replace(leaves=leaves))
    output = run.reads(o)
    if run.trains_base or any(linear.rank for linear in o):
        output = output._replace(keeps=output.keeps - run.itemsize * sizes.queries)  # It is attention's output.
    operations += [run.rotary(), run.attends(), output]
    return [*operations, run.norm(sizes.hidden)] if sizes.norms_after else operations


def mlp_half(run: LayerRun) -> list[Operation]:
    """Return the operations of a dense MLP, from attention's output to the layer's output."""
    hidden, read = run.decoder.hidden, run.linears["gate_up"]
    down = run.reads(run.linears["down"], made=True)
    operations = [run.norm(hidden), run.reads(read, made=True, kept=read), run.gates(), down]
    return [*operations, run.norm(hidden)] if run.decoder.norms_after else operations


def scaled_half(run: LayerRun, half: ScaledHalf) -> list[Operation]:
    """Return a half that is estimated from a shrunk model's as one operation, with the adapters of its linears."""
    # Measured in bf16, with attention that keeps scores if query and value heads differ in size.
    of_run, row = run.itemsize / 2, 0 if run.attention in ("documents", "tiles") else run.row

    def nbytes(pair: tuple[float, float]) -> float:
        return of_run * (pair[0] + pair[1] * row)

    keeps, fixed, dense, gradients, stacks, joins = nbytes(half.keeps), 0.0, 0.0, 0.0, 0.0, 0.0
    for path in half.paths:
        (linear,) = run.linears[path]
        made = run.reads([linear])
        keeps += half.inputs * linear.chosen * made.keeps
        fixed = max(fixed, *(linear.experts * moment.fixed for moment in made.backward))
        dense = max(dense, made.dense)
        gradients, stacks, joins = gradients + made.gradients, stacks + made.stacks, max(joins, made.joins)
    backward = (TransientMemory(nbytes(half.backward), fixed, dense),)
    boundary = run.itemsize * run.decoder.hidden
    return [Operation(keeps, backward, boundary, nbytes(half.forward), dense, gradients, stacks, joins)]


INDEX_BYTES = 4 * 8
"""A row's entries in a Routing: tokens, order, inverse, experts, int64."""


def expert_half(run: LayerRun) -> list[Operation]:
    """Return the operations of a mixture of experts; outputs are kept for the gradients of their weights."""
    experts, b, hidden = run.decoder.experts, run.itemsize, run.decoder.hidden
    assert experts is not None
    rows, columns = experts.chosen, b * experts.chosen * experts.inner
    (gate_up,), (down,) = run.linears["gate_up"], run.linears["down"]
    # The router: softmax, chosen experts and weights, the Routing, and the balance loss. Backward adds the gradient of
    # its input to that of the expert rows (distlora/model/experts.py).
    keeps = rows * (8 + b) if experts.router == "chosen" else 4 * experts.count + rows * (8 + 4) + 4
    keeps += INDEX_BYTES * rows + ((b * experts.count + 8 * rows + 4) if run.balances else 0)
    made = 2 * b * hidden + (16 * experts.count if run.balances else 0)
    # The sum makes three tensors of the outputs' size in backward: gradients of the product and of both operands.
    wide = 4 if experts.router == "fp32 weights" else b
    exchanged: list[Operation] = []
    if experts.degree > 1:  # Rows as they are sent, as they come, and sorted; by their number, if the load is balanced.
        moved = 2 * b * hidden * rows
        exchanged = [Operation(INDEX_BYTES * rows, (TransientMemory(moved),), b * hidden * rows, moved)]
    return [
        run.norm(hidden),
        Operation(keeps, (TransientMemory(made),), b * hidden),
        # The rows of a token, each its own; backward turns them into one a choice and adds them up.
        Operation(0, (TransientMemory(b * hidden * (rows + 1)),), b * hidden),
        *exchanged,
        _of_experts(run, experts, gate_up, hidden, 2 * experts.inner),
        # The activation keeps gate, up and act(gate); GPT-OSS the clamped gate, its sigmoid, their product, and up + 1.
        Operation((6 if experts.clamps else 3) * columns, (TransientMemory(2 * columns),), 2 * columns),
        _of_experts(run, experts, down, experts.inner, hidden),
        Operation(b * rows * hidden + wide * rows, (TransientMemory(3 * wide * rows * hidden),), b * rows * hidden),
        *_shared_expert(run),
    ]


def _shared_expert(run: LayerRun) -> list[Operation]:
    """Return the operations of the gated MLP beside the experts, whose input is theirs."""
    if run.decoder.shared is None:
        return []
    path, inner = run.decoder.shared
    read = [each for name in ("gate_proj", "up_proj") for each in run.linears[f"{path}.{name}"]]
    gates = replace(run, decoder=replace(run.decoder, inner=inner)).gates()
    return [run.reads(read, kept=read), gates, run.reads(run.linears[f"{path}.down_proj"])]


def _of_experts(run: LayerRun, experts: ExpertSizes, linear: LayerLinear, inputs: int, outputs: int) -> Operation:
    """Return the linear of all experts (experts_torch.py or experts_grouped.py).

    It makes dX of all rows, with grouped products also the adapter's part of it, dA and dB of all experts in fp32, and
    A and B in the run's dtype. If experts are divided, these are of a rank's own experts.
    """
    b, rank, rows, weight = run.itemsize, linear.rank, experts.chosen, inputs * outputs
    dense = 0
    if linear.format is not None and not run.groups_experts:
        # Of an expert that begins within a group, the rest of its first and last group too (formats/base.py).
        dense = b * (weight if weight % GROUP == 0 else min(weight + 2 * GROUP, weight * experts.local))
    if rank == 0:
        return Operation(0, (TransientMemory(b * rows * inputs, dense=dense),), b * rows * inputs, dense=dense)
    fixed = linear.adapter_numel // experts.degree * (4 + b)
    if experts.degree > 1:  # The gradient of a rank's experts becomes one of all experts, zero elsewhere.
        fixed += 4 * linear.adapter_numel
    if not run.groups_experts:
        made = TransientMemory(b * rows * inputs, fixed, dense)
        return Operation(b * rows * (inputs + rank), (made,), b * rows * inputs, dense=dense)
    padded = -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
    sums = b * experts.local * padded * max(inputs, outputs)
    return Operation(
        b * rows * (inputs + padded),
        (TransientMemory(b * rows * inputs, fixed + sums), TransientMemory(2 * b * rows * inputs, fixed)),
        b * rows * inputs,
    )
