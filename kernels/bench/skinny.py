"""Compare the adapter's products with the library's: the large operand is read once, not once per product.

Letters: M rows, I in features, O out features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from distlora_kernels.skinny import skinny_down, skinny_dy, skinny_grad, skinny_up

from .costs import E, Rates, Step
from .problem import SCALE, Group, normal
from .table import Candidate, Place, Row, judge

SECTION = "Products of the adapter"
LIBRARY = "library GEMM"


def rows(
    groups: Sequence[Group], counts: Sequence[int], rank: int, device: torch.device, rates: Rates
) -> Iterator[Row]:
    """Yield the rows of every distinct shape and M."""
    for shape in dict.fromkeys(shape for group in groups for shape in group.shapes):
        for count in counts:
            place = Place(section=SECTION, shape=f"{shape[0]}x{shape[1]}", num_rows=count, device=device, rates=rates)
            yield from judge(place, _candidates(shape, count, rank, device), baseline=LIBRARY)


def _candidates(shape: tuple[int, int], m: int, r: int, device: torch.device) -> Iterator[Candidate]:
    (out, features), generator = shape, torch.Generator(device).manual_seed(0)
    x, dy = normal((m, features), device, generator), normal((m, out), device, generator)
    a, b = normal((r, features), device, generator), normal((out, r), device, generator)
    xa, dxa = normal((m, r), device, generator), normal((m, r), device, generator)
    x_bytes, y_bytes, small = E * (m + r) * features, E * (m + r) * out, E * m * r
    pass_over_partials = Step(0.0)
    yield from _pair(
        "x A^T",
        lambda: {"xa": x @ a.T},
        lambda: {"xa": skinny_down(x, a)},
        {"xa": x.float() @ a.float().T},
        [Step(x_bytes + small)],
        [Step(x_bytes + small)],
    )
    yield from _pair(
        "(x A^T) B^T",
        lambda: {"y": xa @ b.T},
        lambda: {"y": skinny_up(xa, b)},
        {"y": xa.float() @ b.float().T},
        [Step(y_bytes + small)],
        [Step(y_bytes + small)],
    )
    yield from _pair(
        "dY B, dB",
        lambda: {"dxa": dy @ b, "db": (dy.T @ xa) * SCALE},
        partial(_named_dy, dy, b, xa),
        {"dxa": dy.float() @ b.float(), "db": SCALE * (dy.float().T @ xa.float())},
        [Step(y_bytes + small), Step(y_bytes + small), Step(2 * E * out * r)],
        [Step(y_bytes + E * out * r + 2 * small), pass_over_partials],
    )
    yield from _pair(
        "dA",
        lambda: {"da": dxa.T @ x},
        lambda: {"da": skinny_grad(dxa, x)},
        {"da": dxa.float().T @ x.float()},
        [Step(x_bytes + small)],
        [Step(x_bytes + small), pass_over_partials],
    )


def _named_dy(dy: Tensor, b: Tensor, xa: Tensor) -> dict[str, Tensor]:
    dxa, db = skinny_dy(dy, b, xa, scale=SCALE)
    return {"dxa": dxa, "db": db}


Run = Callable[[], Mapping[str, Tensor]]


def _pair(
    task: str, library: Run, ours: Run, expected: Mapping[str, Tensor], library_steps: list[Step], steps: list[Step]
) -> Iterator[Candidate]:
    """Yield the library's and our candidate; the floor of both is what our launches move."""
    floor = (sum(step.nbytes for step in steps), 0.0)
    yield Candidate(name=LIBRARY, task=task, run=library, expected=expected, steps=library_steps, floor=floor)
    yield Candidate(name="ours", task=task, run=ours, expected=expected, steps=steps, floor=floor)
