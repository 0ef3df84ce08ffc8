"""List the parameters of a merged model and yield their values a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distlora.architecture.tokens import EMBEDDING, HEAD
from distlora.loading.token_matrices import mean_row_alone
from distlora.model.experts import ExpertWeight
from distlora.post.adapter_factors import adapted_expert_rows, adapted_rows
from distlora.post.base_weights import HEAD_NAME, Base, BaseWeight, tensors_of
from distlora.post.merge.adapter import Adapter
from distlora.weights.conversion import Source, find_sources
from distlora.weights.prequantized import read_prequantized_weights
from distlora.weights.reader import Reader


class Piece(NamedTuple):
    """Some rows of a parameter in flat order; (n, columns) fp32."""

    base: Tensor
    """Rows that were merged onto."""
    merged: Tensor
    """Merged rows; the same object as `base` if nothing was added."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter of the merged model."""

    weight: BaseWeight
    outputs: Mapping[str, tuple[int, ...]]
    """Shapes of its output tensors by name, in flat order."""
    path: str | None = None
    """Path in the adapter's file, for an adapted weight."""
    experts: int | None = None
    """Number of experts of a fused weight."""
    transposed: bool = False
    """True if each expert's weight is stored as (in, out)."""
    matrix: str | None = None
    """EMBEDDING or HEAD, for a matrix that may have trained rows."""

    @property
    def numel(self) -> int:
        """Return the number of values to write."""
        return sum(torch.Size(shape).numel() for shape in self.outputs.values())


def parameters_of(base: Base, folder: Path, adapter: Adapter | None) -> list[Parameter]:
    """Return all parameters: decoder and head in the model's order.

    Prequantized weights outside the decoder (a vision tower's) come last.
    """
    model = base.model
    adapted = set() if adapter is None else set(adapter.file.paths)
    experts = {model.hf_name(f"{path}.weight"): m for path, m in model.named_modules() if isinstance(m, ExpertWeight)}
    found = []
    for name, weight in base.weights.items():
        shapes = [segment.shape for _, segment in tensors_of(weight)] if weight.packed is None else [weight.shape]
        outputs = dict(zip(weight.source.names, shapes, strict=True))
        matrix = _matrix_of(base, name)
        if matrix is not None:
            outputs = dict.fromkeys(outputs, (model.vocabulary.rows, weight.shape[1]))
        fused = experts.get(name)
        path = name if fused is not None else name.removesuffix(".weight")
        found.append(
            Parameter(
                weight=weight,
                outputs=outputs,
                path=path if path in adapted else None,
                experts=None if fused is None else fused.num_experts,
                transposed=fused is not None and fused.transposed,
                matrix=matrix,
            )
        )
    if model.tied_in_base:
        found += _tied_head(base)
    return found + _packed_beside(base, found)


def _matrix_of(base: Base, name: str) -> str | None:
    matrices = {base.embedding_name: EMBEDDING, HEAD_NAME: HEAD}
    return matrices.get(name)


def _tied_head(base: Base) -> list[Parameter]:
    """Return the head of a tied base if it is written separately: trained whole, or stored as a copy."""
    model = base.model
    weight = base.weights[base.embedding_name]
    copy = find_sources(model.layout, base.headers, {HEAD_NAME}).get(HEAD_NAME)
    if copy is None and model.tied:
        return []
    (embedding,) = weight.source.names
    beside = next((name for name in model.family.disk_heads if name.split(".")[0] == embedding.split(".")[0]), None)
    (name,) = copy.names if copy is not None else (beside or HEAD_NAME,)
    shape = (model.vocabulary.rows, weight.shape[1])
    matrix = EMBEDDING if model.tied else HEAD
    return [Parameter(weight=replace(weight, name=HEAD_NAME), outputs={name: shape}, matrix=matrix)]


def _packed_beside(base: Base, found: list[Parameter]) -> list[Parameter]:
    """Return NF4 weights outside the model, which must become dense as quantization_config is dropped."""
    stored = read_prequantized_weights(base.files)
    taken = {name for parameter in found for name in parameter.outputs}
    beside = []
    for name, packed in stored.items():
        if name not in taken:
            source = Source((name,), (packed.codes,), packed.shape)
            weight = BaseWeight(name=name, shape=packed.shape, source=source, quantized=False, packed=packed)
            beside.append(Parameter(weight=weight, outputs={name: packed.shape}))
    return beside


def is_changed(parameter: Parameter, base: Base, adapter: Adapter | None) -> bool:
    """Return True if any of the parameter was trained."""
    if parameter.matrix is None:
        return parameter.path is not None
    grown = bool(base.model.vocabulary.new)
    return grown or (adapter is not None and adapter.has(parameter.matrix))


def pieces(
    parameter: Parameter, base: Base, adapter: Adapter | None, reader: Reader, *, original: bool
) -> Iterator[Piece]:
    """Yield the parameter's values in flat order. Raises UserError for NaN and Inf."""
    rows = parameter.weight.rows(reader, original=original)
    if parameter.matrix is not None:
        yield from _matrix_pieces(parameter, base, adapter, reader, rows)
        return
    if parameter.path is None or adapter is None:
        for _, part in rows:
            yield Piece(part, part)
        return
    factors = adapter.factors(parameter.path, reader, experts=parameter.experts)
    for first, part in rows:
        if parameter.experts is None:
            yield Piece(part, adapted_rows(part, first, factors))
        else:
            yield Piece(part, adapted_expert_rows(part, first, factors, transposed=parameter.transposed))


def _matrix_pieces(
    parameter: Parameter, base: Base, adapter: Adapter | None, reader: Reader, rows: Iterator[tuple[int, Tensor]]
) -> Iterator[Piece]:
    """Yield an embedding or head: trained rows replace the base's, new rows follow."""
    vocabulary, matrix = base.model.vocabulary, parameter.matrix
    assert matrix is not None
    trained: dict[int, Tensor] = {}
    if vocabulary.new:  # Untrained new rows get their initial value of training.
        first_new = min(vocabulary.new.values())
        start = mean_row_alone(parameter.weight.source.segments, first_new, parameter.weight.shape[1], reader)
        trained = dict.fromkeys(vocabulary.new.values(), start.to(base.model.head.weight.dtype).float())
    module = None
    if adapter is not None:
        trained |= adapter.rows(matrix, reader)
        module = adapter.module(matrix)

    def merged(first: int, part: Tensor) -> Tensor:
        if module is None and not trained:
            return part
        own = part.clone()
        for id, row in trained.items():
            if first <= id < first + len(own):
                own[id - first] = row
        if adapter is not None and module is not None:
            whole = adapter.module_rows(module, first, len(own), reader)
            own[: len(whole)] = whole
        return own

    for first, part in rows:
        yield Piece(part, merged(first, part))
    if vocabulary.has_grown:
        grown = torch.zeros(vocabulary.rows - vocabulary.stored, parameter.weight.shape[1])
        yield Piece(grown, merged(vocabulary.stored, grown))
