"""Who runs a run: one machine alone, or the machines of one start together. A second start meanwhile is refused.

Locks of the system (flock), which end with the process that holds them, kill -9 included. Alone: an exclusive one on
RUN/config.yaml. Several machines: whoever comes first leads; it holds that lock exclusively while it sets aside the
logs of an earlier start and prepares the data, and shares it then; the others wait for that, and each takes one of the
places RUN/machines/<n>.json, of which there are as many as machines.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from distlora.config import UserError
from distlora.config.json_files import object_or_empty
from distlora.system import atomic_io
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.launch.logs import host_name
from distlora_launcher.launch.processes import Process, from_record, this_process
from distlora_launcher.terminal.output import show, warn

CONFIG_NAME = "config.yaml"
MACHINES = "machines"
INITIAL_ADAPTER_NAME = "start.json"
"""In RUN/machines: {"id", "leader", "gpus"} of the newest start; gpus are the leader's."""

LEASE_SECONDS = 120
"""How long to wait for a lock that the same run's last machines may still seem to hold: a network file system learns of
a machine that is gone only after a while (NFS: 90 s)."""

LOOK_SECONDS = 5
"""How long others may go on looking at a place (`holders`) that somebody takes."""

LEAVE_SECONDS = 2
"""How long a launcher that has given up its place may still hold the run."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Place:
    """This machine's share in a start of several."""

    def __init__(self, config: IO[str], record: Path, *, leads: bool) -> None:
        self._config = config
        self._record = record
        self.leads = leads
        """Whether this machine sets aside the logs and prepares the data, which the others wait for."""

    @property
    def start(self) -> dict[str, Any]:
        """What the leader left for the others: its name, its GPUs."""
        return object_or_empty(self._record)

    def share(self) -> None:
        """Let the others go on: what the leader does alone is done."""
        if self.leads:
            with _without_locks():
                fcntl.flock(self._config, fcntl.LOCK_SH)


@contextlib.contextmanager
def running(run_dir: Path) -> Iterator[None]:
    """Hold the run alone: a second process that starts or resumes it meanwhile is refused. RUN/machines/0.json says for
    the duration who has it (`holders`).
    """
    with (run_dir / CONFIG_NAME).open("r+") as file:
        _take_run(file, run_dir)
        place = _take_place(run_dir, 1, lambda: False, shares_machine=True)
        assert place is not None, "it gives up only when it is told to"
        try:
            with place:
                yield
        finally:
            leave(run_dir)


@contextlib.contextmanager
def worker_place(sweep: Path, name: str) -> Iterator[None]:
    """Be the worker `name` of a sweep for the duration, as `holders` then says. Raises UserError where another is."""
    folder = sweep / MACHINES
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    with path.open("a+") as file:
        deadline, said = time.monotonic() + LEASE_SECONDS, False
        while not _seize(file):
            holder = from_record(object_or_empty(path))
            if (holder is not None and holder.has_ended is False) or time.monotonic() > deadline:
                raise UserError(f"{sweep} has a {name} already, which lives; wait for it or `distlora cancel {sweep}`")
            if not said:
                show(f"waiting for {holder.host if holder else 'another process'} to leave {sweep} as its {name}\n")
                said = True
            time.sleep(0.5)
        _sign(file)
        yield


def is_alive(sweep: Path, name: str | None, process: Process) -> bool:
    """Whether the worker of a sweep that was `process`, under this name, lives: its place is held, and by no other that
    is known."""
    if name is None:
        return process in holders(sweep)
    path = sweep / MACHINES / f"{name}.json"
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return from_record(object_or_empty(path)) in (None, process)
            except OSError:
                return process.has_ended is not True
    except FileNotFoundError:
        pass
    return False


def leave(run_dir: Path) -> None:
    """Remove the places in a run that nobody holds any more."""
    # Whatever is left of it, a half-written record or an open file on NFS, is no failure of the run.
    for path in _records(run_dir):
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        (run_dir / MACHINES).rmdir()


def holders(run_dir: Path) -> list[Process]:
    """The launchers that hold a run now, on whatever machines: each locks the record that names it while it lives."""
    found = []
    for path in _records(run_dir):
        process = from_record(object_or_empty(path))
        with contextlib.suppress(OSError):
            if process is not None and _is_held(path, process):
                found.append(process)
    return found


