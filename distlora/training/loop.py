"""Run the training loop, without knowledge of the backend and without host syncs within a step.

Exceptions that read from the device in a step: 8-bit optimizers (optimizers.py), DeepSpeed
(parallel/README.md), and the first forward, with train.verify also the one after each save, which checks the base
(parallel/integrity.py).

A step: loss = sum over the units (target tokens, or pairs of answers) of all ranks and micro-batches / their number,
which the loader knows in advance; backward; one sum over ranks; clip; update. trial.py has the rest of a run (metrics,
what is due, early stopping). Trials that share a base take their steps together in multi_trial/.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from distlora.config.objectives import means_of
from distlora.data.loader import MicroBatch, StepBatch, StepLoader, joined
from distlora.model.adapters import AdapterCopies
from distlora.model.build import CausalLM
from distlora.model.images import features_of
from distlora.parallel import Backend, watch
from distlora.parallel.ranks import Traffic
from distlora.parallel.watch import Control
from distlora.system.progress import still
from distlora.system.stop_signals import Stopped
from distlora.training.objectives import Losses, Objective
from distlora.training.trial import Due, StepFigures, Trial


class Passes:
    """Forward and backward passes of a model's steps."""

    def __init__(self, model: CausalLM, backend: Backend, control: Control, *, one_adapter: bool) -> None:
        """`one_adapter`: all rows of a step use the same adapters."""
        self.model, self.backend, self.control = model, backend, control
        self._copies = AdapterCopies.of(model, backend.ranks.device, one_adapter=one_adapter)
        self.is_cold = True
        """True until a step is done: kernels are compiled, memory is allocated, connections are made."""

    def of_trial(
        self, objective: Objective, batch: StepBatch, units: int, done: int, *, whole: bool
    ) -> tuple[list[Losses], int]:
        """Run one trial's step after `done` steps; return its micro-batches' losses and the passes of estimates.

        `whole`: the layers slice one batch of all rows.
        """
        step = done + 1
        with self._copies.fresh():
            place = "forward of mismatched answers, batch"
            mark = functools.partial(self.control.boundary, step, place, long=self.is_cold)
            estimates = prepare(objective, self.model, batch, units, self.backend, whole=whole, mark=mark)
            if whole:  # As one batch, which the layers slice.
                self.model.set_num_micro(len(batch.micro_batches))
            parts = [joined(batch.micro_batches)] if whole else batch.micro_batches

            def means(_: int, rows: Tensor) -> list[Tensor]:
                return [rows.sum() / units]

            losses = self.backward(objective, [(micro_batch, done) for micro_batch in parts], means, step)
        return losses, estimates

    def backward(
        self,
        objective: Objective,
        parts: Sequence[tuple[MicroBatch, int | Tensor | None]],
        means: Callable[[int, Tensor], Sequence[Tensor]],
        step: int,
    ) -> list[Losses]:
        """Run a step's micro-batches forward and backward, and sum the gradients over ranks; return their losses.

        `parts`: rows, and the step of all of them or of each. `means` returns the losses to minimize from the number of
        a part and its rows' loss sums (B,).
        """
        results = []
        for index, (rows, at) in enumerate(parts):
            self.control.boundary(step, "forward of micro-batch", index + 1, long=self.is_cold)
            losses = objective.losses(self.model, rows, self.backend.ranks.device, at)
            results.append(losses._replace(rows=losses.rows.detach()))
            watch.at(step, "backward of micro-batch", index + 1, long=self.is_cold)
            self.backend.backward(*means(index, losses.rows), last=index == len(parts) - 1)
        watch.at(step, "sum of gradients", long=self.is_cold)
        self.backend.finish_gradients()
        return results


