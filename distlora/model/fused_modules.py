"""Replace norms, gated MLPs and the rotary embedding of a transformers decoder by fused ones.

One pass over memory each.

liger.py has the GPU's, this file those of the CPU (train.compile, from elementwise.cpp) and the replacement. Norms and
MLPs are replaced module by module, with the same Parameters and linears under the same names, so loading, sharding and
checkpoints are not affected. Attention modules look up the rotary embedding, a function, in their Python module, so it
is replaced there, for the whole process, as liger-kernel's apply_liger_kernel_to_* does. Each start first restores
transformers' function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from distlora.architecture.families import Family
from distlora.config import UserError
from distlora.model.lm_head import LossHead
from distlora_kernels import native
from distlora_kernels.elementwise import cross_entropy_, gated, rms_norm, rotate

_GELU = ("gelu_pytorch_tanh", "gelu_new")
_SILU = ("silu", "swish")


_own: dict[str, Any] = {}
"""transformers' rotary embedding, by the Python module where it was replaced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fused:
    """Fused replacements of a decoder's modules."""

    name: str
    """Name of the implementation."""
    norm: Callable[[nn.Module, bool], nn.Module]
    """(norm of the decoder, True for Gemma's) -> its replacement, on meta, whose weight is set later."""
    silu: Callable[[Tensor, Tensor], Tensor]
    """(gate, up) -> silu(gate) * up, same shapes. Backward overwrites both: LoRA saves no output, and DoRA, which does,
    does not use it."""
    gelu: Callable[[Tensor, Tensor], Tensor]
    """The same with the tanh approximation of GELU."""
    rotate: Callable[..., tuple[Tensor, Tensor]]
    """Replacement of transformers' apply_rotary_pos_emb. Overwrites queries and keys."""


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) around a decoder's linears."""

    def __init__(self, mlp: nn.Module, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = mlp.get_submodule("gate_proj")
        self.up_proj = mlp.get_submodule("up_proj")
        self.down_proj = mlp.get_submodule("down_proj")
        self.multiply = multiply
        """(gate, up) -> act(gate) * up."""

    def forward(self, x: Tensor) -> Tensor:
        """Return down(act(gate(x)) * up(x))."""
        return self.down_proj(self.multiply(self.gate_proj(x), self.up_proj(x)))


class FusedGatedMLP(nn.Module):
    """Gated MLP whose gate and up are one linear (phi3)."""

    def __init__(self, mlp: nn.Module, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up_proj = mlp.get_submodule("gate_up_proj")
        self.down_proj = mlp.get_submodule("down_proj")
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        """Return down(act(gate(x)) * up(x)), gate and up by one linear."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.multiply(gate, up))


def exchange(decoder: Any, family: Family, fused: Fused, *, outputs_are_kept: bool = False) -> str:
    """Replace modules of a decoder (on meta or with memory) by `fused`. Return a line about what is used.

    - llama, mistral, qwen2, qwen3 (its query and key norms too), phi3: RMSNorm with the scale applied after rounding to
      the input's dtype, SwiGLU;
    - gemma2, gemma3: RMSNorm with 1 + weight, all in fp32, GEGLU with the tanh approximation;
    - all of them: the rotary embedding, partial ones (phi3) included.

    An MLP with another activation is kept. `outputs_are_kept`: linears read their outputs in backward, so only norms
    are replaced: the rotary embedding overwrites queries and keys, the MLP's backward gate and up, and autograd sees
    neither.
    """
    norms = _replace_norms(decoder, family, fused)
    if outputs_are_kept:
        return f"{fused.name}: RMSNorm ({norms}); the others write over outputs that DoRA's gradients read"
    config = decoder.config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    used = [f"RMSNorm ({norms})"]
    if activation in (*_SILU, *_GELU):
        gated, multiply = ("SwiGLU", fused.silu) if activation in _SILU else ("GEGLU", fused.gelu)
        used.append(f"{gated} ({_replace_mlps(decoder, multiply)})")
    name = type(decoder).__module__
    file: Any = sys.modules[name]
    _own.setdefault(name, file.apply_rotary_pos_emb)
    file.apply_rotary_pos_emb = fused.rotate
    used.append("rotary embedding")
    return f"{fused.name}: {', '.join(used)}"


def give_back(decoder: nn.Module) -> None:
    """Restore transformers' rotary embedding in the Python module of `decoder`, if an earlier model replaced it.

    With DoRA, or without kernels, queries and keys must not be overwritten.
    """
    name = type(decoder).__module__
    if name in _own:
        file: Any = sys.modules[name]
        file.apply_rotary_pos_emb = _own.pop(name)


def _replace_norms(decoder: nn.Module, family: Family, fused: Fused) -> int:
    gemma = family.model_type.startswith("gemma")
    norms = [(path, norm) for path, norm in decoder.named_modules() if type(norm).__name__.endswith("RMSNorm")]
    for path, norm in norms:
        new = fused.norm(norm, gemma)
        new.weight = norm.get_parameter("weight")
        decoder.set_submodule(path, new.train(norm.training))
    return len(norms)


def _replace_mlps(decoder: nn.Module, multiply: Callable[[Tensor, Tensor], Tensor]) -> int:
    mlps = [(path, mlp) for path, mlp in decoder.named_modules() if path.rpartition(".")[2] == "mlp"]
    for path, mlp in mlps:
        fused = hasattr(mlp, "gate_up_proj")
        new = FusedGatedMLP(mlp, multiply) if fused else GatedMLP(mlp, multiply)
        decoder.set_submodule(path, new.train(mlp.training))
    return len(mlps)


def eps_of(norm: Any, gemma: bool) -> float:
    """Return the epsilon of a transformers norm."""
    return float(norm.eps if gemma else norm.variance_epsilon)


class CompiledRMSNorm(nn.Module):
    """RMSNorm with a frozen weight (N,)."""

    weight: nn.Parameter

    def __init__(self, *, eps: float, plus_one: bool) -> None:
        super().__init__()
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        """Return the RMS norm of x over its last dimension."""
        return rms_norm(x, self.weight, self.eps, plus_one=self.plus_one)

    def extra_repr(self) -> str:
        """Return the text that torch prints between the module's brackets."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def require_compiled() -> None:
    """Compile the extension. Raises UserError if that fails."""
    try:
        native.library()
    except native.NotCompiledError as error:
        raise UserError(f"train.compile=true: {error}, or set train.compile=false") from error


def use_compiled(decoder: Any, family: Family, head: LossHead, *, outputs_are_kept: bool = False) -> str:
    """Replace what is compiled, after `require_compiled`. Return a line about what is used."""
    fused = Fused(name="compiled for this processor", norm=_norm, silu=_silu, gelu=_gelu, rotate=rotate)
    used = exchange(decoder, family, fused, outputs_are_kept=outputs_are_kept)
    if not head.takes_cross_entropy:
        return used
    head.cross_entropy = cross_entropy_
    return f"{used}, cross-entropy"


def _norm(norm: nn.Module, gemma: bool) -> nn.Module:
    return CompiledRMSNorm(eps=eps_of(norm, gemma), plus_one=gemma)


def _silu(gate: Tensor, up: Tensor) -> Tensor:
    return gated(gate, up, "silu")


def _gelu(gate: Tensor, up: Tensor) -> Tensor:
    return gated(gate, up, "gelu_tanh")
