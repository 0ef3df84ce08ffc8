"""How long the CPU's attention in bf16 takes, by products of the library (attention_cpu.py) and compiled
(attention.cpp), beside torch's flash attention with the same keys, repeated for each head of the queries, and the same
documents, as a dense mask: what transformers does.

    python -m distlora.bench.attention [--threads 1] [--rounds 7]                    (`distlora bench attention`)

All take turns; each's fastest round counts, forward and backward, by this process' CPU seconds and by the clock.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from distlora.bench.machine import made_here
from distlora.model import attention_cpu
from distlora.model.attention import VarlenOp
from distlora_kernels import attention as compiled
from distlora_kernels import native


@dataclass(frozen=True, slots=True)
class Case:
    rows: int
    length: int
    heads: int
    key_heads: int
    size: int
    document: int
    """Tokens of each, but for what is left of a row."""

    def __str__(self) -> str:
        documents = "one document" if self.document >= self.length else f"documents of {self.document}"
        return f"{self.rows} x {self.length}, {documents}, {self.heads} heads over {self.key_heads} of {self.size}"

    @property
    def bounds(self) -> list[int]:
        starts = [row * self.length + at for row in range(self.rows) for at in range(0, self.length, self.document)]
        return [*starts, self.rows * self.length]


CASES = (
    Case(4, 512, 16, 4, 64, 512),
    Case(4, 512, 16, 16, 64, 512),
    Case(4, 512, 8, 2, 128, 512),
    Case(4, 512, 16, 4, 64, 100),
    Case(4, 512, 16, 4, 64, 20),
    Case(1, 2048, 16, 4, 64, 2048),
    Case(1, 2048, 8, 2, 128, 2048),
    Case(1, 2048, 16, 4, 64, 128),
)
Op = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(case: Case, attend: VarlenOp) -> Op:
    bounds = torch.tensor(case.bounds, dtype=torch.int32)

    def op(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape = query.shape
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
        return attend(query, key, value, bounds, case.document, case.size**-0.5, None).view(shape)

    return op


def flash(case: Case) -> Op:
    mask = None
    if case.document < case.length:
        at = torch.arange(case.length)
        same, seen = at[:, None] // case.document == at // case.document, at[:, None] >= at
        mask = (same & seen).expand(case.rows, 1, -1, -1).contiguous()
    groups = case.heads // case.key_heads

    def op(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (tensor.repeat_interleave(groups, dim=2) for tensor in (key, value))
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return output.transpose(1, 2).contiguous()

    return op


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """By name: CPU seconds of forward and of backward, and the clock's of both."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, gradient = (
        torch.randn(case.rows, case.length, heads, case.size, generator=generator).bfloat16()
        for heads in (case.heads, case.key_heads, case.key_heads, case.heads)
    )

    def once(op: Op) -> list[float]:
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        moments = [(time.process_time(), time.perf_counter())]
        output = op(*leaves)
        moments.append((time.process_time(), time.perf_counter()))
        output.backward(gradient)
        moments.append((time.process_time(), time.perf_counter()))
        forward, backward = ([b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(moments))
        return [forward[0], backward[0], forward[1] + backward[1]]

    ops = {"flash": flash(case), "ours": ours(case, attention_cpu.attend)}
    if why_not_compiled(case.key_heads, case.size) is None:
        ops["compiled"] = ours(case, compiled.attend)
    best: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for name, op in ops.items():
            found = once(op)
            if turn:  # The first one warms up.
                best[name] = [min(pair) for pair in zip(found, best.get(name, found), strict=True)]
    return best


def why_not_compiled(key_heads: int, size: int) -> str | None:
    try:
        return native.why_not() or compiled.why_not(key_heads, size)
    except native.NotCompiledError as error:
        return str(error)


def lines(threads: int, rounds: int) -> Iterator[str]:
    ratios_of = "flash / ours: CPU | clock | flash / compiled: CPU | clock"
    yield f"| {threads} threads | flash, ms CPU (forward + backward) | ours | compiled | {ratios_of} |"
    yield "|--|--|--|--|--|--|--|--|"
    for case in CASES:
        found = measure(case, rounds)
        times = {name: f"{1e3 * forward:.0f} + {1e3 * backward:.0f}" for name, (forward, backward, _) in found.items()}
        cells = [times.get(name, "-") for name in ("flash", "ours", "compiled")]
        for name in ("ours", "compiled"):
            for part in (slice(2), slice(2, 3)):  # CPU seconds; the clock's.
                cells.append(f"{sum(found['flash'][part]) / sum(found[name][part]):.2f}" if name in found else "-")
        yield " | ".join([f"| {case}", *cells]) + " |"
    reasons = {why_not_compiled(case.key_heads, case.size): None for case in CASES}
    for reason in filter(None, reasons):
        yield f"Not compiled: {reason}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(made_here())
    for line in lines(options.threads, options.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
