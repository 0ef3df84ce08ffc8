"""Who holds a run: one launcher alone, or the nodes of one start. A second start meanwhile is refused.

Locks are flock's, which the system releases when their process ends, kill -9 included. A launcher that runs alone, and
of several nodes the one at the rendezvous endpoint, locks RUN/config.yaml; it waits for launchers of an earlier start
to leave. The other nodes join once that node serves the agents' store. Every launcher also locks one of the records
RUN/machines/<n>.json, which name it to `distlora status` and `cancel`, and of which a run has one per node.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from distlora.config import UserError
from distlora.config.json_files import object_or_empty
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.launch.processes import Process, from_record, host_name, this_process
from distlora_launcher.launch.rendezvous import Rendezvous, connection_error
from distlora_launcher.terminal.output import show, warn

CONFIG_NAME = "config.yaml"
MACHINES = "machines"

LEASE_SECONDS = 120
"""Longest wait for a lock of a node that may be gone: NFS releases its locks after up to 90 s."""

LOOK_SECONDS = 5
"""Longest wait while readers (`holders`) share a record for a moment."""

RELEASE_SECONDS = 2
"""Longest wait for a launcher that has removed its record but not yet released the run."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True, slots=True)
class NodeLock:
    """The lock of one node in a run of several."""

    leads: bool
    """True if this node prepares the run; the others wait for it."""
    gpus_elsewhere: dict[str, int]
    """Number of GPUs by node, for the other nodes that hold the run."""


@contextlib.contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Hold a run alone for the duration. Raises UserError if another launcher holds it."""
    with (run_dir / CONFIG_NAME).open("r+") as file:
        _lock_alone(file, run_dir)
        record = _lock_record(run_dir, 1, "", lambda: False, several_per_node=True)
        assert record is not None
        try:
            with record:
                yield
        finally:
            remove_records(run_dir)


@contextlib.contextmanager
def lock_node(run_dir: Path, rendezvous: Rendezvous, stopped: Callable[[], bool]) -> Iterator[NodeLock | None]:
    """Hold a run as one of its nodes for the duration; yield None once `stopped()` while waiting.

    Raises UserError if another start holds the run, this node holds it already, or it has all its nodes.
    """
    with (run_dir / CONFIG_NAME).open("r+") as config:
        has_locks = _has_locks(config)
        if not has_locks:
            warn(f"{run_dir} is on a file system without locks: make sure that only one start uses it")
        leads = _lead_or_join(config, run_dir, rendezvous, stopped, has_locks=has_locks)
        record = None
        if leads is not None:
            several = rendezvous.is_host is None
            record = _lock_record(run_dir, rendezvous.nodes, rendezvous.run_id, stopped, several_per_node=several)
        if record is None:
            yield None
            return
        gpus = {process.host: int(values.get("gpus", 0)) for process, values in _held_records(run_dir)}
        with record:
            yield NodeLock(bool(leads), gpus)


def _lead_or_join(
    config: IO[str], run_dir: Path, rendezvous: Rendezvous, stopped: Callable[[], bool], *, has_locks: bool
) -> bool | None:
    """Return True once this node has locked the run, False once it may join another's, None once `stopped()`."""
    deadline, message = time.monotonic() + LEASE_SECONDS, ""
    joins_until = time.monotonic() + rendezvous.join_seconds
    while not stopped():
        held = _held_records(run_dir)
        if rendezvous.is_host is not False and _try_lock(config) and not (held and has_locks):
            _check_not_removed(config, run_dir)
            return True
        error = connection_error(rendezvous) if rendezvous.is_host is not True else ""
        same_start = [process for process, values in held if values.get("start") == rendezvous.run_id]
        # The store that listens may still be that of another run at the same endpoint: the leader's record tells.
        is_led = bool(same_start) or not has_locks
        if error is None and is_led:
            return False
        _check_not_removed(config, run_dir)
        hosts = ", ".join(process.host for process, _ in held)
        if rendezvous.is_host:
            _check_not_on_this_node(run_dir, [process for process, _ in held])
        if rendezvous.is_host is not True and same_start:
            waits_for = f"waiting for {hosts} to prepare {run_dir}"
            deadline = time.monotonic() + LEASE_SECONDS
            joins_until = time.monotonic() + rendezvous.join_seconds
        elif held or rendezvous.is_host is not False:
            waits_for = f"waiting for {hosts or 'another process'} to leave {run_dir}"
            if time.monotonic() > deadline:
                by = f"on {hosts}" if hosts else "in another process"
                raise UserError(f"{run_dir} is already running {by}; wait for it or stop it first")
        else:
            reason = error or "another run listens there"
            waits_for = f"waiting for {rendezvous.endpoint} to listen ({reason})"
            if time.monotonic() > joins_until:
                raise UserError(
                    f"no process listened at {rendezvous.endpoint} for {rendezvous.join_seconds} s ({reason}); "
                    "`distlora resume` the run on each node, including that one, or correct the endpoint and open the "
                    "port"
                )
        if waits_for.partition(" (")[0] != message:
            show(f"{waits_for}\n")
            message = waits_for.partition(" (")[0]
        time.sleep(0.5)
    return None


def _check_not_removed(config: IO[str], run_dir: Path) -> None:
    path = run_dir / CONFIG_NAME
    if not path.exists() or os.fstat(config.fileno()).st_ino != path.stat().st_ino:
        raise UserError(f"the node that prepared {run_dir} failed; see its messages")


def _check_not_on_this_node(run_dir: Path, held: list[Process]) -> None:
    process = next((process for process in held if process.is_of_this_machine), None)
    if process is not None:
        raise UserError(f"{run_dir} is already running on this node (pid {process.pid}); wait for it or stop it first")


