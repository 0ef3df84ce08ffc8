"""Who holds a run: one launcher alone, or the nodes of one start. A second start meanwhile is refused.

Each launcher locks one of the records RUN/machines/<n>.json by flock, which the system releases when its process ends,
kill -9 included. Record 0 is that of the launcher that prepares the run: the only one, or of several nodes the one at
the rendezvous endpoint. It waits for launchers of an earlier start to leave. The other nodes take the next records once
that node serves the agents' store. The records name the launchers to `distlora status` and `cancel`.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from distlora.config import UserError
from distlora.config.json_files import object_or_empty
from distlora.run_folder.layout import MACHINES
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.launch.rendezvous import Rendezvous, connection_error
from distlora_launcher.terminal.output import show, warn

CONFIG_NAME = "config.yaml"

LEASE_SECONDS = 120
"""Longest wait for a lock of a node that may be gone: NFS releases its locks after up to 90 s."""
READ_SECONDS = 5
"""Longest wait while readers (`holders`) share a record for a moment."""
WRITE_SECONDS = 2
"""Longest wait for the holder of a record to write its name."""

_LARGEST_PID = 2**22
"""Largest pid of Linux."""
_STARTED = 18
"""Index of the start time in /proc/PID/stat, counted after the state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A process on some node. The last three fields are None on a system without /proc."""

    host: str
    pid: int
    started: int | None = None
    """Start time, in clock ticks since the node booted."""
    boot: str | None = None
    """Boot id of the node."""
    namespace: str | None = None
    """Pid namespace: that of the node, or of a container."""

    @property
    def is_of_this_machine(self) -> bool:
        """Return True if the pid is valid in this process's node and container."""
        return (self.host, self.boot, self.namespace) == (host_name(), _boot(), _namespace())

    @property
    def has_ended(self) -> bool | None:
        """Return True if the process has ended; None if this node cannot tell."""
        if not self.is_of_this_machine:
            return None
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text(errors="replace")
        except OSError:
            return None if _exists(self.pid) else True
        # From the third field on: the second is a name, which may have spaces.
        state, *fields = stat.rpartition(")")[2].split()
        return state in "ZX" or int(fields[_STARTED]) != self.started

    def send(self, signum: int) -> None:
        """Send a signal. Raises ProcessLookupError if the process has ended, PermissionError if another user's."""
        if self.has_ended or not self.is_of_this_machine:
            raise ProcessLookupError(f"process {self.pid} of {self.host} has ended")
        os.kill(self.pid, signum)


def host_name() -> str:
    """Return this node's host name without its domain."""
    return socket.gethostname().partition(".")[0] or "localhost"


def this_process() -> Process:
    """Return the calling process."""
    pid, started = os.getpid(), None
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        started = int(stat.rpartition(")")[2].split()[1 + _STARTED])
    return Process(host=host_name(), pid=pid, started=started, boot=_boot(), namespace=_namespace())


def from_record(values: Mapping[str, Any]) -> Process | None:
    """Return the process that a record names; None for a damaged record."""
    host, pid, started = values.get("host"), values.get("pid"), values.get("started")
    # kill(0) and kill(-1) would signal many processes.
    if not isinstance(host, str) or type(pid) is not int or not 1 < pid <= _LARGEST_PID:
        return None
    boot, namespace = values.get("boot"), values.get("namespace")
    return Process(
        host=host,
        pid=pid,
        started=started if isinstance(started, int) else None,
        boot=boot if isinstance(boot, str) else None,
        namespace=namespace if isinstance(namespace, str) else None,
    )


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # Another user's process, which /proc may hide.
        return True
    return True


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class RunLock:
    """The lock of one launcher in a run."""

    leads: bool
    """True if this node prepares the run; the others wait for it."""
    gpus: dict[str, int]
    """Number of GPUs by node, for the nodes that hold the run."""


class _Wait:
    """Prints what is waited for, and tells when it takes too long."""

    def __init__(self) -> None:
        self._what, self._deadline = "", 0.0

    def __call__(self, what: str, seconds: float) -> bool:
        """Wait a moment; return False once `what` has been waited for that long."""
        if what != self._what:
            show(f"{what}\n")
            self._what, self._deadline = what, time.monotonic() + seconds
        time.sleep(0.2)
        return time.monotonic() <= self._deadline


@contextlib.contextmanager
def lock_run(
    run_dir: Path, rendezvous: Rendezvous | None = None, stopped: Callable[[], bool] = lambda: False
) -> Iterator[RunLock | None]:
    """Hold a run for the duration, alone or as one of its nodes; yield None once `stopped()` while waiting.

    Raises UserError if another start holds the run, this node holds it already, or it has all its nodes.
    """
    has_locks = rendezvous is None or _has_locks(run_dir)
    wait, config = _Wait(), file_identity(run_dir / CONFIG_NAME)
    while not stopped():
        held = _held_records(run_dir)
        file = _take(run_dir, 0) if not held and (rendezvous is None or rendezvous.is_host is not False) else None
        leads = file is not None
        if file is None:
            file = _join(run_dir, rendezvous, held, wait, has_locks=has_locks)
            if file_identity(run_dir / CONFIG_NAME) != config:
                raise UserError(f"the node that prepared {run_dir} failed; see its messages")
        if file is not None:
            with file:
                start = "" if rendezvous is None else rendezvous.run_id
                _write_record(file, {"start": start, "gpus": gpu_count()})
                gpus = {process.host: values.get("gpus", 0) for process, values in _held_records(run_dir)}
                try:
                    yield RunLock(leads, gpus)
                finally:
                    with contextlib.suppress(OSError):
                        os.unlink(file.name)
                        (run_dir / MACHINES).rmdir()
            return
    yield None


