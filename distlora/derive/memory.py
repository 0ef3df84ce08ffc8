"""Measure the activation memory of a shrunk model's layers, where the planner's formulas do not hold.

The halves of a layer are the one of `LayerKind.mlp` and all else. Both are measured in bf16 with frozen linears, at two
lengths, so that what grows with the sequence is known apart.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distlora.architecture.spec import Architecture, HalfMemory, LayerKind
from distlora.model.layer_wrapper import argument_names
from distlora.planner.memory.activations import has_formula

_LENGTHS = (64, 128)
"""Tokens of the measured sequences."""


class LiveTensors(TorchDispatchMode):
    """Count the bytes of tensors that operations make while it is on. Views of `known` tensors do not count."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._sizes: dict[int, int] = {}
        self.alive = self.peak = 0
        """Bytes that were made and not freed yet, and the most there were."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return result

    def note(self, tensor: Tensor) -> bool:
        """Count a tensor's storage. Return whether it is a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._known:
            return False
        self._sizes[key] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, key)
        return True

    def _freed(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


@dataclasses.dataclass
class _LayerCall:
    """A decoder layer with the arguments of one call."""

    module: nn.Module
    kind: LayerKind
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def inputs(self) -> tuple[Tensor, list[Any], list[Tensor]]:
        """Return the hidden states, as a leaf, the arguments with them, and all other tensors."""
        values = [_detached(value) for value in (*self.args, *self.kwargs.values())]
        names = [*argument_names(self.module)[: len(self.args)], *self.kwargs]
        at = names.index("hidden_states") if "hidden_states" in names else 0
        hidden = values[at].clone().requires_grad_()
        values[at] = hidden
        others = [leaf for i, value in enumerate(values) if i != at for leaf in tree_leaves(_plain(value))]
        tensors = [leaf for leaf in others if isinstance(leaf, Tensor)]
        return hidden, values, [*tensors, *self.module.parameters(), *self.module.buffers()]

    def run(self, values: Sequence[Any]) -> Tensor:
        """Return the hidden states that the layer returns."""
        count = len(self.args)
        output = self.module(*values[:count], **dict(zip(self.kwargs, values[count:], strict=True)))
        return output[0] if isinstance(output, (tuple, list)) else output

    @contextlib.contextmanager
    def halves(self, enter: Any, leave: Any) -> Iterator[None]:
        """Call `enter` with the input of the MLP's half before it runs, and `leave` after it."""
        handles = []
        if self.kind.mlp is not None:
            mlp, before, after = self.kind.mlp
            first, last = (self.module.get_submodule(name or mlp) for name in (before, after))
            handles = [
                first.register_forward_pre_hook(lambda _, args: enter(args[0])),
                last.register_forward_hook(lambda _, args, output: leave()),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _detached(value: Any) -> Any:
    """Copy an argument without its graph: layers write what they share into a mapping."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(map(_detached, value))
    if hasattr(value, "keys"):
        own = copy.copy(value)
        own.update({name: _detached(each) for name, each in value.items()})
        return own
    return value


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "keys") else value


def with_memory(architecture: Architecture, decoder: Any) -> tuple[LayerKind, ...]:
    """Return the kinds with the memory of the halves for which the planner has no formula. `decoder`: in bf16."""
    kinds = architecture.kinds
    layers = decoder.get_submodule(architecture.layers)
    decoder.requires_grad_(False)
    figures: dict[int, list[dict[str, list[float]]]] = {number: [] for number in range(len(kinds))}
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    unread: list[tuple[str, ...]] = [()] * len(kinds)
    for length in _LENGTHS:
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: calls.update({i: (args, kwargs)}), with_kwargs=True
            )
            for i, layer in enumerate(layers)
        ]
        try:
            with torch.no_grad():
                decoder(input_ids=torch.arange(length)[None] % (architecture.vocabulary - 5) + 5, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        for number, kind in enumerate(kinds):
            index = architecture.kind_of_layer.index(number)
            layer = _LayerCall(layers[index], kind, *calls[index])
            with torch.enable_grad():
                figures[number].append(_kept(layer, length) | _peaks(layer, length))
                unread[number] = _unread(layer)
    halves = [
        (_half(architecture, kind, 0, figures[n]), _half(architecture, kind, 1, figures[n]))
        for n, kind in enumerate(kinds)
    ]
    return tuple(
        dataclasses.replace(kind, memory=own, unread=reads)
        for kind, own, reads in zip(kinds, halves, unread, strict=True)
    )


_SUMS = {f"{name}Backward0" for name in ("Add", "Sub", "View", "UnsafeView", "ReshapeAlias", "Transpose", "ToCopy")}
"""Autograd's names of the operations whose backward reads no value."""


def _unread(layer: _LayerCall) -> tuple[str, ...]:
    """Return the layer's `LayerKind.unread`."""
    _, values, _ = layer.inputs()
    outputs: dict[str, list[tuple[Tensor, Any]]] = {}
    last = ""

    def left(path: str, output: Tensor) -> None:
        nonlocal last
        last = path
        outputs.setdefault(path, []).append((output, output.grad_fn))

    def save(tensor: Tensor) -> Tensor:
        nonlocal last
        last = ""
        return tensor

    paths = [weight.path.removesuffix(".weight") for weight in layer.kind.weights if weight.kind == "linear"]
    hooks = [
        layer.module.get_submodule(path).register_forward_hook(lambda _, args, output, path=path: left(path, output))
        for path in paths
    ]
    try:
        with saved_tensors_hooks(save, lambda tensor: tensor):
            end = layer.run(values).grad_fn
    finally:
        for hook in hooks:
            hook.remove()
    users: dict[Any, set[Any]] = {end: set()}
    ahead: list[Any] = [end]
    while ahead:
        node = ahead.pop()
        for below, _ in node.next_functions:
            if below is not None and below not in users:
                ahead.append(below)
            users.setdefault(below, set()).add(node)

    def only_sums(node: Any) -> bool:
        return node in users and all(user.name() in _SUMS and only_sums(user) for user in users[node])

    return tuple(
        path
        for path, calls in outputs.items()
        # A recomputation ends before the last. What stands in for another product cannot be written to.
        if all(path == last or (output._version == 0 and only_sums(node)) for output, node in calls)
    )


def _half(
    architecture: Architecture, kind: LayerKind, half: int, figures: list[dict[str, list[float]]]
) -> HalfMemory | None:
    """Return the measured memory of one half; None if the planner's formula gives what it keeps."""
    first, second = _LENGTHS
    if has_formula(architecture, kind, half, keeps=figures[1]["keeps"][half], row=second):
        return None

    def fit(name: str) -> tuple[float, float]:
        at_first, at_second = (max(0.0, values[name][half]) for values in figures)
        slope = (at_second - at_first) / (second - first)
        return (at_first - slope * first, slope) if slope * first > 0.05 * at_first else (at_second, 0.0)

    return HalfMemory(
        columns=kind.columns(half),
        keeps=fit("keeps"),
        inputs=figures[1]["inputs"][half],
        forward=fit("forward"),
        backward=fit("backward"),
    )


def _kept(layer: _LayerCall, length: int) -> dict[str, list[float]]:
    """Return what each half keeps, and the share of its linears' inputs that it does not."""
    _, values, others = layer.inputs()
    known = {tensor.untyped_storage()._cdata for tensor in others}
    kept: list[dict[int, Tensor]] = [{}, {}]
    read: list[list[Tensor]] = [[], []]
    half = 0

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in known and key not in kept[0] and key not in kept[1]:
            kept[half][key] = tensor
        return tensor

    def to(number: int) -> None:
        nonlocal half
        half = number

    linears = [module for module in layer.module.modules() if isinstance(module, nn.Linear)]
    hooks = [linear.register_forward_pre_hook(lambda _, args: read[half].append(args[0])) for linear in linears]
    try:
        with layer.halves(lambda states: to(1), lambda: to(0)), saved_tensors_hooks(keep, lambda tensor: tensor):
            output = layer.run(values)
    finally:
        for hook in hooks:
            hook.remove()
    del output
    shares = []
    for tensors in read:
        own = {t.untyped_storage()._cdata: t for t in tensors}
        unkept = sum(t.nbytes for key, t in own.items() if key not in kept[0] and key not in kept[1])
        shares.append(unkept / max(1, sum(tensor.nbytes for tensor in tensors)))
    sizes = [sum(tensor.untyped_storage().nbytes() for tensor in own.values()) / length for own in kept]
    return {"keeps": sizes, "inputs": shares}


def _peaks(layer: _LayerCall, length: int) -> dict[str, list[float]]:
    """Return the most of each half in forward and in backward, beside what is kept and the incoming gradient."""
    hidden, values, others = layer.inputs()
    with LiveTensors([*others, hidden]) as live:
        begin, forward, backward, ends = 0, [0, 0], [0, 0], [0, 0]

        def at(half: int, peaks: list[int], base: int) -> None:
            nonlocal begin
            peaks[half] = max(peaks[half], live.peak - base)
            begin = live.peak = live.alive

        def enter(states: Tensor) -> None:
            at(0, forward, live.alive)
            ends[0] = live.alive
            if states.requires_grad:
                states.register_hook(lambda gradient: at(1, backward, begin))

        def leave() -> None:
            at(1, forward, live.alive)

        with layer.halves(enter, leave):
            output = layer.run(values)
        at(0, forward, live.alive)
        gradient = torch.ones_like(output)
        begin = live.peak = live.alive
        output.backward(gradient)
        at(0, backward, begin)
    return {"forward": [n / length for n in forward], "backward": [n / length for n in backward]}
