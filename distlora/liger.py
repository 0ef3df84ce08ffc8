"""liger-kernel's fused RMSNorm, gated MLP and rotary embedding in a transformers decoder, on CUDA.

Norms and MLPs are exchanged module by module: the new ones hold the same Parameters and the same linears under the
same names, so loading, sharding and checkpoints do not see it. The rotary embedding is a function that attention
modules look up in their file, so it is exchanged there, for the whole process: liger-kernel's own
apply_liger_kernel_to_* does that too, and nothing smaller exists. A worker runs one model, and only a worker on CUDA
comes here.

Its linear cross-entropy is not used: it reads the number of targets on the host (README.md).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distlora.families import Family

_GELU = ("gelu_pytorch_tanh", "gelu_new")
_SILU = ("silu", "swish")

FIRST = (0, 8, 5)
"""The version that was read and is tested. 0.8.0 has no partial rotary embedding: on Phi-4-mini it reads beyond cos."""


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) around a decoder's own linears."""

    def __init__(self, mlp: nn.Module, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = mlp.get_submodule("gate_proj")
        self.up_proj = mlp.get_submodule("up_proj")
        self.down_proj = mlp.get_submodule("down_proj")
        self.multiply = multiply
        """(gate, up) -> act(gate) * up, same shapes. Its backward overwrites both: no LoRA here saves its output (and
        DoRA, which does, goes without)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.multiply(self.gate_proj(x), self.up_proj(x)))


class FusedGatedMLP(nn.Module):
    """The same where gate and up are one linear (phi3)."""

    def __init__(self, mlp: nn.Module, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up_proj = mlp.get_submodule("gate_up_proj")
        self.down_proj = mlp.get_submodule("down_proj")
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.multiply(gate, up))


def why_not(*, device: torch.device, full: bool, experts: bool = False) -> str | None:
    """Why liger-kernel cannot be used here; None where it can."""
    if device.type != "cuda":
        return f"its kernels need CUDA, this is {device.type}"
    if full:
        return "adapter=full trains the norms, and no test covers its kernels' gradients of them"
    if experts:
        return "no test shows yet that its norms and rotary embeddings are those of mixtures of experts"
    if importlib.util.find_spec("liger_kernel") is None:
        return "it is not installed; pip install 'distlora[cuda]' does that, train.liger=false silences this"
    version = importlib.metadata.version("liger_kernel")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < FIRST:
        return (
            f"it is {version}, older than {'.'.join(map(str, FIRST))}; pip install -U liger-kernel brings a newer one"
        )
    return None


def apply(decoder: Any, family: Family, *, outputs_are_kept: bool = False) -> str:
    """Exchange what liger-kernel has a kernel for in a decoder (on meta or with memory). Returns what is used, a line.

    - llama, mistral, qwen2, qwen3 (its query and key norms too), phi3: RMSNorm with the scale applied after rounding to
      the input's dtype ("llama" casting), SwiGLU;
    - gemma2, gemma3: RMSNorm with 1 + weight, all in fp32 ("gemma" casting), GEGLU with the tanh approximation;
    - all of them: the rotary embedding, partial ones (phi3) included.
    An MLP with another activation stays what it is. `outputs_are_kept`: linears read their outputs in backward, so
    norms alone are exchanged: the rotary embedding writes over queries and keys, the MLP's backward over gate and up,
    and autograd, which would notice torch doing that, sees neither.
    """
    from liger_kernel.transformers import liger_rotary_pos_emb
    from liger_kernel.transformers.functional import liger_geglu, liger_swiglu

    norms = _replace_norms(decoder, family)
    version = f"liger-kernel {importlib.metadata.version('liger_kernel')}"
    if outputs_are_kept:
        return f"{version}: RMSNorm ({norms}); the others write over outputs that DoRA's gradients read"
    config = decoder.config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    used = [f"RMSNorm ({norms})"]
    if activation in (*_SILU, *_GELU):
        name, multiply = ("SwiGLU", liger_swiglu) if activation in _SILU else ("GEGLU", liger_geglu)
        used.append(f"{name} ({_replace_mlps(decoder, multiply)})")
    sys.modules[type(decoder).__module__].apply_rotary_pos_emb = liger_rotary_pos_emb  # type: ignore[attr-defined]
    used.append("rotary embedding")
    return f"{version}: {', '.join(used)}"


def _replace_norms(decoder: nn.Module, family: Family) -> int:
    from liger_kernel.transformers import LigerRMSNorm

    gemma = family.model_type.startswith("gemma")
    found = [(path, norm) for path, norm in decoder.named_modules() if type(norm).__name__.endswith("RMSNorm")]
    for path, norm in found:
        weight = norm.get_parameter("weight")
        with torch.device("meta"):
            new = LigerRMSNorm(
                weight.shape[0],
                eps=norm.eps if gemma else norm.variance_epsilon,
                offset=1.0 if gemma else 0.0,
                casting_mode="gemma" if gemma else "llama",
                # In place it would write over the gradient of its output, which gemma's residual reads again. Out of
                # place it costs one buffer of a micro-batch's hidden states in backward.
                in_place=False,
            )
        new.weight = weight
        decoder.set_submodule(path, new.train(norm.training))
    return len(found)


def _replace_mlps(decoder: nn.Module, multiply: Callable[[Tensor, Tensor], Tensor]) -> int:
    found = [(path, mlp) for path, mlp in decoder.named_modules() if path.rpartition(".")[2] == "mlp"]
    for path, mlp in found:
        fused = hasattr(mlp, "gate_up_proj")
        new = FusedGatedMLP(mlp, multiply) if fused else GatedMLP(mlp, multiply)
        decoder.set_submodule(path, new.train(mlp.training))
    return len(found)
