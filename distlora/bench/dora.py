"""What DoRA costs beside LoRA: counted for a GPU, and measured here on the CPU, both in one run, taking turns.

    python -m distlora.bench.dora [--rows 2048] [--sizes 1024,2048] [--threads 1] ...     (`distlora bench dora`)

Counted: bytes and flops of forward and backward of one adapted linear in bf16, from kernels/bench/costs.py, and the
time that they predict. Measured: an adapted linear (size x size), forward and backward; the ratios are medians over
pairs of turns, of this process' CPU seconds, which other work on the machine hardly changes, and of the wall clock,
which it does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from distlora_kernels.bench import costs
from distlora_kernels.bench.rates import ASSUMED, Step, predicted_seconds
from distlora_kernels.bench.shapes import Group
from torch import Tensor

from distlora_kernels.dora import initial_magnitude
from distlora_kernels.lora_linear import Adapter, FrozenWeight, Magnitude, lora_linear
from distlora_kernels.nf4 import nf4_quantize

COUNTED = ((8192, 8192), (8192, 28672), (28672, 8192))
"""(out, in) of Llama 3 70B: o, down, gate or up."""
COUNTED_ROWS, RANK = 8192, 16


def counted() -> Iterator[tuple[str, list[Step], list[Step]]]:
    """(case, LoRA's steps, DoRA's) of forward and backward."""
    for shape in COUNTED:
        group = Group("x".join(map(str, shape)), (shape,))
        cases = (("NF4", costs.ours_scratch, costs.ours_dora), ("dense", costs.ours_dense, costs.ours_dora_dense))
        for kind, lora, dora in cases:
            steps = [list(count(group, COUNTED_ROWS, RANK, backward=True)) for count in (lora, dora)]
            yield f"{group.name} {kind}", steps[0], steps[1]


@dataclass(frozen=True, slots=True)
class Turn:
    """One forward and backward."""

    cpu: float
    wall: float


def problem(size: int, rows: int, dtype: torch.dtype, *, packed: bool) -> Callable[[bool], dict[str, Tensor]]:
    """run(dora) -> outputs and gradients of one linear, trained a little, on the same numbers each time."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = (draw(size, size) / size**0.5).to(dtype)
    frozen = FrozenWeight(nf4_quantize(weight) if packed else (weight,), (size, size))
    a, b = (draw(RANK, size) / size**0.5).requires_grad_(), (0.1 * draw(size, RANK)).requires_grad_()
    squares = frozen.dense(dtype).double().square().sum(dim=1).float()
    masters = (initial_magnitude(squares)[None] * (1 + 0.1 * draw(1, size))).requires_grad_()
    x, dy = draw(rows, size).to(dtype).requires_grad_(), draw(rows, size).to(dtype)

    def run(dora: bool) -> dict[str, Tensor]:
        magnitude = Magnitude(masters, squares) if dora else None
        y = lora_linear(x, frozen, Adapter(a, b, 1.0, None, magnitude))
        leaves = {"x": x, "a": a, "b": b, **({"magnitude": masters} if dora else {})}
        return {"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))

    return run


def measure(run: Callable[[bool], dict[str, Tensor]], repeats: int) -> tuple[list[Turn], list[Turn]]:
    """LoRA's turns and DoRA's, one after the other, after two that do not count. Checks that both did the work."""
    for _ in range(2):
        results = [run(dora) for dora in (False, True)]
    assert all(bool(tensor.isfinite().all()) for result in results for tensor in result.values())
    assert not torch.equal(results[0]["y"], results[1]["y"]), "the magnitudes do nothing"
    turns: tuple[list[Turn], list[Turn]] = ([], [])
    for _ in range(repeats):
        for dora in (False, True):
            cpu, wall = time.process_time(), time.perf_counter()
            run(dora)
            turns[dora].append(Turn(time.process_time() - cpu, time.perf_counter() - wall))
    return turns


def report(options: argparse.Namespace) -> Iterator[str]:
    yield f"| counted, M = {COUNTED_ROWS}, r = {RANK}, bf16 | LoRA GB | DoRA GB | bytes | flops | predicted, H100 |"
    yield "|---|---|---|---|---|---|"
    for case, *both in counted():
        nbytes = [sum(step.nbytes for step in steps) / 1e9 for steps in both]
        flops = [sum(step.flops for step in steps) for steps in both]
        seconds = [predicted_seconds(steps, ASSUMED) for steps in both]
        yield (
            f"| {case} | {nbytes[0]:.2f} | {nbytes[1]:.2f} | {nbytes[1] / nbytes[0]:.3f} | {flops[1] / flops[0]:.4f} | "
            f"{seconds[1] / seconds[0]:.3f} ({seconds[0] * 1e3:.2f} -> {seconds[1] * 1e3:.2f} ms) |"
        )
    yield ""
    yield (
        f"| measured, M = {options.rows}, r = {RANK}, {torch.get_num_threads()} threads, torch {torch.__version__} | "
        "LoRA, CPU ms | DoRA over LoRA, CPU seconds | wall clock |"
    )
    yield "|---|---|---|---|"
    for size in options.sizes:
        for dtype in (torch.float32, torch.bfloat16):
            for packed in (True, False):
                lora, dora = measure(problem(size, options.rows, dtype, packed=packed), options.repeats)
                name = f"{size}x{size} {str(dtype).removeprefix('torch.')} {'NF4' if packed else 'dense'}"
                cpu = statistics.median(turn.cpu for turn in lora) * 1e3
                pairs = list(zip(lora, dora, strict=True))
                ratio = statistics.median(second.cpu / first.cpu for first, second in pairs)
                wall = statistics.median(second.wall / first.wall for first, second in pairs)
                yield f"| {name} | {cpu:.1f} | {ratio:.3f} | {wall:.3f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")], default=[1024, 2048])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for line in report(options):
        print(line, flush=True)


if __name__ == "__main__":
    main()
