"""torchrun as the launcher has it: a process that may be there before its time, its log, and rank 0's output."""

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
from distlora_launcher.launch.logs import machine_log
from distlora_launcher.launch.worker_entry import PARENT
from distlora_launcher.terminal.output import Output


class Starting:
    """torchrun with `words`, for a machine `alone` from now on, though it starts nothing before `begin`: it imports
    meanwhile. Of several machines' it comes at `begin`.

    As a context: if it has not ended by then it is killed, and its workers with it.
    """

    def __init__(
        self, words: Sequence[str], log_dir: Path, scratch: Path, *, environment: Mapping[str, str], alone: bool
    ) -> None:
        self._words, self._log_dir, self._scratch = words, log_dir, scratch
        self.pid_dir = scratch / "pids"
        """Where each worker leaves its pid."""
        self.pid_dir.mkdir()
        self._environment = {**environment, PID_DIR: str(self.pid_dir), PARENT: str(os.getpid())}
        self.output = Output(log_dir / "rank_0.log")
        self._process: subprocess.Popen[bytes] | None = None
        if alone:
            early = ["--log", str(machine_log(log_dir, alone=True))]
            self._process = self._popen([*early, *words], scratch / "early.log", subprocess.PIPE)

    def begin(self) -> tuple[subprocess.Popen[bytes], Path]:
        """Have it start the workers, and where it writes. RUN/logs is there."""
        log = machine_log(self._log_dir, alone=self._process is not None)
        log.touch()
        if self._process is None:
            self._process = self._popen(self._words, log, subprocess.DEVNULL)
        elif self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # It has ended, and its exit code says why.
                self._process.stdin.write(b"go\n")
                self._process.stdin.close()
        return self._process, log

    def _popen(self, words: Sequence[str], log: Path, stdin: int) -> subprocess.Popen[bytes]:
        with log.open("ab") as noise:
            process = subprocess.Popen(
                [sys.executable, "-m", "distlora_launcher.launch.torchrun_entry", *words],
                stdin=stdin,
                stdout=self.output.child_end,
                stderr=noise,
                env=self._environment,
                start_new_session=True,  # Ctrl-C then reaches the workers once, through us.
            )
        os.close(self.output.child_end)
        return process

    def __enter__(self) -> Starting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            died = self._process.poll()
            self._process.kill()
            self._process.wait()
            if died:
                self._keep_early_words()
            if self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _keep_early_words(self) -> None:
        """Of what ended by itself while it imported: what it said then is the reason that its log lacks."""
        early, log = self._scratch / "early.log", machine_log(self._log_dir, alone=True)
        if early.is_file() and log.is_file():
            with log.open("ab") as end:
                end.write(early.read_bytes())
