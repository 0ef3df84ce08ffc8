"""Train trials in the slots of one model: they enter and leave between steps, each with a run folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.checkpoint.saver import SaveError
from distlora.config import Config, UserError
from distlora.config.file import load_config, settings_by_name
from distlora.loading.load_base import Loaded
from distlora.model.adapters import slot_name
from distlora.model.build import CausalLM, put_trial, remove_trial
from distlora.parallel import Backend, watch
from distlora.parallel.stop_and_save import Control
from distlora.run_folder import error_file
from distlora.run_folder.sweep import COMPLETE, FAILED, PRUNED
from distlora.system.stop_signals import Stopped
from distlora.training.loop import Trainer
from distlora.training.metrics import describe_steps, summarize
from distlora.training.multi_trial.inbox import GroupSettings, Inbox, pause, together
from distlora.training.multi_trial.protocol import check_beside, check_trial
from distlora.training.open_run import OpenRun, open_data, open_run, record_stop, trial_of
from distlora.training.optimizers import build_optimizer
from distlora.training.publish import restore
from distlora.training.trial import NonFiniteError, Trial


@dataclass(slots=True, eq=False)
class SlotTrial:
    """Trial in a slot, and the resources to close."""

    number: int
    slot: int
    run: OpenRun
    trained: dict[str, nn.Parameter]
    """Trained parameters by their names in a run alone."""
    trial: Trial
    closing: contextlib.ExitStack
    began: float
    pruned_at: int | None = None

    @property
    def has_ended(self) -> bool:
        """Return True if the trial was pruned or has ended."""
        return self.pruned_at is not None or self.trial.has_ended


class MultiTrialTrainer(Trainer):
    """Trainer that takes trials from an inbox and runs a step of every trial in a slot at a time."""

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        control: Control,
        *,
        inbox: Inbox,
        settings: GroupSettings,
        shared: Mapping[str, Any],
        loaded: Loaded,
        base: CheckpointFiles,
    ) -> None:
        """Start without trials. `shared`: the shared settings by name. `loaded`: how `base` was read."""
        super().__init__(model, backend, control)
        self._inbox, self._settings, self._shared, self._loaded = inbox, settings, shared, loaded
        self._base = base
        self._in_slots: dict[Trial, SlotTrial] = {}
        self._none_left = False
        """True if the inbox is closed and all its trials were handed out."""

    def run(self) -> None:
        """Train until the inbox is closed and all trials have an outcome.

        Raises Stopped once every trial in a slot is saved.
        """
        self.control.saved()
        try:
            while self._fill() or self._in_slots:
                if self._in_slots:
                    self.advance()
                    self._end_trials()
                else:
                    self.control.boundary(None, "waiting for a trial", long=True)
                    pause()
        except Stopped as stop:
            self._save_all(stop.signum)
            raise
        except BaseException as error:
            with contextlib.ExitStack() as closing:
                for entry in self._in_slots.values():
                    closing.push(entry.closing)
                raise error

    def _fill(self) -> bool:
        """Put trials into the free slots. Return whether more may come."""
        while not self._none_left and len(self._in_slots) < self._settings.slots:
            is_closed = self._inbox.is_closed()
            entered: list[Trial] = []
            while len(self._in_slots) < self._settings.slots:
                if (number := self._inbox.next()) is None:
                    self._none_left = is_closed
                    break
                if (trial := self._enter(number)) is not None:
                    entered.append(trial)
            if entered:
                self.begin(entered)
                self._recall(entered)
            self._end_trials()  # A trial that resumes from its last step has no steps left.
            if not entered:
                break
        return not self._none_left

    def _enter(self, number: int) -> Trial | None:
        """Put a trial into a free slot; return None, after writing the outcome, if that is not possible."""
        self._log(self.trials)
        watch.at(None, f"trial {number} enters", long=True)
        self._write_slots(number)
        began, run_dir = time.monotonic(), None
        try:
            run_dir = self._inbox.run_dir(number)
            entry = self._start_trial(number, run_dir, began)
        except UserError as error:
            if run_dir is not None:
                self._report_failure(run_dir, error)
            self._inbox.end(number, FAILED, reason=str(error), step=0, seconds=time.monotonic() - began)
            self._write_slots()
            print(f"trial {number} cannot start: {error}", flush=True)
            return None
        self._in_slots[entry.trial] = entry
        self.trials.append(entry.trial)
        return entry.trial

    def _start_trial(self, number: int, run_dir: Path, began: float) -> SlotTrial:
        """Start a trial. Raises UserError, on every rank, if some rank cannot read what it needs."""
        ranks = self.backend.ranks
        config = together(lambda: self._read(run_dir), ranks)
        run = together(lambda: open_run(run_dir, config, ranks, self._base), ranks)
        taken = {entry.slot for entry in self._in_slots.values()}
        slot = next(slot for slot in range(self._settings.slots) if slot not in taken)
        adapter, seed = slot_name(slot), config.train.seed
        with contextlib.ExitStack() as closing:
            reporter = together(lambda: run.reporter(ranks, label=f"trial {number}: "), ranks)
            closing.enter_context(reporter)
            for line in run.notes:
                reporter.event(line)
            trained = together(
                lambda: put_trial(self.model, slot, config.adapter, seed=seed, device=ranks.device), ranks
            )
            closing.callback(remove_trial, self.model, slot)
            gradients = self.backend.reduce_gradients_of(trained.values(), config.parallel.bucket_mb)
            closing.callback(self.backend.release_gradients, gradients)
            optimizer = build_optimizer(self.backend.updated(trained), config.optim)
            if (newest := run.newest) is not None:
                together(lambda: restore(newest, self.model, optimizer, trained, self.backend, adapter), ranks)
                reporter.event(f"continuing from {newest.name}")
            self.backend.compare_trained(self.model)
            reporter.event(f"slot {slot}, {sum(p.numel() for p in trained.values()):,} trained parameters")
            describe_steps(reporter, run.loader, run.total_steps)
            trial, saver = trial_of(
                run,
                self.model,
                self.backend,
                reporter,
                gradients=gradients,
                optimizer=optimizer,
                trained=trained,
                slot=slot,
            )
            closing.enter_context(saver)
            resources = closing.pop_all()
        return SlotTrial(number, slot, run, trained, trial, resources, began)

    def _read(self, run_dir: Path) -> Config:
        """Read the trial's settings and check that its files are readable, before other ranks wait for this one."""
        config = load_config(run_dir)
        check_trial(config)
        check_beside(settings_by_name(config), first=self._shared)
        open_data(run_dir, config.train, self.backend.ranks)
        return config

    def _do(self, trial: Trial, action: Callable[[], None]) -> None:
        """End a trial whose loss is not finite, or that cannot be saved; the others continue."""
        try:
            action()
        except (NonFiniteError, SaveError) as error:
            trial.failure = error

    def _judge(self, trials: Sequence[Trial]) -> None:
        """Wait for the verdicts on evaluated trials that would continue."""
        waiting = [trial for trial in trials if self._settings.verdicts and trial.done > 0 and not trial.has_ended]
        while waiting:
            for trial in list(waiting):
                entry = self._in_slots[trial]
                if (prunes := self._inbox.prunes(entry.number, trial.done)) is not None:
                    waiting.remove(trial)
                    if prunes:
                        entry.pruned_at = trial.done
            if waiting:
                self.control.boundary(waiting[0].done, "waiting for a verdict", long=True)
                pause()

    def _recall(self, trials: Sequence[Trial]) -> None:
        """Apply verdicts on the evaluations of resumed trials that an earlier start did not read."""
        for trial in trials:
            entry, is_evaluated = self._in_slots[trial], 0 < trial.first_step in trial.progress.evaluations
            if self._settings.verdicts and is_evaluated and not trial.has_ended:
                entry.pruned_at = trial.done if self._inbox.prunes(entry.number, trial.done) else None

    def _end_trials(self) -> None:
        """Free the slots of trials that have ended."""
        while ended := [entry for entry in self._in_slots.values() if entry.has_ended]:
            self._log(self.trials)
            for entry in ended:
                self._end(entry)

    def _end(self, entry: SlotTrial) -> None:
        watch.at(None, f"trial {entry.number} leaves", long=True)
        trial = entry.trial
        if trial.failure is None and entry.pruned_at is not None:
            self._do(trial, lambda: trial.hooks.save_last(trial.progress))
        state, reason = COMPLETE, None
        if trial.failure is not None:
            state, reason = FAILED, str(trial.failure)
            self._report_failure(entry.run.folder, trial.failure)
            trial.reporter.event(f"failed: {reason}")
        elif entry.pruned_at is not None:
            state, reason = PRUNED, f"pruned by its held-out loss after step {entry.pruned_at}"
            trial.reporter.event(reason)
        else:
            summarize(trial, self.model, self._loaded, entry.run.config.adapter, entry.trained)
            entry.run.publish(self.model, self.backend, trial.reporter, slot_name(entry.slot))
        self._leave(entry, trial.failure)
        seconds = time.monotonic() - entry.began
        self._inbox.end(entry.number, state, reason=reason, step=trial.progress.step, seconds=seconds)

    def _leave(self, entry: SlotTrial, error: BaseException | None) -> None:
        del self._in_slots[entry.trial]
        self.trials.remove(entry.trial)
        self._write_slots()
        entry.closing.__exit__(None if error is None else type(error), error, None)

    def _save_all(self, signum: int) -> None:
        """Save every trial in a slot because of a signal. Raises SaveError, after all, if some could not be saved."""
        unsaved: SaveError | None = None
        self._log(self.trials)
        for entry in list(self._in_slots.values()):
            if entry.trial.failure is not None:
                self._end(entry)
                continue
            try:
                entry.trial.save_whole_steps()
            except SaveError as error:
                unsaved = unsaved or error
                self._leave(entry, error)
            else:
                record_stop(entry.trial.reporter, entry.trial.progress, signum)
                self._leave(entry, Stopped(signum))
        if unsaved is not None:
            raise unsaved

    def _write_slots(self, *entering: int) -> None:
        self._inbox.write_slots([*(entry.number for entry in self._in_slots.values()), *entering])

    def _report_failure(self, run_dir: Path, error: BaseException) -> None:
        """Leave the error for the launcher, as a run alone does."""
        if self.backend.writes:
            (run_dir / "logs").mkdir(exist_ok=True)
            error_file.write(run_dir / "logs" / "rank_0.error.json", error)
