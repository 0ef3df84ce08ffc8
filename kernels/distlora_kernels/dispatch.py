"""How an op is registered with torch, and which implementation of it runs: Triton on a GPU's tensors, torch elsewhere.

An op has one schema (`distlora::name`), one Python implementation for all devices, which asks `uses_triton`, and a fake
that gives shapes and dtypes alone: with it torch.compile and torch.library.opcheck accept the op. Triton is imported
where a kernel is first launched, so a CPU worker never pays for it.
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
    """Whether ops on this tensor run as Triton kernels."""
    return tensor.is_cuda or _interpreting


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within it the kernels run on CPU tensors, in Triton's interpreter; TRITON_INTERPRET=1 must be set since before
    the first import of triton. For tests: the interpreter is some 10^5 times slower than a GPU.
    """
    global _interpreting
    assert not _interpreting, "interpreted() is already on"
    _interpreting = True
    try:
        yield
    finally:
        _interpreting = False


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Within it the tensor's GPU is the current one: Triton launches on that, whatever its arguments' device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _on_its_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation on the device of its first argument, a tensor or a list of them."""

    def on_its_device(first: Any, *others: Any, **options: Any) -> Any:
        with on_device_of(first if isinstance(first, Tensor) else first[0]):
            return implementation(first, *others, **options)

    return on_its_device


def register(schema: str, *, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function becomes the op `distlora::name` of this schema; returns the op, to be called as it is."""
    name = schema.partition("(")[0]

    def decorate(implementation: Callable[..., Any]) -> Callable[..., Any]:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, _on_its_device(implementation), "CompositeExplicitAutograd")
        torch.library.register_fake(f"distlora::{name}", fake, lib=_library)
        op: Callable[..., Any] = getattr(torch.ops.distlora, name).default
        return op

    return decorate


def check(condition: bool, message: Callable[[], str], error: type[Exception] = RuntimeError) -> None:
    """Raise `error` unless the condition holds. Not torch._check: torch.compile breaks the graph at one whose message
    shows values.
    """
    if not condition:
        raise error(message())
