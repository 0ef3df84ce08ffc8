"""Trials in the slots of one model: they enter and leave between steps, each with its own run folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from distlora import error_file
from distlora.adapters import DEFAULT_ADAPTER, slot_name
from distlora.config import Config, UserError
from distlora.config_file import load_config
from distlora.figures import describe_steps, summarize
from distlora.loading.weights import Loaded
from distlora.model import CausalLM
from distlora.optim import build_optimizer
from distlora.packed.inbox import COMPLETE, FAILED, PRUNED, Inbox, PackSettings, pause
from distlora.packed.settings import check_beside, check_trial
from distlora.parallel import Backend
from distlora.parallel.control import Control
from distlora.reporting import Reporter
from distlora.results import restore
from distlora.runs import OpenRun, open_run, record_stop, trial_of
from distlora.slots import put_trial, remove_trial
from distlora.stopping import Stopped
from distlora.trainer import Trainer
from distlora.trial import NonFiniteError, Trial


@dataclass(slots=True, eq=False)
class Seat:
    """A trial that is in a slot, and what of it has to be closed."""

    number: int
    slot: int
    run: OpenRun
    trained: dict[str, nn.Parameter]
    """By the names of a run alone."""
    trial: Trial
    reporter: Reporter
    closing: contextlib.ExitStack
    began: float
    pruned_at: int | None = None
    failure: NonFiniteError | None = None

    @property
    def is_over(self) -> bool:
        return self.pruned_at is not None or self.failure is not None or self.trial.has_ended


class Pack(Trainer):
    """Takes trials from an inbox and trains those that are in slots, a step of each at a time."""

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        control: Control,
        *,
        inbox: Inbox,
        settings: PackSettings,
        config: Config,
        loaded: Loaded,
    ) -> None:
        """`config` is what all trials share; `loaded` says how the base was."""
        super().__init__(model, backend, control)
        self._inbox, self._settings, self._config, self._loaded = inbox, settings, config, loaded
        self._seats: dict[Trial, Seat] = {}

    def run(self) -> None:
        """Until the inbox is closed and all that was in it has an outcome. Raises Stopped once every trial in a slot is
        saved."""
        self.control.saved()
        try:
            while self._fill() or self._seats:
                if self._seats:
                    self.advance()
                    self._let_go()
                else:
                    self.control.boundary(None, "waiting for a trial", long=True)
                    pause()
        except Stopped as stop:
            self._save_all(stop.signum)
            raise
        except BaseException as error:
            for seat in self._seats.values():
                seat.closing.__exit__(type(error), error, error.__traceback__)
            raise

    def _fill(self) -> bool:
        """Let trials into the free slots. Returns whether more may come."""
        while True:
            entered = []
            is_closed = self._inbox.is_closed()
            while len(self._seats) < self._settings.slots and (number := self._inbox.next()) is not None:
                entered += [] if (trial := self._enter(number)) is None else [trial]
            if entered:
                self.begin(entered)
                self._recall(entered)
                self._let_go()  # What goes on from its last step has nothing left to do.
            if len(self._seats) == self._settings.slots or not entered:
                return not is_closed

    def _enter(self, number: int) -> Trial | None:
        """Take a trial into a free slot; None where that cannot be, which is its outcome then."""
        began, run_dir = time.monotonic(), self._inbox.run_dir(number)
        slot = next(slot for slot in range(self._settings.slots) if slot not in self._slots())
        try:
            seat = self._seated(number, slot, run_dir, began)
        except UserError as error:
            self._report_failure(run_dir, error)
            self._inbox.end(number, FAILED, reason=str(error), step=0, seconds=time.monotonic() - began)
            print(f"trial {number} cannot start: {error}", flush=True)
            return None
        self._seats[seat.trial] = seat
        self.trials.append(seat.trial)
        return seat.trial

    def _slots(self) -> set[int]:
        return {seat.slot for seat in self._seats.values()}

    def _seated(self, number: int, slot: int, run_dir: Path, began: float) -> Seat:
        config = load_config(run_dir)
        check_trial(config)
        check_beside(config, first=self._config)
        run = open_run(run_dir, config, self.backend.ranks)
        adapter, device = slot_name(slot), self.backend.ranks.device
        placed = put_trial(self.model, slot, config.adapter, seed=config.train.seed, device=device)
        trained = {name.replace(f".{adapter}.", f".{DEFAULT_ADAPTER}."): p for name, p in placed.items()}
        gradients = self.backend.reduce_gradients_of(trained.values(), config.parallel.bucket_mb)
        with contextlib.ExitStack() as closing:
            closing.callback(remove_trial, self.model, slot)
            closing.callback(self.backend.release_gradients, gradients)
            reporter = closing.enter_context(run.reporter(self.backend.ranks, label=f"trial {number}: "))
            for line in run.notes:
                reporter.event(line)
            optimizer = build_optimizer(self.backend.updated(trained), config.optim)
            if run.newest is not None:
                restore(run.newest, self.model, optimizer, trained, self.backend, adapter)
                reporter.event(f"continuing from {run.newest.name}")
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
                adapter=adapter,
                slot=slot,
            )
            closing.enter_context(saver)
            kept = closing.pop_all()
        return Seat(number, slot, run, trained, trial, reporter, kept, began)

    def _log(self, trial: Trial) -> bool:
        """One that was not finite has ended; the others go on."""
        try:
            trial.log()
        except NonFiniteError as error:
            self._seats[trial].failure = error
            return False
        return True

    def _judge(self, trials: Sequence[Trial]) -> None:
        """After these were evaluated: wait for the verdicts on those that would go on."""
        waiting = [trial for trial in trials if self._settings.verdicts and trial.done > 0 and not trial.has_ended]
        while waiting:
            for trial in list(waiting):
                seat = self._seats[trial]
                if (prunes := self._inbox.prunes(seat.number, trial.done)) is not None:
                    waiting.remove(trial)
                    if prunes:
                        seat.pruned_at = trial.done
            if waiting:
                self.control.boundary(waiting[0].done, "waiting for a verdict", long=True)
                pause()

    def _recall(self, trials: Sequence[Trial]) -> None:
        """Of what goes on from a checkpoint: a verdict on its evaluation that the pack did not live to read."""
        for trial in trials:
            seat, is_evaluated = self._seats[trial], 0 < trial.first_step in trial.progress.evaluations
            if self._settings.verdicts and is_evaluated and not trial.has_ended:
                seat.pruned_at = trial.done if self._inbox.prunes(seat.number, trial.done) else None

    def _let_go(self) -> None:
        """Free the slots of those that have ended."""
        for seat in [seat for seat in self._seats.values() if seat.is_over]:
            self._end(seat)

    def _end(self, seat: Seat) -> None:
        state, reason = COMPLETE, None
        if seat.failure is not None:
            state, reason = FAILED, str(seat.failure)
            self._report_failure(seat.run.folder, seat.failure)
            seat.reporter.event(f"failed: {reason}")
        elif seat.pruned_at is not None:
            state, reason = PRUNED, f"pruned by its held-out loss after step {seat.pruned_at}"
            seat.trial.hooks.save_last(seat.trial.progress)
            seat.reporter.event(reason)
        else:
            summarize(seat.trial, self.model, self._loaded, seat.trained)
            seat.run.publish(self.model, self.backend, seat.reporter, slot_name(seat.slot))
        self._leave(seat, seat.failure)
        seconds = time.monotonic() - seat.began
        self._inbox.end(seat.number, state, reason=reason, step=seat.trial.progress.step, seconds=seconds)

    def _leave(self, seat: Seat, error: BaseException | None) -> None:
        del self._seats[seat.trial]
        self.trials.remove(seat.trial)
        seat.closing.__exit__(None if error is None else type(error), error, None)

    def _save_all(self, signum: int) -> None:
        """Asked to stop: save every trial in a slot, which a start of the pack goes on with."""
        for seat in list(self._seats.values()):
            try:
                seat.trial.save_whole_steps()
            except NonFiniteError as error:
                seat.failure = error
                self._end(seat)
                continue
            record_stop(seat.reporter, seat.trial.progress, signum)
            self._leave(seat, Stopped(signum))

    def _report_failure(self, run_dir: Path, error: BaseException) -> None:
        """As a run alone leaves its error for the launcher."""
        if self.backend.writes:
            (run_dir / "logs").mkdir(exist_ok=True)
            error_file.write(run_dir / "logs" / "rank_0.error.json", error)
