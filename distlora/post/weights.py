"""Read the weights of a base and of an adapter one at a time, and add the adapter to the base's rows.

A run trains on the dequantized NF4 values, less PiSSA's initial adapter: bit-identical to `FrozenTensor.frozen_weight`
dequantized in fp32. Weights are read in whole rows, so memory holds a few rows and one tensor's absmax per 64 weights.
A weight of E experts is read as (E x rows, columns), as it is stored (gpt-oss: transposed).

LoRA (Hu et al. 2021, arXiv 2106.09685): W + s B A. DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5): m (W + s B A)
/ ||W + s B A||, the norm per row. Letters: O out features, I in features, R rank, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.kept_weights import is_kept, is_transposed
from distlora.architecture.safetensors_headers import Segment, read_header
from distlora.config import ModelSpec, UserError
from distlora.loading.decomposed_adapters import load_initial_factors
from distlora.loading.fill_weight import DoubleQuantizedAbsmax, requantized, run_size
from distlora.loading.load_base import find_base
from distlora.loading.peft_format import transposed_factors
from distlora.model.adapters import AdaptedLinear
from distlora.model.build import CausalLM, build_model
from distlora.model.experts import ExpertWeight
from distlora.model.frozen_linear import FrozenTensor
from distlora.model.hf_model import stored_buffers
from distlora.weights.conversion import ParameterSource
from distlora.weights.decompose import LowRankFactors, Residual
from distlora.weights.peft_folder import WEIGHTS_NAME, PeftAdapter
from distlora.weights.reader import Reader, all_finite, check_finite
from distlora_kernels.formats import Format, nf4

CHUNK = 64 * nf4.GROUP
"""Weights per read: whole groups, 4 MiB in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseWeight:
    """One parameter of the base in its checkpoint."""

    name: str
    """Hugging Face name: model.layers.0.mlp.up_proj.weight."""
    shape: tuple[int, ...]
    source: ParameterSource
    """The tensors it is made of, in flat order."""
    format: Format | None = None
    """Format that training stores it in; None: it is dense."""
    residual: Residual | None = None
    """The initial adapter that PiSSA subtracted before quantization."""
    held: torch.dtype = torch.float32
    """The dtype that training rounds an unquantized weight to (train.dtype)."""
    transposed: bool = False
    """True if the matrix of each expert is read as (in, out)."""

    @property
    def is_nf4(self) -> bool:
        """True if training stores it in NF4."""
        return isinstance(self.format, nf4.Nf4)

    @property
    def kept(self) -> bool:
        """True if training stores it as the checkpoint does."""
        return self.format is not None and is_kept(self.format.name, self.source.segments)

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    def chunks(self, reader: Reader, *, original: bool = False) -> Iterator[Tensor]:
        """Yield the weight in flat order in fp32 pieces of CHUNK weights (the last is smaller).

        With `original` as it is stored, else as a run trains on it. Raises UserError for NaN and Inf.
        """
        if original or self.kept:
            for _, chunk in reader.chunks(self.source.segments, 0, self.numel, CHUNK):
                check_finite(self.name, chunk)
                yield chunk.float()
        elif not self.is_nf4:
            format, width = self.format, self.shape[-1]
            for chunk in self._before_quantization(reader, CHUNK if format is None else run_size(format, width)):
                yield chunk.to(self.held).float() if format is None else requantized(format, chunk, width)
        else:
            second, group = self.second_level(reader), 0
            for size, codes in self.codes(reader):
                parts = second.groups(group, len(codes))
                yield nf4.NF4.dequantize((codes, *parts), shape=(size,), dtype=torch.float32)
                group += len(codes)

    def rows(self, reader: Reader, *, original: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, (n, columns) fp32), the weight in whole rows in order. A vector is one row."""
        columns = self.shape[-1]
        rest, first = torch.empty(0), 0
        for chunk in self.chunks(reader, original=original):
            rest = torch.cat([rest, chunk]) if len(rest) else chunk
            whole = len(rest) // columns
            if whole:
                yield first, rest[: whole * columns].view(whole, columns)
                rest, first = rest[whole * columns :], first + whole

    def published_rows(self, reader: Reader, *, original: bool = False) -> Iterator[Tensor]:
        """Yield the rows of the base that a published adapter is for: with PiSSA's initial adapter added back."""
        for first, rows in self.rows(reader, original=original):
            if self.residual is not None and not original:
                start = self.residual.start
                rows = rows + self.residual.scaling * (start.B[first : first + len(rows)] @ start.A)
            yield rows

    def whole(self, reader: Reader, *, original: bool = False) -> Tensor:
        """Return the whole weight in its shape in fp32."""
        weight, first = torch.empty(self.numel), 0
        for chunk in self.chunks(reader, original=original):
            weight[first : first + len(chunk)] = chunk
            first += len(chunk)
        return weight.view(self.shape)

    def _before_quantization(self, reader: Reader, size: int = CHUNK) -> Iterator[Tensor]:
        for first, chunk in reader.chunks(self.source.segments, 0, self.numel, size):
            chunk = chunk if self.residual is None else self.residual.of(chunk, first)
            check_finite(self.name, chunk)
            yield chunk

    def second_level(self, reader: Reader) -> DoubleQuantizedAbsmax:
        """Return the double-quantized absmax of a weight that training quantizes."""
        return DoubleQuantizedAbsmax.of(self._before_quantization(reader), self.numel)

    def codes(self, reader: Reader) -> Iterator[tuple[int, Tensor]]:
        """Yield (number of weights, codes (groups, GROUP_BYTES) uint8), in the pieces of `chunks`."""
        for chunk in self._before_quantization(reader):
            yield len(chunk), nf4.quantize_blocks(chunk)[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenBase:
    """All parameters of a base and the rest of its checkpoint."""

    model: CausalLM
    """The model on the meta device: architecture, names, config."""
    weights: Mapping[str, BaseWeight]
    """Weights by Hugging Face name, in the model's order. A tied head is the embedding alone."""
    files: CheckpointFiles
    """The folder, config.json and headers of the checkpoint, with tensors outside the model."""

    @property
    def embedding_name(self) -> str:
        """Return the embedding's name in the checkpoint."""
        return f"{self.model.architecture.embedding_path}.weight"

    @property
    def head_name(self) -> str:
        """Return the LM head's name in the checkpoint."""
        return f"{self.model.architecture.head}.weight"


def open_base(spec: ModelSpec, initial_adapter_dir: str | Path = "") -> OpenBase:
    """Open the base of a model from its headers.

    Raises UserError if the checkpoint belongs to another model, or if PiSSA's initial adapter is gone.
    """
    files = CheckpointFiles(spec.path)
    model = build_model(spec, base=files, training=False)
    sources = find_base(model, files.headers)
    frozen = {model.hf_name(f"{path}.weight"): m for path, m in model.named_modules() if isinstance(m, FrozenTensor)}
    residuals = {}
    if spec.adapter.pissa:
        start = load_initial_factors(initial_adapter_dir)
        for path, linear in model.adapted_linears():
            assert isinstance(linear, AdaptedLinear)
            a, b = (start[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
            residuals[f"{path}.weight"] = Residual(LowRankFactors(a, b), linear.pairs[0].scaling)
    held = {model.hf_name(name): parameter.dtype for name, parameter in model.named_parameters()}
    weights, buffers = {}, stored_buffers(model)  # Never trained: whatever is written copies their bytes.
    for name, source in sources.items():
        if name in buffers or (model.tied_in_base and name == f"{model.architecture.head}.weight"):
            continue
        module = frozen.get(name)
        weights[name] = BaseWeight(
            name=name,
            shape=source.shape,
            source=source,
            format=None if module is None else module.format,
            residual=residuals.get(name),
            held=held.get(name, torch.float32),
            transposed=isinstance(module, ExpertWeight) and (module.transposed or is_transposed(source.segments)),
        )
    return OpenBase(model=model, weights=weights, files=files)


def require_whole_tensors(base: OpenBase) -> None:
    """Raise UserError if a parameter is a part of a tensor on disk, or shares it: what is written are whole tensors."""
    parameters: dict[str, str] = {}
    for weight in base.weights.values():
        for stored in weight.source.names:
            other = parameters.setdefault(stored, weight.name)
            if other != weight.name or not weight.source.whole:
                raise UserError(
                    f"{weight.name} and others are parts of {stored} on disk or share it, and only parameters with "
                    "tensors of their own can be written; save the base with transformers' "
                    "save_pretrained(save_original_format=False) and train on that folder"
                )


LARGEST_ERROR = 1e-6
"""Largest relative error of dW as a consumer computes it from a written file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """The LoRA factors of one weight, and with DoRA the norm that each row gets."""

    A: Tensor
    """(R, I) fp32; of experts (E, R, I)."""
    B: Tensor
    """(O, R) fp32; of experts (E, O, R)."""
    scaling: float
    magnitude: Tensor | None = None
    """(O,) fp32."""

    @property
    def rank(self) -> int:
        """Return the rank."""
        return self.A.shape[-2]

    def delta(self) -> Tensor:
        """Return scaling * B A, dense: (O, I) or (E, O, I) fp32."""
        return (self.scaling * self.B) @ self.A

    def norm(self) -> float:
        """Return the Frobenius norm of scaling * B A."""
        return _product_norm(self.scaling * self.B.double(), self.A.double())

    def error(self, what: str, scale: float, b: Tensor, a: Tensor) -> float:
        """Return the relative error of scale * b a as a consumer computes it from a file, by the Frobenius norm.

        b and a may have zeros beyond the rank. Raises UserError, which begins with `what`, beyond LARGEST_ERROR.
        """
        missing = a.shape[-2] - self.rank
        assert missing >= 0
        own_a = torch.nn.functional.pad(self.A.double(), (0, 0, 0, missing))
        own_b = torch.nn.functional.pad(self.scaling * self.B.double(), (0, missing))
        b, a = scale * b.double(), a.double()
        # (s b - S B) a + S B (a - A): neither term cancels if both have the same factors.
        apart = _product_norm(torch.cat([b - own_b, own_b], -1), torch.cat([a, a - own_a], -2))
        error = apart / max(self.norm(), 1e-30)
        if error > LARGEST_ERROR:
            raise UserError(
                f"{what} computes another dW than was trained, with a relative error of {error:.1e}; please report it"
            )
        return error


def _product_norm(b: Tensor, a: Tensor) -> float:
    """Return the Frobenius norm of b a, from Gram matrices (R, R): b a itself may exceed the memory."""
    return float(((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0).sqrt())


def error_line(consumer: str, error: float) -> str:
    """Return the line of the terminal on the largest `Factors.error` of a file."""
    return f"largest relative error of dW, as {consumer} computes it: {error:.0e} (limit {LARGEST_ERROR:.0e})"


def read_factors(adapter: PeftAdapter, path: str, reader: Reader, *, experts: int | None = None) -> Factors:
    """Return the factors of one weight; `experts` is their number if it is fused. Raises UserError for NaN and Inf."""
    names = {part: name for part in ("A", "B", "magnitude") if (name := adapter.names.get((path, part))) is not None}
    parts = {part: read_whole(adapter.tensors[path, part], name, reader) for part, name in names.items()}
    a, b = parts["A"], parts["B"]
    if path in adapter.transposed:
        assert experts is not None
        a, b = transposed_factors(a, b, experts)
    if experts is not None:  # PEFT's layout (experts.ExpertPair): row e * R + j of A, column j * E + e of B.
        a = a.view(experts, -1, a.shape[1])
        b = b.view(b.shape[0], -1, experts).permute(2, 0, 1).contiguous()
    return Factors(A=a, B=b, scaling=adapter.adapter_config.scaling_of(path), magnitude=parts.get("magnitude"))


def read_token_rows(adapter: PeftAdapter, matrix: str, reader: Reader) -> dict[int, Tensor]:
    """Return the trained rows of the embedding or head, (H,) fp32 by token id. Raises UserError for NaN and Inf."""
    rows = adapter.token_rows.get(matrix)
    if rows is None:
        return {}
    tensor = read_whole(read_header(adapter.folder / WEIGHTS_NAME)[rows.name], rows.name, reader)
    return dict(zip(rows.ids, tensor, strict=True))


def read_whole(segment: Segment, name: str, reader: Reader) -> Tensor:
    """Return a tensor of an adapter's file in fp32."""
    whole = reader.read([segment], 0, segment.numel).view(segment.shape).float()
    if not all_finite(whole):
        raise UserError(f"{segment.file}: {name} holds NaN or Inf; the adapter is damaged, save it again")
    return whole


@torch.no_grad()
def adapted_rows(rows: Tensor, first: int, factors: Factors) -> Tensor:
    """Return rows `first` and on of a linear's weight (n, I) fp32 with the adapter added, in new memory."""
    own = slice(first, first + len(rows))
    adapted = torch.addmm(rows, factors.B[own], factors.A, alpha=factors.scaling)
    if factors.magnitude is not None:
        norms = torch.linalg.vector_norm(adapted, dim=1)
        # As in training, a row of zeros stays zero.
        adapted *= torch.where(norms > 0, factors.magnitude[own] / norms, 0.0)[:, None]
    return adapted


@torch.no_grad()
def adapted_expert_rows(rows: Tensor, first: int, factors: Factors, *, transposed: bool) -> Tensor:
    """Return rows of a fused expert weight (E x n, columns) with the adapter added.

    The rows may begin and end inside an expert. With `transposed` each expert's weight is stored as (I, O).
    """
    adapted, done = torch.empty_like(rows), 0
    per_expert = factors.A.shape[2] if transposed else factors.B.shape[1]
    while done < len(rows):
        expert, inside = divmod(first + done, per_expert)
        count = min(per_expert - inside, len(rows) - done)
        left, right = factors.B[expert], factors.A[expert]
        if transposed:
            left, right = right.T, left.T
        own = slice(inside, inside + count)
        span = slice(done, done + count)
        torch.addmm(rows[span], left[own], right, alpha=factors.scaling, out=adapted[span])
        done += count
    return adapted
