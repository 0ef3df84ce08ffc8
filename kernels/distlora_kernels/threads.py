"""How many threads torch has on the CPU, for as long as that matters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The order of a product's sums depends on the number of threads; with one it is every rank's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def threads_of_one(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for pieces of work, in which torch has no others: those would wait for each other at every operation. A
    thread begins with what another has set last, so one that first uses torch meanwhile has none either."""
    with one_thread(), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool
