"""Run the training loop, without knowledge of the backend and without host syncs within a step.

Exceptions that read from the device in a step: 8-bit optimizers and Muon (optimizers.py), DeepSpeed
(parallel/README.md), and the first forward, with train.verify also the one after each save, which checks the base
(parallel/integrity.py).

A step: loss = sum over the units (target tokens, or pairs of answers) of all ranks and micro-batches / their number,
which the loader knows in advance; backward; one sum over ranks; clip; update. Trials that share a base take the step
together: their rows are stacked, each row uses its trial's adapter, and each trial has its own loss, gradients and
update. trial.py has the rest of a run (metrics, what is due, early stopping).
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distlora.config.objectives import means_of
from distlora.data.loader import MicroBatch, Share, Stack, StepBatch, stacks
from distlora.model.adapters import AdaptedLinear, AdapterCopies
from distlora.model.build import CausalLM
from distlora.parallel import Backend, watch
from distlora.parallel.stop_and_save import Control
from distlora.system.progress import still
from distlora.system.stop_signals import Stopped
from distlora.training.objectives import Losses, Objective
from distlora.training.trial import StepFigures, Trial


class Trainer:
    """Steps of the trials that share a model, from each trial's present step."""

    def __init__(self, model: CausalLM, backend: Backend, control: Control, trials: Sequence[Trial] = ()) -> None:
        self.model, self.backend, self.control = model, backend, control
        self.trials = list(trials)
        """Trials that train, in the order of their gradients in the backend."""
        self._is_cold = True
        """True until a step is done: kernels are compiled, memory is allocated, connections are made."""
        copied = trials and backend.ranks.device.type == "cuda"
        self._copies = AdapterCopies([m for m in model.modules() if copied and isinstance(m, AdaptedLinear)])

    def fit(self) -> None:
        """Train the only trial to its end or until early stopping, with evaluations, samples and saves.

        Raises NonFiniteError, and Stopped once the state is saved.
        """
        (trial,) = self.trials
        self.control.saved()  # Start the clock of saves here: loading has trained nothing.
        try:
            self.begin([trial])
            while not trial.has_ended:
                self.advance()
        except Stopped:
            self._log([trial])
            trial.save_whole_steps()
            raise

    def begin(self, trials: Sequence[Trial]) -> None:
        """Do what is due before the first step: the base's evaluation, or what a stop interrupted."""
        self._is_cold = True
        for trial in trials:
            if trial.first_step == 0 and trial.eval_loader is not None:
                trial.reporter.event(
                    f"evaluating {len(trial.eval_loader.rows):,} held-out sequences before the first step"
                )
        self._follow(trials)

    def advance(self) -> None:
        """Run one step of every trial, and what is due after it."""
        self._measure_or_train()
        if (settled := self.backend.settle_residency()) is not None:
            self.trials[0].reporter.event(settled)
        self._follow(self.trials)

    def _follow(self, trials: Sequence[Trial]) -> None:
        """Log, evaluate, save and sample if it is due for these trials and not done yet."""
        due = {trial: trial.due(self.control) for trial in trials}
        # What does not count as training time.
        if any(each.evaluating or each.saving or each.sampling or each.is_last for each in due.values()):
            self._log(self.trials)  # So that the steps' time does not include it.
        else:
            self._log([trial for trial in trials if due[trial].logging])
        evaluating = [trial for trial in trials if due[trial].evaluating and trial.failure is None]
        if evaluating:
            with still("evaluating", evaluating[0].reporter.event):
                self._evaluate_or_save(evaluating)
        for trial in evaluating:
            trial.keep_best()
        self._judge(evaluating)
        saving = [
            trial
            for trial in trials
            if trial.failure is None and (trial.has_ended or (due[trial].saving and trial.may_save()))
        ]
        for trial in saving:
            self._do(trial, trial.save)
        if len(saving) == len(self.trials):
            self.control.saved()
        for trial in trials:
            if due[trial].sampling and trial.hooks.sample is not None:
                # After the save, so that running out of memory in a sample loses no state.
                self.control.boundary(trial.done, "sampling", long=True)
                trial.hooks.sample(trial.done)

    def _log(self, trials: Sequence[Trial]) -> None:
        """Read the metrics of all unlogged steps of these trials at once: the only host sync of training."""
        unread = {trial: figures for trial in trials if (figures := trial.unread()) is not None}
        if not unread:
            return
        watch.at(next(iter(unread)).done, "reading figures")
        sums = self.backend.sum_over_ranks(torch.cat([losses.flatten() for losses, _, _ in unread.values()]))
        maxima = torch.cat([found.flatten() for _, _, found in unread.values()])
        if len(maxima):
            maxima = self.backend.max_over_ranks(maxima)
        values = iter(torch.cat([sums, *(norms for _, norms, _ in unread.values()), maxima]).tolist())
        # In this order: the sums of all trials, their norms, their maxima.
        tables = [[_rows_of(values, each) for each in column] for column in zip(*unread.values(), strict=True)]
        for trial, rows, norms, largest in zip(unread, *tables, strict=True):
            self._do(trial, functools.partial(trial.log, rows, [norm for (norm,) in norms], largest))

    def _do(self, trial: Trial, action: Callable[[], None]) -> None:
        action()

    def _judge(self, trials: Sequence[Trial]) -> None:
        """Judge the trials that were evaluated. Multi-trial training waits for verdicts here."""

    def _measure_or_train(self) -> None:
        measured = next((t for t in self.trials if t.memory is not None and t.memory.measures(t.done)), None)
        if measured is None:
            self._train_step(self.trials)
            return
        assert measured.memory is not None
        if measured.rollouts is not None:  # Sampling is not part of the step that is planned.
            measured.rollouts.sample(measured.done)
        if (device := self.backend.ranks.device).type == "cuda":
            torch.cuda.synchronize(device)  # Do not count the previous steps' remaining work.
        began = time.monotonic()
        with measured.memory.around():
            self._train_step(self.trials)
            watch.at(measured.done, "reading what memory it took", long=True)
        measured.note_measured(began)
        if measured.memory.warning is not None:
            measured.reporter.event(measured.memory.warning)

    def _train_step(self, trials: Sequence[Trial]) -> None:
        began, step = time.monotonic(), trials[0].done + 1
        assert len(trials) == 1 or not trials[0].objective.needs.figures, "whose figures they are is not known"
        watch.at(step, "reading rows", long=self._is_cold)
        shares = [Share(trial.loader.batch(trial.done), trial.slot, trial.done) for trial in trials]
        units = [trial.objective.units(share.batch) for trial, share in zip(trials, shares, strict=True)]
        row_losses: list[list[Tensor]] = [[] for _ in trials]
        figures: list[Tensor] = []
        maxima: list[Tensor] = []
        self.backend.traffic.take()  # Drop what was counted between steps.
        self.backend.zero_gradients()
        whole = self.trials[0].train.accumulate == "block"
        with self._copies.fresh():
            mark = functools.partial(
                self.control.boundary, step, "forward of mismatched answers, batch", long=self._is_cold
            )
            estimates = prepare(
                trials[0].objective, self.model, shares[0], units[0], self.backend, whole=whole, mark=mark
            )
            if whole:  # As one batch, which the layers slice.
                self.model.set_num_micro(max(len(share.batch.micro_batches) for share in shares))
            parts = stacks(shares, whole=whole)
            for index, part in enumerate(parts):
                self.control.boundary(step, "forward of micro-batch", index + 1, long=self._is_cold)
                losses = trials[0].objective.losses(self.model, part.batch, self.backend.ranks.device, part.step)
                figures.append(losses.figures)
                if losses.maxima is not None:
                    maxima.append(losses.maxima)
                for owner, rows in part.split_by_owner(losses.rows):
                    row_losses[owner].append(rows.detach())
                watch.at(step, "backward of micro-batch", index + 1, long=self._is_cold)
                self.backend.backward(*mean_losses(part, losses.rows, units), last=index == len(parts) - 1)
            watch.at(step, "sum of gradients", long=self._is_cold)
            self.backend.finish_gradients()
        watch.at(step, "update", long=self._is_cold)
        for trial in trials:
            trial.update()
        self._is_cold = False
        moved = self.backend.traffic.take()
        for trial, share, own_units, own_losses in zip(trials, shares, units, row_losses, strict=True):
            micro_batches = share.batch.micro_batches
            trial.note(
                StepFigures(
                    # Without the rows that fill up a layer's slices.
                    row_losses=torch.cat(own_losses)[: len(share.batch.rows)],
                    figures=torch.stack(figures).sum(dim=0),
                    units=own_units,
                    tokens=share.batch.global_rows * micro_batches[0].labels.shape[1],
                    flops=trial.flops_of(share.batch),
                    began=began,
                    traffic=moved,
                    passes=2 * len(parts) + estimates,
                    maxima=torch.stack(maxima).amax(dim=0) if maxima else None,
                    known=share.batch.figures,
                )
            )

    def _evaluate_or_save(self, trials: Sequence[Trial]) -> None:
        """Evaluate. If that fails, save what was trained, unless other ranks, which a save needs, may wait in it."""
        try:
            self.evaluate(trials)
        except Stopped:
            raise
        except Exception as error:
            is_alone = self.backend.ranks.world == 1
            for trial in trials:
                became = trial.save_at_failure() if is_alone else "checkpoints of earlier steps are kept"
                error.add_note(f"(in the evaluation after step {trial.done}; {became})")
            raise

    def evaluate(self, trials: Sequence[Trial]) -> None:
        """Compute the mean held-out loss and metrics of each trial over all its held-out units, or of its answers."""
        if (rollouts := trials[0].rollouts) is not None:
            (trial,), step = trials, trials[0].progress.step
            figures, samples, answers = rollouts.evaluate(step)
            if answers is not None:
                figures |= self._means_of(trials, [iter([answers])])[0]
            trial.evaluated(figures)
            trial.reporter.samples(step, samples)
            return
        for documents in (trial.documents for trial in trials if trial.documents is not None):
            documents.begin()
        loaders = [trial.eval_loader for trial in trials if trial.eval_loader is not None]
        batches = [map(loader.batch, range(loader.steps_per_epoch)) for loader in loaders]
        for trial, means in zip(trials, self._means_of(trials, batches), strict=True):
            trial.evaluated(means)

    def _means_of(self, trials: Sequence[Trial], batches: Sequence[Iterator[StepBatch]]) -> list[dict[str, float]]:
        """Return the mean loss and metrics of each trial over its batches, by their names in an evaluation."""
        self.model.set_num_micro(1)
        objective, device, step = trials[0].objective, self.backend.ranks.device, trials[0].done
        num_figures = 1 + len(objective.needs.figures)
        totals = torch.zeros(len(trials), num_figures, dtype=torch.float64, device=device)
        units = [0] * len(trials)
        with torch.no_grad():
            for index, found in enumerate(itertools.zip_longest(*batches)):
                running = [number for number, batch in enumerate(found) if batch is not None]
                shares = [Share(found[number], trials[number].slot, None) for number in running]
                for number, share in zip(running, shares, strict=True):
                    units[number] += objective.units(share.batch)
                own, place = shares[0], f"evaluation, estimates of batch {index + 1}, part"
                mark = functools.partial(self.control.boundary, step, place, long=index == 0)
                prepare(objective, self.model, own, objective.units(own.batch), self.backend, whole=False, mark=mark)
                for part in stacks(shares, whole=False):
                    # The first batch may compile and allocate memory.
                    self.control.boundary(step, "evaluation, batch", index + 1, long=index == 0)
                    losses = objective.losses(self.model, part.batch, device, None)
                    for owner, rows in part.split_by_owner(losses.rows):
                        totals[running[owner]] += torch.cat([rows.sum()[None], losses.figures])
                    _note_documents([trials[number] for number in running], part, losses)
        sums = self.backend.sum_over_ranks(totals).tolist()
        means = (means_of(objective.needs, own_sums, count) for own_sums, count in zip(sums, units, strict=True))
        return [{f"eval_{name}": mean for name, mean in each.items()} for each in means]


