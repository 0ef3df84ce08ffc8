"""Images among the tokens: transformers' own module computes their features and puts them into the decoder's input.

That module, the merger, is called instead of the decoder, whose layers are ours. The tower runs on each image alone, so
that no feature depends on what else is in the batch, and keeps nothing for backward. No collective depends on images.

Letters: B rows, T tokens per row.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distlora.architecture.images import ImageLayout
from distlora.model.layer_wrapper import Reference
from distlora.system.transfer import to_device

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Names by which mergers take the tokens that are a part of an image."""
ProcessedImage = Mapping[str, Tensor]
"""What the image processor makes of one image: pixel_values, image_grid_thw, ..."""


def merger_path(hf_model: nn.Module, decoder: str) -> str:
    """Return the path of the innermost module around the decoder that takes images; empty without one.

    The whole model does not count: its forward has the LM head.
    """
    path = decoder.rpartition(".")[0]
    while path:
        module = hf_model.get_submodule(path)
        takes = inspect.signature(module.forward).parameters
        if hasattr(module, "get_image_features") and "mm_encoder_outputs" in takes:
            return path
        path = path.rpartition(".")[0]
    return ""


def image_names(merger: Any) -> tuple[str, ...]:
    """Return the tensors of an image that the tower takes."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes = inspect.signature(merger.get_image_features).parameters.values()
    return tuple(parameter.name for parameter in takes if parameter.kind in kinds)


def attend_fast(merger: nn.Module, decoder: nn.Module) -> None:
    """Let the towers of a merger attend by SDPA where they can: eager scores grow with the square of the patches."""
    from transformers import PreTrainedModel

    others = {merger, *decoder.modules()}
    for module in merger.modules():
        if isinstance(module, PreTrainedModel) and module not in others and module._supports_sdpa:
            module.set_attn_implementation("sdpa")


def tower_parameters(merger: nn.Module, decoder: nn.Module) -> dict[str, nn.Parameter]:
    """Return a merger's parameters outside of its decoder (tower, projector), by their paths in the merger."""
    inside = set(decoder.parameters())
    return {name: parameter for name, parameter in merger.named_parameters() if parameter not in inside}


def frozen_merger(hf_model: nn.Module, path: str, decoder: nn.Module) -> nn.Module:
    """Return the merger at a path, whose towers attend fast and are not trained."""
    merger = hf_model.get_submodule(path)
    attend_fast(merger, decoder)
    for parameter in tower_parameters(merger, decoder).values():
        parameter.requires_grad_(False)
    return merger


@dataclass(frozen=True, slots=True)
class Images:
    """Images of a batch, in the order of their placeholder tokens."""

    tensors: Sequence[ProcessedImage]
    """On the CPU: each image's go to the device when the tower runs on it."""
    is_image: Tensor
    """(B, T) int64: 1 at the placeholders."""
    grid: Tensor | None
    """(3, B, T) int64 positions in time, height and width; None where positions have one dimension."""

    @classmethod
    def of(
        cls,
        rows: Sequence[Iterable[ProcessedImage]] | None,
        is_image: Tensor | None,
        input_ids: Tensor,
        position_ids: Tensor,
        merger: nn.Module | None,
        device: torch.device,
    ) -> Images | None:
        """Return the images of a batch, whose tensors are on the CPU, for `device`; None if it has none.

        `rows`: the images of each row, in order; each row is read once. `is_image` (B, T) bool.
        """
        tensors = [image for row in rows or () for image in row]
        if not tensors:
            return None
        assert merger is not None, "images for a model that was built for text"
        assert is_image is not None, "images without their placeholders"
        types = is_image.long()
        grid = grid_positions(merger, input_ids, position_ids, types, tensors)
        return cls(tensors, to_device(types, device), None if grid is None else to_device(grid, device))

    def arguments(
        self,
        merger: Any,
        decoder: Any,
        layout: ImageLayout,
        position_ids: Tensor,
        reference: Reference | None = None,
        **known: Any,
    ) -> dict[str, Any]:
        """Return the merger's arguments for text positions (B, T); `known`: those that the decoder would get.

        `reference` is given what the decoder adds between its layers.
        """
        takes = inspect.signature(merger.forward).parameters
        features = features_of(merger, self.tensors)
        if reference is not None and layout.deepstack:
            reference.is_image = self.is_image == 1
            reference.features = [_rows(level) for level in features.deepstack_features]
        if layout.ahead == "ours":
            dtype = decoder.get_input_embeddings().weight.dtype
            known["attention_mask"] = masks_that_see_ahead(decoder.config, position_ids, self.is_image == 1, dtype)
        elif layout.ahead == "transformers":
            known["attention_mask"] = None  # Documents in its place would hide that images see ahead.
        known |= {"mm_encoder_outputs": {"image": features}}
        known |= {name: self.is_image for name in TOKEN_TYPES if name in takes}
        if self.grid is not None:
            position_ids = torch.cat([position_ids[None], self.grid])
        return known | {"position_ids": position_ids}


