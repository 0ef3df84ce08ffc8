"""Run the processes of a measurement; each puts its figures into a queue."""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.multiprocessing as multiprocessing


def run_each(
    target: Callable[..., None],
    arguments: Sequence[tuple[Any, ...]],
    *,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run target(*values, results) once for each of `arguments`, in fresh processes, and return their figures.

    Each process puts (its number, its figures) into `results`; the returned list is ordered by number.

    Args:
        target: Function of each process; must be importable.
        arguments: Positional arguments of each process.
        environment: Variables set in the processes, beside this process' environment.

    Raises:
        RuntimeError: A process failed; the others are terminated.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=target, args=(*values, results)) for values in arguments]
    with _variables_set(environment or {}):
        for process in processes:
            process.start()
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
def _variables_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside: libraries read them when they are loaded."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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
