"""Train trials in the slots of one model: they enter and leave between steps, each with a run folder.

GROUP's files (protocol.py) are read and written by rank 0 on behalf of all ranks, and all get the same.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.checkpoint.saver import SaveError, noting_stop
from distlora.config import Config, UserError, check_ranks
from distlora.config.file import load_config, settings_by_name
from distlora.config.json_files import Shape, read_object
from distlora.data.loader import open_data
from distlora.loading.load_base import Loaded
from distlora.model.adapters import MOST_SLOTS
from distlora.model.build import CausalLM
from distlora.model.trial_slots import put_trial, remove_trial
from distlora.parallel import Backend, Ranks, from_rank_0, max_over_ranks, watch
from distlora.parallel.watch import Control
from distlora.run_folder import error_file
from distlora.run_folder.sweep import COMPLETE, FAILED, PRUNED
from distlora.system import atomic_io
from distlora.system.exit_codes import DONE, STOPPED
from distlora.system.stop_signals import Stopped
from distlora.training.compile_choice import decide_compile, record
from distlora.training.loop import Passes, Trainer, log, step_figures
from distlora.training.metrics import describe_steps, summarize
from distlora.training.multi_trial.protocol import (
    CLOSED_NAME,
    INBOX,
    OUTCOMES,
    SETTINGS_NAME,
    SLOTS_NAME,
    check_beside,
    check_trial,
    inbox_file,
    outcome_file,
    verdict_file,
)
from distlora.training.multi_trial.stacks import stacks
from distlora.training.open_run import OpenRun, open_run
from distlora.training.optimizers import build_optimizer
from distlora.training.publish import restore
from distlora.training.setup import StartOptions, start_run_model
from distlora.training.start_trial import trial_of
from distlora.training.trial import NonFiniteError, TrainedParts, Trial

LOOK_SECONDS = 0.2
"""Seconds between reads while nothing trains or a verdict is pending."""

_REMEDY = "the launcher writes it; start the sweep again with `distlora resume`"
_ENTRY: Shape = {"number": int, "run_dir": str}
_VERDICT: Shape = {"prune": bool}


def read_settings(folder: Path) -> tuple[int, bool]:
    """Return (trials that train at once, is every evaluation followed by a verdict) of GROUP/pack.json.

    Raises UserError if it is missing.
    """
    path = folder / SETTINGS_NAME
    values = read_object(path, _REMEDY, {"slots": int, "verdicts?": bool})
    if not 1 <= values["slots"] <= MOST_SLOTS:
        raise UserError(
            f"{path}: slots={values['slots']} is not a supported number of trials; set sweep.packed to 1 to "
            f"{MOST_SLOTS}"
        )
    return values["slots"], values.get("verdicts", False)


class Inbox:
    """Inbox of trials. Every rank makes one and calls it alike; only rank 0 reads and writes."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self._ranks = folder, ranks
        self._taken: set[int] = set()

    def next(self) -> int | None:
        """Return the lowest number without an outcome that was not handed out; None if there is none now."""
        waiting = (
            sorted(_numbers(self.folder / INBOX) - _numbers(self.folder / OUTCOMES) - self._taken)
            if self._reads
            else []
        )
        number = from_rank_0(waiting[0] if waiting else -1, self._ranks)
        if number < 0:
            return None
        self._taken.add(number)
        return number

    def run_dir(self, number: int) -> Path:
        """Return the run folder of a trial that was handed out."""

        def read() -> Path:  # On every rank: the file was whole before rank 0 saw it.
            return Path(read_object(inbox_file(self.folder, number), _REMEDY, _ENTRY)["run_dir"])

        return together(read, self._ranks)

    def is_closed(self) -> bool:
        """Return whether no more trials will come. Call it before `next`, which then sees all earlier trials."""
        return bool(from_rank_0(int(self._reads and (self.folder / CLOSED_NAME).exists()), self._ranks))

    def prunes(self, number: int, step: int) -> bool | None:
        """Return the verdict on a trial's evaluation at `step`; None while there is none."""
        verdict = -1
        if self._reads and (path := verdict_file(self.folder, number, step)).exists():
            verdict = int(read_object(path, _REMEDY, _VERDICT)["prune"])
        verdict = from_rank_0(verdict, self._ranks)
        return None if verdict < 0 else bool(verdict)

    def end(self, number: int, state: str, *, reason: str | None, step: int, seconds: float) -> None:
        """Write a trial's outcome."""
        if self._reads:
            path = outcome_file(self.folder, number)
            path.parent.mkdir(exist_ok=True)
            atomic_io.write_json(path, {"state": state, "reason": reason, "step": step, "seconds": round(seconds, 3)})

    @property
    def _reads(self) -> bool:
        return self._ranks.rank == 0


