"""Compare the elementwise operations, forward and backward together, with transformers' and liger-kernel's.

Letters: M rows, N columns: the in features of a group of linears, taken as hidden size, inner columns, heads of up to
128 columns, and vocabulary.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from distlora_kernels import elementwise

from .problem import Group, normal
from .table import Candidate, Place, Rates, Row, judge

SECTION, TRANSFORMERS, OURS, LIGER = "Elementwise operations", "transformers", "ours", "liger-kernel"
Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def rows(groups: Sequence[Group], counts: Sequence[int], device: torch.device, rates: Rates | None) -> Iterator[Row]:
    """Yield the rows of every operation, for every distinct N and M."""
    for columns in dict.fromkeys(group.features for group in groups):
        for count in counts:
            place = Place(section=SECTION, shape=str(columns), num_rows=count, device=device, rates=rates)
            yield from judge(place, _candidates(columns, count, device), baseline=TRANSFORMERS)


def _candidates(n: int, m: int, device: torch.device) -> Iterator[Candidate]:
    generator = torch.Generator(device).manual_seed(0)
    x, second, weight = (normal(shape, device, generator) for shape in ((m, n), (m, n), (n,)))
    size = math.gcd(128, n)
    angles = torch.randn(1, m, size, device=device, generator=generator)
    heads = {name: part.view(1, m, -1, size).transpose(1, 2) for name, part in (("q", x), ("k", second[:, :size]))}
    labels = torch.arange(m, device=device) % n

    def losses(logits: Tensor) -> Tensor:
        return elementwise.reference_cross_entropy(logits, labels)[1]

    def own_losses(logits: Tensor) -> Tensor:
        elementwise.cross_entropy_(logits, labels)
        return logits

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return elementwise.reference_rotated(q, cos, sin), elementwise.reference_rotated(k, cos, sin)

    theirs = _liger() if device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None else {}
    # Names and tensors with gradients, the others, the definition, ours, and the fewest passes over a tensor of M x N.
    tasks: tuple[tuple[str, dict[str, Tensor], tuple[Tensor, ...], Operation, Operation, float], ...] = (
        (
            "RMSNorm",
            {"x": x},
            (weight,),
            lambda x, w: elementwise.reference_rms_norm(x, w, 1e-6, plus_one=False),
            lambda x, w: elementwise.rms_norm(x, w, 1e-6, plus_one=False),
            5,
        ),
        (
            "SwiGLU",
            {"gate": x, "up": second},
            (),
            lambda gate, up: elementwise.reference_gated(gate, up, "silu"),
            lambda gate, up: elementwise.gated(gate, up, "silu"),
            8,
        ),
        ("rotary embedding", heads, (angles.cos(), angles.sin()), rotated, elementwise.rotate, 4 * (1 + size / n)),
        ("cross-entropy", {}, (x,), losses, own_losses, 2),
    )
    for task, leaves, others, definition, ours, passes in tasks:
        if task == "rotary embedding" and size == 1:
            continue
        expected = _run(definition, [t.float() for t in leaves.values()], [t.float() for t in others], [*leaves])()
        tables = [t.to(x.dtype) for t in others]
        for name, operation in {TRANSFORMERS: definition, OURS: ours, LIGER: theirs.get(task)}.items():
            if operation is not None:
                run = _run(operation, [*leaves.values()], tables, [*leaves])
                yield Candidate(name=name, task=task, run=run, expected=expected, floor=(passes * x.nbytes, 0.0))


def _run(
    operation: Operation, leaves: list[Tensor], others: list[Tensor], names: list[str]
) -> Callable[[], dict[str, Tensor]]:
    """Return a function that runs the operation and its backward, with operands of its own.

    Operations write over their operands: only the first run has the right ones, and is checked.
    """
    own = [leaf.clone(memory_format=torch.preserve_format).requires_grad_() for leaf in leaves]
    rest = [each.clone() for each in others]
    dys: list[Tensor] = []

    def run() -> dict[str, Tensor]:
        outputs = operation(*(leaf.view_as(leaf) for leaf in own), *rest)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = {f"y{index}": y.detach() for index, y in enumerate(outputs)}
        if own:
            dys.extend(torch.ones_like(y) for y in outputs[len(dys) :])
            found |= zip((f"d{name}" for name in names), torch.autograd.grad(outputs, own, dys), strict=True)
        return found

    return run


def _liger() -> dict[str, Operation]:
    """Return liger-kernel's functions by task."""
    from liger_kernel.transformers import liger_rotary_pos_emb
    from liger_kernel.transformers.functional import liger_rms_norm, liger_swiglu

    return {
        "RMSNorm": lambda x, weight: liger_rms_norm(x, weight, 1e-6, in_place=False),
        "SwiGLU": liger_swiglu,
        "rotary embedding": liger_rotary_pos_emb,
    }
