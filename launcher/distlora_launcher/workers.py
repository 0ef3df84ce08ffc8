"""Worker processes on this machine: torchrun, rank 0's output shown as it comes, one signal passed on, no orphans.

torchrun's exit code says neither what failed nor whether a stopped run saved, so it decides nothing but success: see
`run_workers`.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from distlora.command_line import BAD_INPUT, DONE, FAILED
from distlora_launcher.checks import gpu_count
from distlora_launcher.failures import TORCHRUN_LOG, first_failure

STOPPED = 75

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
STOP_MARKER = "stopped.json"
"""In RUN: the workers saved a checkpoint and stopped before the end."""

KEEP_PAGES = {
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}
"""glibc's malloc told to keep freed pages: a fresh 32 MiB tensor costs 5x the work in page faults, 3-6 % of a step."""


def run_workers(run_dir: Path, *, processes: int, worker_module: str = "distlora.train") -> int:
    """Run `python -m worker_module run_dir` in `processes` ranks to the end; print why it failed; return our exit code.

    0 when every rank ended well, 2 when the first failure is a UserError, 75 when the stop marker is there, 128 + n
    after signal n ended it without one, else 1.
    """
    log_dir = run_dir / "logs"
    set_aside_logs(log_dir)
    marker = run_dir / STOP_MARKER
    marker.unlink(missing_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="distlora-torchrun-") as scratch,
        (log_dir / TORCHRUN_LOG).open("wb") as noise,
    ):
        arguments = torchrun_arguments(processes, Path(scratch), log_dir, worker_module, run_dir)
        command = [sys.executable, "-m", "distlora_launcher.torchrun_entry", *arguments]
        output, child_end = open_output()
        with forwarding() as forwarder:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=child_end,
                stderr=noise,
                env=worker_environment(processes),
                start_new_session=True,  # Ctrl-C then reaches the workers once, through us and torchrun, not twice.
            )
            forwarder.process = process
            os.close(child_end)
            with (log_dir / "rank_0.log").open("ab", buffering=0) as log:
                show_output(output, process, log.fileno())
            code = process.wait()
    if marker.exists():
        return STOPPED
    if code == 0:
        return DONE
    if forwarder.received is not None and forwarder.received != signal.SIGUSR1:
        print(f"stopped by {signal.Signals(forwarder.received).name}; logs are in {log_dir}", file=sys.stderr)
        return 128 + forwarder.received
    failure = first_failure(log_dir)
    print(f"error: {failure.message}", file=sys.stderr)
    return BAD_INPUT if failure.bad_input else FAILED


def torchrun_arguments(processes: int, scratch: Path, log_dir: Path, worker_module: str, run_dir: Path) -> list[str]:
    """torchrun's options, then `--`: without it, torchrun takes a worker's option for an abbreviation of its own."""
    return [
        "--standalone",
        "--local-addr=127.0.0.1",  # Else the host's name, which laptops and containers often cannot resolve.
        f"--nproc-per-node={processes}",
        "--max-restarts=0",
        # Its default dies of SIGUSR1 at once and leaves the workers behind.
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        f"--log-dir={scratch}",
        "--module",
        "--",
        "distlora_launcher.worker_entry",
        str(log_dir),
        worker_module,
        str(run_dir),
    ]


def worker_environment(processes: int) -> dict[str, str]:
    """The launcher's environment plus what workers need; a variable that the user set stays as it is."""
    # PET_* are torchrun's defaults for its own options: one left over from another job would change ours.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    threads = max(1, len(os.sched_getaffinity(0)) // processes) if hasattr(os, "sched_getaffinity") else 1
    defaults = {
        # The agent's store outlives a rank, and with it the address at which a dead rank was reached.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONSAFEPATH": "1",  # A folder such as ./datasets beside the user must not shadow a package.
    }
    if gpu_count() == 0:
        defaults |= KEEP_PAGES
    return defaults | environment


def set_aside_logs(log_dir: Path) -> None:
    """Move the logs of an earlier start to logs/start_<n>: the newest are always logs/rank_<k>.log."""
    log_dir.mkdir(parents=True, exist_ok=True)
    earlier = [path for path in log_dir.iterdir() if path.is_file()]
    if earlier:
        number = 1 + len([path for path in log_dir.iterdir() if path.is_dir()])
        folder = log_dir / f"start_{number}"
        folder.mkdir()
        for path in earlier:
            path.rename(folder / path.name)


def open_output() -> tuple[int, int]:
    """(our end, the workers' end) of rank 0's stdout: a terminal of the same size if ours is one, else a pipe."""
    if not sys.stdout.isatty():
        return os.pipe()
    ours, theirs = pty.openpty()
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST  # Our own terminal turns \n into \r\n already.
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    copy_size(ours)
    return ours, theirs


def copy_size(terminal: int) -> None:
    """Give a pseudo-terminal the size of the one we write to."""
    if os.isatty(terminal) and sys.stdout.isatty():
        size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)


def show_output(output: int, process: subprocess.Popen[bytes], log: int) -> None:
    """Copy what rank 0 writes to our stdout and its log until torchrun has ended and nothing is left to read."""
    sys.stdout.flush()
    size = shutil.get_terminal_size()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # A chunk may end within a character.
    while True:
        ended = process.poll() is not None
        readable, _, _ = select.select([output], [], [], 0.0 if ended else 0.2)
        if shutil.get_terminal_size() != size:
            size = shutil.get_terminal_size()
            copy_size(output)
        if not readable:
            if ended:
                break
            continue
        try:
            chunk = os.read(output, 65536)
        except OSError:  # EIO: the last process on a pseudo-terminal has closed it.
            chunk = b""
        if not chunk:
            process.wait()
            break
        os.write(log, chunk)
        show(decoder.decode(chunk))
    os.close(output)


def show(text: str) -> None:
    """Write to stdout. When its reader has left (`... | head`, a pager that was quit) the run goes on unseen: what it
    says is in its logs."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Forwarder:
    """Passes signals on to a child. A second request to stop kills it, and by `end_with_parent` its workers."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.received: int | None = None

    def __call__(self, signum: int, _frame: FrameType | None) -> None:
        again = self.received in (signal.SIGINT, signal.SIGTERM) and signum in (signal.SIGINT, signal.SIGTERM)
        self.received = signum
        if self.process is None or self.process.poll() is not None:
            return
        if again:
            self.process.kill()
        else:
            self.process.send_signal(signum)
            if signum == signal.SIGINT and sys.stderr.isatty():
                print("\nstopping the workers; Ctrl-C again kills them", file=sys.stderr)


@contextlib.contextmanager
def forwarding(signals: Sequence[signal.Signals] = FORWARDED) -> Iterator[Forwarder]:
    """Handle `signals` by a Forwarder for the duration."""
    forwarder = Forwarder()
    previous = {signum: signal.signal(signum, forwarder) for signum in signals}
    try:
        yield forwarder
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