def _numbers(folder: Path) -> set[int]:
    if not folder.is_dir():
        return set()
    return {int(path.stem) for path in folder.iterdir() if path.suffix == ".json" and path.stem.isdecimal()}


Made = TypeVar("Made")


def together(action: Callable[[], Made], ranks: Ranks) -> Made:
    """Return the result of `action`, which must not communicate after a possible failure.

    Raises UserError, on every rank, if it failed on some.
    """
    made: list[Made] = []
    error: UserError | None = None
    try:
        made.append(action())
    except UserError as failure:
        error = failure
    failed = max_over_ranks(-1 if error is None else ranks.rank, ranks)
    if error is None and failed >= 0:
        error = UserError(f"rank {failed} failed; see its logs/rank_{failed}.log")
    if error is not None:
        raise error
    return made[0]


@dataclass(slots=True, eq=False)
class SlotTrial:
    """Trial in a slot, and the resources to close."""

    number: int
    run: OpenRun
    trainer: Trainer
    closing: contextlib.ExitStack
    began: float
    pruned_at: int | None = None
    failure: NonFiniteError | SaveError | None = None
    """Error that ended this trial but not the others."""

    @property
    def trial(self) -> Trial:
        """Its rows, metrics and progress."""
        return self.trainer.trial

    @property
    def has_ended(self) -> bool:
        """Return True if the trial was pruned, failed or has ended."""
        return self.pruned_at is not None or self.failure is not None or self.trial.has_ended