@contextlib.contextmanager
def worker_place(sweep: Path, name: str) -> Iterator[None]:
    """Hold the record of the worker `name` of a sweep for the duration. Raises UserError if a live worker holds it."""
    folder = sweep / MACHINES
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    with path.open("a+") as file:
        deadline, waited = time.monotonic() + LEASE_SECONDS, False
        while not _try_lock_record(file):
            holder = from_record(object_or_empty(path))
            if (holder is not None and holder.has_ended is False) or time.monotonic() > deadline:
                raise UserError(
                    f"{sweep} already has a running {name}; wait for it, or stop it with `distlora cancel {sweep}`"
                )
            if not waited:
                show(f"waiting for {holder.host if holder else 'another process'} to release {sweep} as its {name}\n")
                waited = True
            time.sleep(0.5)
        _write_record(file, {})
        yield


def is_alive(sweep: Path, name: str | None, process: Process) -> bool:
    """Return whether `process` still holds the record `name` of a sweep; without a name, any record."""
    if name is None:
        return process in holders(sweep)
    path = sweep / MACHINES / f"{name}.json"
    with contextlib.suppress(FileNotFoundError):
        return from_record(object_or_empty(path)) in (None, process) and _is_held(path, process)
    return False


def remove_records(run_dir: Path) -> None:
    """Remove the records of launchers in a run folder; what cannot be removed stays."""
    for path in _record_paths(run_dir):
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        (run_dir / MACHINES).rmdir()


def holders(run_dir: Path) -> list[Process]:
    """Return the launchers that hold a run or a sweep now, on any node."""
    return [process for process, _ in _held_records(run_dir)]


def _held_records(run_dir: Path) -> list[tuple[Process, dict[str, Any]]]:
    """Return (launcher, its record) for each locked record."""
    held = []
    for path in _record_paths(run_dir):
        values = object_or_empty(path)
        process = from_record(values)
        with contextlib.suppress(OSError):
            if process is not None and _is_held(path, process):
                held.append((process, values))
    return held


def _record_paths(run_dir: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):  # The folder exists only while somebody holds the run.
        return sorted(path for path in (run_dir / MACHINES).iterdir() if path.suffix == ".json")
    return []


def _is_held(path: Path, process: Process) -> bool:
    """Return whether a record is locked. Without locks, only the launcher's own node can tell."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return process.has_ended is not True  # A record read just before its holder wrote it names the one before.
        except OSError:
            return process.has_ended is False
        return False


def _lock_record(
    run_dir: Path, nodes: int, start: str, stopped: Callable[[], bool], *, several_per_node: bool
) -> IO[str] | None:
    """Return one of the `nodes` records of a run, locked while the file is open; None once `stopped()`."""
    folder = run_dir / MACHINES
    folder.mkdir(exist_ok=True)
    deadline, waited = time.monotonic() + LEASE_SECONDS, False
    while not stopped():
        held = holders(run_dir)
        if not several_per_node:
            _check_not_on_this_node(run_dir, held)
        file = _free_record(folder, nodes)
        if file is not None:
            _write_record(file, {"start": start, "gpus": gpu_count()})
            return file
        hosts = ", ".join(process.host for process in held)
        if time.monotonic() > deadline:
            raise UserError(f"{run_dir} already runs on its {nodes} nodes: {hosts}; end the one that is too many")
        if not waited:
            show(f"waiting for a node to stop: {run_dir} runs on all of its {nodes} nodes ({hosts})\n")
            waited = True
        time.sleep(1)
    return None


def _free_record(folder: Path, nodes: int) -> IO[str] | None:
    """Return a record that nobody holds, locked; without locks, one named for this node."""
    for number in range(nodes):
        file = (folder / f"{number}.json").open("a+")
        if not _has_locks(file):
            file.close()
            return (folder / f"{host_name()}.json").open("a+")
        if _try_lock_record(file):
            return file
        file.close()
    return None


def _lock_alone(config: IO[str], run_dir: Path) -> None:
    """Lock a run exclusively. Raises UserError at once if its holder is known to live, else after a wait."""
    began, waited = time.monotonic(), False
    while not _try_lock(config) or holders(run_dir):
        held = holders(run_dir)
        is_running = any(process.has_ended is False for process in held)
        if is_running or time.monotonic() > began + (LEASE_SECONDS if held else RELEASE_SECONDS):
            raise UserError(f"{run_dir} is already running in another process; wait for it or stop it first")
        if held and not waited:
            show(f"waiting for {held[0].host} to release {run_dir}\n")
            waited = True
        time.sleep(0.1)


def _try_lock_record(file: IO[str]) -> bool:
    """Lock a record; return False if a launcher holds it. Readers share it for a moment, which is waited for."""
    deadline = time.monotonic() + LOOK_SECONDS
    while not _try_lock(file):
        if not _try_lock(file, fcntl.LOCK_SH) or time.monotonic() > deadline:
            return False
        fcntl.flock(file, fcntl.LOCK_UN)
        time.sleep(0.01)
    return True


def _write_record(file: IO[str], values: dict[str, Any]) -> None:
    """Name this process in its record, synced: NFS would show other nodes an empty one for a while."""
    file.truncate(0)
    file.write(json.dumps(asdict(this_process()) | values))
    file.flush()
    os.fsync(file.fileno())


def _try_lock(file: IO[str], kind: int = fcntl.LOCK_EX) -> bool:
    """Return whether a file could be locked; always True on a file system without locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _has_locks(file: IO[str]) -> bool:
    """Return whether the file system has locks, by sharing a file that this process has not locked yet."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
