"""Map a checkpoint's tensors to a model's parameters by transformers' own conversion rules, without reading a tensor.

transformers renames tensors while it loads (Gemma 3: language_model.model.x -> model.language_model.x), adds or drops
the base model's prefix, and merges some (Mixtral's experts). The same rules give each parameter as a list of whole
tensors in flat order. A rule that needs more (splits, transpositions, permutations) is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distlora.architecture.safetensors_headers import Segment
from distlora.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLayout:
    """The facts that decide where the parameters of a transformers model lie in its checkpoint."""

    names: Collection[str]
    """Every entry of the model's state_dict."""
    transforms: Sequence[Any]
    """transformers' WeightRenaming and WeightConverter objects for this model, in order."""
    base_model_prefix: str
    """Prefix that the names in a checkpoint of the bare decoder lack."""


@dataclass(frozen=True, slots=True)
class Source:
    """A parameter on disk: whole tensors, concatenated in flat order."""

    names: tuple[str, ...]
    """The tensors' names on disk."""
    segments: tuple[Segment, ...]
    shape: tuple[int, ...]
    """Shape of the parameter; of a single tensor its shape on disk."""


def layout_of(hf_model: PreTrainedModel) -> CheckpointLayout:
    """Return the layout of a model as transformers built it (meta device is enough), before any module is replaced."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return CheckpointLayout(
        names=frozenset(hf_model.state_dict()),
        transforms=tuple(get_model_conversion_mapping(hf_model)),
        base_model_prefix=hf_model.base_model_prefix,
    )


def find_sources(
    layout: CheckpointLayout, on_disk: Mapping[str, Segment], wanted: Collection[str]
) -> dict[str, Source]:
    """Return the tensors on disk of each `wanted` parameter, as from_pretrained finds them; absent ones are left out.

    Raises UserError with the operation's name if one needs more than renaming and merging of whole tensors.
    """
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    converters = {
        pattern: transform
        for transform in layout.transforms
        if isinstance(transform, WeightConverter)
        for pattern in transform.source_patterns
    }
    rename = _renamer(layout)
    collected: dict[str, dict[str, list[str]]] = {}
    # transformers merges in this order (experts.2 before experts.10).
    for name in sorted(on_disk, key=dot_natural_key):
        target, pattern = rename(name)
        if target in layout.names:
            collected.setdefault(target, {}).setdefault(pattern or "", []).append(name)
    sources = {}
    for target, by_pattern in collected.items():
        converter = next((converters[pattern] for pattern in by_pattern if pattern), None)
        if converter is None:
            if target in wanted:
                name = by_pattern[""][-1]  # Two names for one parameter: the last is what transformers ends with.
                sources[target] = Source((name,), (on_disk[name],), on_disk[name].shape)
            continue
        first, *others = converter.target_patterns
        if any(name in wanted for name in (target, *(target.replace(first, other) for other in others))):
            sources |= _merge(converter, target, by_pattern, on_disk)
    return {name: source for name, source in sources.items() if name in wanted}


def names_without_a_place(layout: CheckpointLayout, on_disk: Mapping[str, Segment], scope: str) -> list[str]:
    """Return weights and biases on disk under `scope` that transformers would drop.

    config.json then describes another model than the one that was saved. Tensors that only accompany a weight (its
    quantization, old rotary frequencies) are not included.
    """
    rename, left = _renamer(layout), []
    for name in on_disk:
        target, _ = rename(name)
        if name.endswith((".weight", ".bias")) and target.startswith(scope + ".") and target not in layout.names:
            left.append(name)
    return left


def _renamer(layout: CheckpointLayout) -> Callable[[str], tuple[str, str | None]]:
    """Return a function from a name on disk to (the model's name, the converter's pattern that matched)."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [transform for transform in layout.transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in layout.transforms if isinstance(transform, WeightConverter)]
    known = dict.fromkeys(layout.names, True)

    def rename(name: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, renamings, converters, layout.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], layout.base_model_prefix, known)
        return target, pattern

    return rename


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A merged tensor that does not exist yet: its shape, and the tensors on disk (name, segment) in flat order."""

    shape: tuple[int, ...]
    parts: tuple[tuple[str, Segment], ...]

    def cut(self, pieces: int) -> list[tuple[tuple[str, Segment], ...]] | None:
        """Return the parts of `pieces` equal pieces of the flat order; None if a border falls inside a part."""
        size = math.prod(self.shape) // pieces
        result: list[list[tuple[str, Segment]]] = []
        filled = size
        for part in self.parts:
            if filled == size:
                result.append([])
                filled = 0
            result[-1].append(part)
            filled += part[1].numel
            if filled > size:
                return None
        return [tuple(piece) for piece in result]


def _merge(
    converter: Any, target: str, by_pattern: Mapping[str, Sequence[str]], on_disk: Mapping[str, Segment]
) -> dict[str, Source]:
    """Apply a converter's operations to shapes and names."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    if len(converter.target_patterns) > 1:
        raise _refusal(converter, target, "fills several parameters from one")
    values = {
        pattern: [_Tensor(on_disk[name].shape, ((name, on_disk[name]),)) for name in names]
        for pattern, names in by_pattern.items()
    }
    for operation in converter.operations:
        # Exact classes: a subclass may do something else.
        if type(operation) is MergeModulelist and operation.dim == 0:
            values = {pattern: [_stack(tensors, target)] for pattern, tensors in values.items()}
        elif type(operation) is Concatenate:
            ordered = [tensor for pattern in converter.source_patterns for tensor in values.get(pattern, [])]
            joined = _concatenate(ordered, operation.dim)
            if joined is None:
                raise _refusal(converter, target, f"{operation!r} cuts through tensors")
            values = {"": [joined]}
        else:
            raise _refusal(converter, target, f"{operation!r} is more than renaming and merging whole tensors")
    (tensor,) = (tensor for tensors in values.values() for tensor in tensors)
    names, segments = zip(*tensor.parts, strict=True)
    dtypes = sorted({segment.dtype for segment in segments})
    if len(dtypes) > 1:
        raise UserError(
            f"{target} is put together from tensors of different types ({', '.join(dtypes)}); "
            "save the checkpoint in one type"
        )
    return {target: Source(names, segments, tensor.shape)}


