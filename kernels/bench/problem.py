"""Make the shapes, operands and expected outputs of a group of linears, the same for every candidate.

Letters: M rows, I in features, O out features, R rank.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from distlora_kernels import reference
from distlora_kernels.formats.nf4 import NF4, nf4_quantize
from distlora_kernels.operands import Adapter, FrozenWeight, Linear

SCALE = 2.0
"""Scale of the adapters: a power of two, so that rounding s B and B agree."""
_WEIGHT_DEVIATION, _UP_DEVIATION = 0.02, 0.05
"""Standard deviations of W and B: without the adapter outputs change by 10 %, far beyond a check's limit."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The operands that are the same for every M."""

    linears: tuple[Linear, ...]
    dense: tuple[Tensor, ...]
    """Dense weights (O, I) bf16, dequantized by the reference."""

    @property
    def masters(self) -> list[Tensor]:
        """Masters a and b of each linear, alternating."""
        adapters = [cast(Adapter, linear.adapter) for linear in self.linears]
        return [master for adapter in adapters for master in (adapter.a, adapter.b)]


def make_weights(shapes: Sequence[tuple[int, int]], rank: int, device: torch.device) -> Weights:
    """Return Gaussian NF4 weights with adapters; fp32 masters are bf16 numbers, so that all candidates have them."""
    generator = torch.Generator(device).manual_seed(0)
    linears, dense = [], []
    for out, features in shapes:
        weight = normal((out, features), device, generator).mul_(_WEIGHT_DEVIATION)
        parts = nf4_quantize(weight)
        del weight
        a = normal((rank, features), device, generator).mul_(features**-0.5).float().requires_grad_()
        b = normal((out, rank), device, generator).mul_(_UP_DEVIATION).float().requires_grad_()
        linears.append(Linear(FrozenWeight(parts, (out, features), NF4), Adapter(a, b, SCALE)))
        dense.append(reference.nf4_dequantize(*parts, shape=(out, features), dtype=torch.bfloat16))
    return Weights(tuple(linears), tuple(dense))


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


def floor(group: Group, num_rows: int, *, quantized: bool, backward: bool) -> tuple[float, float]:
    """Return the fewest bytes and flops of a group: stored weights, x and y; with `backward` dx and dy too."""
    weights = sum(NF4.num_bytes(shape) if quantized else 2 * shape[0] * shape[1] for shape in group.shapes)
    rows = 2 * num_rows * (group.features + sum(out for out, _ in group.shapes))
    flops = sum(2.0 * num_rows * out * features for out, features in group.shapes)
    return (weights + rows) * (1 + backward), flops * (1 + backward)
