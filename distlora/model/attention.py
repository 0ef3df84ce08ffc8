"""Variable-length attention over packed sequences: each document attends to itself, without masks or host syncs.

transformers' decoders pass a 4-D attention_mask to every layer unchanged (masking_utils._preprocess_mask_arguments), so
the documents travel as that mask: `Documents.starts`, int32, which the layer wrapper slices by rows. The attention
function registered here takes int32 for documents; anything else (generation) goes to SDPA. On the CPU the operation is
`attend_on_cpu`, or with train.compile attention.cpp's.

Letters: B rows, T tokens per row, D starts per row, H query heads, K key and value heads, E head size.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distlora.architecture.shapes import EXTRA, scores_at_once, tile_length, tiles
from distlora.architecture.spec import Architecture
from distlora.model.by_document import DocumentRows
from distlora.system.transfer import to_device
from distlora_kernels import attention as compiled_attention
from distlora_kernels.products import product

NAME = "distlora_varlen"
"""Name of the implementation in transformers' AttentionInterface."""
LONGEST = "max_length_q"
"""Keyword by which decoders pass on the longest document's length (transformers' FlashAttentionKwargs)."""


class Documents(NamedTuple):
    """Positions of the packed documents in a batch."""

    starts: Tensor
    """(B, 1, 1, D) int32: first position of each document of a row, padded with T, at least once."""
    longest: int
    """Tokens of the longest document. The host knows it, because kernel launches depend on it."""
    rows: DocumentRows | None = None
    """The same on the host, for modules that run each document alone."""

    @classmethod
    def of(cls, position_ids: Tensor) -> Documents:
        """Find the documents from positions (B, T) on the CPU that restart at 0 with each document."""
        assert position_ids.device.type == "cpu", f"positions on {position_ids.device} would make the host wait"
        num_rows, length = position_ids.shape
        rows, starts = (position_ids == 0).nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=num_rows)
        assert bool((position_ids[:, 0] == 0).all()), "a row begins within a document"
        padded = torch.full((num_rows, int(counts.max()) + 1), length, dtype=torch.int32)
        padded[rows, torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]] = starts.int()
        return cls(padded[:, None, None, :], int(padded.diff(dim=1).max()))

    @property
    def is_packed(self) -> bool:
        """True if a row has more than one document."""
        return self.starts.shape[-1] > 2  # Each row ends with T.

    def to(self, device: torch.device) -> Documents:
        """Return the documents with their starts on `device`."""
        return self._replace(starts=to_device(self.starts, device))


VarlenOp = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int | None], Tensor]
"""Causal attention within each document of flattened rows: (query (B T, H, E), key and value (B T, K, E), cu_seqlens,
longest, scale, left) -> (B T, H, E).

cu_seqlens (documents + 1,) int32 from 0 to B T may contain empty documents; `longest` is the longest one's length. A
token sees itself and `left` tokens before it, all for None.
"""


def reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float, left: int | None
) -> Tensor:
    """Define VarlenOp in plain torch, one document after the other. Reads cu_seqlens on the host."""
    outputs = []
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        assert 0 <= end - start <= longest, f"a document from {start} to {end}, the longest has {longest}"
        parts = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        one_query, one_key, one_value = parts
        groups = query.shape[1] // key.shape[1]
        one_key, one_value = (tensor.repeat_interleave(groups, dim=0) for tensor in (one_key, one_value))
        at = torch.arange(end - start, device=query.device)
        distance = at[:, None] - at[None, :]
        seen = (distance >= 0) if left is None else (distance >= 0) & (distance <= left)
        scores = (one_query @ one_key.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        outputs.append((weights @ one_value).transpose(0, 1))
    return torch.cat(outputs)


def from_torch(varlen_attn: Callable[..., Any], *, deterministic: bool) -> VarlenOp:
    """Wrap torch.nn.attention.varlen's function (torch 2.11 and later) as a VarlenOp.

    Its backward sums dQ with atomics unless torch.use_deterministic_algorithms is on when it runs
    (aten/src/ATen/native/transformers/cuda/attention_backward.cu: _flash_attention_backward). Its forward is
    deterministic (it splits keys in inference only). The switch is turned on for that one graph node: for a whole step
    it would refuse unrelated operations and require a cuBLAS workspace setting.
    """
    # torch 2.11 may lack the flag, and then needs as many key heads as query heads.
    groups_itself = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def op(
        query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float, left: int | None
    ) -> Tensor:
        options: dict[str, Any] = {}
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and groups_itself:
            options["enable_gqa"] = True
        elif groups > 1:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        window = (-1 if left is None else left, 0)  # (-1, 0) is torch's causal window; it must be a tuple.
        output: Tensor = varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=window, **options
        )
        if deterministic:
            deterministic_backward(output)
        return output

    return op


