"""Replace norms, gated MLPs and the rotary embedding of a transformers decoder by ones that pass over memory once.

On CUDA they are Triton kernels or liger-kernel's (train.fused_kernels), on the CPU those of elementwise.cpp
(train.compile). Norms and MLPs are replaced module by module, with the same Parameters and linears under the same
names, so loading, sharding and checkpoints are not affected. Attention looks up the rotary embedding, a function, among
the globals of its forward: the model's attention modules get a forward with globals of their own, so no other model of
the process is affected.

liger-kernel's linear cross-entropy is not used: it reads the number of targets on the host (README.md).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distlora.architecture.spec import Architecture
from distlora.config import UserError, require
from distlora.config.base import cache_root
from distlora.model.hf_model import with_globals
from distlora.model.lm_head import LossHead
from distlora_kernels import native, products
from distlora_kernels.elementwise import cross_entropy_, gated, rms_norm, rotate

FIRST_LIGER = (0, 8, 5)
"""First supported liger-kernel. 0.8.0 has no partial rotary embedding: on Phi-4-mini it reads beyond cos."""

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}
"""Fused activation of gated MLPs by its name in a config."""

ROTARY = "apply_rotary_pos_emb"
"""transformers' name of the function that rotates queries and keys."""


def activation_of(config: Any) -> str | None:
    """Return the fused activation, silu or gelu, of a decoder's MLPs by its config; None if it has another one."""
    return _ACTIVATIONS.get(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or "")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fused:
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
    """down(act(gate(x)) * up(x)) around a decoder's linears; gate and up may be one linear (phi3)."""

    def __init__(self, mlp: nn.Module, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._inputs = ("gate_up_proj",) if hasattr(mlp, "gate_up_proj") else ("gate_proj", "up_proj")
        for name in (*self._inputs, "down_proj"):
            self.add_module(name, mlp.get_submodule(name))
        self.multiply = multiply
        """(gate, up) -> act(gate) * up."""

    def forward(self, x: Tensor) -> Tensor:
        """Return down(act(gate(x)) * up(x))."""
        products = [self.get_submodule(name)(x) for name in self._inputs]
        gate, up = products if len(products) == 2 else products[0].chunk(2, dim=-1)
        return self.get_submodule("down_proj")(self.multiply(gate, up))


def exchange(decoder: Any, architecture: Architecture, fused: _Fused, *, outputs_are_kept: bool) -> list[str]:
    """Replace modules of a decoder (on meta or with memory) by `fused`. Return what is used.

    - RMSNorm with the scale applied after rounding to the input's dtype (llama, qwen3_moe), or with 1 + weight, all in
      fp32 (gemma3, qwen3_next), norms of queries and keys too;
    - gated MLPs, also those beside experts: SwiGLU, or GEGLU with the tanh approximation;
    - the rotary embedding, partial ones (phi3, glm4_moe) included.

    Each where the architecture says so; other modules are kept. `outputs_are_kept`: linears read their outputs in
    backward, so only norms are replaced: the rotary embedding overwrites queries and keys, the MLP's backward gate and
    up, and autograd sees neither.
    """
    forms = {name: form for name, form in architecture.norm_forms if form}
    norms = [(path, norm) for path, norm in decoder.named_modules() if type(norm).__name__ in forms]
    for path, norm in norms:
        new = fused.norm(norm, forms[type(norm).__name__] == "gemma")
        new.weight = norm.get_parameter("weight")
        decoder.set_submodule(path, new.train(norm.training))
    used = [f"RMSNorm ({len(norms)})"] if norms else []
    if outputs_are_kept:
        return used
    mlps = [(path, mlp) for path, mlp in decoder.named_modules() if type(mlp).__name__ in architecture.gated_mlps]
    if mlps:
        is_silu = activation_of(decoder.config) == "silu"
        product, multiply = ("SwiGLU", fused.silu) if is_silu else ("GEGLU", fused.gelu)
        for path, mlp in mlps:
            decoder.set_submodule(path, GatedMLP(mlp, multiply).train(mlp.training))
        used.append(f"{product} ({len(mlps)})")
    rotating = [module for module in decoder.modules() if type(module).__name__ in architecture.rotated]
    for module in rotating:
        # transformers replaces such a function for some model types only, by the package of the hub's kernels.
        forward: Any = type(module).forward
        module.forward = types.MethodType(with_globals(forward, {ROTARY: fused.rotate}), module)
    return [*used, "rotary embedding"] if rotating else used


def _eps_of(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)


class FusedRMSNorm(nn.Module):
    """RMSNorm with a frozen weight (N,)."""

    weight: nn.Parameter

    def __init__(self, *, eps: float, plus_one: bool) -> None:
        super().__init__()
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        """Return the RMS norm of x over its last dimension."""
        return rms_norm(x, self.weight, self.eps, plus_one=self.plus_one)


def why_not_compiled() -> str | None:
    """Compile the extension, or take it from the cache. Return why that is not possible; None if it is there."""
    native.kept_in = cache_root() / "compiled"
    try:
        native.library()
    except native.NotCompiledError as error:
        return str(error)
    return None


def require_compiled() -> None:
    """Compile the extension. Raises UserError if that fails."""
    reason = why_not_compiled()
    require(reason is None, f"train.compile=true: {reason}, or set train.compile=false")


def use_own(
    decoder: Any, architecture: Architecture, head: LossHead, *, is_gpu: bool, outputs_are_kept: bool = False
) -> str:
    """Use distlora_kernels' functions, on the CPU after `require_compiled`. Return a line about what is used."""
    fused = _Fused(
        name="fused kernels" if is_gpu else "compiled for this processor",
        norm=lambda norm, gemma: FusedRMSNorm(eps=_eps_of(norm), plus_one=gemma),
        silu=lambda gate, up: gated(gate, up, "silu"),
        gelu=lambda gate, up: gated(gate, up, "gelu_tanh"),
        rotate=rotate,
    )
    used = exchange(decoder, architecture, fused, outputs_are_kept=outputs_are_kept)
    if not is_gpu and products.use(True):
        used.append("linears")
    return _with_loss(head, fused.name, used, outputs_are_kept)


def _with_loss(head: LossHead, name: str, used: list[str], outputs_are_kept: bool) -> str:
    """Use our loss too where the head allows it. Return a line about what is used."""
    if head.takes_cross_entropy:
        head.cross_entropy = cross_entropy_
        used.append("cross-entropy")
    why = "; the others write over outputs that DoRA's gradients read" if outputs_are_kept else ""
    return f"{name}: {', '.join(used) or 'none of the modules'}{why}"


def require_liger() -> None:
    """Raise UserError if liger-kernel is missing or too old."""
    cure = "pip install -U 'distlora[cuda]' brings one, train.fused_kernels=own needs none"
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(f"train.fused_kernels=liger, and liger-kernel is not installed; {cure}")
    version = importlib.metadata.version("liger_kernel")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < FIRST_LIGER:
        oldest = ".".join(map(str, FIRST_LIGER))
        raise UserError(f"train.fused_kernels=liger, and liger-kernel is {version}, older than {oldest}; {cure}")


def use_liger(decoder: Any, architecture: Architecture, head: LossHead, *, outputs_are_kept: bool = False) -> str:
    """Use liger-kernel's modules and our loss, after `require_liger`. Return a line about what is used."""
    from liger_kernel.transformers import LigerRMSNorm, liger_rotary_pos_emb
    from liger_kernel.transformers.functional import liger_geglu, liger_swiglu

    def norm_of(norm: nn.Module, gemma: bool) -> nn.Module:
        with torch.device("meta"):
            return LigerRMSNorm(
                norm.get_parameter("weight").shape[0],
                eps=_eps_of(norm),
                offset=1.0 if gemma else 0.0,
                casting_mode="gemma" if gemma else "llama",
                # In place it would overwrite the gradient of its output, which gemma's residual reads again. Out of
                # place it costs one buffer of a micro-batch's hidden states in backward.
                in_place=False,
            )

    fused = _Fused(
        name=f"liger-kernel {importlib.metadata.version('liger_kernel')}",
        norm=norm_of,
        silu=liger_swiglu,
        gelu=liger_geglu,
        rotate=liger_rotary_pos_emb,
    )
    used = exchange(decoder, architecture, fused, outputs_are_kept=outputs_are_kept)
    return _with_loss(head, fused.name, used, outputs_are_kept)