def _join(
    run_dir: Path,
    rendezvous: Rendezvous | None,
    held: list[tuple[Process, dict[str, Any]]],
    wait: _Wait,
    *,
    has_locks: bool,
) -> IO[str] | None:
    """Return a record of a run that another node leads, locked while the file is open; None after a short wait.

    Raises UserError after a long one, and at once if this node holds the run.
    """
    hosts = ", ".join(process.host for process, _ in held)
    here = [process.pid for process, _ in held if process.is_of_this_machine]
    if here and (rendezvous is None or rendezvous.is_host is not None):
        raise UserError(f"{run_dir} is already running on this node (pid {here[0]}); wait for it or stop it first")
    if rendezvous is not None and rendezvous.is_host is not True:
        same_start = any(values.get("start") == rendezvous.run_id for _, values in held)
        error = connection_error(rendezvous)
        # The store that listens may still be that of another run at the same endpoint: the leader's record tells.
        if error is None and (same_start or not has_locks):
            names: Sequence[int | str] = range(1, rendezvous.nodes) if has_locks else [host_name()]
            for name in names:
                if (file := _take(run_dir, name)) is not None:
                    return file
            nodes = f"its {rendezvous.nodes} nodes"
            if not wait(f"waiting for a node to stop: {run_dir} runs on all of {nodes} ({hosts})", LEASE_SECONDS):
                raise UserError(f"{run_dir} already runs on {nodes}: {hosts}; end the one that is too many")
            return None
        if same_start:
            wait(f"waiting for {hosts} to prepare {run_dir}", math.inf)
            return None
        if not held and rendezvous.is_host is False:
            reason = error or "another run listens there"
            if not wait(f"waiting for {rendezvous.endpoint} to listen", rendezvous.join_seconds):
                raise UserError(
                    f"no process listened at {rendezvous.endpoint} for {rendezvous.join_seconds} s ({reason}); "
                    "`distlora resume` the run on each node, including that one, or correct the endpoint and open the "
                    "port"
                )
            return None
    seconds = LEASE_SECONDS if held else WRITE_SECONDS
    if not wait(f"waiting for {hosts or 'another process'} to leave {run_dir}", seconds):
        where = f"on {hosts}" if hosts else "in another process"
        raise UserError(f"{run_dir} is already running {where}; wait for it or stop it first")
    return None


@contextlib.contextmanager
def worker_place(sweep: Path, name: str) -> Iterator[None]:
    """Hold the record of the worker `name` of a sweep for the duration. Raises UserError if a live worker holds it."""
    wait = _Wait()
    while (file := _take(sweep, name)) is None:
        holder = from_record(object_or_empty(sweep / MACHINES / f"{name}.json"))
        waits_for = f"waiting for {holder.host if holder else 'another process'} to release {sweep} as its {name}"
        if (holder is not None and holder.has_ended is False) or not wait(waits_for, LEASE_SECONDS):
            raise UserError(
                f"{sweep} already has a running {name}; wait for it, or stop it with `distlora cancel {sweep}`"
            )
    with file:
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


def holders(run_dir: Path) -> list[Process]:
    """Return the launchers that hold a run or a sweep now, on any node."""
    return [process for process, _ in _held_records(run_dir)]


def _held_records(run_dir: Path) -> list[tuple[Process, dict[str, Any]]]:
    """Return (launcher, its record) for each locked record."""
    held = []
    paths: list[Path] = []
    with contextlib.suppress(FileNotFoundError):  # The folder exists only while somebody holds the run.
        paths = sorted(path for path in (run_dir / MACHINES).iterdir() if path.suffix == ".json")
    for path in paths:
        values = object_or_empty(path)
        process = from_record(values)
        with contextlib.suppress(OSError):
            if process is not None and _is_held(path, process):
                held.append((process, values))
    return held


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


def _take(folder: Path, name: int | str) -> IO[str] | None:
    """Return a record of a run or sweep, locked while the file is open; None if a launcher holds it."""
    path = folder / MACHINES / f"{name}.json"
    deadline = time.monotonic() + READ_SECONDS
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            file = path.open("a+")
        except FileNotFoundError:  # The last launcher has just removed the folder.
            continue
        if _try_lock(file, fcntl.LOCK_EX):
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        elif not _try_lock(file, fcntl.LOCK_SH) or time.monotonic() > deadline:  # Readers share it.
            file.close()
            return None
        file.close()
        time.sleep(0.01)


def _write_record(file: IO[str], values: dict[str, Any]) -> None:
    """Name this process in its record, synced: NFS would show other nodes an empty one for a while."""
    file.truncate(0)
    file.write(json.dumps(asdict(this_process()) | values))
    file.flush()
    os.fsync(file.fileno())


def _try_lock(file: IO[str], kind: int) -> bool:
    """Return whether a file could be locked; always True on a file system without locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


def _has_locks(run_dir: Path) -> bool:
    """Return whether the file system of a run has locks; warn if it has none."""
    with (run_dir / CONFIG_NAME).open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # A node begins a new stage (stage.py).
            return True
        except OSError:
            warn(f"{run_dir} is on a file system without locks: make sure that only one start uses it")
            return False
    return True


def file_identity(path: Path) -> tuple[int, int] | None:
    """Return (inode, modification time) of a file, which a new file in its place changes; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