def deterministic_backward(output: Tensor) -> None:
    """Run the backward of the operation that made `output`, and no other, under torch.use_deterministic_algorithms."""
    node = output.grad_fn
    if node is None:
        return
    settings: Any = torch.utils.deterministic
    before: list[tuple[bool, bool, bool]] = []

    def enter(_grads: Any) -> None:
        enabled = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        before.append((enabled, warn_only, settings.fill_uninitialized_memory))
        torch.use_deterministic_algorithms(True)
        # The backward writes all that it allocates; filling it with NaN first is a debugging aid.
        settings.fill_uninitialized_memory = False

    def leave(_grad_inputs: Any, _grad_outputs: Any) -> None:
        enabled, warn_only, settings.fill_uninitialized_memory = before.pop()
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)

    node.register_prehook(enter)
    node.register_hook(leave)


def use(decoder: nn.Module, op: VarlenOp, *, name: str = NAME) -> None:
    """Make a transformers decoder attend through `op` wherever documents are its mask."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, _attention_function(op))
    # Without documents, masks are SDPA's; documents, a 4-D mask, never come there.
    AttentionMaskInterface.register(name, sdpa_mask)
    decoder.set_attn_implementation(name)  # type: ignore[operator]


def _attention_function(op: VarlenOp) -> Callable[..., tuple[Tensor, Tensor | None]]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        dropout: float = 0.0,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: query (B, H, T, E), key and value (B, K, T, E) -> (B, T, H, E)."""
        if attention_mask is None or attention_mask.dtype != torch.int32:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap, **kwargs
            )
        assert softcap is None, f"softcap={softcap} is not computed here"
        assert dropout == 0.0, f"dropout={dropout} is not computed here"
        num_rows, length = query.shape[0], query.shape[2]
        # Full fine-tuning computes under autocast, which leaves normalized and rotated queries and keys in fp32 and
        # does not know this op. SDPA gets all of them in the dtype of the values.
        tensors = (query.to(value.dtype), key.to(value.dtype), value)
        # Latent attention has narrower values. More columns of zeros change no score and no other column.
        columns = max(query.shape[-1], value.shape[-1])
        flat_query, flat_key, flat_value = (
            nn.functional.pad(tensor, (0, columns - tensor.shape[-1])).transpose(1, 2).flatten(0, 1)
            if tensor.shape[-1] < columns
            else tensor.transpose(1, 2).flatten(0, 1)
            for tensor in tensors
        )
        # Flash attention takes 1 for decoding, where it expects as many tokens as documents.
        longest = max(2, kwargs.get(LONGEST, length))
        # If no document exceeds the window, plain causal attention has the faster kernel.
        left = None if sliding_window is None or sliding_window >= longest else sliding_window - 1
        bounds = cu_seqlens(attention_mask, length)
        output = op(flat_query, flat_key, flat_value, bounds, longest, scaling, left)[..., : value.shape[-1]]
        return output.view(num_rows, length, *output.shape[1:]), None

    return attend


def cu_seqlens(starts: Tensor, length: int) -> Tensor:
    """Return (B D,) int32 document bounds in the flattened rows, from starts (B, 1, 1, D) and T = `length`.

    The T that ends each row's starts is where the next row begins: an empty document stands between them.
    """
    if starts.shape[0] == 1:  # Common case of one row: nothing to launch.
        return starts.flatten()
    firsts = torch.arange(0, starts.shape[0] * length, length, dtype=torch.int32, device=starts.device)
    return (starts[:, 0, 0] + firsts[:, None]).flatten()


class AttentionChoice(NamedTuple):
    """Attention implementation of a run, chosen at its start."""

    op: VarlenOp | None
    """None: as the family attends without documents (SDPA or eager, with masks)."""
    note: str