class MultiTrialTrainer(Passes):
    """Trainer that takes trials from an inbox and runs a step of every trial in a slot at a time."""

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        control: Control,
        *,
        inbox: Inbox,
        slots: int,
        verdicts: bool,
        shared: Mapping[str, Any],
        loaded: Loaded,
        base: CheckpointFiles,
        compiles: bool,
    ) -> None:
        """Start without trials. `shared`: the shared settings by name. `loaded`: how `base` was read.

        `compiles`: the decided train.compile.
        """
        super().__init__(model, backend, control, one_adapter=False)
        self._inbox, self._slots, self._verdicts, self._shared, self._loaded = inbox, slots, verdicts, shared, loaded
        self._base, self._compiles = base, compiles
        self._in_slots: list[SlotTrial] = []
        """Trials that train, in the order of their gradients in the backend."""
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
                    self._train_step()
                    self._follow(self._in_slots)
                    self._end_trials()
                else:
                    self.control.boundary(None, "waiting for a trial", long=True)
                    time.sleep(LOOK_SECONDS)
        except Stopped as stop:
            self._save_all(stop.signum)
            raise
        except BaseException as error:
            with contextlib.ExitStack() as closing:
                for entry in self._in_slots:
                    closing.push(entry.closing)
                raise error

    def _fill(self) -> bool:
        """Put trials into the free slots. Return whether more may come."""
        while not self._none_left and len(self._in_slots) < self._slots:
            is_closed = self._inbox.is_closed()
            entered: list[SlotTrial] = []
            while len(self._in_slots) < self._slots:
                if (number := self._inbox.next()) is None:
                    self._none_left = is_closed
                    break
                if (entry := self._enter(number)) is not None:
                    entered.append(entry)
            if entered:
                self.is_cold = True
                self._follow(entered)
            self._end_trials()  # A trial that resumes from its last step has no steps left.
            if not entered:
                break
        return not self._none_left

    def _enter(self, number: int) -> SlotTrial | None:
        """Put a trial into a free slot; return None, after writing the outcome, if that is not possible."""
        self._log(self._in_slots)
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
        self._in_slots.append(entry)
        return entry

    def _start_trial(self, number: int, run_dir: Path, began: float) -> SlotTrial:
        """Start a trial. Raises UserError, on every rank, if some rank cannot read what it needs."""
        ranks = self.backend.ranks
        config = together(lambda: self._read(run_dir), ranks)
        decided = self._compiles if config.train.compile == "auto" else None
        together(lambda: record(run_dir, ranks, compiles=decided), ranks)
        if decided is not None:
            config = config.with_settings({"train.compile": decided})
        taken = {entry.run.slot for entry in self._in_slots}
        slot = next(slot for slot in range(self._slots) if slot not in taken)
        run, seed = together(lambda: open_run(run_dir, config, ranks, self._base, slot=slot), ranks), config.train.seed
        with contextlib.ExitStack() as closing:
            reporter = together(lambda: run.reporter(ranks, label=f"trial {number}: "), ranks)
            closing.enter_context(reporter)
            closing.enter_context(noting_stop(run.folder, ranks, reporter.event))
            for line in run.notes:
                reporter.event(line)
            parameters = together(
                lambda: put_trial(self.model, slot, config.adapter, seed=seed, device=ranks.device), ranks
            )
            closing.callback(remove_trial, self.model, slot)
            gradients = self.backend.reduce_gradients_of(parameters.values(), config.parallel.bucket_mb)
            closing.callback(self.backend.release_gradients, gradients)
            optimizer = build_optimizer(self.backend.updated(parameters), config.optim)
            if (newest := run.newest) is not None:
                together(lambda: restore(newest, self.model, optimizer, parameters, self.backend, run.adapter), ranks)
                reporter.event(f"continuing from {newest.name}")
            self.backend.compare_trained(self.model)
            reporter.event(f"slot {slot}, {sum(p.numel() for p in parameters.values()):,} trained parameters")
            describe_steps(reporter, run)
            trained = TrainedParts(parameters, gradients, optimizer)
            trial, saver = trial_of(run, self.model, self.backend, reporter, trained)
            closing.enter_context(saver)
            resources = closing.pop_all()
        trainer = Trainer(self.model, self.backend, self.control, trial, shares_steps=True)
        return SlotTrial(number, run, trainer, resources, began)

    def _read(self, run_dir: Path) -> Config:
        """Read the trial's settings and check that its files are readable, before other ranks wait for this one."""
        config = load_config(run_dir)
        check_trial(config)
        check_beside(settings_by_name(config), first=self._shared)
        open_data(run_dir, config.train, self.backend.ranks)
        return config

    def _train_step(self) -> None:
        """Run one step of every trial: their rows are stacked, and each has its own loss, gradients and update."""
        began, trials = time.monotonic(), [entry.trial for entry in self._in_slots]
        step, first = trials[0].done + 1, trials[0]
        watch.at(step, "reading rows", long=self.is_cold)
        batches = [trial.loader.batch(trial.done) for trial in trials]
        units = [trial.objective.units(batch) for trial, batch in zip(trials, batches, strict=True)]
        self.backend.traffic.take()  # Drop what was counted between steps.
        self.backend.zero_gradients()
        whole = first.train.accumulate == "block"
        if whole:  # As one batch, which the layers slice.
            self.model.set_num_micro(max(len(batch.micro_batches) for batch in batches))
        parts = stacks(batches, [trial.done for trial in trials], whole=whole)
        steps = [(part.batch, part.steps) for part in parts]
        losses = self.backward(first.objective, steps, lambda index, rows: parts[index].mean_losses(rows, units), step)
        watch.at(step, "update", long=self.is_cold)
        for trial in trials:
            trial.update()
        self.is_cold = False
        rows: list[list[Tensor]] = [[] for _ in trials]
        for part, of_part in zip(parts, losses, strict=True):
            for owner, row_losses in part.split(of_part.rows):
                rows[owner].append(row_losses)
        moved, passes = self.backend.traffic.take(), 2 * len(parts)
        for trial, batch, own in zip(trials, batches, rows, strict=True):
            trial.note(step_figures(trial, batch, own, losses, began=began, traffic=moved, passes=passes))

    def _follow(self, entries: Sequence[SlotTrial]) -> None:
        """Log, evaluate and save what is due for these trials and not done yet, one after the other."""
        due = {entry: entry.trial.due(self.control) for entry in entries}
        if any(each.evaluating or each.saving or each.is_last for each in due.values()):
            self._log(self._in_slots)  # What takes long counts as the training time of no trial.
        saved = []
        for entry in entries:
            if entry.failure is None:
                try:
                    self._guard(entry, lambda entry=entry: saved.append(entry.trainer.follow(due[entry])))  # type: ignore[misc]
                except Stopped:
                    raise
                except Exception as error:
                    self._save_others(entry, error)
                    raise
        if saved == [True] * len(self._in_slots):
            self.control.saved()
        self._judge(entries)

    def _save_others(self, failed: SlotTrial, error: Exception) -> None:
        """Save the other trials before an error between two steps ends all, unless a save would wait for other ranks.

        A failing evaluation saves its own (`saved_at_failure`).
        """
        if self.backend.ranks.world > 1:
            return
        self._log(self._in_slots)
        for entry in self._in_slots:
            if entry is not failed and entry.failure is None:
                error.add_note(f"(trial {entry.number}, trained beside it: {entry.trial.save_at_failure()})")

    def _log(self, entries: Sequence[SlotTrial]) -> None:
        for entry in entries:
            self._guard(entry, lambda trial=entry.trial: log(trial, self.backend))  # type: ignore[misc]

    @staticmethod
    def _guard(entry: SlotTrial, action: Callable[[], None]) -> None:
        """End a trial whose loss is not finite, or that cannot be saved; the others continue."""
        try:
            action()
        except (NonFiniteError, SaveError) as error:
            entry.failure = error

    def _judge(self, entries: Sequence[SlotTrial]) -> None:
        """Wait for verdicts on evaluations after this step, also of an earlier start, of trials that would go on."""
        evaluated = [entry for entry in entries if 0 < entry.trial.done in entry.trial.progress.evaluations]
        waiting = [entry for entry in evaluated if self._verdicts and not entry.has_ended]
        while waiting:
            for entry in list(waiting):
                if (prunes := self._inbox.prunes(entry.number, entry.trial.done)) is not None:
                    waiting.remove(entry)
                    if prunes:
                        entry.pruned_at = entry.trial.done
            if waiting:
                self.control.boundary(waiting[0].trial.done, "waiting for a verdict", long=True)
                time.sleep(LOOK_SECONDS)

    def _end_trials(self) -> None:
        """Free the slots of trials that have ended."""
        while ended := [entry for entry in self._in_slots if entry.has_ended]:
            self._log(self._in_slots)
            for entry in ended:
                self._end(entry)

    def _end(self, entry: SlotTrial) -> None:
        watch.at(None, f"trial {entry.number} leaves", long=True)
        trial = entry.trial
        if entry.failure is None and entry.pruned_at is not None:
            self._guard(entry, lambda: trial.hooks.save_last(trial.progress))
        state, reason = COMPLETE, None
        if entry.failure is not None:
            state, reason = FAILED, str(entry.failure)
            self._report_failure(entry.run.folder, entry.failure)
            trial.reporter.event(f"failed: {reason}")
        elif entry.pruned_at is not None:
            state, reason = PRUNED, f"pruned by its held-out loss after step {entry.pruned_at}"
            trial.reporter.event(reason)
        else:
            summarize(trial, self.model, self._loaded, entry.run.config.adapter)
            entry.run.publish(self.model, self.backend, trial.reporter)
        self._leave(entry, entry.failure)
        seconds = time.monotonic() - entry.began
        self._inbox.end(entry.number, state, reason=reason, step=trial.progress.step, seconds=seconds)

    def _leave(self, entry: SlotTrial, error: BaseException | None) -> None:
        self._in_slots.remove(entry)
        self._write_slots()
        entry.closing.__exit__(None if error is None else type(error), error, None)

    def _save_all(self, signum: int) -> None:
        """Save every trial in a slot because of a signal. Raises SaveError, after all, if some could not be saved."""
        unsaved: SaveError | None = None
        self._log(self._in_slots)
        for entry in list(self._in_slots):
            if entry.failure is not None:
                self._end(entry)
                continue
            try:
                entry.trial.save_whole_steps()
            except SaveError as error:
                unsaved = unsaved or error
                self._leave(entry, error)
            else:
                self._leave(entry, Stopped(signum))
        if unsaved is not None:
            raise unsaved

    def _write_slots(self, *entering: int) -> None:
        """Write the numbers of the trials in slots, in the order of entering."""
        if self.backend.writes:
            numbers = [*(entry.number for entry in self._in_slots), *entering]
            atomic_io.write_json(self._inbox.folder / SLOTS_NAME, {"numbers": numbers})

    def _report_failure(self, run_dir: Path, error: BaseException) -> None:
        """Leave the error for the launcher, as a run alone does."""
        if self.backend.writes:
            (run_dir / "logs").mkdir(exist_ok=True)
            error_file.write(run_dir / "logs" / "rank_0.error.json", error)


