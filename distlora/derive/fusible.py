"""Find the modules of a decoder that compute what fused ones do: norms and rotations by running them, MLPs by code."""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distlora.architecture.spec import FusiblePart, NormForm
from distlora.model.fused_modules import ROTARY, activation_of
from distlora.model.hf_model import with_globals
from distlora_kernels.elementwise import reference_rotated

_WITH_FUSED_MLPS = ("llama", "phi3", "gemma3", "glm4_moe")
"""Model types of transformers whose gated MLPs are what fused modules compute."""


def fusible(decoder: Any, input_ids: Tensor) -> dict[str, Any]:
    """Return the fields of Architecture that say which modules compute what fused ones do.

    A part is fusible if each of its modules is. An MLP with experts is not its part, nor is what rotates within a
    module that is fusible (an indexer of an attention). The decoder, in bf16, is run on `input_ids` (B, T).
    """
    forms: dict[str, set[NormForm]] = {}
    for module in decoder.modules():
        if (name := type(module).__name__).endswith("RMSNorm"):
            forms.setdefault(name, set()).add(_norm_form(module))
    norm_forms = tuple((name, of_class.pop() if len(of_class) == 1 else "") for name, of_class in forms.items())

    mlps = set[str]()
    for name in _WITH_FUSED_MLPS:
        home = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        mlps.add(code_of(getattr(home, f"{name.title().replace('_', '')}MLP").forward))
    classes = {type(module) for module in decoder.modules()} if activation_of(decoder.config) is not None else set()
    gated = {kind for kind in classes if kind.__name__.endswith("MLP") and code_of(kind.forward) in mlps}
    dense = [
        module
        for path, module in decoder.named_modules()
        if path.rpartition(".")[2] == "mlp" and not hasattr(module, "experts")
    ]
    rotates = _rotates(decoder, input_ids)
    rotated = {type(module).__name__ for module, fits in rotates.items() if fits}
    rotated -= {type(module).__name__ for module, fits in rotates.items() if not fits}
    within = {inner for module in rotates if type(module).__name__ in rotated for inner in module.modules()}
    parts: dict[FusiblePart, bool] = {
        "norms": bool(norm_forms) and all(form for _, form in norm_forms),
        "mlps": bool(gated) and all(type(module) in gated for module in dense),
        "rotary": bool(rotated) and within.issuperset(rotates),
    }
    return {
        "norm_forms": norm_forms,
        "gated_mlps": tuple(sorted(kind.__name__ for kind in gated)),
        "rotated": tuple(sorted(rotated)),
        "fusible": tuple(part for part, whole in parts.items() if whole),
    }


@torch.no_grad()
def _rotates(decoder: Any, input_ids: Tensor) -> dict[nn.Module, bool]:
    """Return the modules that rotate queries and keys in a forward, and whether each does as `reference_rotated`."""
    found: dict[nn.Module, bool] = {}
    watched: list[nn.Module] = []
    for module in decoder.modules():
        forward: Any = type(module).forward
        theirs = getattr(inspect.unwrap(forward), "__globals__", {}).get(ROTARY)
        if theirs is None:
            continue

        def rotary(*arguments: Any, module: nn.Module = module, theirs: Any = theirs, **named: Any) -> Any:
            found[module] = found.get(module, True) and _is_rotation(theirs, arguments, named)
            return theirs(*arguments, **named)

        module.forward = types.MethodType(with_globals(forward, {ROTARY: rotary}), module)
        watched.append(module)
    try:
        decoder(input_ids=input_ids, use_cache=False)
    finally:
        for module in watched:
            del module.forward
    return found


def _is_rotation(function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Return whether a call of transformers' apply_rotary_pos_emb is what a fused one computes."""
    if len(arguments) != 4 or named:
        return False  # With `unsqueeze_dim` heads and tokens lie in another order.
    query, key, cos, sin = arguments
    if cos.dim() != 3 or any(x.dim() != 4 or x.shape[2] != cos.shape[1] for x in (query, key)):
        return False
    made = function(query, key, cos, sin)
    # Fused ones round the tables to the dtype of what they rotate (olmo3 does not).
    fused = (reference_rotated(x, cos.to(x.dtype), sin.to(x.dtype)) for x in (query, key))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(made, fused, strict=True))


def _norm_form(norm: nn.Module) -> NormForm:
    """Return what an RMSNorm computes in bf16."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None:
        return ""
    generator = torch.Generator().manual_seed(3)
    given = torch.randn(3, 5, len(weight), generator=generator).bfloat16()
    scale, wide = torch.randn(len(weight), generator=generator).bfloat16(), given.float()
    rms = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    made = functional_call(norm, {"weight": scale}, (given,))
    llama, gemma = scale * rms.bfloat16(), (rms * (1 + scale.float())).bfloat16()
    return "llama" if torch.equal(made, llama) else "gemma" if torch.equal(made, gemma) else ""


@functools.cache
def code_of(function: Any) -> str:
    """Return the code of a function without its docstring, to compare: no run shows what other inputs would do."""
    source = inspect.getsource(function)
    return source.replace(function.__doc__ or "", "")
