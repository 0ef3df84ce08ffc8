"""Count the tensors that a computation makes and keeps, as it runs on the CPU."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distlora.derive.memory import LiveTensors
from distlora.model import attention


class FlashLike(torch.autograd.Function):
    """Attention by documents that keeps what the CUDA kernel keeps; a VarlenOp by `flash_like`.

    It keeps queries, keys, values, the output and one number per head and token.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.rest = arguments[3:]
        output = attention.reference(*arguments)
        ctx.save_for_backward(*arguments[:3], output, output.new_empty(output.shape[:2], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[:3]
        bounds, *rest = ctx.rest
        gradients = [torch.empty_like(tensor) for tensor in inputs]
        for start, end in itertools.pairwise(bounds.tolist()):
            parts = [tensor[start:end].detach().requires_grad_() for tensor in inputs]
            with torch.enable_grad():
                output = attention.reference(*parts, torch.tensor([0, end - start]), *rest)
            own = torch.autograd.grad(output, parts, gradient[start:end])
            for whole, part in zip(gradients, own, strict=True):
                whole[start:end] = part
        return *gradients, None, None, None, None


def flash_like(*arguments: Any) -> Tensor:
    output: Tensor = FlashLike.apply(*arguments)
    return output


class Kept:
    """The bytes that autograd keeps within certain modules, each storage once, parameters and views of them not."""

    def __init__(self) -> None:
        self._storages: dict[int, Tensor] = {}
        self._parameters: set[int] = set()

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._storages.values())

    def keep(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._parameters:
            self._storages.setdefault(place, tensor)
        return tensor

    @contextlib.contextmanager
    def within(self, modules: list[nn.Module]) -> Iterator[None]:
        contexts: list[Any] = []
        self._parameters |= {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}

        def enter(module: nn.Module, arguments: Any) -> None:
            contexts.append(torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor))
            contexts[-1].__enter__()

        def leave(module: nn.Module, arguments: Any, output: Any) -> None:
            contexts.pop().__exit__(None, None, None)

        handles = [module.register_forward_pre_hook(enter) for module in modules]
        handles += [module.register_forward_hook(leave, always_call=True) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Made(LiveTensors):
    """Record tensors that operations make while it is on: their sizes, and the bytes of those that are alive.

    Views of a model's parameters and buffers do not count, nor do those of `host`, which stands for host memory.
    """

    def __init__(self, model: nn.Module, host: Sequence[Tensor] = ()) -> None:
        super().__init__([*model.parameters(), *model.buffers(), *host])
        self.largest = 0
        """Elements of the largest tensor that was made."""

    def note(self, tensor: Tensor) -> bool:
        is_new = super().note(tensor)
        if is_new:
            self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return is_new


class Moved(TorchDispatchMode):
    """Record the bytes that operations read and write while it is on, by the operation's name.

    Each argument that is not overwritten and each result counts once. Views, and memory that is allocated and not
    written, do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = args[1:] if name in ("copy_", "zero_") else args
        inputs = (inputs, {key: value for key, value in (kwargs or {}).items() if key != "out"})
        read, written = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (inputs, result))
        storages = {tensor.untyped_storage()._cdata for tensor in read}
        is_view = all(tensor.untyped_storage()._cdata in storages for tensor in written)
        if (func._schema.is_mutable or not is_view) and "empty" not in name:
            self.by_name[name] += sum(map(_bytes_of, (*read, *written)))
        return result


def _bytes_of(tensor: Tensor) -> int:
    """Return the stored bytes of an expanded tensor."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())
