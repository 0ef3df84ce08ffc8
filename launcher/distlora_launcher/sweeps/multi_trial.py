"""Train several trials at once on one base: prepare their run folders and feed a multi-trial process.

The process (distlora/training/multi_trial/) reads and writes files in SWEEP/packs/N. Its launcher:

    python -m distlora_launcher.sweeps.multi_trial FOLDER

Trials whose settings may not differ wait for the next process. One that dies is started again with half as many trials
at once, each from its last checkpoint; a trial that was alone in one that died has failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.config import Config, UserError, require
from distlora.config.file import load_config, settings_by_name
from distlora.config.json_files import object_or_empty, read_object
from distlora.config.plan import CHOSEN
from distlora.run_folder.layout import DATA_NAME, PLAN_NAME, find_result
from distlora.run_folder.sweep import COMPLETE, FAILED, PACKS, PRUNED, SAVED
from distlora.system import atomic_io
from distlora.system.exit_codes import BAD_INPUT, DONE, STOPPED, run_to_exit_code
from distlora.training.multi_trial.protocol import (
    CLOSED_NAME,
    INBOX,
    OUTCOMES,
    SETTINGS_NAME,
    VERDICTS,
    check_beside,
    check_trial,
    inbox_file,
    outcome_file,
    verdict_file,
)
from distlora_launcher.compose.checks import check
from distlora_launcher.compose.compose import compose_run
from distlora_launcher.compose.hub import localize, restore
from distlora_launcher.compose.planning import choices
from distlora_launcher.launch.local import create_run, forget_run, is_prepared
from distlora_launcher.launch.lock import CONFIG_NAME, lock_run
from distlora_launcher.launch.signals import block
from distlora_launcher.launch.workers import run_workers
from distlora_launcher.sweeps.folder import LOGS, Sweep
from distlora_launcher.sweeps.multi_trial_size import count_trials, largest_trials, plan_beside, plan_together
from distlora_launcher.sweeps.runner import LoggedProcess, Outcome, Trial, trial_log, wait_until_free
from distlora_launcher.terminal.output import say


@dataclass(slots=True)
class _Running:
    """A trial from `begin` to its outcome."""

    trial: Trial
    config: Config
    hold: contextlib.ExitStack
    """Lock of its run folder, so that nobody resumes it meanwhile."""
    began: float = field(default_factory=time.monotonic)


class MultiTrialRunner:
    """Trains the trials of one worker, in one multi-trial process after the other."""

    def __init__(self, sweep: Sweep, index: int) -> None:
        self._sweep, self._index = sweep, index
        sizes = largest_trials(sweep)
        self._sizes = [trial.config.adapter for trial in sizes]
        """Adapters of the trials that may need most memory."""
        self.slots = plan_together(sweep.settings, sizes, most=count_trials(sweep)).trials
        self._trials: dict[int, _Running] = {}
        self._waiting: list[int] = []
        """Trials for a later process, in the order in which they came."""
        self._to_prepare: list[int] = []
        self._preparing: tuple[int, LoggedProcess] | None = None
        self._done: list[Outcome] = []
        self._group: MultiTrialRun | None = None
        self._groups = 0
        self._prepared: dict[str, Path] = {}
        """RUN/data.json by all settings that it depends on."""
        self._closed = self._stops = False

    @property
    def is_idle(self) -> bool:
        """Return whether its processes have ended."""
        return self._group is None or not self._group.was_started or self._group.ended() is not None

    def begin(self, trial: Trial) -> None:
        """Start or resume a trial. Raises UserError if it cannot run."""
        wait_until_free(trial.run_dir)
        config = self._config_of(trial)
        with contextlib.ExitStack() as held:
            held.enter_context(lock_run(trial.run_dir))
            is_done = find_result(trial.run_dir) is not None
            fits = is_done or self._fits(config)
            self._trials[trial.number] = _Running(trial, config, held.pop_all())
        if is_done:  # Its last worker was killed before it could record that.
            self._end(trial.number, COMPLETE)
        else:
            (self._to_prepare if fits else self._waiting).append(trial.number)

    def verdict(self, number: int, step: int, *, prune: bool) -> None:
        """Pass on the pruner's decision on a trial."""
        if self._group is not None:
            self._group.write_verdict(number, step, prune=prune)

    def poll(self) -> Sequence[Outcome]:
        """Return the trials that have ended."""
        self._prepare()
        if self._group is not None:
            self._read_outcomes(self._group)
        done, self._done = self._done, []
        return done

    def _read_outcomes(self, group: MultiTrialRun) -> None:
        """Read what the process has written, and whether it has ended."""
        code = group.ended()  # Before the outcomes: all that it wrote is then there to be read.
        for ended in group.outcomes():
            self._end(ended.number, ended.state, ended)
        if code is not None:
            self._handle_end(group, code)
        elif not self._to_prepare and self._preparing is None:
            if not group.was_started:  # All its trials failed before they were put in.
                self._next_group()
            elif not group.closed and (self._closed or (self._waiting and not group.inside)):
                group.close()

    def close(self) -> None:
        """Announce that no more trials come."""
        self._closed = True

    def stop(self) -> None:
        """Have every trial save and stop."""
        self._stops = True
        for number in [*self._to_prepare, *self._waiting]:
            self._end(number, SAVED)
        self._to_prepare, self._waiting = [], []
        if self._preparing is not None:
            self._preparing[1].stop()
        if self._group is not None:
            self._group.ask_to_stop()

    def _config_of(self, trial: Trial) -> Config:
        """Return the settings of a trial; make its run folder if needed.

        Raises UserError if it cannot run, or not with other trials.
        """
        run_dir, folder = trial.run_dir, self._sweep.config_dir
        if (run_dir / CONFIG_NAME).is_file():
            config = load_config(run_dir)
            restore(config.model)
            check(config, new_run=False)
            return config
        with contextlib.chdir(self._sweep.cwd):
            composed = compose_run(trial.overrides, config_dir=folder)
        check(composed.config, new_run=True)
        config = self._decided(composed.config, composed.fixed)
        config = dataclasses.replace(config, model=localize(config.model))
        check_trial(config)
        require(
            config.cluster.nodes == 1,
            f"sweep.packed={self._sweep.settings.packed} trains trials together on one node, and "
            f"cluster.nodes={config.cluster.nodes}; set cluster.nodes=1, or sweep.packed=1",
        )
        create_run(run_dir, config)
        return config

    def _decided(self, config: Config, fixed: frozenset[str]) -> Config:
        """Return the settings with the choices of plan=auto and quant=auto: those of the first trial for all."""
        if config.plan.mode != "auto" and config.quant.method != "auto":
            return config
        if self._group is None:
            return choices(config, fixed).config
        settings = [*(CHOSEN if config.plan.mode == "auto" else ()), "quant.method"]
        free = [name for name in settings if name not in fixed or config.value_of(name) == "auto"]
        return config.with_settings({name: self._group.config.value_of(name) for name in free})

    def _fits(self, config: Config) -> bool:
        """Return whether a trial may join the current process, which is set up for its first trial."""
        if self._group is None:
            self._make_group(config)
            return True
        if self._group.closed:
            return False
        try:
            check_beside(settings_by_name(config), first=settings_by_name(self._group.config))
        except UserError:
            return False
        return True

    def _make_group(self, config: Config) -> None:
        name = f"{self._index}" if self._groups == 0 else f"{self._index}_{self._groups}"
        self._groups += 1
        folder = self._sweep.folder / PACKS / name
        planned = plan_beside(self._sweep, config, self._sizes)
        self.slots = planned.trials
        self._group = MultiTrialRun(
            folder,
            self._sweep.folder / LOGS / f"pack_{name}.log",
            dataclasses.replace(config, run_dir=str(folder)),
            slots=self.slots,
            verdicts=self._sweep.settings.pruner != "none",
        )
        self._group.keep_plan(planned.plan.as_json())

    def _prepare(self) -> None:
        """Continue the preparation of trials' data, one after the other: most share it."""
        if self._preparing is not None:
            number, process = self._preparing
            code = process.poll()
            if code is None:
                return
            self._prepare_ended(number, process, code)
            self._preparing = None
        while self._to_prepare and self._preparing is None:
            trial = self._trials[self._to_prepare.pop(0)]
            run_dir, key = trial.trial.run_dir, _data_key(trial.config)
            if not is_prepared(run_dir) and key in self._prepared:
                shutil.copyfile(self._prepared[key], run_dir / DATA_NAME)
            if is_prepared(run_dir):
                self._put(trial)
            else:
                log = trial_log(self._sweep, trial.trial.number)
                self._preparing = trial.trial.number, LoggedProcess(["distlora.data.prepare", str(run_dir)], log)

    def _prepare_ended(self, number: int, process: LoggedProcess, code: int) -> None:
        trial = self._trials[number]
        if code == DONE and not self._stops:
            self._put(trial)
        elif self._stops:
            self._end(number, SAVED)
        else:
            reason = process.last_error() or f"its preparation ended with code {code}"
            self._end(number, FAILED, reason=reason, is_refused=code == BAD_INPUT)
            forget_run(trial.trial.run_dir)

    def _put(self, trial: _Running) -> None:
        """Hand a prepared trial to the process, which starts with its first trial."""
        assert self._group is not None, "made for its first trial"
        run_dir = trial.trial.run_dir
        self._prepared.setdefault(_data_key(trial.config), run_dir / DATA_NAME)
        shutil.copyfile(self._group.folder / PLAN_NAME, run_dir / PLAN_NAME)
        self._group.put(trial.trial.number, run_dir)
        if not self._group.was_started:
            self._group.start(self._group.slots)

    def _handle_end(self, group: MultiTrialRun, code: int) -> None:
        """Handle the end of the process, once its outcomes are read."""
        left = group.inside
        if self._stops or code == STOPPED:
            for number in left:
                self._end(number, SAVED)
            if not self._stops:
                # SLURM or systemd stops the processes of this node, but may not signal this one.
                os.kill(os.getpid(), signal.SIGTERM)
        elif code == BAD_INPUT:
            for number in left:
                self._end(number, FAILED, reason=group.why(code), is_refused=True)
        elif left:
            self._restart(group, group.why(code))
            return
        self._next_group()

    def _next_group(self) -> None:
        """Set up the next process, for the trials that came too late or did not fit into this one."""
        self._group = None
        again, self._waiting, self._to_prepare = [*self._to_prepare, *self._waiting], [], []
        for number in again:
            fits = self._fits(self._trials[number].config)
            (self._to_prepare if fits else self._waiting).append(number)

    def _restart(self, group: MultiTrialRun, reason: str) -> None:
        """Restart a process that has died with fewer trials at once, without a trial that was alone in it."""
        if group.slots > 1:
            slots = max(1, min(group.slots, len(group.inside)) // 2)
            say(f"{len(group.inside)} trials trained together ended ({reason}); restarting with {slots} at once")
        else:
            for number in group.given:
                group.fail(number, reason)
            for ended in group.outcomes():
                self._end(ended.number, ended.state, ended)
            slots = self.slots
            if not group.inside and not self._to_prepare:
                self._next_group()
                return
        group.start(slots)

    def _end(
        self,
        number: int,
        state: str,
        ended: RecordedOutcome | None = None,
        *,
        reason: str | None = None,
        is_refused: bool = False,
    ) -> None:
        """Record the outcome of a trial and release its folder."""
        trial = self._trials.pop(number)
        trial.hold.close()
        seconds = time.monotonic() - trial.began
        step = None
        if ended is not None:
            reason, step = ended.reason, ended.step
            seconds = seconds if ended.seconds is None else ended.seconds
        self._done.append(
            Outcome(number=number, state=state, seconds=seconds, step=step, reason=reason, is_refused=is_refused)
        )


def _data_key(config: Config) -> str:
    """Return a key of the settings that a run's data depends on."""
    return repr((config.model, config.data, config.train.seed, config.train.objective))


MODULE = "distlora_launcher.sweeps.multi_trial"


@dataclass(frozen=True, slots=True)
class RecordedOutcome:
    """A trial's outcome as the process wrote it."""

    number: int
    state: str
    reason: str | None
    step: int | None
    seconds: float | None


class MultiTrialRun:
    """The folder of a multi-trial process (distlora/training/multi_trial/protocol.py), and the process."""

    def __init__(self, folder: Path, log: Path, config: Config, *, slots: int, verdicts: bool) -> None:
        """Make the folder.

        Files of a killed worker's process are removed: its trials are complete in their run folders, and other workers
        may have taken them.
        """
        self.folder, self._log, self.config = folder, log, config
        self.slots, self._verdicts = slots, verdicts
        self.closed = False
        self._process: LoggedProcess | None = None
        self._code_read = False
        self._inside: set[int] = set()
        self._given: dict[int, Path] = {}
        """Run folders of the trials in the inbox."""
        self._later: dict[int, Path] = {}
        """Run folders of trials that wait for the end of the only one in the inbox (one slot)."""
        wait_until_free(folder)
        for name in (INBOX, VERDICTS, OUTCOMES):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (CLOSED_NAME, CONFIG_NAME, PLAN_NAME):
            (folder / name).unlink(missing_ok=True)
        for name in (INBOX, VERDICTS, OUTCOMES):
            (folder / name).mkdir(parents=True)
        create_run(folder, config)

    def keep_plan(self, plan: Mapping[str, Any]) -> None:
        """Write the plan, which the ranks check their memory against."""
        atomic_io.write_json(self.folder / PLAN_NAME, plan)

    @property
    def inside(self) -> frozenset[int]:
        """Return the trials that were put in and whose outcome was not read yet."""
        return frozenset(self._inside)

    @property
    def given(self) -> list[int]:
        """Return the trials that the process may take; with one slot, the only one in it."""
        return sorted(self._given)

    def put(self, number: int, run_dir: Path) -> None:
        """Put in a prepared trial.

        With one slot the inbox has one trial at a time, so that it is known which one a dying process had.
        """
        self._inside.add(number)
        if self.slots == 1 and len(self._inside) > 1:
            self._later[number] = run_dir
        else:
            self._put_in_inbox(number, run_dir)

    def _put_in_inbox(self, number: int, run_dir: Path) -> None:
        atomic_io.write_json(inbox_file(self.folder, number), {"number": number, "run_dir": str(run_dir)})
        self._given[number] = run_dir

    def write_verdict(self, number: int, step: int, *, prune: bool) -> None:
        """Write the pruner's verdict on a trial's evaluation."""
        if self._verdicts:
            atomic_io.write_json(verdict_file(self.folder, number, step), {"prune": prune})

    def fail(self, number: int, reason: str) -> None:
        """Write the outcome of a trial whose process died with it."""
        path = outcome_file(self.folder, number)
        if not path.exists():
            atomic_io.write_json(path, {"state": FAILED, "reason": reason, "step": None, "seconds": None})

    def close(self) -> None:
        """Announce that no more trials come."""
        self.closed = True
        self._write_closed()

    def _write_closed(self) -> None:
        """Close the inbox once all trials are in it: the process ends when they are done."""
        if self.closed and not self._later:
            atomic_io.write_text(self.folder / CLOSED_NAME, "")

    def outcomes(self) -> Iterator[RecordedOutcome]:
        """Yield new outcomes in the order of the trials' numbers."""
        for number in sorted(self._inside):
            path = outcome_file(self.folder, number)
            if not path.is_file():
                continue
            values = object_or_empty(path)
            if values.get("state") not in (COMPLETE, PRUNED, FAILED):
                values = {"state": FAILED, "reason": f"{path} is damaged, so its outcome is unknown"}
            self._inside.remove(number)
            self._given.pop(number, None)
            if self._later and not self._given:
                following = min(self._later)
                self._put_in_inbox(following, self._later.pop(following))
                self._write_closed()
            yield RecordedOutcome(
                number,
                values["state"],
                values.get("reason"),
                _whole(values.get("step")),
                _number(values.get("seconds")),
            )

    def start(self, slots: int) -> None:
        """Start the process; after a death it continues with the trials without an outcome."""
        self.slots = slots
        waiting = {**self._later, **self._given}
        self._given, self._later = {}, {}
        for number in sorted(waiting):
            if slots == 1 and self._given:
                self._later[number] = waiting[number]
                inbox_file(self.folder, number).unlink(missing_ok=True)
            else:
                self._put_in_inbox(number, waiting[number])
        (self.folder / CLOSED_NAME).unlink(missing_ok=True)
        self._write_closed()
        atomic_io.write_json(self.folder / SETTINGS_NAME, {"slots": slots, "verdicts": self._verdicts})
        self._process, self._code_read = LoggedProcess([MODULE, str(self.folder)], self._log), False

    @property
    def was_started(self) -> bool:
        """Return whether its process runs, or has ended unread."""
        return self._process is not None and not self._code_read

    def ended(self) -> int | None:
        """Return the exit code of the process, once; None while it runs or if there is none."""
        if self._process is None or self._code_read or (code := self._process.poll()) is None:
            return None
        self._code_read = True
        return code

    def why(self, code: int) -> str:
        """Return why the process ended with `code`, in a sentence."""
        assert self._process is not None, "it has ended"
        return self._process.why(code, self.folder)

    def ask_to_stop(self) -> None:
        """Have the process save every trial and end."""
        if self._process is not None:
            self._process.stop()


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def run(group: Path) -> int:
    """Run the ranks of a multi-trial process. Returns the exit code of `run_workers`.

    With one slot, ranks that die are restarted as a run's are; with more, the worker restarts it with fewer trials at
    once.
    """
    config = load_config(group)
    slots = read_object(group / SETTINGS_NAME, "start the sweep again with `distlora resume`").get("slots")
    with lock_run(group):
        return run_workers(
            group,
            processes=config.cluster.gpus_per_node,
            max_restarts=config.cluster.max_restarts if slots == 1 else 0,
        )


if __name__ == "__main__":
    block()
    sys.exit(run_to_exit_code(lambda: run(Path(sys.argv[1]))))
