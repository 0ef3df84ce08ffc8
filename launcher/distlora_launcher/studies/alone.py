"""Place trials one after the other, as `distlora train` does. Several at once: multi_trial.py."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from distlora.run_folder.layout import find_result
from distlora.run_folder.sweep import CANCELLED_NAME, COMPLETE, FAILED, PRUNED, SAVED
from distlora.system.exit_codes import BAD_INPUT, DONE, STOPPED
from distlora.training.trackers.wandb_agent import VARIABLES
from distlora_launcher.launch.bound import start_command
from distlora_launcher.launch.failures import read_ending
from distlora_launcher.launch.lock import CONFIG_NAME, holders
from distlora_launcher.report.records import read_figures
from distlora_launcher.studies.placement import PlacedTrial, Placement, TrialOutcome
from distlora_launcher.studies.sweep import LOGS, Sweep

MODULE = "distlora_launcher.cli.main"
"""Module with the commands `train` and `resume`."""

POLL_SECONDS = 0.2
RELEASE_SECONDS = 60
"""Time in seconds to wait for a killed worker's launcher to release a run folder."""


class Alone(Placement):
    """Trains one trial at a time, each by `distlora train`; its output goes to SWEEP/logs/trial_<n>.log."""

    slots = 1

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._trial: PlacedTrial | None = None
        self._process: LoggedProcess | None = None
        self._started = 0.0
        self._prunes = self._stops = False

    @property
    def is_idle(self) -> bool:
        """Return whether its processes have ended: they may outlive their last trial's outcome for a moment."""
        return self._process is None

    def begin(self, trial: PlacedTrial) -> None:
        """Start or resume a trial. Raises UserError if it cannot run."""
        (trial.run_dir / CANCELLED_NAME).unlink(missing_ok=True)
        if (trial.run_dir / CONFIG_NAME).is_file():
            wait_until_free(trial.run_dir)
            arguments = ["resume", str(trial.run_dir)]
        else:
            folder = self._sweep.config_dir
            arguments = ["train", *([] if folder is None else ["--config-dir", folder]), *trial.overrides]
        log = trial_log(self._sweep, trial.number)
        self._process = LoggedProcess([MODULE, *arguments], log, cwd=self._sweep.cwd)
        self._trial, self._started, self._prunes = trial, time.monotonic(), False

    def verdict(self, number: int, step: int, *, prune: bool) -> None:
        """Pass on the pruner's decision after an evaluation at `step`; called for each if the sweep has a pruner."""
        if prune and self._trial is not None and self._trial.number == number and not self._prunes:
            self._prunes = True
            self._stop_process()

    def poll(self) -> Sequence[TrialOutcome]:
        """Return the trials that have ended since the last call, without waiting."""
        if self._process is None or self._trial is None or (code := self._process.poll()) is None:
            return []
        trial, seconds = self._trial, time.monotonic() - self._started
        state, reason = self._ending(trial, self._process, code)
        self._trial = self._process = None
        figures = read_figures(trial.run_dir)
        step = None if figures.time is None else figures.step
        refused = code == BAD_INPUT
        return [
            TrialOutcome(
                number=trial.number, state=state, seconds=seconds, step=step, reason=reason, is_refused=refused
            )
        ]

    def stop(self) -> None:
        """Have every trial save and stop."""
        self._stops = True
        self._stop_process()

    def _stop_process(self) -> None:
        if self._process is not None:
            self._process.stop()

    def _ending(self, trial: PlacedTrial, process: LoggedProcess, code: int) -> tuple[str, str | None]:
        """Return (state, reason) of a trial whose process ended with `code`."""
        if code == DONE or find_result(trial.run_dir) is not None:  # It may have been signalled after its end.
            return COMPLETE, None
        # The signal itself ends a launcher that is still importing.
        if code in (STOPPED, -signal.SIGTERM):
            if self._stops:
                return SAVED, None
            if self._prunes:
                return PRUNED, None
            if (trial.run_dir / CANCELLED_NAME).exists():
                return PRUNED, "it was cancelled (`distlora cancel`)"
            # SLURM or systemd stops the processes of this node, but may not signal this one.
            os.kill(os.getpid(), signal.SIGTERM)
            return SAVED, None
        if code == BAD_INPUT:
            return FAILED, process.last_error() or "bad input"
        return FAILED, process.why(code, trial.run_dir)


def environment() -> dict[str, str]:
    """Return the environment of a training process, which is no run of a wandb agent."""
    return {name: value for name, value in os.environ.items() if name not in VARIABLES}


def trial_log(sweep: Sweep, number: int) -> Path:
    """Return the log of a trial's launcher."""
    return sweep.folder / LOGS / f"trial_{number:04d}.log"


class LoggedProcess:
    """A module run as a process that ends with this one; its output is appended to a log."""

    def __init__(self, arguments: Sequence[str], log: Path, *, cwd: str | None = None) -> None:
        """Start it: `arguments` are the module and its arguments."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._log, self._start = log, file.tell()
            self._process = start_command(
                *arguments, environment=environment(), stdout=file, stderr=subprocess.STDOUT, cwd=cwd
            )

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Send SIGTERM if it runs."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def last_error(self) -> str | None:
        """Return the last error that it printed."""
        with self._log.open("rb") as file:
            file.seek(self._start)
            text = file.read().decode("utf-8", "replace")
        _, mark, message = f"\n{text}".rpartition("\nerror: ")
        return message.strip() if mark else None

    def why(self, code: int, run_dir: Path) -> str:
        """Return why it ended with `code`, in a sentence; a rank's error in run_dir/logs comes first."""
        error = read_ending(run_dir).error
        if error is not None:
            return error.splitlines()[0]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return self.last_error() or f"its launcher {how}"


def wait_until_free(run_dir: Path) -> None:
    """Wait until the launcher of a killed worker has released its run folder."""
    deadline = time.monotonic() + RELEASE_SECONDS
    while holders(run_dir) and time.monotonic() < deadline:
        time.sleep(0.2)
