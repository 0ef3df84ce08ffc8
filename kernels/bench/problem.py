"""Make the shapes, operands and expected outputs of a group of linears, the same for every candidate.

Letters: M rows, I in features, O out features, R rank.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from distlora_kernels import reference
from distlora_kernels.formats import FORMATS, Format
from distlora_kernels.formats.base import dtype_of
from distlora_kernels.formats.flat import BlockFormat
from distlora_kernels.formats.nf4 import NF4, nf4_quantize
from distlora_kernels.operands import Adapter, FrozenWeight, Linear

SCALE = 2.0
"""Scale of the adapters: a power of two, so that rounding s B and B agree."""
_UP_DEVIATION = 2.5
"""Standard deviation of B over W's: without the adapter outputs change by 10 %, far beyond a check's limit."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The operands that are the same for every M."""

    format: Format
    linears: tuple[Linear, ...]
    dense: tuple[Tensor, ...]
    """Dense weights (O, I) bf16, dequantized by the format's definition."""

    @property
    def masters(self) -> list[Tensor]:
        """Masters a and b of each linear, alternating."""
        adapters = [cast(Adapter, linear.adapter) for linear in self.linears]
        return [master for adapter in adapters for master in (adapter.a, adapter.b)]


def make_weights(shapes: Sequence[tuple[int, int]], rank: int, device: torch.device, format: Format = NF4) -> Weights:
    """Return random weights with adapters; fp32 masters are bf16 numbers, so that all candidates have them."""
    generator = torch.Generator(device).manual_seed(0)
    linears, dense = [], []
    for shape in shapes:
        parts, weight = random_weight(format, shape, device, generator)
        a = normal((rank, shape[1]), device, generator).mul_(shape[1] ** -0.5).float().requires_grad_()
        deviation = _UP_DEVIATION * float(weight.float().square().mean().sqrt())
        b = normal((shape[0], rank), device, generator).mul_(deviation).float().requires_grad_()
        linears.append(Linear(FrozenWeight(parts, shape, format), Adapter(a, b, SCALE)))
        dense.append(weight)
    return Weights(format, tuple(linears), tuple(dense))


BLOCK_FORMATS = tuple({each.label: each for each in FORMATS.values() if isinstance(each, BlockFormat)}.values())
"""The registered formats other than NF4, one of each label: of int4 the last, which has zero points."""


