"""CUDA graphs of the pretended device: what a capture forbids is an error, and a replay runs the operators again.

A graph keeps what its operators made, and only an address of other memory: a replay asserts that this still exists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from pretend_cuda import device, launches


class Outside:
    """A tensor whose memory is not the graph's: its place in a storage that may be freed."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.form = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        self.dtype, self.device = tensor.dtype, tensor.device

    def again(self) -> Tensor:
        assert not self.storage.expired(), "a graph reads memory that has been freed"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype, device=self.device).set_(storage, *self.form)


class CUDAGraph(TorchDispatchMode):
    """Records operators and launches of Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, list[Tensor]]] = []
        self.made: set[int] = set()
        """Addresses of storages that the capture allocated; they are kept by `calls`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "pretend_cuda":  # The device's own.
            self.record(func, (args, kwargs or {}), result)
        return result

    def record(self, run: Callable[..., Any], given: Any, result: Any) -> None:
        """Add a call. Asserts that it moves nothing between host and device but numbers."""
        inputs = [each for each in tree_flatten(given)[0] if isinstance(each, Tensor)]
        results = [each for each in tree_flatten(result)[0] if isinstance(each, Tensor)]
        name, both = getattr(run, "__name__", str(run)), inputs + results
        of_host = [each for each in both if not each.is_cuda and (each.dim() or "copy" in name)]
        assert not of_host or not any(each.is_cuda for each in both), f"{name} in a capture uses the host's memory"
        known = {each.untyped_storage().data_ptr() for each in inputs}
        fresh = [each for each in results if each.is_cuda and each.untyped_storage().data_ptr() not in known]
        self.made |= {each.untyped_storage().data_ptr() for each in fresh}
        self.calls.append((run, tree_map(self.kept, given), fresh))

    def kept(self, value: Any) -> Any:
        """Return what the graph keeps of an argument."""
        is_outside = isinstance(value, Tensor) and value.is_cuda and value.untyped_storage().data_ptr() not in self.made
        return Outside(value) if is_outside else value

    def replay(self) -> None:
        """Run the calls again, and write their results where the first ones are."""
        for run, given, fresh in self.calls:
            args, kwargs = tree_map(lambda value: value.again() if isinstance(value, Outside) else value, given)
            results = [each for each in tree_flatten(run(*args, **kwargs))[0] if isinstance(each, Tensor)]
            for old, new in zip(fresh, results, strict=False):
                old.copy_(new)


@contextlib.contextmanager
def graph(captured: CUDAGraph, pool: Any = None, stream: Any = None) -> Iterator[None]:
    """Capture what runs in the scope, on a stream that is not the default one. A wait of the host is an error."""
    assert stream is not None, "a capture needs a stream of its own"
    launches.on_launch = lambda run, args, options: captured.record(run, (args, options), None)
    device.is_capturing, was_recording = True, device.is_recording
    torch.ops.pretend_cuda.count(True)
    try:
        with device.use_stream(stream), captured:
            yield
    finally:
        device.is_capturing, launches.on_launch = False, None
        torch.ops.pretend_cuda.count(was_recording)


def install() -> None:
    """Put graphs in place."""
    torch.cuda.CUDAGraph, torch.cuda.graph = CUDAGraph, graph  # type: ignore[assignment,misc]
    torch.cuda.graph_pool_handle = lambda: (0, 0)  # type: ignore[assignment,return-value]
    torch.cuda.is_current_stream_capturing = lambda: device.is_capturing
