"""The training loop. It reads like the maths, knows no backend, and reads nothing from the device inside a step
(an 8-bit optimizer does: optim.py; so does DeepSpeed, for which the host waits too, with parallel=zero3:
parallel/README.md; and the first forward, with train.verify the one after each save too, reads whether the base is what
was loaded: parallel/integrity.py).

A step: loss = sum over the units (target tokens, pairs of answers) of all ranks and micro-batches / their number, which
the loader knows in advance; backward; one sum over ranks; clip; update. Losses and norms stay on the device until the
next log.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch
from torch import Tensor

from distlora.checkpoints.saver import SaveError
from distlora.checkpoints.state import Progress
from distlora.config import Config
from distlora.data.loader import MicroBatch, StepBatch, StepLoader
from distlora.flops import count_flops, peak_flops
from distlora.memory_check import MemoryCheck
from distlora.model import CausalLM
from distlora.objectives import objective_of
from distlora.optim import Optimizer, learning_rate
from distlora.parallel import Backend, watch
from distlora.parallel.control import Control
from distlora.parallel.traffic import Traffic
from distlora.reached import WATCHED, Reached, sentence
from distlora.reporting import Reporter
from distlora.stopping import Stopped


class NonFiniteError(FloatingPointError):
    """A loss or a gradient was NaN or infinite. What was trained before that step is saved; the same step would fail
    again."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the loop calls at certain steps. Every rank calls each of them alike."""

    save: Callable[[Progress], None]
    """Save a checkpoint while training goes on; a disk that does not take it stops nothing."""
    save_last: Callable[[Progress], None]
    """Save a checkpoint, unless that step is saved already, and wait until it is on the disk. Raises SaveError."""
    publish_best: Callable[[Progress], None]
    """Keep what is trained now as the best by held-out loss."""
    sample: Callable[[int], None] | None = None
    """Show what the model writes after so many steps, unless an earlier start has."""


