"""How a worker trains several trials at once on one base: it prepares their run folders and feeds a pack, which trains
them together (distlora/training/multi_trial/).

Trials whose settings may not differ in a pack wait for the pack after this one. A pack that dies is started again with
half as many at once, from what each trial has saved; one that dies with a single trial in it was killed by that trial.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distlora.config import Config, UserError, require
from distlora.config.file import load_config
from distlora.config.plan import CHOSEN
from distlora.planner.choice.space import value_of, with_settings
from distlora.run_folder.layout import DATA_NAME, PLAN_NAME, find_result
from distlora.run_folder.sweep import (
    COMPLETE,
    FAILED,
    PACKS,
    SAVED,
)
from distlora.system.exit_codes import BAD_INPUT, DONE, STOPPED
from distlora.training.multi_trial.settings import check_beside, check_trial
from distlora_launcher.compose.checks import check
from distlora_launcher.compose.compose import compose_run
from distlora_launcher.compose.hub import localize, restore
from distlora_launcher.compose.planning import choices
from distlora_launcher.launch.local import create_run, forget_run, is_prepared
from distlora_launcher.launch.lock import CONFIG_NAME, running
from distlora_launcher.sweeps.folder import LOGS, Sweep
from distlora_launcher.sweeps.pack_folder import Ended, PackFolder
from distlora_launcher.sweeps.packing import number_of, packing_beside, packing_of, valid_sizes
from distlora_launcher.sweeps.runner import Asked, Outcome, environment, last_error, trial_log, wait_until_free
from distlora_launcher.terminal.output import say


@dataclass(slots=True)
class _Trial:
    """A trial from `begin` to its outcome."""

    asked: Asked
    config: Config
    hold: contextlib.ExitStack
    """Its run folder is held while this is open, so that nobody resumes it beside."""
    began: float = field(default_factory=time.monotonic)


class PackRunner:
    """The trials of one worker, in one pack after the other."""

    def __init__(self, sweep: Sweep, index: int) -> None:
        self._sweep, self._index = sweep, index
        sizes = valid_sizes(sweep)
        self._sizes = [trial.config.adapter for trial in sizes]
        """Of the trials that may take most memory."""
        self.slots = packing_of(sweep.settings, sizes, most=number_of(sweep)).trials
        self._trials: dict[int, _Trial] = {}
        self._waiting: list[int] = []
        """Trials for a later pack, in the order in which they came."""
        self._to_prepare: list[int] = []
        self._preparing: _Preparation | None = None
        self._done: list[Outcome] = []
        self._pack: PackFolder | None = None
        self._packs = 0
        self._prepared: dict[str, Path] = {}
        """RUN/data.json by all that it depends on."""
        self._closed = self._stops = False

    @property
    def is_idle(self) -> bool:
        return self._pack is None or not self._pack.was_started or self._pack.ended() is not None

    def begin(self, trial: Asked) -> None:
        wait_until_free(trial.run_dir)
        config = self._config_of(trial)
        with contextlib.ExitStack() as held:
            held.enter_context(running(trial.run_dir))
            is_done = find_result(trial.run_dir) is not None
            fits = is_done or self._fits(config)
            self._trials[trial.number] = _Trial(trial, config, held.pop_all())
        if is_done:  # Whoever had it before was killed before it could say so.
            self._end(trial.number, COMPLETE)
        else:
            (self._to_prepare if fits else self._waiting).append(trial.number)

    def verdict(self, number: int, step: int, *, prune: bool) -> None:
        if self._pack is not None:
            self._pack.say(number, step, prune=prune)

    def poll(self) -> Sequence[Outcome]:
        self._prepare()
        if self._pack is not None:
            self._look(self._pack)
        done, self._done = self._done, []
        return done

    def _look(self, pack: PackFolder) -> None:
        """What the pack has written, and whether it is over."""
        code = pack.ended()  # First: what it wrote before its end is then there to be read.
        for ended in pack.outcomes():
            self._end(ended.number, ended.state, ended)
        if code is not None:
            self._after(pack, code)
        elif not self._to_prepare and self._preparing is None:
            if not pack.was_started:  # Its only trials failed before they came into it.
                self._next_pack()
            elif not pack.closed and (self._closed or (self._waiting and not pack.inside)):
                pack.close()

    def close(self) -> None:
        self._closed = True

    def stop(self) -> None:
        self._stops = True
        for number in [*self._to_prepare, *self._waiting]:
            self._end(number, SAVED)
        self._to_prepare, self._waiting = [], []
        if self._preparing is not None:
            self._preparing.process.terminate()
        if self._pack is not None:
            self._pack.ask_to_stop()

    def _config_of(self, trial: Asked) -> Config:
        """The settings of a trial, whose run folder is made where it is not there yet. Raises UserError for one that
        cannot be a trial of a pack, or of any run."""
        run_dir, folder = trial.run_dir, self._sweep.config_dir
        if (run_dir / CONFIG_NAME).is_file():
            config = load_config(run_dir)
            restore(config)
            check(config, new_run=False)
            return config
        with contextlib.chdir(self._sweep.cwd):
            composed = compose_run(trial.words, config_dir=folder)
        check(composed.config, new_run=True)
        config = localize(self._decided(composed.config, composed.fixed))
        check_trial(config)
        require(
            config.cluster.nodes == 1,
            f"sweep.packed={self._sweep.settings.packed} packs trials on one machine, and cluster.nodes="
            f"{config.cluster.nodes}; set cluster.nodes=1, or sweep.packed=1",
        )
        create_run(run_dir, config)
        return config

    def _decided(self, config: Config, fixed: frozenset[str]) -> Config:
        """With what plan=auto and quant=auto choose: for all trials of a pack what its first got."""
        if config.plan.mode != "auto" and config.quant.method != "auto":
            return config
        if self._pack is None:
            return choices(config, fixed).config
        settings = [*(CHOSEN if config.plan.mode == "auto" else ()), "quant.method"]
        free = [name for name in settings if name not in fixed or value_of(config, name) == "auto"]
        return with_settings(config, {name: value_of(self._pack.config, name) for name in free})

    def _fits(self, config: Config) -> bool:
        """Whether a trial may be in the pack that is fed now, which is made for the first one."""
        if self._pack is None:
            self._make_pack(config)
            return True
        if self._pack.closed:
            return False
        try:
            check_beside(config, first=self._pack.config)
        except UserError:
            return False
        return True

    def _make_pack(self, config: Config) -> None:
        name = f"{self._index}" if self._packs == 0 else f"{self._index}_{self._packs}"
        self._packs += 1
        folder = self._sweep.folder / PACKS / name
        planned = packing_beside(self._sweep, config, self._sizes)
        self.slots = planned.trials
        self._pack = PackFolder(
            folder,
            self._sweep.folder / LOGS / f"pack_{name}.log",
            dataclasses.replace(config, run_dir=str(folder)),
            slots=self.slots,
            verdicts=self._sweep.settings.pruner != "none",
        )
        self._pack.keep_plan(planned.plan.as_json())

    def _prepare(self) -> None:
        """Go on with the preparation of trials' data, one after the other: most share it."""
        if self._preparing is not None:
            code = self._preparing.process.poll()
            if code is None:
                return
            self._prepare_ended(self._preparing, code)
            self._preparing = None
        while self._to_prepare and self._preparing is None:
            trial = self._trials[self._to_prepare.pop(0)]
            run_dir, key = trial.asked.run_dir, _data_of(trial.config)
            if not is_prepared(run_dir) and key in self._prepared:
                shutil.copyfile(self._prepared[key], run_dir / DATA_NAME)
            if is_prepared(run_dir):
                self._put(trial)
            else:
                self._preparing = _Preparation.of(trial.asked, trial_log(self._sweep, trial.asked.number))

    def _prepare_ended(self, preparing: _Preparation, code: int) -> None:
        trial = self._trials[preparing.number]
        if code == DONE and not self._stops:
            self._put(trial)
        elif self._stops:
            self._end(preparing.number, SAVED)
        else:
            reason = last_error(preparing.log, preparing.log_start) or f"its preparation ended with code {code}"
            self._end(preparing.number, FAILED, reason=reason, is_refused=code == BAD_INPUT)
            forget_run(trial.asked.run_dir)

    def _put(self, trial: _Trial) -> None:
        """Into the pack, whose workers start with its first trial."""
        assert self._pack is not None, "it was made for the first trial that it fits"
        run_dir = trial.asked.run_dir
        self._prepared.setdefault(_data_of(trial.config), run_dir / DATA_NAME)
        shutil.copyfile(self._pack.folder / PLAN_NAME, run_dir / PLAN_NAME)
        self._pack.put(trial.asked.number, run_dir)
        if not self._pack.was_started:
            self._pack.start(self._pack.slots)

    def _after(self, pack: PackFolder, code: int) -> None:
        """The pack's process has ended, and what it wrote of its trials was read."""
        left = pack.inside
        if self._stops or code == STOPPED:
            for number in left:
                self._end(number, SAVED)
            if not self._stops:
                # Whoever takes the machine away (SLURM, systemd) tells the processes on it, and not always this one.
                os.kill(os.getpid(), signal.SIGTERM)
        elif code == BAD_INPUT:
            for number in left:
                self._end(number, FAILED, reason=pack.why(code), is_refused=True)
        elif left:
            self._again(pack, pack.why(code))
            return
        self._next_pack()

    def _next_pack(self) -> None:
        """Make the pack after this one, of those that came when this one had ended or never fitted into it."""
        self._pack = None
        again, self._waiting, self._to_prepare = [*self._to_prepare, *self._waiting], [], []
        for number in again:
            fits = self._fits(self._trials[number].config)
            (self._to_prepare if fits else self._waiting).append(number)

    def _again(self, pack: PackFolder, reason: str) -> None:
        """Start a pack that has died, with fewer trials at once; without the one that was alone in it."""
        if pack.slots > 1:
            slots = max(1, min(pack.slots, len(pack.inside)) // 2)
            say(f"the pack of {len(pack.inside)} trials died ({reason}); going on with {slots} at once")
        else:
            for number in pack.given:
                pack.fail(number, reason)
            for ended in pack.outcomes():
                self._end(ended.number, ended.state, ended)
            slots = self.slots
            if not pack.inside and not self._to_prepare:
                self._next_pack()
                return
        pack.start(slots)

    def _end(
        self,
        number: int,
        state: str,
        ended: Ended | None = None,
        *,
        reason: str | None = None,
        is_refused: bool = False,
    ) -> None:
        """Note the outcome of a trial, and let go of its folder."""
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


@dataclass(frozen=True, slots=True)
class _Preparation:
    """The process that tokenizes the data of a trial."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int

    @classmethod
    def of(cls, trial: Asked, log: Path) -> _Preparation:
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "distlora_launcher.launch.bound", "distlora.data", str(trial.run_dir)]
        with log.open("ab") as file:
            start = file.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
        return cls(trial.number, process, log, start)


def _data_of(config: Config) -> str:
    """What a run's data depends on."""
    return repr((config.model, config.data, config.train.seed, config.train.objective))