def choose(
    architecture: Architecture,
    *,
    wanted: Literal["auto", "sdpa"],
    device: torch.device,
    dtype: torch.dtype,
    deterministic: bool,
    compiled: bool = False,
) -> AttentionChoice:
    """Choose variable-length attention if device, dtype and model allow it; otherwise give the reason.

    `dtype` is the compute dtype, `wanted` train.attention, `compiled` train.compile.
    """
    dense = "attention goes through dense masks, whose memory grows with rows x length squared"
    heads = sorted({kind.heads for kind in architecture.kinds if kind.heads is not None})
    unfit = [size for _, _, size in heads if size % 8 or size > 256]
    if architecture.attention != "sdpa" or not architecture.varlen:
        return AttentionChoice(
            None,
            f"{dense}: attention of {architecture.model_type} is more than a softmax over a causal window (caps, "
            "sinks, selected keys), which no such kernel here computes",
        )
    if wanted == "sdpa":
        return AttentionChoice(None, f"{dense}: train.attention=sdpa")
    if device.type == "cpu":
        if dtype != torch.bfloat16:
            return AttentionChoice(None, f"{dense}: on the CPU {dtype} uses transformers' attention, the reference")
        by_products = "attention is computed per document, by matrix products"
        if not compiled:
            return AttentionChoice(attend_on_cpu, by_products)
        for _, key_heads, size in heads:
            reason = compiled_attention.unsupported_reason(key_heads, size)
            if reason is not None:
                return AttentionChoice(attend_on_cpu, f"{by_products}; it is not compiled: {reason}")
        return AttentionChoice(
            compiled_attention.attend, "attention is computed per document, compiled for this processor"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        return AttentionChoice(None, f"{dense}: flash attention computes in 16 bits, train.dtype is {dtype}")
    if unfit or not heads:
        these = f"these have {unfit[0]}" if unfit else "these are unusual"
        return AttentionChoice(None, f"{dense}: flash attention takes heads of 8, 16, ... 256 columns, {these}")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return AttentionChoice(None, f"{dense}: flash attention needs compute capability 8.0, {device} is older")
    if not torch.backends.cuda.is_flash_attention_available():
        return AttentionChoice(None, f"{dense}: torch {torch.__version__} was built without flash attention")
    from torch.nn.attention.varlen import varlen_attn

    order = "its backward in a fixed order" if deterministic else "its backward in no fixed order"
    op = from_torch(varlen_attn, deterministic=deterministic)
    return AttentionChoice(op, f"attention is computed per document (torch.nn.attention.varlen), {order}")


class QueryTile(NamedTuple):
    """Queries of a document, from `first` to `last`, and the keys that they see."""

    queries: slice
    keys: slice

    @property
    def num_queries(self) -> int:
        """Return the number of queries."""
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        """Return the number of keys."""
        return self.keys.stop - self.keys.start


def attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float, left: int | None
) -> Tensor:
    """Attend as a VarlenOp: query (T, H, E), key and value (T, K, E), bf16 -> (T, H, E) bf16, contiguous."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16, f"{query.dtype}, {key.dtype}, {value.dtype}"
    assert scale > 0, f"scores times {scale}"
    output: Tensor = _AttendByProducts.apply(
        query, key, value, tuple(cu_seqlens.tolist()), scale * math.log2(math.e), left
    )
    return output


class _AttendByProducts(torch.autograd.Function):
    """Autograd function of `attend_on_cpu`, by matrix products; torch's flash attention is four times as slow there.

    Queries go in tiles, and each tile meets all keys that it may see at once: keys of other documents, beyond the
    diagonal or before the window are in no product, except in the tile's corner. Query heads that share a key head are
    rows of one matrix. Backward keeps query, key, value, the output and one number per query and head.

    The library rounds products to bf16, and a score of 20 rounded to bf16 makes a weight that is 4 % off. So scores are
    rounded where they are small: a first product gives each query's largest score m, a second one q.k - m, and in
    backward q.k - l with l the logarithm of the sum, which is near 0 wherever the weight is not. Two more columns make
    the difference within the product, in fp32: -l and its bf16 rounding error, beside ones. dO.v - D likewise, with D =
    dO.O; the rest of D is subtracted exactly (`_softmax_backward_data`), because the weights of a query that sees one
    token cancel to the last bit only so. tests/kernels/test_attention_cpu.py measures it against fp64.

    Letters: T tokens of all documents, L of one, N keys of a tile, n queries of a tile, G = H / K, M = G n rows of a
    product, W = E + 2. `scale` is in units of powers of 2.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], scale: float, left: int | None
    ) -> Tensor:
        work = _ScoreMemory(query, key, bounds, left)
        output = query.new_empty(query.shape)
        sums = query.new_empty(work.keys, work.groups, len(query), dtype=torch.float32)
        """l of each query and head (K, G, T), in the unit of q.k."""
        for document in work.documents:
            keys, values = work.widened(key[document]), value[document].transpose(0, 1)
            queries, outputs = work.grouped(query[document]), work.grouped(output[document])
            for tile, heads in work.tiles(document):
                rows, seen = work.rows(queries[heads, :, tile.queries]), keys[heads, tile.keys].transpose(1, 2)
                scores = work.product(rows, seen, 0)
                work.hide(scores, tile)
                most = _largest(scores)
                torch.neg(most, out=rows[..., -EXTRA])
                product(rows, seen, factor=scale, out=scores)
                weights = work.cut(scores.exp2_(), tile)
                total = weights.sum(-1, dtype=torch.float32)
                attended = product(weights, values[heads, tile.keys])
                torch.div(work.by_group(attended), work.by_group(total[..., None]), out=outputs[heads, :, tile.queries])
                tile_result = sums[:, :, document][heads, :, tile.queries]
                torch.add(work.by_group(most), work.by_group(total.log2_()), alpha=1 / scale, out=tile_result)
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.bounds, ctx.scale, ctx.left = bounds, scale, left
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, sums = ctx.saved_tensors
        work, scale = _ScoreMemory(query, key, ctx.bounds, ctx.left), ctx.scale
        plain = scale / math.log2(math.e)
        d_query, d_key, d_value = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
        for document in work.documents:
            keys, values = work.widened(key[document]), work.widened(value[document])
            queries, outputs, d_outputs, d_queries = (
                work.grouped(tensor[document]) for tensor in (query, output, d_output, d_query)
            )
            d_keys, d_values = query.new_zeros(2, *keys[..., :-EXTRA].shape, dtype=torch.float32)
            for tile, heads in work.tiles(document):
                place = (heads, slice(None), tile.queries)
                rows = work.rows(queries[place], minus=sums[:, :, document][place])
                d_rows = work.rows(d_outputs[place], minus=(d_outputs[place].float() * outputs[place]).sum(-1))
                seen = keys[heads, tile.keys]
                weights = work.product(rows, seen.transpose(1, 2), 0, scale=scale)
                work.cut(weights.exp2_(), tile)
                d_scores = work.product(d_rows, values[heads, tile.keys].transpose(1, 2), 1)
                torch._softmax_backward_data(d_scores, weights, -1, d_scores.dtype, grad_input=d_scores)
                d_values[heads, tile.keys] += product(weights.transpose(1, 2), d_rows[..., :-EXTRA])
                d_keys[heads, tile.keys] += product(d_scores.transpose(1, 2), rows[..., :-EXTRA])
                tile_result = work.by_group(product(d_scores, seen[..., :-EXTRA]))
                torch.mul(tile_result, plain, out=d_queries[place])
            torch.mul(d_keys.transpose(0, 1), plain, out=d_key[document])
            d_value[document].copy_(d_values.transpose(0, 1))
        return d_query, d_key, d_value, None, None, None