def run_group(folder: Path, ranks: Ranks) -> int:
    """Train the trials of GROUP on this rank, until the inbox is closed and empty or all ranks agreed to stop.

    Returns the exit code: 0, or 75 after a stop.
    """
    config = load_config(folder)
    check_ranks(config, ranks.world)
    check_trial(config)
    control = Control(ranks.control, save_minutes=config.train.save_minutes)
    code = DONE
    try:
        slots, verdicts = read_settings(folder)
        control.boundary(None, "reading the multi-trial settings", long=True)
        _say(f"training up to {slots:,} trials together; reading {config.model.path}")
        base = CheckpointFiles(config.model.path)
        shared = settings_by_name(config)
        config, why_not_compiled = decide_compile(config, ranks, base=base, folder=folder)
        # Memory that depends on the rows of a micro-batch is reserved for all slots.
        rows = {name: slots * getattr(config.train, name) for name in ("micro_batch", "global_batch")}
        model, backend, loaded = start_run_model(
            replace(config, train=replace(config.train, **rows)),
            ranks,
            StartOptions(log=_say, boundary=control.boundary, for_slots=True),
            base=base,
        )
        for note in [*model.notes, *why_not_compiled]:
            _say(note)
        MultiTrialTrainer(
            model,
            backend,
            control,
            inbox=Inbox(folder, ranks),
            slots=slots,
            verdicts=verdicts,
            shared=shared,
            loaded=loaded,
            base=base,
            compiles=config.train.compile is True,
        ).run()
        backend.barrier()
    except Stopped:
        code = STOPPED
    control.end()
    return code


def _say(text: str) -> None:
    """Print a line about the multi-trial run. Rank 0's lines are shown; the others' go to their logs."""
    print(text, flush=True)