class Trainer(Passes):
    """Steps of a trial, from its present one."""

    def __init__(
        self, model: CausalLM, backend: Backend, control: Control, trial: Trial, *, shares_steps: bool = False
    ) -> None:
        """`shares_steps`: the steps are run elsewhere, with those of other trials."""
        super().__init__(model, backend, control, one_adapter=not shares_steps)
        self.trial = trial

    def fit(self) -> None:
        """Train to the end or until early stopping, with evaluations, samples and saves.

        Raises NonFiniteError, and Stopped once the state is saved.
        """
        self.control.saved()  # Start the clock of saves here: loading has trained nothing.
        try:
            self.begin()
            while not self.trial.has_ended:
                self.advance()
        except Stopped:
            log(self.trial, self.backend)
            self.trial.save_whole_steps()
            raise

    def begin(self) -> None:
        """Do what is due before the first step: the base's evaluation, or what a stop interrupted."""
        trial = self.trial
        if trial.first_step == 0 and trial.eval_loader is not None:
            count = len(trial.eval_loader.rows)
            trial.reporter.event(f"evaluating {count:,} held-out sequences before the first step")
        self._follow()

    def advance(self) -> None:
        """Run one step, and what is due after it."""
        self._measure_or_train()
        if (settled := self.backend.settle_residency(self._run_largest_image)) is not None:
            self.trial.reporter.event(settled)
        self._follow()

    def _run_largest_image(self) -> None:
        """Run the vision tower on the largest image of the data, if there are any, and drop its features."""
        loader = self.trial.loader
        if isinstance(loader, StepLoader) and (image := loader.largest_image()) is not None:
            features_of(self.model.merger, [image])

    def _follow(self) -> None:
        if self.follow(self.trial.due(self.control)):
            self.control.saved()

    def follow(self, due: Due) -> bool:
        """Log, evaluate, save and sample if it is due; return whether it was saved."""
        trial = self.trial
        if any(due):  # What takes long logs first: it does not count as training time.
            log(trial, self.backend)
        if due.evaluating:
            with still("evaluating", trial.reporter.event), saved_at_failure(trial, self.backend):
                self.evaluate()
            trial.keep_best()
        saves = trial.has_ended or (due.saving and trial.may_save())
        if saves:
            trial.save()
        if due.sampling and trial.hooks.sample is not None:
            # After the save, so that running out of memory in a sample loses no state.
            self.control.boundary(trial.done, "sampling", long=True)
            trial.hooks.sample(trial.done)
        return saves

    def _measure_or_train(self) -> None:
        trial, memory = self.trial, self.trial.memory
        if memory is None or not memory.measures(trial.done):
            self._train_step()
            return
        if trial.rollouts is not None:  # Sampling is not part of the step that is planned.
            trial.rollouts.sample(trial.done)
        if (device := self.backend.ranks.device).type == "cuda":
            torch.cuda.synchronize(device)  # Do not count the previous steps' remaining work.
        began = time.monotonic()
        with memory.around():
            self._train_step()
            watch.at(trial.done, "reading what memory it took", long=True)
        trial.note_measured(began)
        if memory.warning is not None:
            trial.reporter.event(memory.warning)

    def _train_step(self) -> None:
        trial, backend = self.trial, self.backend
        began, done, step = time.monotonic(), trial.done, trial.done + 1
        watch.at(step, "reading rows", long=self.is_cold)
        batch = trial.loader.batch(done)
        units = trial.objective.units(batch)
        backend.traffic.take()  # Drop what was counted between steps.
        backend.zero_gradients()
        whole = trial.train.accumulate == "block"
        losses, estimates = self.of_trial(trial.objective, batch, units, done, whole=whole)
        watch.at(step, "update", long=self.is_cold)
        trial.update()
        self.is_cold = False
        rows, passes = [part.rows for part in losses], 2 * len(losses) + estimates
        trial.note(step_figures(trial, batch, rows, losses, began=began, traffic=backend.traffic.take(), passes=passes))

    def evaluate(self) -> None:
        """Compute the mean held-out loss and metrics over all held-out units, or of the answers to held-out prompts."""
        trial = self.trial
        if trial.rollouts is not None:
            found = trial.rollouts.evaluate(trial.progress.step)
            more = {} if found.answers is None else self._means_of([found.answers])
            trial.evaluated(found.figures | more)
            trial.reporter.samples(trial.progress.step, found.samples, found.notable)
            return
        if trial.documents is not None:
            trial.documents.begin()
        assert trial.eval_loader is not None, "an evaluation is due"
        trial.evaluated(self._means_of(map(trial.eval_loader.batch, range(trial.eval_loader.steps_per_epoch))))

    def _means_of(self, batches: Iterable[StepBatch]) -> dict[str, float]:
        """Return the mean loss and metrics over batches, by their names in an evaluation."""
        self.model.set_num_micro(1)
        objective, device, step = self.trial.objective, self.backend.ranks.device, self.trial.done
        totals = torch.zeros(1 + len(objective.needs.figures), dtype=torch.float64, device=device)
        units = 0
        with torch.no_grad():
            for index, batch in enumerate(batches):
                own = objective.units(batch)
                units += own
                place = f"evaluation, estimates of batch {index + 1}, part"
                mark = functools.partial(self.control.boundary, step, place, long=index == 0)
                prepare(objective, self.model, batch, own, self.backend, whole=False, mark=mark)
                for micro_batch in batch.micro_batches:
                    # The first batch may compile and allocate memory.
                    self.control.boundary(step, "evaluation, batch", index + 1, long=index == 0)
                    losses = objective.losses(self.model, micro_batch, device, None)
                    totals += torch.cat([losses.rows.sum()[None], losses.figures])
                    if self.trial.documents is not None:
                        assert losses.units is not None, "an evaluation"
                        self.trial.documents.add(micro_batch, losses.units)
        means = means_of(objective.needs, self.backend.sum_over_ranks(totals).tolist(), units)
        return {f"eval_{name}": mean for name, mean in means.items()}