def _rows_of(values: Iterator[float], like: Tensor) -> list[list[float]]:
    """Take the next values in the rows of a tensor, of which a vector has one each."""
    width = like.shape[1] if like.dim() > 1 else 1
    return [list(itertools.islice(values, width)) for _ in range(like.shape[0])]


def _note_documents(trials: Sequence[Trial], part: Stack, losses: Losses) -> None:
    """Add an evaluation's losses to the document losses of the trials that record them."""
    if all(trial.documents is None for trial in trials):
        return
    assert losses.units is not None, "an evaluation"
    for (owner, batch), (_, units) in zip(part.batches_of_owners(), part.split_by_owner(losses.units), strict=True):
        if (documents := trials[owner].documents) is not None:
            documents.add(batch, units)


@torch.no_grad()
def prepare(
    objective: Objective,
    model: CausalLM,
    share: Share,
    units: int,
    backend: Backend,
    *,
    whole: bool,
    mark: Callable[[int], None] = lambda _: None,
) -> int:
    """Let the objective estimate what the losses of a step need of all its rows; return its forward passes.

    `whole`: the layers slice one batch of all rows. `mark` is called before each pass, with its number from 1.
    """
    mismatched = list(share.batch.mismatched)
    if not mismatched:
        return 0
    if whole:
        model.set_num_micro(len(mismatched))
    parts = stacks([Share(replace(share.batch, micro_batches=mismatched), share.slot, None)], whole=whole)
    objective.prepare(model, _marked(parts, mark), units, backend)
    return len(parts)


def _marked(parts: Sequence[Stack], mark: Callable[[int], None]) -> Iterator[MicroBatch]:
    for index, part in enumerate(parts, 1):
        mark(index)
        yield part.batch


def mean_losses(part: Stack, rows: Tensor, units: Sequence[int]) -> list[Tensor]:
    """Return each trial's contribution to its step's loss, from the rows' loss sums (B,); 0 without rows here."""
    sums: list[Tensor | None] = [None] * len(units)
    for owner, losses in part.split_by_owner(rows):
        loss, before = losses.sum() / units[owner], sums[owner]
        sums[owner] = loss if before is None else before + loss
    return [rows.new_zeros(()) if loss is None else loss for loss in sums]
