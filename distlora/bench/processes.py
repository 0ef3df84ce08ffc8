"""Processes of a measurement, each of which puts what it found into a queue."""

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
    """Run target(*values, results) once for each of `arguments`, in fresh processes; each puts (its number, what it
    found) into `results`. Returns what they found, by number, when all have ended. RuntimeError as soon as any fails.
    `environment`: variables that they have beside this process' own.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=target, args=(*values, results)) for values in arguments]
    with _having(environment or {}):
        for process in processes:
            process.start()
    found: list[tuple[int, Any]] = []
    # Read before they are waited for: one whose figures fill the pipe ends only when they are read.
    while len(found) < len(processes) or any(process.is_alive() for process in processes):
        with contextlib.suppress(queue.Empty):
            found.append(results.get(timeout=0.2))
        if any(process.exitcode for process in processes):
            break
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        for process in processes:
            process.terminate()
        raise RuntimeError(f"{target.__name__} failed with exit code {failed[0]}; its error is above")
    return [figures for _, figures in sorted(found, key=lambda each: each[0])]


@contextlib.contextmanager
def _having(variables: Mapping[str, str]) -> Iterator[None]:
    """What starts meanwhile has them: libraries read theirs when they are loaded."""
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
def own_stdout() -> Iterator[None]:
    """What libraries print of themselves meanwhile, here and in processes that start here, goes to stderr with their
    warnings: stdout is for figures."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
