"""The operations of a decoder block in the order in which a forward runs them: what each keeps for backward, and what
its backward makes. The peak of a block in backward follows by going through them from the last to the first.

All numbers are bytes a token; those of adapters and of weights stand beside them, as `fixed` and `dense`. Each is read
off the code that allocates, which the docstrings name, and held to what is alive in a backward by tests/
test_activations.py. In the dtype of the run, of b bytes:

    attention   norm, linears (X, X A^T), [norms of queries and keys], rotary embedding, attention proper, linear,
                [norm after it]
    MLP         norm, linears (X, X A^T), act(gate) up, linear (P, P A^T), [norm after it]

A norm of transformers keeps an fp32 copy of its input, liger-kernel's (`fused`) the input itself; its gated MLP keeps
no act(gate). What an adapter's linear reads is kept for dA; a linear without one keeps nothing. With DoRA a linear
keeps its output for the magnitude's gradient: where nothing else keeps that very tensor, it is one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from distlora.planner.decoder_sizes import AdaptedRanks, Decoder
from distlora.planner.memory.attention_memory import BY_DOCUMENTS, Attention, tiles_make
from distlora.planner.memory.partial_sums import parts_of_db, parts_over_rows

_COUNTERS = {"cpu": 2**15, "cuda": 2**22}
"""What distlora_kernels.dropout has of counters at once, by device."""
_COUNTER_BYTES = 8 * 8
"""Of one in philox: eight int64. Each makes the words of eight inputs."""
STRIPE_BYTES = 3 * 4 * 2**20
"""Two operands and their product, fp32, of the rows that dora_reference takes at once for a magnitude's gradient."""


class Moment(NamedTuple):
    """What is alive for a while."""

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
    """Of them, dequantized weights."""

    def plus(self, nbytes: float, dense: float = 0) -> Peak:
        """With so many beside them, less where they are counted elsewhere, and dequantized weights."""
        return Peak(self.bytes + nbytes + dense, self.dense + dense)


class Operation(NamedTuple):
    """One of a block, or a few that follow each other."""

    keeps: float
    """Bytes a token from forward to backward."""
    backward: tuple[Moment, ...]
    """What its backward makes, moment by moment, beside what is kept and the gradient that comes in, and less what of
    that is gone by then."""
    leaves: float
    """Bytes a token of the gradient that it hands on."""
    forward: float = 0
    """Bytes a token that its forward has at the most beside what it and those before it keep."""
    dense: float = 0
    """Bytes of dequantized weights that its forward has at the most, where they are tensors like others."""
    keeps_dense: float = 0
    """Bytes of dequantized weights from recomputation to backward."""
    gradients: float = 0
    """Bytes of what it is trained of itself that its backward leaves to be added up."""
    stacks: float = 0
    """Bytes from forward to backward of adapters side by side, where a linear has several."""
    joins: float = 0
    """Bytes beside them while it runs."""


def kept(operations: Sequence[Operation]) -> float:
    """Bytes a token."""
    return sum(operation.keeps for operation in operations)


def stacked(operations: Sequence[Operation]) -> float:
    """Bytes that stay with what is kept, whatever the number of tokens."""
    return sum(operation.stacks for operation in operations)


def backward_peak(operations: Sequence[Operation], tokens: int) -> Peak:
    """In the backward of these operations, what they keep among it, and in a recomputation before it. The gradient that
    comes to the last of them, which the residual stream has too, is not counted."""
    peaks, held, dense, incoming, gradients, beside = [], 0.0, 0.0, 0.0, 0.0, 0.0
    for operation in operations:
        held, dense, beside = held + operation.keeps, dense + operation.keeps_dense, beside + operation.stacks
        peaks.append(Peak(tokens * (held + operation.forward) + beside + operation.joins + dense, dense))
    for operation in reversed(operations):
        for moment in operation.backward:
            weights = dense + moment.dense
            alive = tokens * (held + incoming + moment.bytes) + gradients + beside + moment.fixed + weights
            peaks.append(Peak(alive, weights))
        held, incoming, beside = held - operation.keeps, operation.leaves, beside - operation.stacks
        dense, gradients = dense - operation.keeps_dense, gradients + operation.gradients
    return max(peaks)