def random_weight(
    format: Format, shape: tuple[int, int], device: torch.device, generator: torch.Generator
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return random parts of a weight (O, I), and the weight in bf16 by the format's definition."""
    dtype = torch.bfloat16
    if not isinstance(format, BlockFormat):
        codes, *second = nf4_quantize(normal(shape, device, generator))
        absmax = reference.dequantize_absmax(*second)
        parts = (codes, *second) if format is NF4 else (codes, absmax)
        return parts, reference.dequantize_blocks(codes, absmax, shape=shape, dtype=dtype)
    stored = {}
    for part in format.parts:
        size = (format.num_groups(shape), *part.shape)
        if part.dtype == "uint8":
            stored[part.name] = torch.randint(256, size, dtype=torch.uint8, device=device, generator=generator)
            last = part.name
        else:
            stored[part.name] = torch.rand(size, device=device, generator=generator).add_(1).to(dtype_of(part))
    # These bytes hold scales, or everything: from 0x60 to 0x6F they are finite and of a like size in every format.
    stored[last] = stored[last] & 0x0F | 0x60
    parts = tuple(stored.values())
    return parts, format.decode_into(torch.empty(shape, dtype=dtype, device=device), parts)


def normal(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    """Return Gaussian bf16 numbers."""
    return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of a group and the gradients of its outputs: x (M, I), dys (M, O), bf16."""

    x: Tensor
    dys: tuple[Tensor, ...]


def make_batch(shapes: Sequence[tuple[int, int]], num_rows: int, device: torch.device) -> Batch:
    """Return a Gaussian input and gradients of the outputs."""
    generator = torch.Generator(device).manual_seed(1)
    x = normal((num_rows, shapes[0][1]), device, generator).requires_grad_()
    return Batch(x, tuple(normal((num_rows, out), device, generator) for out, _ in shapes))


@torch.no_grad()
def expected_outputs(weights: Weights, batch: Batch, *, adapted: bool) -> dict[str, Tensor]:
    """Return y0..., dx, and with `adapted` da0, db0..., computed in fp32 from the bf16 operands.

    y = x W^T + s (x A^T) B^T;  dX = sum of dY W + s (dY B) A;  dA = s (dY B)^T X;  dB = s dY^T (X A^T).
    """
    x = batch.x.float()
    dx = torch.zeros_like(x)
    outputs: dict[str, Tensor] = {}
    for index, (dense, linear, grad) in enumerate(zip(weights.dense, weights.linears, batch.dys, strict=True)):
        weight, dy = dense.float(), grad.float()
        y = x @ weight.T
        dx.addmm_(dy, weight)
        if adapted:
            adapter = cast(Adapter, linear.adapter)
            xa, dxa = SCALE * (x @ adapter.a.T), SCALE * (dy @ adapter.b)
            y.addmm_(xa, adapter.b.T)
            dx.addmm_(dxa, adapter.a)
            outputs |= {f"da{index}": dxa.T @ x, f"db{index}": dy.T @ xa}
        outputs[f"y{index}"] = y
    return outputs | {"dx": dx}


ROWS = (1, 16, 64, 128, 256, 512, 2048, 8192)
"""Default values of M: from decoding one row to a training batch."""


@dataclass(frozen=True, slots=True)
class Group:
    """Linears of one input."""

    name: str
    """Name in the table: `llama-70b/down`, or the shapes themselves."""
    shapes: tuple[tuple[int, int], ...]
    """(O, I) of each linear."""

    @property
    def features(self) -> int:
        """I."""
        return self.shapes[0][1]

    @property
    def label(self) -> str:
        """Name and shapes."""
        shapes = " + ".join(f"{out}x{features}" for out, features in self.shapes)
        return shapes if self.name == shapes else f"{self.name} {shapes}"


def _model(name: str, *, hidden: int, queries: int, keys: int, intermediate: int) -> tuple[Group, ...]:
    """Return a model's four groups; `queries` and `keys` are heads times head dimension."""
    return (
        Group(f"{name}/qkv", ((queries, hidden), (keys, hidden), (keys, hidden))),
        Group(f"{name}/o", ((hidden, queries),)),
        Group(f"{name}/gate-up", ((intermediate, hidden), (intermediate, hidden))),
        Group(f"{name}/down", ((hidden, intermediate),)),
    )


GROUPS = (
    *_model("llama-8b", hidden=4096, queries=4096, keys=1024, intermediate=14336),
    *_model("llama-70b", hidden=8192, queries=8192, keys=1024, intermediate=28672),
    *_model("qwen3-32b", hidden=5120, queries=8192, keys=1024, intermediate=25600),
)


def groups_named(names: str) -> tuple[Group, ...]:
    """Parse `llama-70b`, `llama-70b/down` and `128x64+64x64` (O x I), separated by commas. Raises ValueError."""
    groups: list[Group] = []
    for name in names.split(","):
        known = [group for group in GROUPS if group.name == name or group.name.startswith(name + "/")]
        groups += known or [_group_of_shapes(name)]
    return tuple(groups)


def _group_of_shapes(text: str) -> Group:
    parts = [re.fullmatch(r"(\d+)x(\d+)", part) for part in text.split("+")]
    shapes = tuple((int(part[1]), int(part[2])) for part in parts if part is not None)
    if len(shapes) != len(parts) or len({features for _, features in shapes}) != 1:
        models = ", ".join(sorted({group.name.partition("/")[0] for group in GROUPS}))
        raise ValueError(f"shapes are {models}, one of their groups (llama-70b/down) or OxI+OxI..., not {text!r}")
    return Group(" + ".join(f"{out}x{features}" for out, features in shapes), shapes)


def floor(group: Group, num_rows: int, format: Format | None, *, backward: bool) -> tuple[float, float]:
    """Return the fewest bytes and flops of a group: stored weights, x and y; with `backward` dx and dy too.

    `format`: that of the weights, None for bf16.
    """
    weights = sum(2 * math.prod(shape) if format is None else format.num_bytes(shape) for shape in group.shapes)
    rows = 2 * num_rows * (group.features + sum(out for out, _ in group.shapes))
    flops = sum(2.0 * num_rows * out * features for out, features in group.shapes)
    return (weights + rows) * (1 + backward), flops * (1 + backward)
