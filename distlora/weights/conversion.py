"""Map a checkpoint's tensors to a model's parameters by transformers' own conversion rules, without reading a tensor.

transformers renames tensors while it loads (Gemma 3: language_model.model.x -> model.language_model.x), adds or drops
the base model's prefix, merges some (Mixtral's experts) and cuts others (a fused q, k and v). The same rules give each
parameter as a list of byte ranges in flat order: transformers' operations run on the positions of rows instead of their
values. A rule that does more than move rows is refused by name.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from distlora.architecture.disk_names import DiskNames, Rename
from distlora.architecture.safetensors_headers import Segment
from distlora.config import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

MAX_PIECES = 2**14
"""Byte ranges that one parameter may be put together from. Each takes about 150 bytes, on every rank."""

_ROW_MOVERS = (
    *("Chunk", "Concatenate", "Interleave", "MergeModulelist", "PermuteForRope", "Split"),
    *("Inkling2UnpadVocab", "Inkling2LoopMergeMessageQueries"),
)
"""transformers' operations that only move rows: elements with the same index in all dimensions but the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLayout:
    """The facts that decide where the parameters of a transformers model lie in its checkpoint."""

    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every entry of the model's state_dict."""
    transforms: Sequence[Any]
    """transformers' WeightRenaming and WeightConverter objects for this model, in order."""
    base_model_prefix: str
    """Prefix that the names in a checkpoint of the bare decoder lack."""
    hf_config: Any = None
    """The whole model's settings, which some operations read."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Parameters that are the same Parameter as another one, by transformers' list of tied weights."""
    dropped: str | None = None
    """Regular expression of names that transformers drops on purpose (layers that predict further tokens)."""
    embedding: str = ""
    """Name of the embedding's weight."""
    head: str = ""
    """Path of the LM head."""
    zeroed_row: int | None = None
    """Row of the embedding that transformers sets to zero after loading."""

    @property
    def names(self) -> Collection[str]:
        """Return every entry of the model's state_dict."""
        return self.shapes.keys()


@dataclass(frozen=True, slots=True)
class ParameterSource:
    """A parameter on disk: byte ranges, concatenated in flat order."""

    names: tuple[str, ...]
    """The tensors' names on disk."""
    segments: tuple[Segment, ...]
    shape: tuple[int, ...]
    """Shape of the parameter; of a single tensor its shape on disk."""
    whole: bool = True
    """True if the segments are the named tensors, each whole and once."""


def layout_of(hf_model: PreTrainedModel) -> CheckpointLayout:
    """Return the layout of a model as transformers built it (meta device is enough), before any module is replaced."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    embedding, head = hf_model.get_input_embeddings(), hf_model.get_output_embeddings()
    paths = {module: path for path, module in hf_model.named_modules()}
    return CheckpointLayout(
        shapes={name: tuple(value.shape) for name, value in hf_model.state_dict().items()},
        transforms=tuple(get_model_conversion_mapping(hf_model)),
        base_model_prefix=hf_model.base_model_prefix,
        hf_config=hf_model.config,
        tied=dict(hf_model.all_tied_weights_keys),
        dropped="|".join(f"({name})" for name in hf_model._keys_to_ignore_on_load_unexpected or ()) or None,
        embedding=f"{paths[embedding]}.weight",
        head=paths[head],
        zeroed_row=_zeroed_row(hf_model, embedding, paths[embedding]),
    )


def _zeroed_row(hf_model: PreTrainedModel, embedding: nn.Module, path: str) -> int | None:
    """Return the row that the model's initialization zeroes even in a loaded weight, tried on a small embedding."""
    import torch
    from transformers import PreTrainedModel as Model

    row = getattr(embedding, "padding_idx", None)
    if row is None:
        return None
    parents = [path.rsplit(".", level)[0] for level in range(1, path.count(".") + 1)]
    owner = next((m for m in map(hf_model.get_submodule, parents) if isinstance(m, Model)), hf_model)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        probe = torch.nn.Embedding(1, 1, padding_idx=0)
        probe.weight.fill_(1.0)
        probe.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        owner._init_weights(probe)
    return None if bool(probe.weight.all()) else row


def disk_names_of(layout: CheckpointLayout) -> DiskNames:
    """Return the layout's rules for names, which need neither torch nor transformers.

    Raises UserError for a renaming of transformers that is more than a regular expression.
    """
    from transformers.core_model_loading import WeightConverter

    rules: dict[bool, list[Rename]] = {False: [], True: []}
    for transform in layout.transforms:
        rules[isinstance(transform, WeightConverter)] += _rules(transform)
    return DiskNames(
        renamings=tuple(rules[False]), converters=tuple(rules[True]), base_model_prefix=layout.base_model_prefix
    )