def _stack(tensors: Sequence[_Tensor], target: str) -> _Tensor:
    """Stack along dim 0, as torch.stack."""
    shapes = sorted({tensor.shape for tensor in tensors})
    if len(shapes) > 1:
        raise UserError(
            f"{target} is stacked from tensors of shapes {' and '.join(str(list(shape)) for shape in shapes)}; "
            "the checkpoint is damaged, download it again"
        )
    return _Tensor((len(tensors), *shapes[0]), tuple(part for tensor in tensors for part in tensor.parts))


def _concatenate(tensors: Sequence[_Tensor], dim: int) -> _Tensor | None:
    """Concatenate along `dim`, as torch.cat; None unless every tensor stays whole in the flat order."""
    shape = list(tensors[0].shape)
    dim %= len(shape)
    # Flat order: for each leading position in turn, that position's piece of every tensor.
    pieces = [tensor.cut(math.prod(shape[:dim])) for tensor in tensors]
    if any(cut is None for cut in pieces):
        return None
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    in_turn = zip(*(cut for cut in pieces if cut is not None), strict=True)
    return _Tensor(tuple(shape), tuple(part for position in in_turn for piece in position for part in piece))


def _refusal(converter: Any, target: str, what: str) -> UserError:
    sources = ", ".join(converter.source_patterns)
    return UserError(
        f"transformers makes {target} from {sources} by {', '.join(map(repr, converter.operations))}, and {what}: "
        "distlora reads bytes in place and cannot; load the model with transformers, save_pretrained it with "
        "save_original_format=False, and set {model.path} to that folder"
    )