@dataclass(slots=True)
class _Interval:
    """The whole steps since the last log: device scalars, read together."""

    first_step: int
    row_losses: list[Tensor] = field(default_factory=list)
    """(rows of this rank,) loss sums of each step."""
    figures: list[Tensor] = field(default_factory=list)
    """(F,) sums of the objective's figures in each step, of this rank."""
    units: list[int] = field(default_factory=list)
    grad_norms: list[Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    flops: int = 0
    """Of this rank."""
    began: float = 0.0
    """When its first step began."""
    measured: tuple[float, int, int] = (0.0, 0, 0)
    """(seconds, tokens, flops) of the step whose memory was measured: it takes longer than others."""
    traffic: Traffic = field(default_factory=Traffic)
    """What this rank had moved after its last step."""


class Trainer:
    """The steps of a run, from wherever it stands."""

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        optimizer: Optimizer,
        *,
        loader: StepLoader,
        eval_loader: StepLoader | None,
        progress: Progress,
        total_steps: int,
        reporter: Reporter,
        config: Config,
        hooks: Hooks,
        control: Control,
        memory: MemoryCheck | None = None,
    ) -> None:
        """`memory` measures one of the steps."""
        self.model, self.backend, self.optimizer, self.control = model, backend, optimizer, control
        self.loader, self.eval_loader, self.total_steps = loader, eval_loader, total_steps
        self.reporter, self.config, self.hooks = reporter, config, hooks
        self.progress, self.memory = progress, memory
        self._interval = _Interval(progress.step)
        self._first_step = progress.step
        """What this start goes on from, and so is saved."""
        self.step_traffic: Traffic | None = None
        """What the last logged interval moved on this rank, a step; None before the first."""
        self.objective = objective_of(config.train)
        self.held_out: dict[str, float] = {}
        """The figures of the last evaluation, by name."""
        self._reached = Reached(model, optimizer.parameters) if progress.step == 0 else None
        self.unreached: list[str] | None = None
        """What no gradient reached in the first steps; None where they were not looked at, or not yet."""
        self._is_cold = True
        """Until a step is done: kernels are compiled, memory is taken, connections are made."""
        self._flops = count_flops(model, with_reference=self.objective.has_reference)
        self._peak_flops = peak_flops(backend.ranks.device)
        self._ok = torch.ones((), dtype=torch.bool, device=backend.ranks.device)
        """On the device: false from the first step with a non-finite loss or gradient on; nothing is updated then."""

    @property
    def passes_per_step(self) -> int:
        """Forward and backward passes of a step, which is how often it gathers each block."""
        return 2 * (self.loader.accumulation if self.config.train.accumulate == "step" else 1)

    def fit(self) -> None:
        """Train to the end, or until the held-out loss has stopped falling; evaluate, sample and save where the config
        says. Raises NonFiniteError, and Stopped once what was trained is saved."""
        self.control.saved()  # Saves are timed from here: loading has trained nothing.
        if self._first_step == 0 and self.eval_loader is not None:
            self.reporter.event(f"evaluating {len(self.eval_loader.rows):,} held-out rows")
        try:
            self._follow(self._first_step)  # The base's evaluation, or what a stop has cut off.
            for step in range(self._first_step, self.total_steps):
                if self._is_exhausted():
                    return
                self._measure_or_train(step)
                if (settled := self.backend.settle_residency()) is not None:
                    self.reporter.event(settled)
                self._follow(step + 1)
        except Stopped:
            self._save_whole_steps()
            raise

    def _follow(self, done: int) -> None:
        """What is due after so many steps and is not done yet: log, evaluate, save, sample. Not all of it is in a
        checkpoint of that step, so a resume asks again."""
        settings, is_last = self.config.train, done == self.total_steps

        def due(every: int | None) -> bool:
            return every is not None and done > 0 and done % every == 0

        evaluating = self.eval_loader is not None and (done == 0 or is_last or due(settings.eval_every))
        saving = done > self._first_step and (due(settings.save_every) or self.control.save_is_due)
        sampling = due(settings.sample_every)
        if evaluating or saving or sampling or is_last or due(settings.log_every):
            self._log()
        if evaluating and done not in self.progress.evaluations:
            self._evaluate_trained()
        ending = is_last or self._is_exhausted()
        if saving or ending:
            save = self.hooks.save_last if ending else self.hooks.save
            save(self.progress)
            self.control.saved()
        if sampling and self.hooks.sample is not None:  # After the save, which a sample's memory may not cost.
            self.control.boundary(done, "sampling", long=True)
            self.hooks.sample(done)

    def _save_whole_steps(self) -> None:
        """Before the run stops. What was begun is dropped, a step or an evaluation: a resume does it from its start."""
        self.backend.traffic.restore(self._interval.traffic)
        self._log()
        if self.progress.step > 0:
            self.hooks.save_last(self.progress)

    def _evaluate_trained(self) -> None:
        """Evaluate what has been trained so far; keep it where it is the best."""
        self.evaluate()
        settings = self.config.train
        if settings.eval_every is not None and self.progress.best_step == self.progress.step:
            self.hooks.publish_best(self.progress)
        if self._is_exhausted():
            best = self.progress.best_step
            lowest = "" if best is None else f"; the lowest was {self.progress.evaluations[best]:.4f} after step {best}"
            self.reporter.event(
                f"stopping early: the held-out loss has not fallen in {settings.early_stopping_patience} evaluations"
                + lowest
            )

    def _is_exhausted(self) -> bool:
        """Whether early stopping ends the run here; a function of the evaluations, so a resume decides the same."""
        settings = self.config.train
        if settings.early_stopping_patience is None:
            return False
        since_best = self.progress.evaluations_since_best(settings.early_stopping_threshold)
        return since_best >= settings.early_stopping_patience

    def _measure_or_train(self, step: int) -> None:
        if self.memory is None or not self.memory.measures(step):
            self._train_step(step)
            return
        if (device := self.backend.ranks.device).type == "cuda":
            torch.cuda.synchronize(device)  # What it still does of the steps before is not of this one's time.
        began, flops = time.monotonic(), self._interval.flops
        with self.memory.around():
            self._train_step(step)
            watch.at(step + 1, "reading what memory it took", long=True)
        interval = self._interval
        if len(interval.units) == 1:
            interval.began = began
        interval.measured = (time.monotonic() - began, interval.tokens[-1], interval.flops - flops)
        if self.memory.warning is not None:
            self.reporter.event(self.memory.warning)

    def _train_step(self, step: int) -> None:
        began = time.monotonic()
        watch.at(step + 1, "reading rows", long=self._is_cold)
        batch = self.loader.batch(step)
        row_losses: list[Tensor] = []
        figures: list[Tensor] = []
        units, flops = self.objective.units(batch), 0
        self.backend.zero_gradients()
        micro_batches = self._as_run(batch)
        for index, micro_batch in enumerate(micro_batches):
            self.control.boundary(step + 1, "forward of micro-batch", index + 1, long=self._is_cold)
            losses = self.objective.losses(self.model, micro_batch, self.backend.ranks.device, step)
            row_losses.append(losses.rows.detach())
            figures.append(losses.figures)
            watch.at(step + 1, "backward of micro-batch", index + 1, long=self._is_cold)
            self.backend.backward(losses.rows.sum() / units, last=index == len(micro_batches) - 1)
            flops += self._flops.of(micro_batch.position_ids[micro_batch.rows >= 0])
        watch.at(step + 1, "sum of gradients", long=self._is_cold)
        self.backend.finish_gradients()
        if self._reached is not None and self._reached.steps < WATCHED:
            self._reached.note()
        grad_norm = self.backend.clip_gradients(self.config.optim.max_grad_norm)
        self._ok &= torch.isfinite(grad_norm)
        watch.at(step + 1, "update", long=self._is_cold)
        rate = learning_rate(step, self.total_steps, self.config.optim)
        self.optimizer.step(rate, self._ok)
        self._is_cold = False

        interval = self._interval
        if not interval.units:
            interval.began = began
        interval.row_losses.append(torch.cat(row_losses))
        interval.figures.append(torch.stack(figures).sum(dim=0))
        interval.units.append(units)
        interval.grad_norms.append(grad_norm)
        interval.rates.append(rate)
        interval.tokens.append(batch.global_rows * batch.micro_batches[0].labels.shape[1])
        interval.flops += flops
        interval.traffic = replace(self.backend.traffic)

    def _as_run(self, batch: StepBatch) -> list[MicroBatch]:
        """The step's micro-batches, or all of them as one batch that the blocks cut up themselves."""
        if self.config.train.accumulate == "step":
            return batch.micro_batches
        self.model.set_num_micro(len(batch.micro_batches))
        parts = batch.micro_batches
        return [
            MicroBatch(
                torch.cat([part.input_ids for part in parts]),
                torch.cat([part.labels for part in parts]),
                torch.cat([part.position_ids for part in parts]),
                torch.cat([part.rows for part in parts]),
            )
        ]

    def evaluate(self) -> None:
        """Mean held-out loss and figures over every held-out unit; does nothing without held-out rows."""
        if self.eval_loader is None:
            return
        self.model.set_num_micro(1)
        names, device = ("loss", *self.objective.figures), self.backend.ranks.device
        totals = torch.zeros(len(names), dtype=torch.float64, device=device)
        units = 0
        with torch.no_grad():
            for index in range(self.eval_loader.steps_per_epoch):
                batch = self.eval_loader.batch(index)
                units += self.objective.units(batch)
                for micro_batch in batch.micro_batches:
                    # The first batch may compile and take memory.
                    self.control.boundary(self.progress.step, "evaluation, batch", index + 1, long=index == 0)
                    losses = self.objective.losses(self.model, micro_batch, device, None)
                    totals += torch.cat([losses.rows.sum()[None], losses.figures])
        means = (self.backend.sum_over_ranks(totals) / units).tolist()
        self.held_out = {f"eval_{name}": mean for name, mean in zip(names, means, strict=True)}
        self.progress.evaluations[self.progress.step] = self.held_out["eval_loss"]
        self.reporter.evaluation(self.progress.step, self.held_out)
        self.backend.traffic.take()  # An evaluation's gathers are no training step's.

    def _log(self) -> None:
        """Read the interval's device scalars, write a line for each of its steps, and begin the next. The one host sync
        of training."""
        interval = self._interval
        if not interval.units:
            return
        done = interval.first_step + len(interval.units)
        watch.at(done, "reading figures")
        self._interval = _Interval(done)
        steps = zip(interval.row_losses, interval.figures, strict=True)
        sums = torch.stack([torch.cat([losses.sum()[None], figures]) for losses, figures in steps])
        means = [
            [total / units for total in totals]
            for totals, units in zip(self.backend.sum_over_ranks(sums).tolist(), interval.units, strict=True)
        ]
        norms = torch.stack(interval.grad_norms).tolist()
        seconds = time.monotonic() - interval.began
        finite = [math.isfinite(mean[0]) and math.isfinite(norm) for mean, norm in zip(means, norms, strict=True)]
        updates = finite.index(False) if False in finite else len(finite)
        self.progress.step = interval.first_step + updates
        aside, tokens, flops = interval.measured
        self.progress.seconds += seconds - aside
        self.progress.tokens += max(0, sum(interval.tokens[:updates]) - tokens)
        self.step_traffic = self.backend.traffic.take(len(means))
        shared: dict[str, float] = {
            "peak_memory_bytes": peak_memory_bytes(self.backend.ranks.device),
            "gathered_bytes": self.step_traffic.gathered_bytes,
            "reduced_bytes": self.step_traffic.reduced_bytes,
            "scattered_bytes": self.step_traffic.scattered_bytes,
        }
        if self.backend.shards.copies > 1:
            shared["between_copies_bytes"] = self.step_traffic.between_copies_bytes
        if sum(interval.tokens) > tokens:  # Else the only step was one that is slower than the others.
            shared["tokens_per_second"] = (sum(interval.tokens) - tokens) / (seconds - aside)
            if self._peak_flops is not None:
                shared["mfu"] = (interval.flops - flops) / (seconds - aside) / self._peak_flops
        names = ("loss", *self.objective.figures)
        for index in range(min(updates + 1, len(means))):
            of_step = dict(zip(names, means[index], strict=True))
            figures = {**of_step, "lr": interval.rates[index], "grad_norm": norms[index], **shared}
            if self.memory is not None:
                figures |= self.memory.of_step(interval.first_step + index)
            self.reporter.log(interval.first_step + index + 1, figures)
        if updates < len(means):
            self._stop_non_finite(interval.row_losses[updates], means[updates][0], norms[updates])
        self._say_unreached(is_last=self.progress.step == self.total_steps)

    def _say_unreached(self, *, is_last: bool) -> None:
        """Once, after the first steps: which trained parameters had no gradient in them."""
        reached = self._reached
        if reached is None or not (reached.steps == WATCHED or (is_last and reached.steps > 1)):
            return
        self._reached = None
        self.unreached = reached.missing(self.backend)
        if self.unreached:
            self.reporter.event(sentence(self.unreached, reached.steps))

    def _stop_non_finite(self, row_losses: Tensor, loss: float, norm: float) -> NoReturn:
        """Save the state before the step after `progress.step`, name that step and its rows, and raise."""
        step = self.progress.step
        slots = self.loader.slots(step)
        flags = torch.zeros(slots.shape, dtype=torch.float64, device=row_losses.device)
        own = flags[:, self.loader.rank]
        own.copy_((~torch.isfinite(row_losses)).view(own.shape))
        bad = self.backend.sum_over_ranks(flags).cpu().numpy() > 0
        rows = sorted(slots[bad & (slots >= 0)].tolist())
        culprits = f"the loss of row{'s' if len(rows) > 1 else ''} {_listed(rows)}" if rows else "the gradient"
        among = "" if rows else f" of rows {_listed(sorted(slots[slots >= 0].tolist()))}"
        saved = "nothing was trained before it"
        if step > 0:
            try:
                self.hooks.save_last(self.progress)
                saved = f"the state after step {step} is saved"
            except SaveError as error:
                saved = str(error)
        raise NonFiniteError(
            f"step {step + 1}: {culprits}{among} is not finite (loss {loss:.4g}, gradient norm {norm:.4g}); {saved}. "
            "Rows are counted from 0 in the packed training data (`distlora data row RUN N` prints one). A resume "
            "meets the same step again: start a new run with a lower optim.lr, a longer optim.warmup_ratio, or without "
            "those documents"
        )


def _listed(rows: list[int], most: int = 8) -> str:
    shown = ", ".join(map(str, rows[:most]))
    return shown if len(rows) <= most else f"{shown} and {len(rows) - most} more"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held: of the allocator on a GPU; resident, file pages included, on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