def _rules(transform: Any) -> list[Rename]:
    from transformers import core_model_loading as loading

    scope = {"scope": transform.scope_prefix, "base_prefix": transform.base_model_prefix or ""}
    pattern, targets = transform.compiled_sources.pattern, tuple(transform.target_patterns)
    match type(transform).__name__:  # A class, which older versions of transformers lack.
        case "LayerPairCollapse":  # Two entries on disk are one layer.
            names = [(r"\d*[02468]", "mixer", "self_attn"), (r"\d*[13579]", "mixer", "mlp")]
            names += [(r"\d+", "attn_alpha", "lambda_1"), (r"\d+", "mlp_alpha", "lambda_2")]
            patterns = [rf"(?P<g0>layers\.({index})\.{old}(?=\.|$))" for index, old, _ in names]
            targets = tuple(rf"layers.\1.{new}" for _, _, new in names)
            return [Rename(pattern=p, targets=(t,), divisor=2, **scope) for p, t in zip(patterns, targets, strict=True)]
        case "GroupWeightRename":  # The last pair first: a pair's target may be the next one's source.
            pairs = zip(transform.source_patterns, targets, strict=True)
            patterns = [loading.WeightRenaming(*pair).compiled_sources.pattern for pair in pairs]
            return [
                Rename(pattern=p, targets=(t,), guard=patterns[0], **scope)
                for p, t in reversed([*zip(patterns, targets, strict=True)])
            ]
        case "Inkling2IndexOffsetWeightRename":
            return [Rename(pattern=pattern, targets=targets, offset=transform.offset, **scope)]
    if type(transform).rename_source_key is not loading.WeightTransform.rename_source_key:
        raise UserError(
            f"transformers renames tensors of this model by {type(transform).__name__}, which is more than a regular "
            "expression; load the model with transformers, save_pretrained it with save_original_format=False, and set "
            "{model.path} to that folder"
        )
    return [Rename(pattern=pattern, targets=targets, **scope)]


def find_sources(
    layout: CheckpointLayout, on_disk: Mapping[str, Segment], wanted: Collection[str]
) -> dict[str, ParameterSource]:
    """Return the tensors on disk of each `wanted` parameter, as from_pretrained finds them; absent ones are left out.

    Of tied parameters that are both wanted, one that is absent has the other's source. Raises UserError with the
    operation's name if one needs more than moving whole rows.
    """
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    converters = {
        pattern: transform
        for transform in layout.transforms
        if isinstance(transform, WeightConverter)
        for pattern in transform.source_patterns
    }
    rename = _renamer(layout)
    collected: dict[str, list[tuple[str | None, str]]] = {}
    # transformers merges in this order (experts.2 before experts.10).
    for name in sorted(on_disk, key=dot_natural_key):
        target, pattern = rename(name)
        if target in layout.names:
            collected.setdefault(target, []).append((pattern, name))
    sources = {}
    for target, tensors in collected.items():
        pattern, name = tensors[0]
        if pattern is None:  # Two names for one parameter: transformers takes the first.
            sources[target] = ParameterSource((name,), (on_disk[name],), on_disk[name].shape)
            continue
        converter = converters[pattern]
        first = converter.target_patterns[0]
        if any(target.replace(first, other) in wanted for other in converter.target_patterns):
            sources |= _convert(converter, target, tensors, layout, on_disk)
    for name, other in layout.tied.items():
        if {name, other} <= set(wanted) and (source := sources.get(name) or sources.get(other)):
            sources = {name: source, other: source} | sources
    return {name: source for name, source in sources.items() if name in wanted}


def names_without_a_place(layout: CheckpointLayout, on_disk: Mapping[str, Segment], scope: str) -> list[str]:
    """Return weights and biases on disk under `scope` that transformers would drop.

    config.json then describes another model than the one that was saved. Tensors that only accompany a weight (its
    quantization, old rotary frequencies) are not included, nor are those that transformers drops on purpose.
    """
    rename, left = _renamer(layout), []
    for name in on_disk:
        target, _ = rename(name)
        is_weight = name.endswith((".weight", ".bias")) and target.startswith(scope + ".")
        if is_weight and target not in layout.names and not (layout.dropped and re.search(layout.dropped, target)):
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


