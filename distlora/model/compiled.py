"""train.compile: what elementwise.cpp computes in a transformers decoder and in the head, on the CPU; attention.py
chooses attention.cpp where it can.

Both are compiled when a worker starts, by the machine's C++ compiler, for its processor (distlora_kernels.native).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distlora.architecture.families import Family
from distlora.config import UserError
from distlora.model import fused_modules
from distlora.model.head import LossHead
from distlora_kernels import native
from distlora_kernels.elementwise import cross_entropy_, gated, rms_norm, rotate


class CompiledRMSNorm(nn.Module):
    """A norm whose weight (N,) is frozen."""

    weight: nn.Parameter

    def __init__(self, *, eps: float, plus_one: bool) -> None:
        super().__init__()
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, plus_one=self.plus_one)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def require() -> None:
    """Compile. Raises UserError where nothing can be compiled."""
    try:
        native.library()
    except native.NotCompiledError as error:
        raise UserError(f"train.compile=true: {error}, or set train.compile=false") from error


def apply(decoder: Any, family: Family, head: LossHead, *, outputs_are_kept: bool = False) -> str:
    """Exchange what is compiled, once `require` has returned; returns what is used, a line."""
    fused = fused_modules.Fused(name="compiled for this processor", norm=_norm, silu=_silu, gelu=_gelu, rotate=rotate)
    used = fused_modules.exchange(decoder, family, fused, outputs_are_kept=outputs_are_kept)
    if not head.takes_cross_entropy:
        return used
    head.cross_entropy = cross_entropy_
    return f"{used}, cross-entropy"


def _norm(norm: nn.Module, gemma: bool) -> nn.Module:
    return CompiledRMSNorm(eps=fused_modules.eps_of(norm, gemma), plus_one=gemma)


def _silu(gate: Tensor, up: Tensor) -> Tensor:
    return gated(gate, up, "silu")


def _gelu(gate: Tensor, up: Tensor) -> Tensor:
    return gated(gate, up, "gelu_tanh")
