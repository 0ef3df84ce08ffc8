"""torchrun's process: it may be started before the workers are needed; its log, and rank 0's output."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from distlora.system.stop_signals import PID_DIR
from distlora_launcher.launch.logs import new_torchrun_log
from distlora_launcher.launch.worker_entry import PARENT
from distlora_launcher.terminal.output import Output


class Torchrun:
    """torchrun with the given arguments. `begin` lets it start the workers.

    For a single node the process starts at once and imports the workers' modules; for one of several it starts at
    `begin`. On exit from the context it is killed if it still runs, and its workers with it.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log_dir: Path,
        scratch: Path,
        *,
        environment: Mapping[str, str],
        single_node: bool,
    ) -> None:
        self._arguments, self._log_dir, self._scratch = arguments, log_dir, scratch
        self.pid_dir = scratch / "pids"
        """Folder where each worker writes its pid."""
        self.pid_dir.mkdir()
        self._environment = {**environment, PID_DIR: str(self.pid_dir), PARENT: str(os.getpid())}
        self.output = Output(log_dir / "rank_0.log")
        self._process: subprocess.Popen[bytes] | None = None
        if single_node:
            early = ["--log", str(new_torchrun_log(log_dir, single_node=True))]
            self._process = self._popen([*early, *arguments], scratch / "early.log", subprocess.PIPE)

    def begin(self) -> tuple[subprocess.Popen[bytes], Path]:
        """Start the workers; return the process and its log. RUN/logs must exist."""
        log = new_torchrun_log(self._log_dir, single_node=self._process is not None)
        log.touch()
        if self._process is None:
            self._process = self._popen(self._arguments, log, subprocess.DEVNULL)
        elif self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # It has ended; its exit code is reported later.
                self._process.stdin.write(b"go\n")
                self._process.stdin.close()
        return self._process, log

    def _popen(self, arguments: Sequence[str], log: Path, stdin: int) -> subprocess.Popen[bytes]:
        with log.open("ab") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "distlora_launcher.launch.torchrun_entry", *arguments],
                stdin=stdin,
                stdout=self.output.child_end,
                stderr=stderr,
                env=self._environment,
                start_new_session=True,  # Ctrl-C then reaches the workers once, through the launcher.
            )
        os.close(self.output.child_end)
        return process

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            failed = self._process.poll()
            self._process.kill()
            self._process.wait()
            if failed:
                self._append_early_log()
            if self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _append_early_log(self) -> None:
        """Append what a torchrun that failed during its imports printed: the reason is not in its log."""
        early, log = self._scratch / "early.log", new_torchrun_log(self._log_dir, single_node=True)
        if early.is_file() and log.is_file():
            with log.open("ab") as end:
                end.write(early.read_bytes())