def _records(run_dir: Path) -> list[Path]:
    """The places in a run. Their folder comes and goes with whoever holds it."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(path for path in (run_dir / MACHINES).iterdir() if path.suffix == ".json")
    return []


def _is_held(path: Path, process: Process) -> bool:
    """Whether the launcher that a record names holds its place. A record that was read just before its holder wrote it
    names the one before. Where the file system has no locks, only the launcher's own machine knows.
    """
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return process.has_ended is not True
        except OSError:
            return process.has_ended is False
        return False


@contextlib.contextmanager
def together(
    run_dir: Path,
    run_id: str,
    *,
    nodes: int,
    stopped: Callable[[], bool],
    leads_without_locks: bool,
    shares_machine: bool = False,
) -> Iterator[Place | None]:
    """Hold the run as one of the `nodes` machines of the start `run_id`; None once `stopped()` while waiting for the
    leader. Raises UserError when another start has it, this machine has a place already, or all are taken.

    leads_without_locks: whether this machine is the leader where the file system has no locks; nothing here makes the
    others wait then.
    shares_machine: whether this machine may have several places: the machines of the run are all this one.
    """
    with (run_dir / CONFIG_NAME).open("r+") as config:
        leads = _take_part(config, run_dir, run_id, stopped, leads_without_locks)
        if leads is None:
            yield None
            return
        if os.fstat(config.fileno()).st_ino != _inode(run_dir / CONFIG_NAME):
            raise UserError(f"{run_dir} was given up by the machine that prepared it; its messages there say why")
        place = _take_place(run_dir, nodes, stopped, shares_machine=shares_machine)
        if place is None:
            yield None
            return
        with place:
            yield Place(config, run_dir / MACHINES / INITIAL_ADAPTER_NAME, leads=leads)


def _take_part(
    config: IO[str], run_dir: Path, run_id: str, stopped: Callable[[], bool], leads_without_locks: bool
) -> bool | None:
    """Whether this machine leads the start; None once `stopped()`."""
    record = run_dir / MACHINES / INITIAL_ADAPTER_NAME
    deadline, said = time.monotonic() + LEASE_SECONDS, False
    while not stopped():
        try:
            if _lock(config, fcntl.LOCK_EX, strict=True):
                _lead(record, run_id)
                return True
            shared = _lock(config, fcntl.LOCK_SH, strict=True)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warn(f"{run_dir} is on a file system without locks: make sure that only one start has it")
            if leads_without_locks:
                _lead(record, run_id)
            return leads_without_locks
        start = object_or_empty(record)
        ours = start.get("id") == run_id
        if shared and ours:
            return False
        if shared:
            fcntl.flock(config, fcntl.LOCK_UN)
        if not ours and time.monotonic() > deadline:
            by = f"start {start['id']} of it, led by {start['leader']}" if start else "another process"
            raise UserError(f"{run_dir} is running in {by}; wait for it or stop it first")
        if not said:
            by = start.get("leader", "another process")
            show(f"waiting for {by}, which prepares {run_dir}\n" if ours else f"waiting for {by} to leave {run_dir}\n")
            said = True
        time.sleep(0.5)
    return None


def _lead(record: Path, run_id: str) -> None:
    """Say who leads the start."""
    record.parent.mkdir(exist_ok=True)
    atomic_io.write_json(record, {"id": run_id, "leader": host_name(), "gpus": gpu_count()})


def _take_place(run_dir: Path, nodes: int, stopped: Callable[[], bool], *, shares_machine: bool) -> IO[str] | None:
    """One of the places of the machines, held while the file is open; None once `stopped()`."""
    folder = run_dir / MACHINES
    folder.mkdir(exist_ok=True)
    deadline, said = time.monotonic() + LEASE_SECONDS, False
    while not stopped():
        held = holders(run_dir)
        mine = None if shares_machine else next((place for place in held if place.is_of_this_machine), None)
        file = _free_place(folder, nodes) if mine is None else None
        if file is not None:
            return file
        if mine is not None:
            raise UserError(f"{run_dir} runs on this machine already (pid {mine.pid}); wait for it or stop it first")
        hosts = ", ".join(place.host for place in held)
        if time.monotonic() > deadline:
            raise UserError(f"{run_dir} has its {nodes} machines already: {hosts}; end the one that is too many")
        if not said:
            show(f"waiting for a place: {run_dir} has its {nodes} machines ({hosts})\n")
            said = True
        time.sleep(1)
    return None


def _free_place(folder: Path, nodes: int) -> IO[str] | None:
    """A place that nobody holds, with this process's name in it. Without locks it is named for the host, since it
    cannot be told whether a number is taken.
    """
    for number in range(nodes):
        file = (folder / f"{number}.json").open("a+")
        try:
            is_free = _seize(file, strict=True)
        except OSError as error:
            file.close()
            if error.errno not in _NO_LOCKS:
                raise
            file, is_free = (folder / f"{host_name()}.json").open("a+"), True
        if is_free:
            _sign(file)
            return file
        file.close()
    return None


def _take_run(config: IO[str], run_dir: Path) -> None:
    """Lock a run for this launcher alone. Raises UserError where another has it: at once where that one is known to
    live, else once whoever has it can have neither gone nor died unnoticed."""
    began, said = time.monotonic(), False
    while not _lock(config, fcntl.LOCK_EX):
        held = holders(run_dir)
        lives = any(place.has_ended is False for place in held)
        if lives or time.monotonic() > began + (LEASE_SECONDS if held else LEAVE_SECONDS):
            raise UserError(f"{run_dir} is running in another process; wait for it or stop it first")
        if held and not said:
            show(f"waiting for {held[0].host} to leave {run_dir}\n")
            said = True
        time.sleep(0.1)


def _seize(file: IO[str], *, strict: bool = False) -> bool:
    """Lock a place; False when another holds it. Who only looks (`holders`) shares it for a moment, which no holder
    does, and is waited for."""
    deadline = time.monotonic() + LOOK_SECONDS
    while not _lock(file, fcntl.LOCK_EX, strict=strict):
        if not _lock(file, fcntl.LOCK_SH, strict=strict) or time.monotonic() > deadline:
            return False
        fcntl.flock(file, fcntl.LOCK_UN)
        time.sleep(0.01)
    return True


def _sign(place: IO[str]) -> None:
    """Write this process's name into its place, for other machines too: NFS would show them an empty record for as long
    as it keeps the text here."""
    place.truncate(0)
    place.write(json.dumps(asdict(this_process())))
    place.flush()
    os.fsync(place.fileno())


def _lock(file: IO[str], kind: int, *, strict: bool = False) -> bool:
    """Try to lock a file; False when another holds it. Without `strict`, a file system without locks has it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if strict or error.errno not in _NO_LOCKS:
            raise
    return True


@contextlib.contextmanager
def _without_locks() -> Iterator[None]:
    """Nothing is to be done where the file system has no locks."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None
