"""Find what a model does with each of its linears and which children of its layers mix tokens, by running it.

The model is a small one with random weights on the CPU, moved off values at which a difference would not show.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distlora.architecture.spec import Role
from distlora.architecture.targets import EXPERT_NAMES, peft_refusal
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
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    uses = {}
    try:
        for path, linear in linears.items():
            owner, _, name = path.rpartition(".")
            uses[path] = LinearUse(read=name in _read_weights(type(model.get_submodule(owner))))
            model.set_submodule(path, _Spy(linear.requires_grad_(), uses[path]))
        with torch.enable_grad():
            run().backward()
    finally:
        for path, linear in linears.items():
            model.set_submodule(path, linear)
    for path, linear in linears.items():
        uses[path].has_gradient = linear.weight.grad is not None and bool(linear.weight.grad.any())
    model.zero_grad(set_to_none=True)
    return uses


def _read_weights(module: type[nn.Module]) -> set[str]:
    """Return the names of which a line of a module's class, or of one it inherits from, reads `self.NAME.weight`."""
    classes = [of for of in module.__mro__ if of.__module__.startswith("transformers.models.")]
    return set().union(*(_weights_read_in(of.__module__).get(of.__name__, ()) for of in classes))


@functools.cache
def _weights_read_in(file: str) -> dict[str, set[str]]:
    """Return these names for each class of a Python module. Its code is read because CUDA's is not run here."""
    tree, names = ast.parse(inspect.getsource(sys.modules[file])), dict[str, set[str]]()
    for owner in [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]:
        for node in ast.walk(owner):
            match node:
                case ast.Attribute(attr="weight", value=ast.Attribute(attr=name), ctx=ast.Load()):
                    names.setdefault(owner.name, set()).add(name)
    return names


class _Spy(nn.Module):
    """Stands in a model for one of its linears, and notes what the model does with it."""

    def __init__(self, linear: nn.Linear, use: LinearUse) -> None:
        super().__init__()
        self.linear, self.use = linear, use

    @property
    def weight(self) -> Tensor:
        """The linear's weight, which its own forward does not read here."""
        self.use.read = True
        return self.linear.weight

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "linear" else getattr(self.linear, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        linear, use = self.linear, self.use
        use.called, output = True, linear(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        use.plain &= isinstance(output, Tensor) and output.shape == (*x.shape[:-1], linear.out_features)
        if use.plain and type(linear).forward is not nn.Linear.forward:
            use.plain = torch.allclose(output, F.linear(x, linear.weight, linear.bias), rtol=1e-5, atol=1e-6)
        return output


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
        mixing = {child: _mixing(child, call.args, call.kwargs, tokens) for child, call in calls.items()}
    return [{n: kind for n, child in _children(layer) if (kind := mixing.get(child))} for layer in layers]


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
    paths = set()
    for path, module in model.named_modules():
        named = re.search("Router|Gating", type(module).__name__)
        if (isinstance(module, recorded) or named) and not any(p.dim() > 2 for p in module.parameters()):
            inside = [f"{path}.{name}".rstrip(".") for name, m in module.named_modules() if isinstance(m, nn.Linear)]
            paths |= set(inside)
    return paths


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


def is_peft_parameter(model_type: str, path: str) -> bool:
    """Return whether PEFT takes the linear at `path` for experts in target_modules."""
    return path.rpartition(".")[2] in EXPERT_NAMES.get(conversion_of(model_type) or "", ())


def peft_reasons(hf_model: Any, paths: Sequence[str]) -> dict[str, str]:
    """Return the reasons why PEFT cannot adapt linears, by path, without those that it can."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [t for t in get_model_conversion_mapping(hf_model) if isinstance(t, WeightRenaming)]
    reasons = {}
    for path in paths:
        name = f"{path}.lora_A.weight"
        reason = peft_refusal(hf_model.config.model_type, path)
        if not reason and rename_source_key(name, renamings, [])[0] != name:
            reason = "PEFT renames its adapter while loading, and loses it"
        if reason:
            reasons[path] = reason
    return reasons
