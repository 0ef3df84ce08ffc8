"""Find what a model does with each of its linears and which children of its layers mix tokens, by running it.

The model is a small one with random weights on the CPU, moved off values at which a difference would not show.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distlora.architecture.peft_names import peft_refusal
from distlora.architecture.spec import Role
from distlora.model.hf_model import Call, calls_of

Mixing = Literal["attention", "mixer"]


@dataclass(slots=True)
class LinearUse:
    """Use of one linear by the code of a model."""

    called: bool = False
    plain: bool = True
    """True if each call returned x W^T + bias."""
    read: bool = False
    """True if other code reads its weight, or has a line that does: Mamba's reads out_proj.weight on CUDA only."""
    has_gradient: bool = False

    @property
    def stays(self) -> str:
        """Return the reason why it must stay the family's module; empty if a frozen linear can take its place."""
        if self.read:
            return "the model's code reads its weight"
        if not self.called:
            return "the model does not call it"
        return "" if self.plain else "its class computes something else than a product"

    @property
    def no_adapter(self) -> str:
        """Return the reason why it can have no adapter; empty if it can."""
        return self.stays or ("" if self.has_gradient else "the loss has no gradient for it")


def linear_calls(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, LinearUse]:
    """Return the use of every nn.Linear of `model`, subclasses included, by path. `run` returns a loss of the model."""
    uses: dict[str, LinearUse] = {}
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    classes = {path: type(linear) for path, linear in linears.items()}
    owners: dict[str, Any] = {path: type(module) for path, module in model.named_modules()}
    try:
        for path, linear in linears.items():
            owner, _, name = path.rpartition(".")
            uses[path] = LinearUse(read=name in _read_weights(owners[owner]))
            linear.__class__ = _spy(type(linear), uses[path])
            linear.requires_grad_()
        with torch.enable_grad():
            run().backward()
    finally:
        for path, linear in linears.items():
            linear.__class__ = classes[path]
    for path, linear in linears.items():
        uses[path].has_gradient = linear.weight.grad is not None and bool(linear.weight.grad.any())
    model.zero_grad(set_to_none=True)
    return uses


@functools.cache
def _read_weights(module: Any) -> set[str]:
    """Return the names of which a line of a module's class, or of one it inherits from, reads `self.NAME.weight`."""
    classes = [of for of in module.__mro__ if not of.__module__.startswith(("torch.", "builtins"))]
    functions = [inspect.unwrap(getattr(each, "fget", each)) for of in classes for each in vars(of).values()]
    left, found = [function.__code__ for function in functions if hasattr(function, "__code__")], set[str]()
    while left:
        code = left.pop()
        left += [each for each in code.co_consts if isinstance(each, CodeType)]
        if "weight" in code.co_names:
            codes = [each for each in dis.get_instructions(code) if each.opname != "EXTENDED_ARG"]
            loads = [each.argval if each.opname == "LOAD_ATTR" else "" for each in codes]
            found |= {name for name, attribute in itertools.pairwise(loads) if attribute == "weight"}
    return found


