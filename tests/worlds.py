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
    """SIZE processes that wait for work. After a failure they are started anew: some may wait for a rank for ever."""

    def __init__(self) -> None:
        self._start()

    def run(self, size: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """The results of `function(Ranks, **arguments)` on the first `size` ranks."""
        assert 1 <= size <= SIZE
        for connection in self._connections[:size]:
            connection.send((size, function, arguments))
        try:
            return [self._receive(rank, size) for rank in range(size)]
        except AssertionError:
            self.stop()
            self._start()
            raise

    def _receive(self, rank: int, size: int) -> Any:
        connection = self._connections[rank]
        assert connection.poll(TIMEOUT_SECONDS), f"rank {rank} of {size} did not answer within {TIMEOUT_SECONDS:.0f} s"
        error, result = connection.recv()
        assert error is None, f"rank {rank} of {size} failed:\n{error}"
        return result

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pipes = [context.Pipe() for _ in range(SIZE)]
        self._connections: list[Connection] = [pipe[0] for pipe in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, port, pipe[1]), daemon=True) for rank, pipe in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


@contextlib.contextmanager
def start_world() -> Iterator[World]:
    world = World()
    try:
        yield world
    finally:
        world.stop()


def _serve(rank: int, port: int, connection: Connection) -> None:
    os.environ.update(
        OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(SIZE)
    )
    import torch
    import torch.distributed as dist

    from distlora.parallel import Ranks

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sizes = range(2, SIZE + 1)
    groups, controls = ({size: dist.new_group(list(range(size))) for size in sizes} for _ in range(2))
    while True:
        size, function, arguments = connection.recv()
        ranks = Ranks(rank, size, torch.device("cpu"), groups.get(size), control=controls.get(size))
        try:
            result = function(ranks, **arguments)
            connection.send((None, result))
        except Exception:  # Told to the test, with the rank's traceback.
            connection.send((traceback.format_exc(), None))
