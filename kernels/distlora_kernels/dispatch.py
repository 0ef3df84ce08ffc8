"""Choose how an op runs: Triton for tensors on a GPU, torch elsewhere. Keep constants on devices, and limit threads.

Triton is imported when a kernel is first launched, so a CPU worker never imports it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import torch
from torch import Tensor

MOST_THREADS = 16
"""Most threads of `in_threads`; each has its work memory."""
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


def check_compilation() -> None:
    """Raise RuntimeError while torch.compile traces an adapted linear.

    It saves tensors in a node of autograd's graph, which a trace does not have, and changes tensors in place, for which
    torch 2.11 traced wrong gradients. Without fullgraph=True, torch.compile then runs the linear eagerly.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("an adapted linear cannot be compiled; leave out fullgraph=True, and it runs eagerly")


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one: Triton launches there, whatever its arguments' device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU; (9, 0) for the CPU, whose interpreter runs the kernels of an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.lru_cache(maxsize=1024)
def on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers, such as scales of adapters, as (N,) fp32: one copy per device, which synchronizes with it."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one torch thread: the order of a product's sums depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def threads_of_one(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads in which torch has one thread each, so that operations do not wait for each other."""
    with one_thread(), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def in_threads(work: Callable[[int], None], numbers: range) -> None:
    """Call `work` with each number, each of torch's threads with its own: a piece is too short to be shared by them."""
    threads = min(torch.get_num_threads(), len(numbers), MOST_THREADS)
    inference = torch.is_inference_mode_enabled()

    def run(first: int) -> None:
        with torch.inference_mode(inference):  # A thread does not inherit the mode.
            for number in numbers[first::threads]:
                work(number)

    if threads < 2:
        for number in numbers:
            work(number)
        return
    with threads_of_one(threads) as pool:
        list(pool.map(run, range(threads)))