@torch.no_grad()
def features_of(merger: Any, tensors: Sequence[ProcessedImage]) -> Any:
    """Return the features of images as one call of `get_image_features` does, computed one image at a time."""
    tower = next(parameter for parameter in merger.parameters() if parameter.is_floating_point())
    features = []
    for image in tensors:
        cast = {
            name: to_device(t.to(tower.dtype) if t.is_floating_point() else t, tower.device)
            for name, t in image.items()
        }
        features.append(merger.get_image_features(**cast, return_dict=True))
    joined = copy.copy(features[0])
    joined.pooler_output = _join([one.pooler_output for one in features])
    if (levels := getattr(features[0], "deepstack_features", None)) is not None:
        joined.deepstack_features = [_join([one.deepstack_features[i] for one in features]) for i in range(len(levels))]
    return joined


def _join(parts: Sequence[Any]) -> Any:
    if not isinstance(parts[0], Tensor):  # One tensor per image.
        return type(parts[0])(tensor for part in parts for tensor in part)
    if len({part.shape[1:] for part in parts}) > 1:  # (1, features, H) each, of several sizes.
        parts = [part.flatten(0, -2) for part in parts]
    return torch.cat(list(parts))


def _rows(features: Any) -> Tensor:
    """Return the features of all images as (features, H)."""
    parts = [features] if isinstance(features, Tensor) else features
    return torch.cat([part.flatten(0, -2) for part in parts])


def masks_that_see_ahead(config: Any, position_ids: Tensor, is_image: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the mask (B, 1, T, T) of each type of layer for packed documents whose images see their own later tokens.

    `is_image` (B, T) bool. transformers (5.24) makes the mask of windows from positions that restart with each
    document, and so takes the first document's images for those of all others.
    """
    documents = (position_ids == 0).cumsum(dim=1)
    begins = is_image & ~nn.functional.pad(is_image, (1, 0))[:, :-1]
    numbers = torch.where(is_image, begins.cumsum(dim=1), 0)
    at = torch.arange(position_ids.shape[1], device=position_ids.device)
    same_image = (numbers[:, :, None] == numbers[:, None]) & is_image[:, :, None]
    full = (documents[:, :, None] == documents[:, None]) & ((at[:, None] >= at) | same_image)
    masks = {"full_attention": full}
    if (window := getattr(config, "sliding_window", None)) is not None:
        masks["sliding_attention"] = full & (at[:, None] < at + window)
    if config._attn_implementation == "eager":
        lowest = torch.finfo(dtype).min
        masks = {kind: torch.where(mask, 0.0, lowest).to(dtype) for kind, mask in masks.items()}
    return {kind: mask[:, None] for kind, mask in masks.items() if kind in config.layer_types}


def grid_positions(
    merger: Any, input_ids: Tensor, position_ids: Tensor, types: Tensor, tensors: Sequence[ProcessedImage]
) -> Tensor | None:
    """Return `Images.grid` of tensors on the CPU, document by document, by the model's own rule; None without one.

    `types` (B, T) int64: 1 at the placeholders.
    """
    rule = getattr(merger, "get_rope_index", None)
    if rule is None:
        return None
    takes = inspect.signature(rule).parameters
    images = iter(tensors)
    grid = position_ids[None].repeat(3, 1, 1)
    for row in range(len(input_ids)):
        starts = (position_ids[row] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], input_ids.shape[1]], strict=True):
            document = (slice(row, row + 1), slice(start, end))
            is_image = types[document]
            # An image is a stretch of placeholders: the rule reads them so.
            count = int((is_image.diff(dim=1, prepend=torch.zeros_like(is_image[:, :1])) == 1).sum())
            if count == 0:
                continue
            these = [next(images) for _ in range(count)]
            sizes = {name: torch.cat([image[name] for image in these]) for name in these[0] if name in takes}
            positions, _ = rule(input_ids[document], mm_token_type_ids=is_image, **sizes)
            grid[:, row, start:end] = positions[:, 0]
    return grid
