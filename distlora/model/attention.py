"""Variable-length attention over packed sequences: each document attends to itself, without masks or host syncs.

On the CPU the operation is attention_cpu.py's, or with train.compile attention.cpp's.

transformers' decoders pass a 4-D attention_mask to every layer unchanged (masking_utils._preprocess_mask_arguments), so
the documents travel as that mask: `Documents.starts`, int32. The layer wrapper slices it by rows and recomputation gets
it again, like any mask. The attention function registered here tells the two apart by dtype: int32 means documents,
anything else (generation, whose masks transformers builds as for SDPA) goes to SDPA.

Letters: B rows, T tokens per row, D starts per row, H query heads, K key and value heads, E head size.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from distlora.architecture.families import Family
from distlora.model import attention_cpu
from distlora_kernels import attention as compiled_attention

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

    def to(self, device: torch.device) -> Documents:
        """Return the documents with their starts on `device`."""
        return Documents(self.starts.to(device, non_blocking=True), self.longest)


def masks_by_layer_type(decoder: nn.Module, position_ids: Tensor) -> dict[str, Tensor | None]:
    """Build masks by layer type that separate documents, for decoders that ignore positions (B, T) in their masks.

    It calls transformers' functions.
    """
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config: Any = decoder.config
    weight = decoder.get_input_embeddings().weight  # type: ignore[operator]
    # Only its dtype, device and first two dimensions are read.
    embeds = torch.empty((*position_ids.shape, 0), dtype=weight.dtype, device=position_ids.device)
    makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    return {
        kind: makers[kind](
            config=config, inputs_embeds=embeds, attention_mask=None, cache=None, position_ids=position_ids
        )
        for kind in sorted(set(config.layer_types))
    }


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
        flat_query, flat_key, flat_value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors)
        # Flash attention takes 1 for decoding, where it expects as many tokens as documents.
        longest = max(2, kwargs.get(LONGEST, length))
        # If no document exceeds the window, plain causal attention has the faster kernel.
        left = None if sliding_window is None or sliding_window >= longest else sliding_window - 1
        bounds = cu_seqlens(attention_mask, length)
        output = op(flat_query, flat_key, flat_value, bounds, longest, scaling, left)
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


class Choice(NamedTuple):
    """Attention implementation of a run, chosen at its start."""

    op: VarlenOp | None
    """None: as the family attends without documents (SDPA or eager, with masks)."""
    note: str


def choose(
    family: Family,
    hf_config: Any,
    *,
    wanted: Literal["auto", "sdpa"],
    device: torch.device,
    dtype: torch.dtype,
    deterministic: bool,
    compiled: bool = False,
) -> Choice:
    """Choose variable-length attention if device, dtype and model allow it; otherwise give the reason.

    `hf_config` is the decoder's, `dtype` the compute dtype, `wanted` train.attention, `compiled` train.compile.
    """
    dense = "attention goes through dense masks, whose memory grows with rows x length squared"
    head_size = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    if family.attention != "sdpa":
        return Choice(
            None, f"{dense}: {family.model_type} caps its scores or has attention sinks, which no such kernel here does"
        )
    if wanted == "sdpa":
        return Choice(None, f"{dense}: train.attention=sdpa")
    if device.type == "cpu":
        if dtype != torch.bfloat16:
            return Choice(None, f"{dense}: on the CPU {dtype} uses transformers' attention, the reference")
        by_products = "attention runs over each document's length, in products of matrices"
        if not compiled:
            return Choice(attention_cpu.attend, by_products)
        key_heads = getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads
        reason = compiled_attention.unsupported_reason(key_heads, head_size)
        if reason is not None:
            return Choice(attention_cpu.attend, f"{by_products}; it is not compiled: {reason}")
        return Choice(
            compiled_attention.attend, "attention runs over each document's length, compiled for this processor"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice(None, f"{dense}: flash attention computes in 16 bits, train.dtype is {dtype}")
    if head_size % 8 or head_size > 256:
        return Choice(None, f"{dense}: flash attention takes heads of 8, 16, ... 256 columns, these have {head_size}")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return Choice(None, f"{dense}: flash attention needs compute capability 8.0, {device} is older")
    if not torch.backends.cuda.is_flash_attention_available():
        return Choice(None, f"{dense}: torch {torch.__version__} was built without flash attention")
    from torch.nn.attention.varlen import varlen_attn

    order = "its backward in a fixed order" if deterministic else "its backward in no fixed order"
    op = from_torch(varlen_attn, deterministic=deterministic)
    return Choice(op, f"attention runs over each document's length (torch.nn.attention.varlen), {order}")