class _ScoreMemory:
    """Tiles of documents, and memory for the scores of one tile at a time."""

    def __init__(self, query: Tensor, key: Tensor, bounds: tuple[int, ...], left: int | None) -> None:
        self.keys, self.groups = key.shape[1], query.shape[1] // key.shape[1]
        self.documents = [slice(start, end) for start, end in itertools.pairwise(bounds) if end > start]
        self.left = left
        lengths = [document.stop - document.start for document in self.documents]
        self.size = scores_at_once(max(lengths, default=1), self.groups, self.keys)
        self._new = query.new_empty
        self._scores: dict[int, Tensor] = {}
        most = max((tile_length(length, self.groups) for length in set(lengths)), default=1)
        self._hidden = torch.full((most, most), -torch.inf, dtype=query.dtype)
        self._later = self._hidden.triu(1)

    def tiles(self, document: slice) -> Iterator[tuple[QueryTile, slice]]:
        """Yield tiles, each with as many key heads as fit."""
        length = document.stop - document.start
        for start, end, first_key in tiles(length, tile_length(length, self.groups), self.left):
            tile = QueryTile(slice(start, end), slice(first_key, end))
            at_once = max(1, self.size // (self.groups * tile.num_queries * tile.num_keys))
            for head in range(0, self.keys, at_once):
                yield tile, slice(head, min(self.keys, head + at_once))

    def grouped(self, tensor: Tensor) -> Tensor:
        """View (L, H, E) as (K, G, L, E)."""
        return tensor.unflatten(1, (self.keys, self.groups)).permute(1, 2, 0, 3)

    def by_group(self, tensor: Tensor) -> Tensor:
        """View (K, M, ...) as (K, G, n, ...)."""
        return tensor.unflatten(1, (self.groups, -1))

    def widened(self, tensor: Tensor) -> Tensor:
        """Append ones to (L, K, E): (K, L, W)."""
        length, keys, size = tensor.shape
        wide = self._new(keys, length, size + EXTRA)
        wide[..., :size].copy_(tensor.transpose(0, 1))
        wide[..., size:].fill_(1)
        return wide

    def rows(self, tensor: Tensor, *, minus: Tensor | None = None) -> Tensor:
        """Arrange (K, G, n, E) as (K, M, W). The product with widened columns then subtracts `minus` (K, G, n) fp32."""
        heads, groups, length, size = tensor.shape
        rows = self._new(heads, groups, length, size + EXTRA)
        rows[..., :size].copy_(tensor)
        if minus is None:
            rows[..., size:].zero_()
        else:
            rows[..., size].copy_(minus).neg_()
            torch.add(minus, rows[..., size], out=rows[..., size + 1])
            rows[..., size + 1].neg_()
        return rows.flatten(1, 2)

    def product(self, rows: Tensor, columns: Tensor, which: int, *, scale: float = 1.0) -> Tensor:
        """Multiply rows (K, M, W) by columns (K, W, N) into buffer number `which`: (K, M, N)."""
        if which not in self._scores:
            self._scores[which] = self._new(self.size)
        shape = (*rows.shape[:2], columns.shape[2])
        out = self._scores[which][: math.prod(shape)].view(shape)
        return product(rows, columns, factor=scale, out=out)

    def hide(self, scores: Tensor, tile: QueryTile) -> None:
        """Set scores (K, M, N) of invisible keys to -inf.

        A NaN score stays NaN, which takes half the time of overwriting. Its value is NaN too in a run, and so is 0
        times it.
        """
        n, by_group = tile.num_queries, self.by_group(scores)
        by_group[..., -n:].add_(self._later[:n, :n])
        if (before := self._before_window(tile)) is not None:
            width = min(n, tile.num_keys)
            by_group[..., :width].add_(self._hidden[:n, :width].tril(before))

    def cut(self, weights: Tensor, tile: QueryTile) -> Tensor:
        """Zero the weights (K, M, N) of invisible keys."""
        matrices = weights.view(-1, tile.num_queries, tile.num_keys)
        matrices.tril_(tile.num_keys - tile.num_queries)
        if (before := self._before_window(tile)) is not None:
            matrices.triu_(before + 1)
        return weights

    def _before_window(self, tile: QueryTile) -> int | None:
        """Return the last diagonal whose keys are before the window of its queries; None if there is none."""
        if self.left is None:
            return None
        diagonal = tile.queries.start - self.left - tile.keys.start - 1
        return diagonal if diagonal > -tile.num_queries else None


def _largest(scores: Tensor) -> Tensor:
    """Return the maximum of bf16 along the last dimension, like amax in a fifth of its time.

    Read as integers, positive numbers keep their order and negative ones reverse it.
    """
    bits = scores.view(torch.int16)
    highest = bits.amax(-1)
    return torch.where(highest >= 0, highest, bits.amin(-1)).view(scores.dtype)
