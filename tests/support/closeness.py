"""Compare numbers that may differ by rounding, and runs that may not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from support.small_models import read_metrics


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| (Frobenius, fp64)."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))


def assert_close(actual: Tensor, expected: Tensor, *, ulps: float) -> None:
    """Require a relative Frobenius error below `ulps` machine epsilons of the actual's dtype."""
    assert actual.shape == expected.shape
    limit = ulps * torch.finfo(actual.dtype).eps
    error = relative_error(actual, expected)
    assert error <= limit, f"relative error {error:.1e} exceeds {limit:.1e} ({ulps} ulps of {actual.dtype})"


def assert_losses_close(actual: Iterable[float], expected: Iterable[float], *, relative: float = 1e-6) -> None:
    """Step by step, within the bound for losses (design: 1e-6 relative in fp32)."""
    for step, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert math.isclose(a, b, rel_tol=relative), (
            f"loss {step}: {a!r} against {b!r}, {abs(a - b) / abs(b):.1e} apart"
        )


def assert_adapters_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, factor: float = 1.0) -> None:
    """Compare adapters after up to 10 AdamW steps in fp32 (Frobenius norm, relative to `expected`).

    All together may differ by 2e-6 and any one tensor by 1e-5, times `factor`. A tensor below a twentieth of the median
    one is held to 1e-5 of that twentieth: its gradient is a sum that cancels, whose rounding is that of its terms.
    """
    assert actual.keys() == expected.keys()
    together = relative_error(
        torch.cat([actual[name].flatten() for name in expected]), torch.cat([t.flatten() for t in expected.values()])
    )
    assert together <= 2e-6 * factor, f"all adapters together are {together:.1e} apart"
    norms = {name: float(tensor.double().norm()) for name, tensor in expected.items()}
    least = statistics.median_low(norms.values()) / 20
    for name, norm in norms.items():
        error = float((actual[name].double() - expected[name].double()).norm()) / max(norm, least)
        assert error <= 1e-5 * factor, f"{name} is {error:.1e} apart"


def adapter_of(run_dir: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run_dir / "adapter" / "adapter_model.safetensors")


def figures_of(run_dir: Path) -> list[tuple[int, str, float]]:
    """Return (step, name, value) of every figure but those of time and memory."""
    names = ("loss", "eval_loss", "lr", "grad_norm")
    return [(line["step"], name, line[name]) for line in read_metrics(run_dir) for name in names if name in line]


def assert_same_run(run_dir: Path, other: Path) -> None:
    """Require the same adapter, bit for bit, by the same steps, each reported once with the same figures."""
    ours, others = adapter_of(run_dir), adapter_of(other)
    assert ours.keys() == others.keys()
    assert all(torch.equal(ours[name], others[name]) for name in ours)
    assert figures_of(run_dir) == figures_of(other)
