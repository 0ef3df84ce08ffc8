"""Register ops with torch and choose their implementation: Triton for tensors on a GPU, torch elsewhere.

An op has one schema (`distlora::name`), one Python implementation for all devices, which asks `uses_triton`, and a fake
that returns shapes and dtypes only, for torch.compile and torch.library.opcheck. Triton is imported when a kernel is
first launched, so a CPU worker never imports it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("distlora", "DEF")
_interpreting = False


def uses_triton(tensor: Tensor) -> bool:
    """Return whether ops on this tensor run as Triton kernels."""
    return tensor.is_cuda or _interpreting


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Run the kernels on CPU tensors in Triton's interpreter, for tests.

    TRITON_INTERPRET=1 must be set before the first import of triton. The interpreter is about 10^5 times slower than a
    GPU.
    """
    global _interpreting
    assert not _interpreting, "interpreted() is already on"
    _interpreting = True
    try:
        yield
    finally:
        _interpreting = False


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one: Triton launches there, whatever its arguments' device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _on_its_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an implementation to run on the device of its first argument, a tensor or a list of tensors."""

    def on_its_device(first: Any, *others: Any, **options: Any) -> Any:
        with on_device_of(first if isinstance(first, Tensor) else first[0]):
            return implementation(first, *others, **options)

    return on_its_device


def register(schema: str, *, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that registers a function as the op `distlora::name` and returns the op."""
    name = schema.partition("(")[0]

    def decorate(implementation: Callable[..., Any]) -> Callable[..., Any]:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, _on_its_device(implementation), "CompositeExplicitAutograd")
        torch.library.register_fake(f"distlora::{name}", fake, lib=_library)
        op: Callable[..., Any] = getattr(torch.ops.distlora, name).default
        return op

    return decorate


def check(condition: bool, message: Callable[[], str], error: type[Exception] = RuntimeError) -> None:
    """Raise `error` unless the condition holds.

    torch._check is not used: torch.compile breaks the graph at one whose message shows values.
    """
    if not condition:
        raise error(message())


@torch.compiler.assume_constant_result
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU; (9, 0) for the CPU, whose interpreter runs the kernels of an H100.

    torch.compile evaluates it once and puts no call into the graph.
    """
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
