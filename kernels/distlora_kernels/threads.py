"""Limit torch's CPU threads, or run work in threads of one torch thread each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


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