def _spy(of: type[nn.Linear], use: LinearUse) -> type[nn.Linear]:
    """Return a subclass of one linear's class that fills in `use`."""
    inside = False

    def weight(module: nn.Linear) -> Tensor | None:
        use.read |= not inside
        return module._parameters["weight"]

    def forward(module: nn.Linear, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        inside = True
        output = of.forward(module, *args, **kwargs)
        inside = False
        x = args[0] if args else next(iter(kwargs.values()))
        use.called = True
        use.plain &= isinstance(output, Tensor) and output.shape == (*x.shape[:-1], module.out_features)
        if use.plain and of.forward is not nn.Linear.forward:
            product = F.linear(x, module._parameters["weight"], module.bias)  # type: ignore[arg-type]
            use.plain = torch.allclose(output, product, rtol=1e-5, atol=1e-6)
        return output

    return type(of.__name__, (of,), {"__module__": of.__module__, "weight": property(weight), "forward": forward})


def token_mixers(layers: Sequence[nn.Module], run: Callable[[], Any], tokens: int) -> list[dict[str, Mixing]]:
    """Return which children of each layer mix tokens, by name: softmax attention, or another mixer.

    A child mixes if the output of a token changes with the input of another. `run` runs the model on one row of
    `tokens` tokens, a number that is no other size of the model.
    """
    children = {child: None for layer in layers for _, child in _children(layer)}
    with torch.no_grad():
        calls: dict[nn.Module, Call] = {}
        for call in calls_of(children, run):
            calls.setdefault(call.module, call)
        found = {child: _mixing(child, call.args, call.kwargs, tokens) for child, call in calls.items()}
    return [{n: kind for n, child in _children(layer) if (kind := found.get(child))} for layer in layers]


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, child), with the members of a list in place of the list."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from _children(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _mixing(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int) -> Mixing | None:
    values = [*args, *kwargs.values()]
    floats = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    states = next((value for value in floats if tokens in value.shape[:-1]), None)
    if states is None:
        return None
    dim, place = states.shape.index(tokens), tokens // 2
    changed = states.clone()
    changed.select(dim, place).add_(torch.randn(changed.select(dim, place).shape))

    def called(x: Tensor) -> Tensor:
        copies = [x if v is states else v for v in values]
        output = child(*copies[: len(args)], **dict(zip(kwargs, copies[len(args) :], strict=True)))
        output = output[0] if isinstance(output, (tuple, list)) else output
        assert isinstance(output, Tensor)
        return output

    with _Softmaxes(tokens) as seen:
        before = called(states)
    if tokens not in before.shape:
        return None
    others = [index for index in range(tokens) if index != place]
    out = before.shape.index(tokens)
    difference = (called(changed) - before).index_select(out, torch.tensor(others)).abs().max()
    if difference <= 1e-5 * before.abs().max():
        return None
    return "attention" if seen.over_tokens else "mixer"


class _Softmaxes(TorchDispatchMode):
    """Note whether a softmax runs over the tokens: scores (..., T, S) of T queries and at least as many keys."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.over_tokens = tokens, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if "softmax" in name and args[0].dim() > 2:
            self.over_tokens |= args[0].shape[-2] == self.tokens and args[0].shape[-1] >= self.tokens
        self.over_tokens |= name.startswith("_scaled_dot_product")
        return func(*args, **(kwargs or {}))


def router_linears(model: nn.Module) -> set[str]:
    """Return the paths of linears inside routers: modules that a model records as router_logits or calls routers."""
    recorders = [getattr(module, "_can_record_outputs", None) or {} for module in model.modules()]
    recorded = tuple({f["router_logits"].target_class for f in recorders if "router_logits" in f})
    found = set()
    for path, module in model.named_modules():
        named = re.search("Router|Gating", type(module).__name__)
        if (isinstance(module, recorded) or named) and not any(p.dim() > 2 for p in module.parameters()):
            inside = [f"{path}.{name}".rstrip(".") for name, m in module.named_modules() if isinstance(m, nn.Linear)]
            found |= set(inside)
    return found


def role_of(path: str, mixers: Mapping[str, Mixing]) -> Role:
    """Return the role of the linear at `path` in a layer: its mixer's (`token_mixers`), or mlp."""
    roles: Mapping[str, Role] = dict(mixers)
    return next((role for name, role in roles.items() if f"{path}.".startswith(f"{name}.")), "mlp")


def conversion_of(model_type: str) -> str | None:
    """Return the type whose conversion of checkpoints transformers uses for `model_type`, as PEFT asks for it."""
    from transformers import conversion_mapping

    if conversion_mapping.get_checkpoint_conversion_mapping(model_type) is None:
        return None
    known: Mapping[str, str] = conversion_mapping._MODEL_TO_CONVERSION_PATTERN
    return "mixtral" if model_type == "mixtral" else known.get(model_type)


def peft_reasons(hf_model: Any, paths: Sequence[str]) -> dict[str, str]:
    """Return the reasons why PEFT cannot adapt linears, by path, without those that it can."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    model_type = hf_model.config.model_type
    conversion = conversion_of(model_type)
    renamings = [t for t in get_model_conversion_mapping(hf_model) if isinstance(t, WeightRenaming)]
    reasons = {}
    for path in paths:
        name = f"{path}.lora_A.weight"
        reason = peft_refusal(model_type, path, conversion)
        if not reason and rename_source_key(name, renamings, [])[0] != name:
            reason = "PEFT renames its adapter while loading, and loses it"
        if reason:
            reasons[path] = reason
    return reasons