def log(trial: Trial, backend: Backend) -> None:
    """Read the metrics of all unlogged steps, and write them: the only host sync of training."""
    unread = trial.unread()
    if unread is None:
        return
    watch.at(trial.done, "reading figures")
    losses, norms, maxima = unread
    sums, largest = backend.sum_over_ranks(losses.flatten()), maxima.flatten()
    if len(largest):
        largest = backend.max_over_ranks(largest)
    values = iter(torch.cat([sums, norms, largest]).tolist())
    rows = [_rows_of(values, each) for each in (losses, norms, maxima)]
    trial.log(rows[0], [norm for (norm,) in rows[1]], rows[2])


def _rows_of(values: Iterator[float], like: Tensor) -> list[list[float]]:
    """Take the next values in the rows of a tensor, of which a vector has one each."""
    width = like.shape[1] if like.dim() > 1 else 1
    return [list(itertools.islice(values, width)) for _ in range(like.shape[0])]


def step_figures(
    trial: Trial,
    batch: StepBatch,
    rows: Sequence[Tensor],
    losses: Sequence[Losses],
    *,
    began: float,
    traffic: Traffic,
    passes: int,
) -> StepFigures:
    """Return a trial's figures of a step. `rows`: its own loss sums, `losses`: those of the micro-batches."""
    maxima = [part.maxima for part in losses if part.maxima is not None]
    return StepFigures(
        row_losses=torch.cat(list(rows))[: len(batch.rows)],  # Without the rows that fill up a layer's slices.
        figures=torch.stack([part.figures for part in losses]).sum(dim=0),
        units=trial.objective.units(batch),
        tokens=batch.global_rows * batch.micro_batches[0].labels.shape[1],
        flops=trial.flops_of(batch),
        began=began,
        traffic=traffic,
        passes=passes,
        maxima=torch.stack(maxima).amax(dim=0) if maxima else None,
        known=batch.figures,
    )


@contextlib.contextmanager
def saved_at_failure(trial: Trial, backend: Backend) -> Iterator[None]:
    """Save what was trained if an evaluation fails, unless other ranks, which a save needs, may wait in it."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        is_alone = backend.ranks.world == 1
        became = trial.save_at_failure() if is_alone else "checkpoints of earlier steps are kept"
        error.add_note(f"(in the evaluation after step {trial.done}; {became})")
        raise


@torch.no_grad()
def prepare(
    objective: Objective,
    model: CausalLM,
    batch: StepBatch,
    units: int,
    backend: Backend,
    *,
    whole: bool,
    mark: Callable[[int], None] = lambda _: None,
) -> int:
    """Let the objective estimate what the losses of a step need of all its rows; return its forward passes.

    `whole`: the layers slice one batch of all rows. `mark` is called before each pass, with its number from 1.
    """
    mismatched = batch.mismatched
    if not mismatched:
        return 0
    if whole:
        model.set_num_micro(len(mismatched))
        mismatched = [joined(mismatched)]
    objective.prepare(model, _marked(mismatched, mark), units, backend)
    return len(mismatched)


def _marked(parts: Sequence[MicroBatch], mark: Callable[[int], None]) -> Iterator[MicroBatch]:
    for index, micro_batch in enumerate(parts, 1):
        mark(index)
        yield micro_batch
