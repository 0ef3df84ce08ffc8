"""Use liger-kernel's fused RMSNorm, gated MLP and rotary embedding in a transformers decoder, on CUDA.

fused_modules.py replaces the modules. liger-kernel's linear cross-entropy is not used: it reads the number of targets
on the host (README.md).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from typing import Any

import torch
from torch import nn

from distlora.architecture.families import Family
from distlora.model import fused_modules

FIRST = (0, 8, 5)
"""First supported version. 0.8.0 has no partial rotary embedding: on Phi-4-mini it reads beyond cos."""


def why_not(*, device: torch.device, full: bool, experts: bool = False) -> str | None:
    """Return why liger-kernel cannot be used; None if it can."""
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
    """Replace what liger-kernel has a kernel for ("llama" or "gemma" casting). Return a line about what is used."""
    from liger_kernel.transformers import liger_rotary_pos_emb
    from liger_kernel.transformers.functional import liger_geglu, liger_swiglu

    fused = fused_modules.Fused(
        name=f"liger-kernel {importlib.metadata.version('liger_kernel')}",
        norm=_norm,
        silu=liger_swiglu,
        gelu=liger_geglu,
        rotate=liger_rotary_pos_emb,
    )
    return fused_modules.exchange(decoder, family, fused, outputs_are_kept=outputs_are_kept)


def _norm(norm: nn.Module, gemma: bool) -> nn.Module:
    from liger_kernel.transformers import LigerRMSNorm

    with torch.device("meta"):
        return LigerRMSNorm(
            norm.get_parameter("weight").shape[0],
            eps=fused_modules.eps_of(norm, gemma),
            offset=1.0 if gemma else 0.0,
            casting_mode="gemma" if gemma else "llama",
            # In place it would overwrite the gradient of its output, which gemma's residual reads again. Out of place
            # it costs one buffer of a micro-batch's hidden states in backward.
            in_place=False,
        )
