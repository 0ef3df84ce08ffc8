"""What the card can do, measured, and what a sequence of operations costs at those rates.

A prediction is the sum over the launches of max(bytes / copy bandwidth, flops / GEMM rate) and a fixed cost of each: it
assumes that each operation reads its inputs and writes its output once, and that operations do not overlap.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .clock import median_seconds

LAUNCH_SECONDS = 3e-6
"""From the end of one kernel to the start of the next, ramps included (an estimate, not measured)."""

_COPIED_BYTES = 2**30
_GEMM_SIZE = 8192


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes and flops a second of large copies and large bf16 GEMMs."""

    bandwidth: float
    gemm: float


ASSUMED = Rates(bandwidth=3.0e12, gemm=800e12)
"""An H100's, for predictions where nothing can be measured."""


def measure_rates(device: torch.device) -> Rates:
    """A copy of 1 GiB (read and written: 2 GiB) and a bf16 GEMM of 8192 x 8192 x 8192."""
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_seconds({"copy": lambda: target.copy_(source)}, device)["copy"]
    left, right = (torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    gemm = median_seconds({"gemm": lambda: torch.mm(left, right.T, out=out)}, device)["gemm"]
    return Rates(bandwidth=2 * _COPIED_BYTES / copy, gemm=2 * _GEMM_SIZE**3 / gemm)


@dataclass(frozen=True, slots=True)
class Step:
    """One launch: its traffic with the card's memory, and its bf16 flops."""

    nbytes: float
    flops: float = 0.0
    efficiency: float = 1.0
    """Share of the GEMM rate that is expected of it."""
    launches: int = 1
    """0: traffic that another launch has beside its own."""

    def seconds(self, rates: Rates) -> float:
        return self.launches * LAUNCH_SECONDS + max(
            self.nbytes / rates.bandwidth, self.flops / (rates.gemm * self.efficiency)
        )


def predicted_seconds(steps: Iterable[Step], rates: Rates) -> float:
    return sum(step.seconds(rates) for step in steps)
