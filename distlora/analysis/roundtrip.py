"""Measure what 4-bit formats cost the quantizable weights of a checkpoint on disk, tensor by tensor, chunk by chunk.

A tensor is read twice: for the absmax of its blocks, whose mean the second level needs, and for the round trip itself.
So what is in memory beside one chunk is an absmax for every 64 weights, whatever the tensor's size. NF4 and int4 share
the absmax of a block, and with it the whole second level.

How much errors of each weight change a model's predictions is estimated from one backward per sequence.
To second order, weights that are off by d diverge from the model by KL = d^T F d / 2 with the Fisher information F, the
covariance of the gradients of log p(y) for tokens y that the model itself draws. Rounding errors are as good as
independent, so F's diagonal is enough: the mean squares of the gradients. Of those of a weight (O, I) the sums of rows
and of columns are kept, as Adafactor does (arXiv 1804.04235): F_ij = rows_i columns_j / sum.

The gradient of one weight at a time exists, in fp32, beside the model and the activations of one sequence. The model
may be in any format: F is about the same at its NF4 weights.

Letters: E experts (1 of a linear), O out features, I in features, T tokens, H hidden size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config import ModelSpec, UserError
from distlora.data.loader import MicroBatch, StepLoader
from distlora.data.rows import PackedRows
from distlora.loading.fill_weight import DoubleQuantizedAbsmax, requantized, run_size
from distlora.loading.load_base import find_base, segments_of
from distlora.model.build import CausalLM, build_model
from distlora.model.experts import ExpertWeight
from distlora.model.frozen_linear import FrozenLinear, FrozenTensor
from distlora.model.lm_head import IGNORED_LABEL, LossHead
from distlora.parallel import Ranks
from distlora.weights.conversion import ParameterSource
from distlora.weights.reader import Reader, all_finite
from distlora_kernels import reference
from distlora_kernels.formats import FORMATS as REGISTERED
from distlora_kernels.formats import nf4
from distlora_kernels.operands import Routing

LOGITS_AT_ONCE = 2**24
"""Logits of a chunk of tokens."""


@dataclass(slots=True)
class Sensitivity:
    """The diagonal of a weight's Fisher information in nats per token, factored. (E, n, m): each matrix as stored."""

    rows: Tensor
    """(E, n) fp32: sums over columns."""
    columns: Tensor
    """(E, m) fp32: sums over rows."""

    def of(self, start: int, count: int) -> Tensor:
        """Return the diagonal for `count` weights of the flat weight from `start` on."""
        (num_rows, width), stop = (self.rows.shape[1], self.columns.shape[1]), start + count
        first = start // width
        numbers = torch.arange(first, -(-stop // width), device=self.rows.device)
        experts = numbers // num_rows
        totals = self.rows.sum(1).clamp_min(torch.finfo(torch.float32).tiny)
        values = (self.rows.view(-1)[numbers] / totals[experts])[:, None] * self.columns[experts]
        return values.view(-1)[start - first * width :][:count]


class _Collector:
    """Sums of squared gradients of the weights of a model, while it runs forward and backward."""

    def __init__(self, model: CausalLM) -> None:
        self.found: dict[str, Sensitivity] = {}
        self._handles = []
        for path, module in model.named_modules():
            if isinstance(module, (FrozenLinear, ExpertWeight)):
                hook = functools.partial(self._watch, model.hf_name(f"{path}.weight"))
                self._handles.append(module.register_forward_hook(hook))

    def _watch(self, name: str, module: FrozenLinear | ExpertWeight, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:  # False in the forward before a recomputation.
            routing = inputs[1] if isinstance(module, ExpertWeight) else None
            output.register_hook(functools.partial(self._add, name, module, inputs[0].detach(), routing))

    @torch.no_grad()
    def _add(
        self, name: str, module: FrozenLinear | ExpertWeight, x: Tensor, routing: Routing | None, gradient: Tensor
    ) -> None:
        x, gradient = x.flatten(0, -2).float(), gradient.flatten(0, -2).float()
        if name not in self.found:
            shape = module.shape if len(module.shape) == 3 else (1, *module.shape)
            rows, columns = (torch.zeros(shape[0], size, device=x.device) for size in shape[1:])
            self.found[name] = Sensitivity(rows, columns)
        sums, transposed = self.found[name], isinstance(module, ExpertWeight) and module.transposed
        ends = [len(x)] if routing is None else routing.ends.tolist()
        for expert, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
            left, right = (x, gradient) if transposed else (gradient, x)
            squares = (left[start:stop].T @ right[start:stop]).square_()
            sums.rows[expert] += squares.sum(1)
            sums.columns[expert] += squares.sum(0)

    def remove(self) -> None:
        """Take the hooks from the model."""
        for handle in self._handles:
            handle.remove()


def measure_sensitivity(
    model: CausalLM, rows: PackedRows, ranks: Ranks, say: Callable[[str], None]
) -> dict[str, Sensitivity]:
    """Return the sensitivities of the weights of the decoder layers by Hugging Face name, on one process.

    Equal on every run of one machine: tokens are drawn from a generator with seed 0.
    """
    collector, generator = _Collector(model), torch.Generator(ranks.device).manual_seed(0)
    loader = StepLoader(rows, global_batch=1, micro_batch=1, rank=0, world=1, seed=0, shuffle=False)
    targets = 0
    for step in range(len(rows)):
        (batch,) = loader.batch(step).micro_batches
        inputs = (each.to(ranks.device) for each in (batch.input_ids, batch.position_ids, batch.labels))
        documents = model.documents_of(batch.position_ids, ranks.device)
        last: list[Tensor] = []
        with model.head.read_by(last.append):
            model(*inputs, documents=documents)
        gradient, count = _gradient_of_drawn(model.head, last[0], batch, generator)
        last[0].backward(gradient)
        targets += count
        say(f"harm: {step + 1:,}/{len(rows):,} sequences")
    collector.remove()
    for parameter in model.parameters():
        parameter.grad = None
    for sums in collector.found.values():
        sums.rows /= targets
        sums.columns /= targets
    return collector.found


def _gradient_of_drawn(
    head: LossHead, hidden: Tensor, batch: MicroBatch, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Return the gradient at the last hidden states (1, T, H) of -log p of tokens drawn from p, and their number."""
    places = (batch.labels[0] != IGNORED_LABEL).to(hidden.device).nonzero()[:, 0]
    gradient = torch.zeros_like(hidden)
    for chunk in places.split(max(16, LOGITS_AT_ONCE // head.num_rows)):
        with torch.enable_grad():
            states = hidden.detach()[0, chunk].requires_grad_()
            logits = head.logits(states).float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            (gradient[0, chunk],) = torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), states)
    return gradient, len(places)


CHUNK = 64 * nf4.GROUP
"""Weights at once: 4 MiB in fp32, which stays in a core's cache."""

DENSE = "bf16"
"""The name of the 16-bit format beside the 4-bit ones."""


class FourBit(NamedTuple):
    """A 4-bit format with blocks of 64 and double quantization."""

    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    """flat (n,) -> codes (G, 8192) uint8, absmax (G, 256) fp32."""
    dequantize: Callable[..., Tensor]
    """((codes, scales, group_scale, offset), *, shape, dtype) -> the weight."""


INT4_LEVELS = tuple(k / 7 for k in range(-7, 8))
"""The levels of QLoRA's "Int4" (arXiv 2305.14314, table 2), bitsandbytes' linear 4-bit map, as fractions of a block's
absmax. It is stored like NF4: blocks of 64, two codes per byte, double quantization. The 16th code is unused, since a
16th level would cost the zero or the symmetry."""


def _quantize_int4(flat: Tensor) -> tuple[Tensor, Tensor]:
    return reference.quantize_blocks(flat, INT4_LEVELS)


def _dequantize_int4(parts: Sequence[Tensor], *, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    codes, absmax = parts[0], reference.dequantize_absmax(*parts[1:])
    return reference.dequantize_blocks(codes, absmax, shape=shape, dtype=dtype, levels=INT4_LEVELS)


FORMATS = {
    "nf4": FourBit(nf4.quantize_blocks, nf4.NF4.dequantize),
    "int4": FourBit(_quantize_int4, _dequantize_int4),
}
MEASURED = (DENSE, "nf4", "int4")
"""Formats that are measured where none are named."""


def round_trip(
    chunk: Tensor, format: FourBit, second: DoubleQuantizedAbsmax, first_group: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, int]:
    """Return (the restored flat chunk in `dtype`; its stored bytes without the tensor's offset)."""
    codes, _ = format.quantize(chunk)
    scales, group_scale, offset = second.groups(first_group, len(codes))
    restored = format.dequantize((codes, scales, group_scale, offset), shape=tuple(chunk.shape), dtype=dtype)
    return restored, codes.nbytes + scales.nbytes + group_scale.nbytes


@dataclass(slots=True)
class FormatSums:
    """Errors and bytes of a format over some weights."""

    error: float = 0.0
    """Sum of the squared errors."""
    largest: float = 0.0
    """Largest error."""
    num_bytes: int = 0
    harm: float | None = None
    """Estimated divergence from the unquantized model in nats per token; None where it is not measured."""

    def add(self, other: FormatSums) -> None:
        """Add the sums of another chunk."""
        if other.harm is not None:
            self.harm = (self.harm or 0.0) + other.harm
        self.error += other.error
        self.largest = max(self.largest, other.largest)
        self.num_bytes += other.num_bytes


@dataclass(slots=True)
class Sums:
    """Sums over weights, from which everything that is reported of a tensor or of many follows. fp64."""

    numel: int = 0
    powers: list[float] = field(default_factory=lambda: [0.0] * 4)
    """Sums of w, w^2, w^3 and w^4."""
    formats: dict[str, FormatSums] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Add the sums of another tensor."""
        self.numel += other.numel
        self.powers = [mine + theirs for mine, theirs in zip(self.powers, other.powers, strict=True)]
        for name, sums in other.formats.items():
            self.formats.setdefault(name, FormatSums()).add(sums)

    def relative_error(self, format: str) -> float:
        """||w - w'|| / ||w|| (Frobenius)."""
        return math.sqrt(self.formats[format].error / self.powers[1]) if self.powers[1] else 0.0

    def snr_db(self, format: str) -> float | None:
        """10 log10(||w||^2 / ||w - w'||^2); None where nothing was lost."""
        error = self.formats[format].error
        return 10 * math.log10(self.powers[1] / error) if error and self.powers[1] else None

    def bits(self, format: str) -> float:
        """Return the stored bits per weight, padding and second level included."""
        return 8 * self.formats[format].num_bytes / self.numel

    @property
    def std(self) -> float:
        """Return the standard deviation of the weights."""
        mean, square = self.powers[0] / self.numel, self.powers[1] / self.numel
        return math.sqrt(max(square - mean**2, 0.0))

    @property
    def excess_kurtosis(self) -> float | None:
        """E(w - m)^4 / var^2 - 3: 0 for a normal distribution, -1.2 for a uniform one; None for constant weights."""
        mean, square, cube, fourth = (power / self.numel for power in self.powers)
        variance = square - mean**2
        if variance <= 1e-30:
            return None
        return (fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4) / variance**2 - 3


Chunks = Callable[[int], Iterator[Tensor]]
"""Reads a tensor again, in flat pieces of this many weights (the last may be smaller)."""


def measure(
    chunks: Chunks, shape: tuple[int, ...], formats: Sequence[str] = MEASURED, sensitivity: Sensitivity | None = None
) -> Sums:
    """Measure formats by their names on one tensor, dequantized in fp32; with a sensitivity, the harm of each too.

    Raises ValueError for NaN and Inf.
    """
    sums = Sums(formats={name: FormatSums() for name in formats})
    for start, weights, values in restored(chunks, shape, formats):
        if start == sums.numel:  # Pieces of another size come again from 0 on.
            sums.add(Sums(len(weights), _powers(weights)))
        for name, (back, num_bytes) in values.items():
            more = _difference(weights, back, num_bytes)
            if sensitivity is not None:
                harm = (weights - back).square_() * sensitivity.of(start, len(weights))
                more.harm = float(harm.sum(dtype=torch.float64)) / 2
            sums.formats[name].add(more)
    for name in FORMATS.keys() & sums.formats.keys():
        sums.formats[name].num_bytes += torch.float32.itemsize  # The offset.
    return sums


@torch.no_grad()
def restored(
    chunks: Chunks, shape: tuple[int, ...], formats: Sequence[str]
) -> Iterator[tuple[int, Tensor, dict[str, tuple[Tensor, int]]]]:
    """Yield (first weight, weights, by format what it gives back of them and its bytes), flat in fp32.

    The bytes are without replicated parts. The tensor is read once for all formats with pieces of one size, and once
    before for the absmax of those with a second level. Raises ValueError for NaN and Inf.
    """
    width, by_size = shape[-1], dict[int, list[str]]()
    for name in formats:
        size = run_size(REGISTERED[name], width) if name in REGISTERED and name not in FORMATS else CHUNK
        by_size.setdefault(size, []).append(name)
    second = None if FORMATS.keys().isdisjoint(formats) else DoubleQuantizedAbsmax.of(chunks(CHUNK), math.prod(shape))
    for size, names in by_size.items():
        start = 0
        for chunk in chunks(size):
            if second is None and not all_finite(chunk):
                raise ValueError("NaN or Inf weights")
            yield start, chunk.float(), {name: _restored(chunk, name, width, second, start) for name in names}
            start += chunk.numel()


def _restored(
    chunk: Tensor, format: str, width: int, second: DoubleQuantizedAbsmax | None, start: int
) -> tuple[Tensor, int]:
    """Return what a format gives back of a piece from weight `start` on, flat in fp32, and the bytes of that."""
    if format == DENSE:
        return chunk.bfloat16().float(), 2 * chunk.numel()
    if format in FORMATS:
        assert second is not None
        return round_trip(chunk, FORMATS[format], second, start // nf4.GROUP)
    block = REGISTERED[format]
    num_bytes = block.num_bytes((len(chunk),) if block.tile is None else (len(chunk) // width, width))
    return requantized(block, chunk, width), num_bytes


def _powers(weights: Tensor) -> list[float]:
    """Return the sums of w, w^2, w^3 and w^4."""
    exact = weights.double()
    squares = exact * exact
    return [float(power.sum()) for power in (exact, squares, squares * exact, squares * squares)]


def _difference(weights: Tensor, restored: Tensor, num_bytes: int) -> FormatSums:
    error = weights - restored
    exact = error.double()
    return FormatSums(float((exact * exact).sum()), float(error.abs().max()), num_bytes)


REFERENCE_SIZE = 2 * CHUNK
"""Two million weights: the figures are good to three digits."""


def measure_references() -> dict[str, Sums]:
    """Return the sums of weights of excess kurtosis -1.2, 0 and 3, equal on all machines of a kind (one seed).

    Their scale does not matter: each block is divided by its absmax.
    """
    sums = {}
    for name in ("uniform", "normal", "Laplace"):
        generator = torch.Generator().manual_seed(0)
        if name == "normal":
            weights = torch.randn(REFERENCE_SIZE, generator=generator)
        elif name == "uniform":
            weights = torch.rand(REFERENCE_SIZE, generator=generator) * 2 - 1
        else:
            uniform = torch.rand(REFERENCE_SIZE, generator=generator, dtype=torch.float64) - 0.5
            weights = (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()
        sums[name] = measure(lambda size, weights=weights: iter(weights.split(size)), (REFERENCE_SIZE,))  # type: ignore[misc]
    return sums


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight that quant=nf4 quantizes, on disk."""

    name: str
    """As the Hugging Face model has it: model.layers.0.mlp.up_proj.weight."""
    source: ParameterSource

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape on disk."""
        return self.source.shape

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return sum(segment.numel for segment in self.source.segments)

    def chunks(self, reader: Reader, device: torch.device, size: int) -> Iterator[Tensor]:
        """Yield the weight in flat order, in pieces of `size` weights (but the last), in its dtype on disk."""
        for _, chunk in reader.chunks(self.source.segments, 0, self.numel, size):
            yield chunk.to(device)

    def measure(
        self, reader: Reader, device: torch.device, formats: Sequence[str], sensitivity: Sensitivity | None
    ) -> Sums:
        """Measure formats on the weight (`measure`). Raises UserError for NaN and Inf."""
        try:
            return measure(functools.partial(self.chunks, reader, device), self.shape, formats, sensitivity)
        except ValueError as error:
            raise UserError(f"{self.name} holds {error}; the checkpoint is damaged, download it again") from error


def block_weights(model: CausalLM) -> Iterator[tuple[str, FrozenTensor]]:
    """(name, module) of every frozen weight of the decoder blocks, quantized in this model or not: linears, experts."""
    for path, module in model.named_modules():
        if isinstance(module, FrozenTensor):
            yield model.hf_name(f"{path}.weight"), module


def find_weights(spec: ModelSpec) -> tuple[list[StoredWeight], int]:
    """Return (weights that quant=nf4 quantizes, parameters of the whole model) from headers alone.

    The weights are in the order of the forward. Raises UserError for a checkpoint that is not the model's, and for
    weights in another type than 32 or 16 bits.
    """
    files = CheckpointFiles(spec.path)
    model = build_model(spec, base=files)
    sources = find_base(model, files.headers)
    weights = []
    for name, module in block_weights(model):
        if not module.quantized:  # A router, which stays as it is.
            continue
        segments_of(sources, name, module.shape)
        weights.append(StoredWeight(name, sources[name]))
    tied = {f"{model.architecture.head}.weight"} if model.tied else set()
    total = sum(segment.numel for name, s in sources.items() if name not in tied for segment in s.segments)
    return weights, total
