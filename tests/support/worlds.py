"""Keep a persistent world of four gloo ranks for the tests.

Importing torch and transformers costs seconds, so it is done once, by the process that they are forked from.

`World.run(size, function, **arguments)` runs `function(ranks, **arguments)` on the first `size` ranks, as a process
group of its own, and returns each rank's result. `function` must be importable (module level of a test file).
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed import TCPStore

SIZE = 4
TIMEOUT_SECONDS = 240.0
STACKS = signal.SIGRTMIN
"""Signal at which a rank writes the stacks of its threads."""
IMPORTED = ["distlora.training.worker", "transformers.models.llama.modeling_llama", "peft"]
"""What nearly every function that runs on ranks needs: 4 CPU seconds. Starts no thread, so it can be forked."""


class World:
    """`size` processes that wait for work. After a failure they are started anew: some may wait for a rank for ever.

    `regroups`: each piece of work gets a default process group of just its ranks, as a run has it. DeepSpeed needs
    that: it broadcasts within that one whatever group it was given. Else all share one, with groups of its first ranks.
    """

    def __init__(self, size: int = SIZE, *, regroups: bool = False) -> None:
        self._size, self._regroups, self._number = size, regroups, 0
        self._start()

    def run(self, size: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Return the results of `function(Ranks, **arguments)` on the first `size` ranks."""
        assert 1 <= size <= self._size
        self._number += 1
        for connection in self._connections[:size]:
            connection.send((self._number, size, function, arguments))
        try:
            return self._receive(size)
        except AssertionError:
            self.stop()
            self._start()
            raise

    def _receive(self, size: int) -> list[Any]:
        """Return the ranks' results. The first rank that fails is named: the others may wait for it for ever."""
        waiting = dict(zip(self._connections, range(size), strict=False))
        results: dict[int, Any] = {}
        ends = time.monotonic() + TIMEOUT_SECONDS
        while waiting:
            answered = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, ends - time.monotonic()))
            if not answered:
                self._show_stacks(size)
            assert answered, f"ranks {[*waiting.values()]} of {size} did not answer within {TIMEOUT_SECONDS:.0f} s"
            for connection in answered:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                error, results[rank] = connection.recv()
                assert error is None, f"rank {rank} of {size} failed:\n{error}"
        return [results[rank] for rank in range(size)]

    def _show_stacks(self, size: int) -> None:
        """Let the ranks write where each of their threads is, to stderr."""
        for process in self._processes[:size]:
            assert process.pid is not None
            os.kill(process.pid, STACKS)
        time.sleep(1.0)

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pipes = [context.Pipe() for _ in range(self._size)]
        self._connections: list[Connection] = [pipe[0] for pipe in pipes]
        shared = (self._size, self._store.port, self._regroups)
        self._processes = [
            context.Process(target=_serve, args=(rank, *shared, pipe[1]), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


@contextlib.contextmanager
def start_world(size: int = SIZE, *, regroups: bool = False) -> Iterator[World]:
    world = World(size, regroups=regroups)
    try:
        yield world
    finally:
        world.stop()


def _serve(rank: int, world: int, port: int, regroups: bool, connection: Connection) -> None:
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    faulthandler.register(STACKS)
    import torch

    from distlora import derive
    from distlora.architecture import spec
    from distlora_kernels import native

    torch.set_num_threads(1)
    spec.derive = derive.derive  # As conftest.py does.
    store = TCPStore("127.0.0.1", port)
    make = _regrouped(rank, store) if regroups else _grouped(rank, world, store)
    while True:
        number, size, function, arguments = connection.recv()
        try:
            result = function(make(number, size), **arguments)
            connection.send((None, result))
        except Exception:  # Told to the test, with the rank's traceback.
            connection.send((traceback.format_exc(), None))
        native._library.cache_clear()  # Else a rank that compiled once would compile in later tests.


def _grouped(rank: int, world: int, store: TCPStore) -> Callable[[int, int], Any]:
    """Return (number of the work, size) -> Ranks: in groups that are made once."""
    import torch
    import torch.distributed as dist

    from distlora.parallel import Ranks

    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    sizes = range(2, world + 1)
    groups, controls = ({size: dist.new_group(list(range(size))) for size in sizes} for _ in range(2))
    return lambda number, size: Ranks(rank, size, torch.device("cpu"), groups.get(size), control=controls.get(size))


def _regrouped(rank: int, store: TCPStore) -> Callable[[int, int], Any]:
    """Return (number of the work, size) -> Ranks: in a default process group of their own."""
    import torch
    import torch.distributed as dist

    from distlora.parallel import Ranks

    def ranks_of(number: int, size: int) -> Ranks:
        if dist.is_initialized():
            dist.destroy_process_group()
        group = control = None
        if size > 1:
            dist.init_process_group("gloo", store=dist.PrefixStore(str(number), store), rank=rank, world_size=size)
            group, control = dist.group.WORLD, dist.new_group(backend="gloo")
        return Ranks(rank, size, torch.device("cpu"), group, control=control)

    return ranks_of


class Alone:
    """Start worlds of two and three ranks when needed; each piece of work has its own default process group.

    DeepSpeed broadcasts within that group. It numbers parameters and units as long as a process lives, and compares the
    numbers: a rank that sat out a run of two would have others than these two.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._worlds: dict[int, World] = {}

    def run(self, size: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        world = 2 if size == 2 else 3
        if world not in self._worlds:
            self._worlds[world] = self._stack.enter_context(start_world(world, regroups=True))
        return self._worlds[world].run(size, function, **arguments)