class Linear(NamedTuple):
    """One of those that read a tensor."""

    name: str
    columns: int
    """Of its output."""
    bias: bool
    output_is_kept: bool = False
    """Whether what follows keeps its output itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRun:
    """How a block is run: what its operations depend on beside its sizes."""

    decoder: Decoder
    ranks: AdaptedRanks
    itemsize: int = 2
    """Of the run's dtype, b."""
    device: Literal["cuda", "cpu"] = "cuda"
    attention: Attention = BY_DOCUMENTS
    tokens: int = 1
    """That it runs at once: some of what is made has a bound."""
    row: int = 1
    """Tokens of a row: what dense masks and scores grow with."""
    fused: bool = False
    """Whether norms are liger-kernel's or compiled (the same is kept); MLPs and rotary embeddings where no DoRA is."""
    remakes: bool = False
    """Whether what norms and gated products give is made again in backward, and not kept."""
    dora: bool = False
    dropout: bool = False
    quantized: bool = False
    """Whether linears are in NF4."""
    groups_experts: bool = False
    """Whether experts are one grouped product (distlora_kernels.experts.runs_grouped)."""
    balances: bool = False
    """Whether a loss balances the routers."""
    trains_base: bool = False
    """Whether norms and linears are trained themselves (adapter=full)."""
    adds_up_gradients: bool = False
    """Whether their gradients are there in the run's dtype until the block's backward is done: where ranks cut them."""
    keeps_dense: bool = False
    """Whether dequantized weights that are tensors like others stay from recomputation to backward."""
    trials: int = 1
    """Of a pack: their adapters lie side by side, and each row uses one of them."""

    @property
    def fused_mlp(self) -> bool:
        """With DoRA liger-kernel's MLP and rotary embedding would write over outputs that gradients read."""
        return self.fused and not self.dora

    def norm(self, columns: int, rows: int = 1) -> Operation:
        """Of `rows` vectors a token that have so many columns together. LlamaRMSNorm and its like: x in fp32, its
        inverse root mean square; in backward five fp32 tensors, when the gradient that came in is gone. The residual
        stream itself is fp32 in an fp32 run. liger-kernel's: x, and the gradient of x."""
        b = self.itemsize
        if self.fused:
            return Operation(b * columns + 4 * rows, (Moment(2 * b * columns),), b * columns)
        # What a trained scale is multiplied with.
        normalized = (4 if self.decoder.norms_in_fp32 else b) * columns if self.trains_base else 0
        return Operation(
            4 * columns + 4 * rows + normalized, (Moment(20 * columns - b * columns - normalized),), b * columns
        )

    def linears(self, inputs: int, outputs: Sequence[Linear], *, made: bool = False) -> Operation:
        """Those that read one tensor of `inputs` columns, which was `made` by a norm or a gated product (lora_torch.py,
        lora_gpu.py)."""
        if self.trains_base:
            return self._trained(inputs, outputs)
        b, ranks = self.itemsize, {linear.name: self.ranks.rank(linear.name) for linear in outputs}
        # Of a pack a row has the columns of its own trial's adapter; on a GPU all have as many.
        largest = sum(self.ranks.largest(linear.name) for linear in outputs)
        columns = sum(ranks.values()) / self.trials if self.device == "cpu" else largest
        keeps = b * (inputs + columns) if any(ranks.values()) else 0
        if self.dora:
            # Of v + bias and of v beside x W^T backward reads v, a tensor of its own; else y itself.
            own = [each for each in outputs if ranks[each.name] and not self._keeps_output(each)]
            keeps += b * sum(linear.columns for linear in own)
        if self.device == "cpu":
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
            joins = sum(4 * ranks[linear.name] * linear.columns for linear in outputs) if self.device == "cpu" else 0
        backward = tuple(moment._replace(fixed=moment.fixed + fixed + joins) for moment in moments)
        # Forward goes from one weight to the next as backward does, in the other order.
        dense, keeps_dense = max(moment.dense for moment in moments), 0.0
        if self.keeps_dense and self.quantized and self.device == "cpu":
            keeps_dense = sum(b * inputs * linear.columns for linear in outputs)
            backward = tuple(moment._replace(dense=0) for moment in backward)
        return Operation(keeps, backward, b * inputs, dense=dense, keeps_dense=keeps_dense, stacks=stacks, joins=joins)

    def _trained(self, inputs: int, outputs: Sequence[Linear]) -> Operation:
        """nn.Linears: their input for dW; in backward a dX each, which is added to the others', and dW in the dtype of
        the run. One process, which has 16-bit copies of fp32 masters, then makes dW in fp32 (compute_copies.py)."""
        b = self.itemsize
        whole = sum(inputs * linear.columns for linear in outputs)
        largest = max(inputs * linear.columns for linear in outputs)
        if self.adds_up_gradients:
            return Operation(b * inputs, (Moment(2 * b * inputs, b * whole),), b * inputs, gradients=b * whole)
        fixed = largest * (b if b == 4 else b + 4)
        made = b * inputs * (1 if len(outputs) == 1 else 2)
        return Operation(b * inputs, (Moment(made, fixed),), b * inputs)

    def _keeps_output(self, linear: Linear) -> bool:
        """Whether what follows keeps the very tensor that DoRA's backward reads."""
        return linear.output_is_kept and not linear.bias and not self.dropout

    def _on_cpu(self, inputs: int, outputs: Sequence[Linear], ranks: dict[str, int]) -> list[Moment]:
        """From the last linear to the first: a dX each, which is added to the others'. A dequantized weight lives until
        the next linear has its own, which is made of its absmax in fp32 (nf4_cpu.py). Of a pack's rows those of one
        trial after the other are dropped, in place."""
        b, moments, before = self.itemsize, [], 0.0
        for index, linear in enumerate(reversed(outputs)):
            weight = b * inputs * linear.columns if self.quantized else 0
            total, own = (b * inputs if index else 0), 0.0
            if ranks[linear.name]:
                if self.dora:  # k dY, and with dropout (k - 1) dY.
                    own = b * linear.columns * (2 if self.dropout else 1)
                    moments.append(Moment(total + own + self._stripe(linear.columns), dense=before))
                if self.dropout:  # Random words, the mask made of them, what it leaves of x.
                    words = (3 * inputs + self._counters(inputs)) / self.trials
                    moments.append(Moment(total + own + inputs * (1 - 1 / self.trials) + words, dense=before))
                    own += inputs
                    moments.append(Moment(total + own + b * inputs / self.trials, dense=before))
            moments.append(Moment(total + own, dense=before + weight * (1 + 4 / 64 / b)))
            dropped = self.dropout and ranks[linear.name] and self.trials == 1
            moments.append(Moment(total + own + b * inputs * (2 if dropped else 1), dense=weight))
            before = weight
        return moments

    def _stripe(self, columns: int) -> float:
        """What DoRA takes at once for the gradient of a magnitude: of all rows, where these choose of one."""
        if self.trials == 1:
            return self._at_most(12 * columns, STRIPE_BYTES)
        return min(12 * columns * self.row, STRIPE_BYTES) / self.tokens

    def _on_gpu(self, inputs: int, outputs: Sequence[Linear], ranks: dict[str, int]) -> list[Moment]:
        """The adapters' gradients linear by linear, then dX, once for all of them."""
        b, adapted = self.itemsize, [linear for linear in outputs if ranks[linear.name]]
        folds = self.quantized and not self.dropout and b == 2
        scaled = 0.0
        moments = []
        for linear in adapted:
            rank = ranks[linear.name]
            if self.dora and not folds:
                # k dY: of all linears in the place of dY without dropout; with it, (k - 1) dY of all of them.
                scaled += b * linear.columns
                moments.append(Moment(scaled + (b * linear.columns if self.dropout else 0)))
            once = parts_of_db(self.tokens, linear.columns, rank, b)
            moments.append(
                Moment(scaled, parts_over_rows(self.tokens, linear.columns, rank, b) if once is None else once)
            )
        if adapted:  # dA: of those that see the same input together.
            groups = [ranks[each.name] for each in adapted] if self.dropout else [sum(ranks.values())]
            moments.append(Moment(scaled, max(parts_over_rows(self.tokens, inputs, rank, b) for rank in groups)))
        if self.dropout and len(adapted) > 1:
            moments.append(Moment(scaled + 2 * b * inputs))
        if self.dropout and self.dora:
            moments.append(Moment(scaled + 2 * b * inputs + 3 * inputs + self._counters(inputs)))
        return [*moments, Moment(scaled + b * inputs)]

    def _counters(self, inputs: int) -> float:
        """What makes the words of a mask has of its own."""
        return self._at_most(inputs / 8 * _COUNTER_BYTES, _COUNTERS[self.device] * _COUNTER_BYTES)

    def _at_most(self, of_token: float, bound: float) -> float:
        """Bytes a token of what has a bound for all of them."""
        return min(of_token, bound / self.tokens)

    def rotary(self) -> Operation:
        """apply_rotary_pos_emb: the gradients of queries, keys and values are there, and of the queries four products
        with the tables. liger-kernel's writes over what it gets."""
        b, sizes = self.itemsize, self.decoder
        made = 0 if self.fused_mlp else 4 * b * sizes.queries
        return Operation(0, (Moment(made),), b * (sizes.queries + 2 * sizes.keys))

    def attends(self) -> Operation:
        """The attention proper: queries, keys, values and the output; a number a head (log-sum-exp)."""
        b, sizes = self.itemsize, self.decoder
        leaves = b * (sizes.queries + 2 * sizes.keys)
        # Values that are a part of what one linear gives keep all of it.
        values = sizes.queries + 2 * sizes.keys if sizes.fused_linears else sizes.keys
        keeps = b * (2 * sizes.queries + sizes.keys + values) + 4 * sizes.heads
        if self.attention.kind == "tiles":
            of_tiles = tiles_make(sizes, self.attention.document or self.row)
            return Operation(keeps, (Moment(leaves, of_tiles.backward),), leaves, of_tiles.forward / self.tokens)
        if self.attention.kind == "documents":
            rounded = -(-sizes.head_size // 32) * 32
            made = leaves + 4 * self.attention.accumulators * sizes.heads * rounded
            if self.attention.expands_keys and sizes.keys < sizes.queries:
                made += 2 * b * sizes.queries
            return Operation(keeps, (Moment(made),), leaves)
        # Keys and values are repeated for each head of the queries.
        if self.attention.kind == "sdpa":
            keeps = 4 * b * sizes.queries + 4 * sizes.heads + b * self.row
            return Operation(keeps, (Moment(3 * b * sizes.queries),), leaves)
        return self._eager(leaves)

    def _eager(self, leaves: float) -> Operation:
        """The scores of a row, of all heads: with a cap its tanh, probabilities in fp32 and in b bytes (Gemma 2), whose
        gradients in fp32 are two in backward; with sinks probabilities in b bytes and the place of each maximum."""
        b, sizes = self.itemsize, self.decoder
        scores = self.row * sizes.heads
        keeps = 4 * b * sizes.queries
        if sizes.sinks:
            keeps += b * (scores + sizes.heads) + 8 * sizes.heads
            # In forward with the masked scores, those with the sinks, and those less their maximum.
            return Operation(keeps, (Moment(2 * b * scores),), leaves, 2 * b * scores)
        copy = b * scores if b < 4 else 0
        of_scores = 4 * scores + copy + (b * scores if sizes.caps_scores else 0)
        # The CPU widens scores for its softmax, beside what that makes.
        widened = 2 * 4 * scores + copy if self.device == "cpu" else 0
        backward = (Moment(8 * scores - copy), Moment((b + 4) * scores))
        return Operation(keeps + of_scores, backward, leaves, max(0, widened - of_scores))

    def gates(self) -> Operation:
        """act(gate) up: gate, up, act(gate), of which liger-kernel keeps none and whose gradients it writes over gate
        and up. In backward the product's gradient becomes those of act(gate) and up; of one linear for both, they
        become one tensor when what is kept is gone."""
        b, inner = self.itemsize, self.decoder.inner
        if self.fused_mlp:
            return Operation(2 * b * inner, (Moment(0),), 2 * b * inner)
        return Operation(3 * b * inner, (Moment(2 * b * inner),), 2 * b * inner)


def attention_half(run: BlockRun) -> list[Operation]:
    """From the input of a block to what is added to it."""
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
    if run.ranks.o or run.trains_base:
        output = output._replace(keeps=output.keeps - run.itemsize * sizes.queries)  # It is attention's output.
    operations += [run.rotary(), run.attends(), output]
    return [*operations, run.norm(sizes.hidden)] if sizes.norms_after else operations


def mlp_half(run: BlockRun) -> list[Operation]:
    """From there to what the block adds to that; a dense MLP."""
    sizes = run.decoder
    if sizes.fused_linears:
        read = [Linear("gate_up_proj", 2 * sizes.inner, sizes.mlp_bias, output_is_kept=True)]
    else:
        names = ("gate_proj", "up_proj")
        read = [Linear(name, sizes.inner, sizes.mlp_bias, output_is_kept=True) for name in names]
    down = run.linears(sizes.inner, [Linear("down_proj", sizes.hidden, sizes.mlp_bias)], made=True)
    operations = [run.norm(sizes.hidden), run.linears(sizes.hidden, read, made=True), run.gates(), down]
    return [*operations, run.norm(sizes.hidden)] if sizes.norms_after else operations
