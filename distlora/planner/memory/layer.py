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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from distlora.architecture.shapes import EXTRA, scores_at_once, tile_length
from distlora.planner.decoder_sizes import AdaptedRanks, AttentionKind, Decoder, ExpertSizes, ScaledHalf
from distlora_kernels import extension
from distlora_kernels.format_layouts import GROUP, is_nf4

_ROWS_A_DOCUMENT, _DOCUMENT = 128, 256
"""Of flash attention's accumulators beside the tokens; tokens of a document, where nothing says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Memory that an attention implementation keeps and allocates."""

    kind: AttentionKind = "documents"
    document: int | None = None
    """Tokens of the longest document, which `tiles` have memory for; None: a row."""
    accumulators: float = 0
    """fp32 copies of the queries' gradient that the backward of `documents` has (`flash_accumulators`)."""
    expands_keys: bool = False
    """True if that backward makes gradients of keys and values for each head of the queries."""


BY_DOCUMENTS = Attention()
"""Attention by documents, without what a kernel makes for itself."""


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


_PARTS_BYTES = 2**28
"""What distlora_kernels.skinny_launch lets the parts of dB take before it reads dY twice."""
_RANK_READ_ONCE = 32
_PROGRAMS = 128
"""What it has of programs, if the rows alone give fewer."""


def parts_of_db(tokens: int, columns: int, rank: int, itemsize: int) -> int | None:
    """Return the bytes of the parts of dB by stripe (skinny_launch.dy); None if dY is read twice instead."""
    rows = 64 if itemsize == 4 else 128 if rank % 16 else 256
    parts = -(-tokens // rows) * 4 * columns * rank
    return None if rank > _RANK_READ_ONCE or parts > _PARTS_BYTES else parts


def parts_over_rows(tokens: int, columns: int, rank: int, itemsize: int) -> int:
    """Return the bytes of the parts of dA or dB that keep each processor busy (skinny_launch)."""
    rows, tile, ranks = (32, 64, 32) if itemsize == 4 else (64, 128, 64)
    if itemsize != 4 and rank % 16 and rank <= 16:
        rows = 32
    programs = -(-columns // tile) * -(-rank // min(ranks, max(16, 1 << (rank - 1).bit_length())))
    grains = -(-tokens // rows)
    size = -(-grains // min(grains, max(1, _PROGRAMS // programs)))
    return -(-grains // size) * 4 * columns * rank


_COUNTERS = {"cpu": 2**15, "cuda": 2**22}
"""What distlora_kernels.dropout has of counters at once, by device."""
_COUNTER_BYTES = 8 * 8
"""Of one in philox: eight int64. Each makes the words of eight inputs."""
STRIPE_BYTES = 3 * 4 * 2**20
"""Two operands and their product, fp32, of the rows that dora_reference takes at once for a magnitude's gradient."""


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


class Linear(NamedTuple):
    """One of those that read a tensor."""

    name: str
    columns: int
    """Columns of its output."""
    bias: bool
    output_is_kept: bool = False
    """True if the next operation keeps its output itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRun:
    """A running decoder layer: its sizes, settings, and the tokens that it runs."""

    decoder: Decoder
    ranks: AdaptedRanks
    itemsize: int = 2
    """b: bytes per element of the run's dtype."""
    is_gpu: bool = True
    attention: Attention = BY_DOCUMENTS
    tokens: int = 1
    """Tokens that it runs at once; some memory has a bound for all of them."""
    row: int = 1
    """Tokens per sequence, which dense masks and scores grow with."""
    fused: bool = False
    """True if norms are fused; without DoRA also gated MLPs and rotary embeddings."""
    remakes: bool = False
    """True if outputs of compiled norms and gated products are made again in backward and not kept."""
    dora: bool = False
    dropout: bool = False
    """True if adapters have dropout. Masks are not kept; on the CPU, and with DoRA, they are tensors."""
    formats: Mapping[str, str] = field(default_factory=dict)
    """Formats of quantized weights (`formats_by_name`): their dense weights are in scratch memory on a GPU, and tensors
    like others on the CPU."""
    groups_experts: bool = False
    """True if experts are one grouped product (distlora_kernels.experts.runs_grouped)."""
    balances: bool = False
    """True if a loss balances the routers."""
    trains_base: bool = False
    """True if norms and linears are trained themselves (adapter=full)."""
    adds_up_gradients: bool = False
    """True if gradients of the trained base stay whole, in the run's dtype, until the layer's backward is done, as
    with sharding."""
    trials: int = 1
    """Trials trained together: their adapters are side by side, and each row uses one of them."""

    @property
    def fused_mlp(self) -> bool:
        """True if the MLP is fused; with DoRA, it would overwrite outputs that gradients read."""
        return self.fused and not self.dora

    def norm(self, columns: int, rows: int = 1) -> Operation:
        """Return a norm of `rows` vectors per token with `columns` columns together.

        LlamaRMSNorm and similar keep x in fp32 and its inverse root mean square; backward takes five fp32 tensors. The
        residual stream is fp32 in an fp32 run. A fused norm keeps x, and makes the gradient of x.
        """
        b = self.itemsize
        if self.fused:
            return Operation(b * columns + 4 * rows, (TransientMemory(2 * b * columns),), b * columns)
        # What a trained scale is multiplied with.
        normalized = (4 if self.decoder.norms_in_fp32 else b) * columns if self.trains_base else 0
        return Operation(
            4 * columns + 4 * rows + normalized,
            (TransientMemory(20 * columns - b * columns - normalized),),
            b * columns,
        )

    def linears(self, inputs: int, outputs: Sequence[Linear], *, made: bool = False) -> Operation:
        """Return linears that read one tensor, `made` by a norm or a gated product (lora_torch.py, lora_gpu.py)."""
        if self.trains_base:
            return self._trained(inputs, outputs)
        b, ranks = self.itemsize, {linear.name: self.ranks.rank(linear.name) for linear in outputs}
        # Of a pack a row has the columns of its own trial's adapter; on a GPU all have as many.
        largest = sum(self.ranks.largest(linear.name) for linear in outputs)
        columns = largest if self.is_gpu else sum(ranks.values()) / self.trials
        keeps = b * (inputs + columns) if any(ranks.values()) else 0
        if self.dora:
            # Of v + bias and of v beside x W^T backward reads v, a tensor of its own; else y itself.
            own = [each for each in outputs if ranks[each.name] and not self._keeps_output(each)]
            keeps += b * sum(linear.columns for linear in own)
        if not self.is_gpu:
            moments = self._on_cpu(inputs, outputs, ranks)
            if made and self.remakes and keeps:
                keeps -= b * inputs
                moments = [moment._replace(bytes=moment.bytes + b * inputs) for moment in moments]
        else:  # Products over tokens are made in parts of one adapter's columns.
            moments = self._on_gpu(inputs, outputs, {name: self.ranks.largest(name) for name in ranks})
        # dA and dB of all of them, in fp32.
        fixed = sum(4 * rank * (inputs + linear.columns) for linear in outputs if (rank := ranks[linear.name]))
        stacks = joins = 0.0
        if self.trials > 1:
            stacks = fixed
            # B of each row's own adapter, as it lies in memory alone (lora_torch.py).
            joins = sum(4 * ranks[linear.name] * linear.columns for linear in outputs) if not self.is_gpu else 0
        backward = tuple(moment._replace(fixed=moment.fixed + fixed + joins) for moment in moments)
        # Forward goes from one weight to the next as backward does, in the other order.
        dense = max(moment.dense for moment in moments)
        return Operation(keeps, backward, b * inputs, dense=dense, stacks=stacks, joins=joins)

    def _trained(self, inputs: int, outputs: Sequence[Linear]) -> Operation:
        """Return trained linears, which keep their input and make dX and dW; one process casts dW to fp32."""
        b = self.itemsize
        whole = sum(inputs * linear.columns for linear in outputs)
        largest = max(inputs * linear.columns for linear in outputs)
        if self.adds_up_gradients:
            return Operation(b * inputs, (TransientMemory(2 * b * inputs, b * whole),), b * inputs, gradients=b * whole)
        fixed = largest * (b if b == 4 else b + 4)
        made = b * inputs * (1 if len(outputs) == 1 else 2)
        return Operation(b * inputs, (TransientMemory(made, fixed),), b * inputs)

    def _keeps_output(self, linear: Linear) -> bool:
        """Return True if the next operation keeps the tensor that DoRA's backward reads."""
        return linear.output_is_kept and not linear.bias and not self.dropout

    def _on_cpu(self, inputs: int, outputs: Sequence[Linear], ranks: dict[str, int]) -> list[TransientMemory]:
        """Return the backward on the CPU, from the last linear to the first: one dX each, added to the others.

        A dequantized weight lives until the next linear has its own, made of its fp32 absmax (nf4_cpu.py). Dropout of
        trials trained together is applied in place, one trial after the other.
        """
        b, moments, before = self.itemsize, [], 0.0
        for index, linear in enumerate(reversed(outputs)):
            weight = b * inputs * linear.columns if linear.name in self.formats else 0
            total, own = (b * inputs if index else 0), 0.0
            if ranks[linear.name]:
                if self.dora:  # k dY, and with dropout (k - 1) dY.
                    own = b * linear.columns * (2 if self.dropout else 1)
                    moments.append(TransientMemory(total + own + self._stripe(linear.columns), dense=before))
                if self.dropout:  # Random words, the mask made of them, what it leaves of x.
                    words = (3 * inputs + self._counters(inputs)) / self.trials
                    moments.append(TransientMemory(total + own + inputs * (1 - 1 / self.trials) + words, dense=before))
                    own += inputs
                    moments.append(TransientMemory(total + own + b * inputs / self.trials, dense=before))
            moments.append(TransientMemory(total + own, dense=before + weight * (1 + 4 / 64 / b)))
            dropped = self.dropout and ranks[linear.name] and self.trials == 1
            moments.append(TransientMemory(total + own + b * inputs * (2 if dropped else 1), dense=weight))
            before = weight
        return moments

    def _stripe(self, columns: int) -> float:
        """Return the bytes that DoRA takes at once for the gradient of a magnitude."""
        if self.trials == 1:
            return self._at_most(12 * columns, STRIPE_BYTES)
        return min(12 * columns * self.row, STRIPE_BYTES) / self.tokens

    def _on_gpu(self, inputs: int, outputs: Sequence[Linear], ranks: dict[str, int]) -> list[TransientMemory]:
        """Return the backward on a GPU: adapter gradients linear by linear, then one dX for all."""
        b, adapted = self.itemsize, [linear for linear in outputs if ranks[linear.name]]
        quantized = [linear.columns for linear in adapted if linear.name in self.formats]
        scaled = self._copied(inputs, quantized, sum(ranks.values()))
        moments = []
        for linear in adapted:
            rank = ranks[linear.name]
            folds = is_nf4(self.formats.get(linear.name)) and not self.dropout and b == 2
            if self.dora and not folds:
                # k dY: of all linears in the place of dY without dropout; with it, (k - 1) dY of all of them.
                scaled += b * linear.columns
                moments.append(TransientMemory(scaled + (b * linear.columns if self.dropout else 0)))
            once = parts_of_db(self.tokens, linear.columns, rank, b)
            moments.append(
                TransientMemory(scaled, parts_over_rows(self.tokens, linear.columns, rank, b) if once is None else once)
            )
        if adapted:  # dA: of those that see the same input together.
            groups = [ranks[each.name] for each in adapted] if self.dropout else [sum(ranks.values())]
            moments.append(
                TransientMemory(scaled, max(parts_over_rows(self.tokens, inputs, rank, b) for rank in groups))
            )
        if self.dropout and len(adapted) > 1:
            moments.append(TransientMemory(scaled + 2 * b * inputs))
        if self.dropout and self.dora:
            moments.append(TransientMemory(scaled + 2 * b * inputs + 3 * inputs + self._counters(inputs)))
        return [*moments, TransientMemory(scaled + b * inputs)]

    def _copied(self, inputs: int, outs: Sequence[int], rank: int) -> float:
        """Return the bytes per token of a dY that is copied for dX (distlora_kernels.extension)."""
        if self.dora or self.dropout or self.trials > 1:
            return 0.0
        carrier = extension.carrier(self.tokens, inputs, dict(enumerate(outs)), rank, self.itemsize)
        return 0.0 if carrier is None else self.itemsize * (outs[carrier] + extension.padded(rank))

    def _counters(self, inputs: int) -> float:
        """Return the bytes that generating a dropout mask takes."""
        return self._at_most(inputs / 8 * _COUNTER_BYTES, _COUNTERS["cuda" if self.is_gpu else "cpu"] * _COUNTER_BYTES)

    def _at_most(self, of_token: float, bound: float) -> float:
        """Bytes a token of what has a bound for all of them."""
        return min(of_token, bound / self.tokens)

    def rotary(self) -> Operation:
        """Return apply_rotary_pos_emb: gradients of inputs, four products with the tables; fused, in place."""
        b, sizes = self.itemsize, self.decoder
        made = 0 if self.fused_mlp else 4 * b * sizes.queries
        return Operation(0, (TransientMemory(made),), b * (sizes.queries + 2 * sizes.keys))

    def attends(self) -> Operation:
        """Return attention proper: it keeps queries, keys, values, the output, and a log-sum-exp per head."""
        b, sizes = self.itemsize, self.decoder
        leaves = b * (sizes.queries + 2 * sizes.keys)
        # Values that are a part of what one linear gives keep all of it.
        values = sizes.queries + 2 * sizes.keys if sizes.fused_linears else sizes.keys
        keeps = b * (2 * sizes.queries + sizes.keys + values) + 4 * sizes.heads
        if self.attention.kind == "tiles":
            forward, backward = tiles_make(sizes, self.attention.document or self.row)
            return Operation(keeps, (TransientMemory(leaves, backward),), leaves, forward / self.tokens)
        if self.attention.kind == "documents":
            rounded = -(-sizes.head_size // 32) * 32
            made = leaves + 4 * self.attention.accumulators * sizes.heads * rounded
            if self.attention.expands_keys and sizes.keys < sizes.queries:
                made += 2 * b * sizes.queries
            return Operation(keeps, (TransientMemory(made),), leaves)
        # Keys and values are repeated for each head of the queries.
        if self.attention.kind == "sdpa":
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
        if self.fused_mlp:
            return Operation(2 * b * inner, (TransientMemory(0),), 2 * b * inner)
        return Operation(3 * b * inner, (TransientMemory(2 * b * inner),), 2 * b * inner)


def attention_half(run: LayerRun) -> list[Operation]:
    """Return the operations from a layer's input to the output of attention."""
    sizes = run.decoder
    # Values go to attention as the linear gives them, queries and keys rotated.
    as_given = run.attention.kind in ("documents", "tiles") or sizes.keys == sizes.queries
    if sizes.fused_linears:
        columns = sizes.queries + 2 * sizes.keys
        qkv = [Linear("qkv_proj", columns, sizes.qkv_bias, as_given)]
    else:
        qkv = [Linear("q_proj", sizes.queries, sizes.qkv_bias), Linear("k_proj", sizes.keys, sizes.qkv_bias)]
        qkv.append(Linear("v_proj", sizes.keys, sizes.qkv_bias, as_given))
    operations = [run.norm(sizes.hidden), run.linears(sizes.hidden, qkv, made=True)]
    if sizes.head_norms:
        # The gradients of queries, keys and values are there together.
        leaves = run.itemsize * (sizes.queries + 2 * sizes.keys)
        operations.append(run.norm(sizes.queries, sizes.heads)._replace(leaves=leaves))
        operations.append(run.norm(sizes.keys, sizes.key_heads)._replace(leaves=leaves))
    output = run.linears(sizes.queries, [Linear("o_proj", sizes.hidden, sizes.o_bias)])
    if run.ranks.reading("o") or run.trains_base:
        output = output._replace(keeps=output.keeps - run.itemsize * sizes.queries)  # It is attention's output.
    operations += [run.rotary(), run.attends(), output]
    return [*operations, run.norm(sizes.hidden)] if sizes.norms_after else operations


def mlp_half(run: LayerRun) -> list[Operation]:
    """Return the operations of a dense MLP, from attention's output to the layer's output."""
    sizes = run.decoder
    if sizes.fused_linears:
        read = [Linear("gate_up_proj", 2 * sizes.inner, sizes.mlp_bias, output_is_kept=True)]
    else:
        names = ("gate_proj", "up_proj")
        read = [Linear(name, sizes.inner, sizes.mlp_bias, output_is_kept=True) for name in names]
    down = run.linears(sizes.inner, [Linear("down_proj", sizes.hidden, sizes.mlp_bias)], made=True)
    operations = [run.norm(sizes.hidden), run.linears(sizes.hidden, read, made=True), run.gates(), down]
    return [*operations, run.norm(sizes.hidden)] if sizes.norms_after else operations


def scaled_half(run: LayerRun, half: ScaledHalf) -> list[Operation]:
    """Return a half that is estimated from a shrunk model's as one operation, with the adapters of its linears."""
    # Measured in bf16, with attention that keeps scores if query and value heads differ in size.
    of_run, row = run.itemsize / 2, 0 if run.attention.kind in ("documents", "tiles") else run.row

    def nbytes(pair: tuple[float, float]) -> float:
        return of_run * (pair[0] + pair[1] * row)

    keeps, fixed, dense, gradients, stacks, joins = nbytes(half.keeps), 0.0, 0.0, 0.0, 0.0, 0.0
    for path, inputs, columns, rows, count in half.linears:
        linear = run.linears(inputs, [Linear(path, columns, bias=False)])
        keeps += half.inputs * rows * linear.keeps
        fixed = max(fixed, *(count * moment.fixed for moment in linear.backward))
        dense = max(dense, linear.dense)
        gradients, stacks, joins = gradients + linear.gradients, stacks + linear.stacks, max(joins, linear.joins)
    backward = (TransientMemory(nbytes(half.backward), fixed, dense),)
    boundary = run.itemsize * run.decoder.hidden
    return [Operation(keeps, backward, boundary, nbytes(half.forward), dense, gradients, stacks, joins)]


_RANK_MULTIPLE = 8
"""What grouped products round ranks up to."""
INDEX_BYTES = 4 * 8
"""A row's entries in a Routing: tokens, order, inverse, experts, int64."""


def expert_half(run: LayerRun) -> list[Operation]:
    """Return the operations of a mixture of experts; outputs are kept for the gradients of their weights."""
    experts, b, hidden = run.decoder.experts, run.itemsize, run.decoder.hidden
    assert experts is not None
    rows, one = experts.chosen, b * experts.chosen * experts.inner
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
        _linear(run, experts, "gate_up_proj", hidden, 2 * experts.inner),
        # The activation keeps gate, up and act(gate); GPT-OSS the clamped gate, its sigmoid, their product, and up + 1.
        Operation((6 if experts.clamps else 3) * one, (TransientMemory(2 * one),), 2 * one),
        _linear(run, experts, "down_proj", experts.inner, hidden),
        Operation(b * rows * hidden + wide * rows, (TransientMemory(3 * wide * rows * hidden),), b * rows * hidden),
        *_shared_expert(run),
    ]


def _shared_expert(run: LayerRun) -> list[Operation]:
    """Return the operations of the gated MLP beside the experts, whose input is theirs."""
    if run.decoder.shared is None:
        return []
    path, inner = run.decoder.shared
    read = [Linear(f"{path}.{name}", inner, bias=False, output_is_kept=True) for name in ("gate_proj", "up_proj")]
    down = Linear(f"{path}.down_proj", run.decoder.hidden, bias=False)
    gates = replace(run, decoder=replace(run.decoder, inner=inner)).gates()
    return [run.linears(run.decoder.hidden, read), gates, run.linears(inner, [down])]


def _linear(run: LayerRun, experts: ExpertSizes, name: str, inputs: int, outputs: int) -> Operation:
    """Return the linear of all experts (experts_torch.py or experts_grouped.py).

    It makes dX of all rows, with grouped products also the adapter's part of it, dA and dB of all experts in fp32, and
    A and B in the run's dtype. If experts are divided, these are of a rank's own experts.
    """
    b, rank = run.itemsize, run.ranks.rank(name)
    rows, weight = experts.chosen, inputs * outputs
    dense = 0
    if name in run.formats and not run.groups_experts:
        # Of an expert that begins within a group, the rest of its first and last group too (formats/base.py).
        dense = b * (weight if weight % GROUP == 0 else min(weight + 2 * GROUP, weight * experts.local))
    if rank == 0:
        return Operation(0, (TransientMemory(b * rows * inputs, dense=dense),), b * rows * inputs, dense=dense)
    # Trials may share other factors, so that each expert has a copy of all.
    numel = run.ranks.numels.get(name, experts.count * rank * (inputs + outputs))
    fixed = numel // experts.degree * (4 + b)
    if experts.degree > 1:  # The gradient of a rank's experts becomes one of all experts, zero elsewhere.
        fixed += 4 * numel
    if not run.groups_experts:
        made = TransientMemory(b * rows * inputs, fixed, dense)
        return Operation(b * rows * (inputs + rank), (made,), b * rows * inputs, dense=dense)
    padded = -(-rank // _RANK_MULTIPLE) * _RANK_MULTIPLE
    sums = b * experts.local * padded * max(inputs, outputs)
    return Operation(
        b * rows * (inputs + padded),
        (TransientMemory(b * rows * inputs, fixed + sums), TransientMemory(2 * b * rows * inputs, fixed)),
        b * rows * inputs,
    )
