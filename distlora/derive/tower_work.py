"""Trace the vision tower of a full-size model on the meta device: the memory of its activations, and its operations.

No weight is read and nothing is computed. Integers that decide shapes (grids of patches) stay on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from distlora.architecture.images import ImageLayout, TowerWork
from distlora.derive.memory import LiveTensors
from distlora.model.images import attend_fast

_SIDES = (224, 448)
"""Sides of the traced square images, in pixels: two give the terms that grow with the tokens and with their square."""
_MADE_OR_MOVED = (
    torch.ops.aten._to_copy.default,
    torch.ops.aten.arange.default,
    torch.ops.aten.arange.start,
    torch.ops.aten.arange.start_step,
)
"""Operations that leave integers on the CPU here, whatever device they name."""


class _LiveBytes(LiveTensors):
    """Count storages on the meta device and copies of pixels. Integers that decide shapes stay on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in _places(index)])
        if func in _MADE_OR_MOVED and not any(tensor.is_meta or tensor.is_floating_point() for tensor in tensors):
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        elif any(tensor.is_meta for tensor in tensors) and "copy" not in func.name():
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs or {}))
        taken = {tensor.untyped_storage()._cdata for tensor in tensors}
        result = func(*args, **(kwargs or {}))
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        for tensor in made:
            if (tensor.is_meta or tensor.is_floating_point()) and tensor.untyped_storage()._cdata not in taken:
                self.note(tensor)
        return result


def _places(index: Tensor | None) -> Sequence[Tensor | None]:
    """Return an index as indices that the meta device knows: a mask as the places that it chooses."""
    if index is None or index.dtype is not torch.bool or index.is_meta:
        return [index]
    return index.nonzero().unbind(1)


class _FusedAttention(TorchFunctionMode):
    """Attend without scores in memory, as fused kernels do; the meta device would make them."""

    flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        self.flops += 4 * named["query"].numel() * named["key"].shape[-2]
        return torch.empty_like(named["query"])


def num_features(features: Any) -> int:
    """Return the number of features of images."""
    pooled = features.pooler_output
    parts = [pooled] if isinstance(pooled, Tensor) else pooled
    return sum(part.numel() // part.shape[-1] for part in parts)


def traced_work(hf_model: Any, layout: ImageLayout, decoder: str, processor: Any) -> tuple[TowerWork, ...]:
    """Return the work of a square image of each of _SIDES for transformers' full-size model on the meta device.

    `processor`: transformers' image processor. Empty for a tower that decides shapes by pixels, which meta has not; the
    plan then names it as not counted.
    """
    merger = hf_model.get_submodule(layout.merger)
    attend_fast(merger.requires_grad_(False), hf_model.get_submodule(decoder))
    traced = []
    for side in _SIDES:
        # Not black: some processors fill up with images of zeros, which their towers leave out.
        made = processor(np.full((side, side, 3), 200, np.uint8), return_tensors="pt")
        image = {name: torch.as_tensor(np.asarray(value)) for name, value in made.items() if name in layout.names}
        peaks: dict[torch.dtype, int] = {}
        for dtype in (torch.float32, torch.bfloat16):
            merger.to(dtype)
            sent = {n: t.to(dtype) if t.is_floating_point() else t for n, t in image.items()}
            live, attention = _LiveBytes([]), _FusedAttention()
            try:
                with torch.no_grad(), FlopCounterMode(display=False) as counter, attention, live:
                    tokens = num_features(merger.get_image_features(**sent, return_dict=True))
            except RuntimeError:  # NotImplementedError too, which is one.
                return ()
            peaks[dtype] = live.peak
        flops = counter.get_total_flops() + attention.flops
        numel = sum(tensor.numel() for tensor in sent.values() if tensor.is_floating_point())
        traced.append(TowerWork(side * side, tokens, numel, peaks[torch.float32], peaks[torch.bfloat16], flops))
    return tuple(traced)
