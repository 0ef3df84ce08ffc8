"""Start the processes of a measurement, read their memory, and describe the machine."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import multiprocessing
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from distlora_kernels import processor


def free_port() -> int:
    """Return a free TCP port of the loopback interface, for a rendezvous of ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def anonymous_bytes(process: int | str = "self") -> int:
    """Return RssAnon of a process, in bytes. RuntimeError where Linux does not report it."""
    with open(f"/proc/{process}/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{process}/status has no RssAnon; this measurement needs Linux 4.5 or newer")


class PeakMemory:
    """Sample this process' anonymous memory: `with PeakMemory() as memory: ...`, then `memory.peak` in bytes.

    The peak is relative to the memory at the start. Anonymous memory is what counts against a job's limit and cannot be
    dropped.
    """

    def __enter__(self) -> PeakMemory:
        self.start = anonymous_bytes()
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes() - self.start)

    def _sample(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, anonymous_bytes() - self.start)
            time.sleep(0.002)


def run_each(
    target: Callable[..., None],
    arguments: Sequence[tuple[Any, ...]],
    *,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run target(*values, results) once for each of `arguments`, in fresh processes, and return their figures.

    Each process puts (its number, its figures) into `results`; the returned list is ordered by number. `environment`
    holds variables set in the processes, beside this process' environment. Raises RuntimeError if a process failed; the
    others are terminated.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=target, args=(*values, results)) for values in arguments]
    before = dict(os.environ)
    os.environ |= environment or {}  # Libraries read it when they are loaded.
    try:
        for process in processes:
            process.start()
    finally:
        for name in environment or {}:
            del os.environ[name]
        os.environ |= before
    answers: list[tuple[int, Any]] = []
    # Read before waiting: a process whose figures fill the pipe ends only when they are read.
    while len(answers) < len(processes) or any(process.is_alive() for process in processes):
        with contextlib.suppress(queue.Empty):
            answers.append(results.get(timeout=0.2))
        if any(process.exitcode for process in processes):
            break
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        for process in processes:
            process.terminate()
        raise RuntimeError(f"{target.__name__} failed with exit code {failed[0]}; its error is above")
    return [figures for _, figures in sorted(answers, key=lambda each: each[0])]


def set_rank(rank: int, world: int, port: int) -> None:
    """Set torch.distributed's environment variables of one rank on this node."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}


@contextlib.contextmanager
def libraries_print_to_stderr() -> Iterator[None]:
    """Redirect stdout to stderr, in this process and its children: stdout is for figures only."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def measurement_notes(*packages: str, threads: int | None = None) -> str:
    """Return the date, device, threads, load, and versions of torch and `packages`.

    `threads` counts those of the measured processes; None for those of this process.
    """
    import torch  # The command of `distlora bench step` starts without it.

    threads = threads or torch.get_num_threads()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", *packages))
    used = f"{threads} threads" if threads > 1 else "1 thread"
    load = f"{os.getloadavg()[0]:.1f}"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return f"{datetime.date.today()}, {name}, {os.cpu_count()} cores, {used}, load {load}; {versions}"


def _cpu_name() -> str:
    """Return the CPU's name, with its instructions for bf16 and the path of its products."""
    flags = sorted({"avx512_bf16", "amx_bf16"} & processor.features())
    return " ".join([processor.name(), *flags, f"(path {processor.path()})"])
