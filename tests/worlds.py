"""A persistent world of four gloo ranks for the tests: importing torch and transformers costs seconds, so they do it
once.

`World.run(size, function, **arguments)` runs `function(ranks, **arguments)` on the first `size` ranks, as a process
group of its own, and returns each rank's result. `function` must be importable (module level of a test file).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

SIZE = 4
TIMEOUT_SECONDS = 240.0


class World:
    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections

    def run(self, size: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        assert 1 <= size <= SIZE
        for connection in self._connections[:size]:
            connection.send((size, function, arguments))
        results = []
        for rank, connection in enumerate(self._connections[:size]):
            assert connection.poll(TIMEOUT_SECONDS), (
                f"rank {rank} of {size} did not answer within {TIMEOUT_SECONDS:.0f} s"
            )
            error, result = connection.recv()
            assert error is None, f"rank {rank} of {size} failed:\n{error}"
            results.append(result)
        return results


@contextlib.contextmanager
def start_world() -> Iterator[World]:
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [context.Pipe() for _ in range(SIZE)]
    processes = [
        context.Process(target=_serve, args=(rank, port, pipe[1]), daemon=True) for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        yield World([pipe[0] for pipe in pipes])
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(rank: int, port: int, connection: Connection) -> None:
    os.environ.update(
        OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(SIZE)
    )
    import torch
    import torch.distributed as dist

    from distlora.parallel import Ranks

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups = {size: dist.new_group(list(range(size))) for size in range(2, SIZE + 1)}
    while True:
        size, function, arguments = connection.recv()
        try:
            result = function(Ranks(rank, size, torch.device("cpu"), groups.get(size)), **arguments)
            connection.send((None, result))
        except Exception:  # Told to the test, with the rank's traceback.
            connection.send((traceback.format_exc(), None))
