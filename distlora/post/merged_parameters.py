"""Open the adapter to merge, list the parameters of the merged model, and yield their values a few rows at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from distlora.architecture.low_bit_headers import LowBitSegment
from distlora.architecture.safetensors_headers import Segment, read_header
from distlora.architecture.tokens import EMBEDDING, HEAD
from distlora.config import UserError
from distlora.loading.decomposed_adapters import plain_form
from distlora.loading.fill_weight import mean_row
from distlora.model.experts import ExpertWeight
from distlora.post.load_trained import check_base_unchanged, weights_in
from distlora.post.merge import Onto
from distlora.post.trained import Trained
from distlora.post.weights import (
    BaseWeight,
    Factors,
    OpenBase,
    adapted_expert_rows,
    adapted_rows,
    read_factors,
    read_token_rows,
    require_whole_tensors,
)
from distlora.weights.conversion import ParameterSource, find_sources
from distlora.weights.decompose import LowRankFactors
from distlora.weights.peft_folder import (
    WEIGHTS_NAME,
    PeftAdapter,
    check_fits,
    read_peft_adapter,
)
from distlora.weights.peft_modules import check_modules, check_rows
from distlora.weights.reader import Reader, all_finite


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenAdapter:
    """An adapter that fits a base."""

    folder: Path
    """Folder it was read from; for a folder of checkpoints, the newest complete one."""
    file: PeftAdapter
    starts: Mapping[str, LowRankFactors]
    """PiSSA's initial adapters by path if the base lacks them, else empty. The file is then a plain LoRA of twice
    the rank: its first half is the trained adapter, its second half the negated initial one."""

    def factors(self, path: str, reader: Reader, *, experts: int | None = None) -> Factors:
        """Return the factors of one weight for the form of the base that is merged onto."""
        factors = read_factors(self.file, path, reader, experts=experts)
        if not self.starts:
            return factors
        half, start = factors.rank // 2, self.starts[path]
        if not (torch.equal(factors.A[half:], start.A) and torch.equal(factors.B[:, half:], -start.B)):
            raise UserError(
                f"{self.folder} was trained from another start: the second half of {path} is not that of this run; put "
                "back the folder that this run made"
            )
        return replace(factors, A=factors.A[..., :half, :], B=factors.B[..., :half].contiguous())


@contextlib.contextmanager
def open_adapter(trained: Trained, base: OpenBase, onto: Onto) -> Iterator[OpenAdapter | None]:
    """Open the adapter of `trained`; yield None for the base alone.

    Raises UserError if it is damaged or belongs to another base.
    """
    spec, place = trained.spec, trained.weights
    if place is None:
        yield None
        return
    folder = weights_in(place)
    if not trained.foreign:
        check_base_unchanged(folder, trained)
    with plain_form(folder, spec.adapter, trained.initial_adapter_dir) as plain:
        file, model = read_peft_adapter(plain), base.model
        file = check_fits(file, file.adapter_config, model.architecture)
        hidden, stored = int(model.hf_config.hidden_size), model.vocabulary.stored
        check_rows(file.token_rows, plain / WEIGHTS_NAME, stored=stored, hidden=hidden)
        check_modules(file.modules, plain / WEIGHTS_NAME, rows=(stored, model.vocabulary.rows), hidden=hidden)
        starts = {}
        if onto == "trained":
            residuals = {name.removesuffix(".weight"): weight.residual for name, weight in base.weights.items()}
            starts = {path: residual.start for path, residual in residuals.items() if residual is not None}
        yield OpenAdapter(folder=folder, file=file, starts=starts)


Piece = tuple[Tensor, Tensor]
"""Rows of a parameter in flat order that were merged onto, (n, columns) fp32, and the merged rows: the same object if
nothing was added."""


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
    matrix: str | None = None
    """EMBEDDING or HEAD, for a matrix that may have trained rows."""

    @property
    def numel(self) -> int:
        """Return the number of values to write."""
        return sum(torch.Size(shape).numel() for shape in self.outputs.values())


def parameters_of(base: OpenBase, adapter: OpenAdapter | None) -> list[Parameter]:
    """Return all parameters: decoder and head in the model's order.

    Quantized weights outside the decoder (a vision tower's) come last.
    """
    require_whole_tensors(base)
    model = base.model
    adapted = set() if adapter is None else set(adapter.file.paths)
    experts = {model.hf_name(f"{path}.weight"): m for path, m in model.named_modules() if isinstance(m, ExpertWeight)}
    parameters = []
    for name, weight in base.weights.items():
        outputs = {
            name: segment.shape for name, segment in zip(weight.source.names, weight.source.segments, strict=True)
        }
        matrix = {base.embedding_name: EMBEDDING, base.head_name: HEAD}.get(name)
        if matrix is not None:
            outputs = dict.fromkeys(outputs, (model.vocabulary.rows, weight.shape[1]))
        fused = experts.get(name)
        path = name if fused is not None else name.removesuffix(".weight")
        parameters.append(
            Parameter(
                weight=weight,
                outputs=outputs,
                path=path if path in adapted else None,
                experts=None if fused is None else fused.num_experts,
                matrix=matrix,
            )
        )
    if model.tied_in_base:
        parameters += _tied_head(base)
    return parameters + _low_bit_beside(base, parameters)


def _tied_head(base: OpenBase) -> list[Parameter]:
    """Return the head of a tied base if it is written separately: trained whole, or stored as a copy."""
    model = base.model
    weight = base.weights[base.embedding_name]
    copy = find_sources(model.layout, base.files.headers, {base.head_name}).get(base.head_name)
    if copy is None and model.tied:
        return []
    (name,) = copy.names if copy is not None else (base.head_name,)
    shape = (model.vocabulary.rows, weight.shape[1])
    matrix = EMBEDDING if model.tied else HEAD
    return [Parameter(weight=replace(weight, name=base.head_name), outputs={name: shape}, matrix=matrix)]


def _low_bit_beside(base: OpenBase, parameters: list[Parameter]) -> list[Parameter]:
    """Return quantized weights outside the model, which must become dense as quantization_config is dropped."""
    taken = {name for parameter in parameters for name in parameter.outputs}
    beside = []
    for name, segment in base.files.headers.items():
        if isinstance(segment, LowBitSegment) and name not in taken:
            source = ParameterSource((name,), (segment,), segment.shape)
            weight = BaseWeight(name=name, shape=segment.shape, source=source)
            beside.append(Parameter(weight=weight, outputs={name: segment.shape}))
    return beside


def is_changed(parameter: Parameter, base: OpenBase, adapter: OpenAdapter | None) -> bool:
    """Return True if any of the parameter was trained."""
    if parameter.matrix is None:
        return parameter.path is not None
    trained = set() if adapter is None else adapter.file.token_rows.keys() | adapter.file.modules.keys()
    return bool(base.model.vocabulary.new) or parameter.matrix in trained


def pieces(
    parameter: Parameter, base: OpenBase, adapter: OpenAdapter | None, reader: Reader, *, original: bool
) -> Iterator[Piece]:
    """Yield the parameter's values in flat order. Raises UserError for NaN and Inf."""
    rows = parameter.weight.rows(reader, original=original)
    if parameter.matrix is not None:
        yield from _matrix_pieces(parameter, base, adapter, reader, rows)
        return
    if parameter.path is None or adapter is None:
        for _, chunk in rows:
            yield chunk, chunk
        return
    factors = adapter.factors(parameter.path, reader, experts=parameter.experts)
    for first, chunk in rows:
        if parameter.experts is None:
            yield chunk, adapted_rows(chunk, first, factors)
        else:
            yield chunk, adapted_expert_rows(chunk, first, factors, transposed=parameter.weight.transposed)


def _matrix_pieces(
    parameter: Parameter,
    base: OpenBase,
    adapter: OpenAdapter | None,
    reader: Reader,
    rows: Iterator[tuple[int, Tensor]],
) -> Iterator[Piece]:
    """Yield an embedding or head: trained rows replace the base's, new rows follow."""
    vocabulary, matrix = base.model.vocabulary, parameter.matrix
    assert matrix is not None
    trained: dict[int, Tensor] = {}
    if vocabulary.new:  # Untrained new rows get their initial value of training.
        first_new = min(vocabulary.new.values())
        start = mean_row(parameter.weight.source.segments, first_new, parameter.weight.shape[1], reader)
        trained = dict.fromkeys(vocabulary.new.values(), start.to(base.model.head.weight.dtype).float())
    module = None
    if adapter is not None:
        trained |= read_token_rows(adapter.file, matrix, reader)
        if matrix in adapter.file.modules:
            module = read_header(adapter.file.folder / WEIGHTS_NAME)[adapter.file.modules[matrix].name]

    def merged(first: int, chunk: Tensor) -> Tensor:
        if module is None and not trained:
            return chunk
        own = chunk.clone()
        for id, row in trained.items():
            if first <= id < first + len(own):
                own[id - first] = row
        if module is not None:
            whole = _rows_of(module, first, len(own), reader)
            own[: len(whole)] = whole
        return own

    for first, chunk in rows:
        yield chunk, merged(first, chunk)
    if vocabulary.has_grown:
        grown = torch.zeros(vocabulary.rows - vocabulary.stored, parameter.weight.shape[1])
        yield grown, merged(vocabulary.stored, grown)


def _rows_of(segment: Segment, first: int, count: int, reader: Reader) -> Tensor:
    """Return rows of a module trained whole in fp32, fewer at its end. Raises UserError for NaN and Inf."""
    width = segment.shape[1]
    last = min(first + count, segment.shape[0])
    rows = reader.read([segment], min(first, last) * width, last * width).view(-1, width).float()
    if not all_finite(rows):
        raise UserError(f"{segment.file} holds NaN or Inf; the adapter is damaged, save it again")
    return rows