def _convert(
    converter: Any,
    target: str,
    tensors: Sequence[tuple[str | None, str]],
    layout: CheckpointLayout,
    on_disk: Mapping[str, Segment],
) -> dict[str, ParameterSource]:
    """Run a converter on the positions of rows, and return where the rows of each of its results lie.

    `tensors`: (pattern, name on disk) in order.
    """
    import torch

    for operation in converter.operations:
        # Exact classes: a subclass may do something else.
        if type(operation).__module__ != type(converter).__module__ or type(operation).__name__ not in _ROW_MOVERS:
            raise _refusal(converter, target, f"{operation!r} does more than move whole rows")
    segments = [on_disk[name] for _, name in tensors]
    shapes = sorted({segment.shape for segment in segments})
    widths = {shape[-1] if len(shape) > 1 else 1 for shape in shapes}
    dtypes = sorted({segment.dtype for segment in segments})
    if len(dtypes) > 1:
        raise UserError(
            f"{target} is put together from tensors of different types ({', '.join(dtypes)}); "
            "save the checkpoint in one type"
        )
    misfit = UserError(
        f"transformers makes {target} by {', '.join(map(repr, converter.operations))} from tensors of shapes "
        f"{' and '.join(str(list(shape)) for shape in shapes)}, which do not fit together or not into config.json; the "
        "checkpoint is damaged, download it again"
    )
    (width, *others), starts, end = widths, list[int](), 0
    if others or not all(segment.numel for segment in segments):
        raise misfit
    group = 1  # Rows that stay together. Merging keeps tensors whole, so that few positions are needed.
    if width > 1 and all(_is_merge(operation) for operation in converter.operations):
        group = math.gcd(*(shape[-2] for shape in shapes))
    converter = deepcopy(converter)
    for (pattern, name), segment in zip(tensors, segments, strict=True):
        positions = torch.arange(end, end + segment.numel // width // group)
        shape = segment.shape if width == 1 else (*segment.shape[:-2], segment.shape[-2] // group, 1)
        converter.add_tensor(target, name, pattern or name, positions.view(shape))
        starts.append(end)
        end += len(positions) + 1  # A gap, so that no range goes on in the next tensor.
    try:
        results = converter.convert(target, model=_Shapes(layout.shapes), config=layout.hf_config)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise misfit from error
    if len(results) < len(converter.target_patterns):
        raise misfit
    sources = {}
    for name, value in results.items():
        positions = value[0] if isinstance(value, list) else value
        if width > 1 and positions.shape[-1] != 1:
            raise _refusal(converter, target, "that cuts through rows")
        flat = positions.reshape(-1)
        breaks = [0, *((flat.diff() != 1).nonzero().view(-1) + 1).tolist(), len(flat)]
        if len(breaks) > MAX_PIECES:
            raise _refusal(converter, target, f"{name} lies in {len(breaks) - 1:,} pieces, more than {MAX_PIECES:,}")
        first_rows = flat[breaks[:-1]].tolist()
        used = [bisect.bisect_right(starts, row) - 1 for row in first_rows]
        pieces = tuple(
            _part(segments[index], (row - starts[index]) * group, (stop - start) * group, width)
            for index, row, start, stop in zip(used, first_rows, breaks[:-1], breaks[1:], strict=True)
        )
        names = tuple(tensors[index][1] for index in dict.fromkeys(used))
        shape = tuple(positions.shape)
        if width > 1:
            shape = (*shape[:-2], shape[-2] * group, width)
        is_whole = [piece is segments[index] for index, piece in zip(used, pieces, strict=True)]
        sources[name] = ParameterSource(names, pieces, shape, all(is_whole))
    return sources


def _is_merge(operation: Any) -> bool:
    """Return True for an operation that puts whole tensors together, and leaves the last but one dimension's order."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    return type(operation) is Concatenate or (type(operation) is MergeModulelist and operation.dim == 0)


def _part(segment: Segment, first: int, rows: int, width: int) -> Segment:
    """Return `rows` rows of a segment from row `first` on; the segment itself if they are all of it."""
    if rows * width == segment.numel:
        return segment
    row_bytes = segment.num_bytes // segment.numel * width
    shape = (rows,) if width == 1 else (rows, width)
    return replace(segment, offset=segment.offset + first * row_bytes, num_bytes=rows * row_bytes, shape=shape)


@dataclass(frozen=True, slots=True)
class _Shapes:
    """Stand-in for the model that transformers' operations ask for the shape of a parameter."""

    shapes: Mapping[str, tuple[int, ...]]

    def get_parameter(self, name: str) -> Tensor:
        """Return a parameter of that shape whose dtype is that of row positions."""
        import torch

        return torch.empty(self.shapes[name], dtype=torch.int64, device="meta")


def _refusal(converter: Any, target: str, what: str) -> UserError:
    sources = ", ".join(converter.source_patterns)
    return UserError(
        f"transformers makes {target} from {sources} by {', '.join(map(repr, converter.operations))}, and {what}: "
        "distlora reads bytes in place and cannot; load the model with transformers, save_pretrained it with "
        "save_original_format=False, and set {model.path} to that folder"
    )
