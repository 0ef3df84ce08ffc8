"""One run's side of training: next rows, metrics of its steps, what is due after them, whether it continues.

The trainer (loop.py) runs its steps. Losses and norms stay on the device
until the next log.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from distlora.checkpoint.saver import SaveError
from distlora.checkpoint.state import RunProgress
from distlora.config.objectives import means_of
from distlora.config.plan import find_gpu
from distlora.config.training import Cadence
from distlora.data.loader import StepBatch, StepLoader
from distlora.model.adapters import AdaptedLinear, LoRAPair
from distlora.model.build import CausalLM
from distlora.model.experts import ExpertWeight
from distlora.model.frozen_linear import FrozenLinear
from distlora.model.lm_head import RewardHead
from distlora.parallel import Backend, Gradients, whole_shape
from distlora.parallel.ranks import Traffic
from distlora.parallel.watch import Control
from distlora.planner.flops import ActiveWeights, queries_by_window
from distlora.training.expert_load import ExpertLoad
from distlora.training.memory_meter import MemoryCheck
from distlora.training.objectives import objective_of
from distlora.training.objectives.documents import DocumentLosses
from distlora.training.open_run import OpenRun
from distlora.training.optimizers import Optimizer, learning_rate
from distlora.training.reporter import Reporter

if TYPE_CHECKING:  # It imports parts of transformers that other runs do not need.
    from distlora.training.rollouts import RolloutLoader


class NonFiniteError(FloatingPointError):
    """Report a loss or gradient that was NaN or infinite. Earlier steps are saved; the same step would fail again."""


HIGH_LOSS = "its loss is above train.loss_watchdog_threshold"


class LossWatchdogError(NonFiniteError):
    """Report a loss that stayed above train.loss_watchdog_threshold; a resume would meet the same one."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """Functions called at certain steps, alike on every rank."""

    save: Callable[[RunProgress], None]
    """Save a checkpoint while training continues. A failed write does not stop the run."""
    save_last: Callable[[RunProgress], None]
    """Save a checkpoint, unless that step is saved already, and wait for the disk. Raises SaveError."""
    publish_best: Callable[[RunProgress], None]
    """Save the present weights as the best by held-out loss."""
    sample: Callable[[int], None] | None = None
    """Log samples after so many steps, unless an earlier start has."""


@dataclass(frozen=True, slots=True)
class TrainedParts:
    """Parameters that a trial trains, with their gradients and optimizer."""

    parameters: Mapping[str, nn.Parameter]
    """By their names in a checkpoint, in forward order."""
    gradients: Gradients
    """Their gradients, summed over ranks."""
    optimizer: Optimizer


class StepFigures(NamedTuple):
    """Measurements of one step on this rank."""

    row_losses: Tensor
    """(rows of this rank,) loss sums, in the order of the micro-batches."""
    figures: Tensor
    """(F,) sums of the objective's metrics."""
    units: int
    tokens: int
    """Tokens over all ranks."""
    flops: int
    began: float
    traffic: Traffic
    passes: int
    """Forward and backward passes: how often the step gathered each layer."""
    maxima: Tensor | None = None
    """(M,) the objective's metrics of which the largest counts."""
    known: Mapping[str, float] = MappingProxyType({})
    """Metrics that were known before the step, the same on every rank."""


class Due(NamedTuple):
    """Work due after a step. A checkpoint of that step lacks some of it, so a resume computes it again."""

    logging: bool
    """Due by train.log_every. Everything that takes long logs first, too."""
    evaluating: bool
    saving: bool
    sampling: bool
    is_last: bool


@dataclass(slots=True)
class _Interval:
    """Complete steps since the last log: device scalars, read together."""

    first_step: int
    steps: list[StepFigures] = field(default_factory=list)
    grad_norms: list[Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    measured: tuple[float, int, int] = (0.0, 0, 0)
    """(seconds, tokens, FLOPs) of the step whose memory was measured, which takes longer."""
    began: float = 0.0
    """Start time of its first step."""


_LOADS = 20
"""Lines of metrics.jsonl with the load of each expert, evenly spaced: 30 kB each for 48 layers of 128."""
WATCHED = 5
"""Number of steps that are checked. In the first one A has no gradient, because B is zero."""


class Trial:
    """A run in training, alone or beside others."""

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        run: OpenRun,
        trained: TrainedParts,
        reporter: Reporter,
        hooks: Hooks,
        *,
        rollouts: RolloutLoader | None = None,
        memory: MemoryCheck | None = None,
    ) -> None:
        """Start from the run's progress.

        `rollouts` samples the answers to the run's prompts. `memory` measures one of the steps.
        """
        self.backend, self.trained, self.reporter, self.hooks = backend, trained, reporter, hooks
        self.loader: StepLoader | RolloutLoader = run.loader if rollouts is None else rollouts
        self.rollouts, self.memory, self.eval_loader = rollouts, memory, run.eval_loader
        self.total_steps, self.progress, self.evaluations = run.total_steps, run.progress, run.evaluations
        train, optim, progress = run.config.train, run.config.optim, run.progress
        self.train, self.optim = train, optim
        self._saves = train.saves(self.loader.steps_per_epoch * train.global_batch)
        self.first_step = progress.step
        """Step that this start resumes from, which is already saved."""
        self.step_traffic: Traffic | None = None
        """This rank's traffic per step in the last logged interval; None before the first."""
        self.step_passes = 0
        """Forward and backward passes per step in that interval."""
        self.objective = objective_of(train, None if rollouts is None else rollouts.config.rollout)
        self.held_out: dict[str, float] = {}
        """Metrics of the last evaluation, by name."""
        held_out = run.eval_loader if train.eval_documents else None
        self.documents = None if held_out is None else DocumentLosses(held_out.rows)
        """Losses of each held-out document in a running evaluation; None: not recorded."""
        self.without_gradient: list[str] | None = None
        """Parameters without gradient in the first steps; None if they were not checked, or not yet."""
        self._gradients_seen = GradientWatch(model, trained.optimizer.parameters) if progress.step == 0 else None
        self.expert_load: ExpertLoad | None = None
        """Load of the experts; None without a mixture of experts, and in multi-trial training, where rows mix."""
        if run.slot is None and model.architecture.has_experts:
            step, decays, device = progress.step, optim.weight_decay > 0, backend.ranks.device
            self.expert_load = ExpertLoad(model, device, progress.expert_tokens, step=step, decays=decays)
        weights = active_weights(model, run.slot)
        self._flops = weights.model_flops(with_reference=self.objective.needs.reference), weights.mismatched_flops()
        """Operations of a step's micro-batches, and of its mismatched ones."""
        self._peak_flops = peak_flops(backend.ranks.device)
        self._interval = _Interval(progress.step)
        self._high_losses = 0
        """Steps in a row, up to the last logged one, whose loss was above the watchdog's threshold."""
        self._ok = torch.ones((), dtype=torch.bool, device=backend.ranks.device)
        """On the device: false from the first step with a non-finite loss or gradient. Nothing is updated then."""

    @property
    def done(self) -> int:
        """Number of steps that are done; `progress` counts those that are logged."""
        return self._interval.first_step + len(self._interval.steps)

    def flops_of(self, batch: StepBatch) -> int:
        """Return the operations of this rank's part of a step, without empty rows."""
        parts = zip(self._flops, (batch.micro_batches, batch.mismatched), strict=True)
        return sum(flops.of(part.position_ids[part.rows >= 0]) for flops, batches in parts for part in batches)

    def update(self) -> None:
        """Clip the summed gradients and update the trained parameters. `note` follows."""
        if self._gradients_seen is not None and self._gradients_seen.steps < WATCHED:
            self._gradients_seen.note()
        grad_norm = self.trained.gradients.clip(self.optim.max_grad_norm)
        self._ok &= torch.isfinite(grad_norm)
        rate = learning_rate(self.done, self.total_steps, self.optim)
        self.trained.optimizer.step(rate, self._ok)
        self._interval.grad_norms.append(grad_norm)
        self._interval.rates.append(rate)

    def note(self, figures: StepFigures) -> None:
        """Record a completed step."""
        if not self._interval.steps:
            self._interval.began = figures.began
        self._interval.steps.append(figures)
        if self.expert_load is not None:
            self.expert_load.note_step()

    def note_measured(self, began: float) -> None:
        """Mark the last noted step as the one whose memory was measured, from `began` on."""
        interval, step = self._interval, self._interval.steps[-1]
        if len(interval.steps) == 1:
            interval.began = began
        interval.measured = (time.monotonic() - began, step.tokens, step.flops)

    def due(self, control: Control) -> Due:
        """Return what is due after the steps that are done."""
        settings, done = self.train, self.done
        is_last = done == self.total_steps

        def every(number: int | None) -> bool:
            return number is not None and done > 0 and done % number == 0

        def due(cadence: Cadence | None) -> bool:
            return cadence is not None and cadence.is_due(done)

        evaluating = self.eval_loader is not None and (done == 0 or is_last or due(self.evaluations))
        return Due(
            logging=every(settings.log_every),
            evaluating=evaluating and done not in self.progress.evaluations,
            saving=done > self.first_step and (due(self._saves) or control.save_is_due),
            sampling=every(settings.sample_every),
            is_last=is_last,
        )

    @property
    def has_ended(self) -> bool:
        """True if no step follows."""
        return self.done >= self.total_steps or self.is_exhausted()

    def is_exhausted(self) -> bool:
        """Return whether early stopping ends the run: a function of the evaluations, so a resume decides the same."""
        settings = self.train
        if settings.early_stopping_patience is None:
            return False
        since_best = self.progress.evaluations_since_best(settings.early_stopping_threshold)
        return since_best >= settings.early_stopping_patience

    def evaluated(self, held_out: dict[str, float]) -> None:
        """Record the metrics of an evaluation. One without a loss does not count: every reward failed."""
        if "eval_loss" not in held_out:
            self.reporter.event(
                f"WARNING: the evaluation after step {self.progress.step:,} does not count: no answer has a reward"
            )
            return
        if not math.isfinite(loss := held_out["eval_loss"]):
            self.reporter.event(f"WARNING: the held-out loss after step {self.progress.step:,} is {loss}: no best one")
        self.held_out = held_out
        self.progress.evaluations[self.progress.step] = held_out["eval_loss"]
        if self.documents is not None:
            self.reporter.documents(self.documents.record(self.progress.step, self.backend))
        self.reporter.evaluation(self.progress.step, held_out)

    def keep_best(self) -> None:
        """After an evaluation, save the best weights, and log an early stop."""
        settings, progress = self.train, self.progress
        if self.evaluations is not None and progress.best_step == progress.step:
            self.hooks.publish_best(progress)
        if self.is_exhausted():
            best = progress.best_step
            lowest = "" if best is None else f"; the lowest was {progress.evaluations[best]:.4f} after step {best}"
            self.reporter.event(
                f"stopping early: the held-out loss has not fallen in {settings.early_stopping_patience} evaluations"
                + lowest
            )

    def save(self) -> None:
        """Save what is logged; wait for the disk in the last save."""
        (self.hooks.save_last if self.has_ended else self.hooks.save)(self.progress)

    def may_save(self) -> bool:
        """Return whether the last loss is below the watchdog's threshold; log that a save is left out."""
        if self._high_losses:
            self.reporter.event(f"step {self.progress.step} is not saved: {HIGH_LOSS}")
        return not self._high_losses

    def save_whole_steps(self) -> None:
        """Save before a stop, when everything is logged. A resume repeats the step that was begun."""
        if self.progress.step > 0 and self.may_save():
            self.hooks.save_last(self.progress)

    def save_at_failure(self) -> str:
        """Save before the run ends by an error, when everything is logged. Return what became of it, for its text."""
        if self._high_losses:
            return f"step {self.progress.step} is not saved: {HIGH_LOSS}"
        if self.progress.step == 0:
            return "nothing was trained before it"
        try:
            self.hooks.save_last(self.progress)
        except SaveError as error:
            return str(error)
        return f"the state after step {self.progress.step} is saved"

    def unread(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return (S, 1 + F) fp32 sums of losses and metrics in the S unlogged steps, (S,) norms and (S, M) maxima.

        They are this rank's, on the device; None without steps.
        """
        if not self._interval.steps:
            return None
        sums = torch.stack([torch.cat([step.row_losses.sum()[None], step.figures]) for step in self._interval.steps])
        maxima = [sums.new_zeros(0) if step.maxima is None else step.maxima for step in self._interval.steps]
        return sums, torch.stack(self._interval.grad_norms), torch.stack(maxima)

    def log(
        self, sums: Sequence[Sequence[float]], norms: Sequence[float], maxima: Sequence[Sequence[float]] = ()
    ) -> None:
        """Write a line for each step of the interval, and start the next.

        The arguments are `unread`'s, summed over ranks, and the largest of all ranks.

        Raises NonFiniteError, on every rank alike, if a step was not finite.
        """
        interval = self._interval
        self._interval = _Interval(self.done)
        needs = self.objective.needs
        means = [means_of(needs, totals, step.units) for totals, step in zip(sums, interval.steps, strict=True)]
        seconds = time.monotonic() - interval.began
        finite = [math.isfinite(mean["loss"]) and math.isfinite(norm) for mean, norm in zip(means, norms, strict=True)]
        updates = finite.index(False) if False in finite else len(finite)
        self.progress.step = interval.first_step + updates
        aside, tokens, _ = interval.measured
        self.progress.seconds += seconds - aside
        self.progress.tokens += max(0, sum(step.tokens for step in interval.steps[:updates]) - tokens)
        traffic = Traffic()
        for step_figures in interval.steps:
            traffic.add(step_figures.traffic)
        self.step_traffic = traffic.per_step(len(interval.steps))
        self.step_passes = interval.steps[-1].passes
        shared = dict(self._shared_figures(interval, self.step_traffic, seconds))
        expert_tokens = None
        if self.expert_load is not None:
            shared |= self.expert_load.read(self.backend)
            if updates:  # Otherwise that of the steps before the interval is still the saved state's.
                # Without the load of some steps, or with that of a step that is not saved, it is not the run's.
                is_whole = updates == len(means) and not self.expert_load.since
                self.progress.expert_tokens = self.expert_load.tokens if is_whole else None
            parts = [_LOADS * step // self.total_steps for step in (interval.first_step, self.progress.step)]
            expert_tokens = self.expert_load.tokens if parts[0] < parts[1] else None
        count = min(updates + 1, len(means))
        for index in range(count):
            figures = {**means[index], "lr": interval.rates[index], "grad_norm": norms[index], **shared}
            figures[needs.unit] = interval.steps[index].units
            if needs.maxima:
                figures |= zip(needs.maxima, maxima[index], strict=True)
            figures |= interval.steps[index].known
            if self.memory is not None:
                figures |= self.memory.step_figures(interval.first_step + index)
            is_last = index == count - 1
            self.reporter.log(
                interval.first_step + index + 1,
                figures,
                shown=is_last,
                expert_tokens=expert_tokens if is_last else None,
            )
            if finite[index]:
                self.objective.check(interval.first_step + index + 1, figures)
        self._watch_losses(interval.first_step, [mean["loss"] for mean in means[:updates]])
        if updates < len(means):
            self._stop_non_finite(interval.steps[updates].row_losses, means[updates]["loss"], norms[updates])
        self._report_unused(is_last=self.progress.step == self.total_steps)

    def _shared_figures(self, interval: _Interval, traffic: Traffic, seconds: float) -> Iterator[tuple[str, float]]:
        """Yield the metrics that all steps of an interval share."""
        if (peak := self.peak_bytes()) is not None:
            yield "peak_memory_bytes", peak
        yield "gathered_bytes", traffic.gathered_bytes
        yield "reduced_bytes", traffic.reduced_bytes
        yield "scattered_bytes", traffic.scattered_bytes
        if traffic.exchanged_bytes:
            yield "exchanged_bytes", traffic.exchanged_bytes
        if self.backend.shards.num_replicas > 1:
            yield "between_replicas_bytes", traffic.between_replicas_bytes
        aside, tokens, flops = interval.measured
        tokens = sum(step.tokens for step in interval.steps) - tokens
        if tokens > 0:  # Otherwise the only step was a slower one.
            yield "tokens_per_second", tokens / (seconds - aside)
            if self._peak_flops is not None:
                flops = sum(step.flops for step in interval.steps) - flops
                yield "mfu", flops / (seconds - aside) / self._peak_flops

    def peak_bytes(self) -> int | None:
        """Return the peak bytes of tensors on this rank's device, which the plan predicts.

        On a GPU the allocator counts them. On the CPU they are the measured step's, on the rank with the most; None
        before that step and without one.
        """
        device = self.backend.ranks.device
        if device.type == "cuda":
            earlier = 0 if self.rollouts is None else self.rollouts.peak_bytes
            return max(earlier, torch.cuda.max_memory_allocated(device))
        return None if self.memory is None else self.memory.figures.get("memory/peak")

    def _report_unused(self, *, is_last: bool) -> None:
        """Log once, after the first steps, which trained parameters had no gradient."""
        watched = self._gradients_seen
        if watched is None or not (watched.steps == WATCHED or (is_last and watched.steps > 1)):
            return
        self._gradients_seen = None
        self.without_gradient = watched.missing(self.backend)
        if missing := self.without_gradient:
            self.reporter.event(
                f"no gradient has reached {_listed(missing)} in the first {watched.steps} steps: as long as none "
                "does, they stay as they started"
            )

    def _watch_losses(self, first_step: int, losses: Sequence[float]) -> None:
        """Raise LossWatchdogError, on every rank alike, if the loss was too high for too many steps in a row."""
        threshold, patience = self.train.loss_watchdog_threshold, self.train.loss_watchdog_patience
        if threshold is None:
            return
        for step, loss in enumerate(losses, first_step + 1):
            self._high_losses = self._high_losses + 1 if loss > threshold else 0
            if self._high_losses == patience:
                raise LossWatchdogError(
                    f"step {step}: the training loss was above train.loss_watchdog_threshold={threshold:g} for "
                    f"{patience} steps in a row (now {loss:.4g}); checkpoints of earlier steps are kept. Start a new "
                    "run with a lower optim.lr or more optim.warmup_steps, or set a higher threshold"
                )

    def _stop_non_finite(self, row_losses: Tensor, loss: float, norm: float) -> NoReturn:
        """Save the state before the step after `progress.step`, name that step and its rows, and raise."""
        step = self.progress.step
        places = self.loader.rows_of_ranks(step)
        flags = torch.zeros(places.shape, dtype=torch.float64, device=row_losses.device)
        rank_flags = flags[:, self.loader.rank]
        rank_flags.copy_((~torch.isfinite(row_losses)).view(rank_flags.shape))
        bad = self.backend.sum_over_ranks(flags).cpu().numpy() > 0
        rows = sorted(places[bad & (places >= 0)].tolist())
        culprits = f"the loss of row{'s' if len(rows) > 1 else ''} {_listed(rows)}" if rows else "the gradient"
        among = "" if rows else f" of rows {_listed(sorted(places[places >= 0].tolist()))}"
        raise NonFiniteError(
            f"step {step + 1}: {culprits}{among} is not finite (loss {loss:.4g}, gradient norm {norm:.4g}); "
            f"{self.save_at_failure()}. Rows are counted from 0 in the packed training data (`distlora data row RUN N` "
            "prints one). A resume meets the same step again: start a new run with a lower optim.lr, more "
            "optim.warmup_steps, or without those documents"
        )


def _listed(names: Sequence[object], most: int = 8) -> str:
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


class GradientWatch:
    """Record, on the device, of which `parameters` (as the optimizer has them) had a nonzero gradient."""

    def __init__(self, model: CausalLM, parameters: dict[str, nn.Parameter]) -> None:
        self._rows = {f"token_rows.{matrix}.rows": matrix for matrix in model.token_rows}
        """Parameters that are checked row by row, and the matrix that they belong to."""
        self._model, self._parameters = model, parameters
        self._seen: dict[str, Tensor] = {}
        self.steps = 0

    def note(self) -> None:
        """Record the gradients of one step, after they have been summed over the ranks."""
        self.steps += 1
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                hit = parameter.grad != 0  # NaN counts as a gradient.
                hit = hit.any(dim=1) if name in self._rows else hit.any()
                if name in self._seen:
                    self._seen[name] |= hit
                else:
                    self._seen[name] = hit

    def missing(self, backend: Backend) -> list[str]:
        """Return the names of parameters without gradient on any rank. Every rank must call it; reads the device."""
        names = list(self._parameters)
        sizes = [len(p) if name in self._rows else 1 for name, p in self._parameters.items()]
        flags = torch.zeros(sum(sizes), device=backend.ranks.device)
        for name, flag in zip(names, flags.split(sizes), strict=True):
            if name in self._seen:
                flag.copy_(self._seen[name].expand(len(flag)))
        reached = backend.max_over_ranks(flags).tolist()
        labels = [label for name in names for label in self._labels(name)]
        return [label for label, is_reached in zip(labels, reached, strict=True) if not is_reached]

    def _labels(self, name: str) -> list[str]:
        """Return the name of a parameter, or of each of its rows."""
        if name not in self._rows:
            return [self._model.hf_name(name)]
        rows = self._model.rows_of(self._rows[name])
        texts = {id: f" ({text})" for text, id in self._model.vocabulary.new.items()}
        assert rows is not None
        return [f"row {id}{texts.get(id, '')} of {self._rows[name]}" for id in rows.ids]


def peak_flops(device: torch.device) -> float | None:
    """Return a GPU's peak FLOP/s; None for a CPU and for a GPU that is not in distlora/config/plan.py (no MFU then)."""
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else gpu.flops


def active_weights(model: CausalLM, slot: int | None = None) -> ActiveWeights:
    """Return the weights that a token uses, module by module, with all adapters or one slot's."""
    architecture = model.architecture
    linears, trained, adapters = 0, 0, 0
    for index, block in enumerate(model.blocks):
        experts = architecture.layer(index).experts
        for module in block.modules():
            if isinstance(module, FrozenLinear):
                linears += module.in_features * module.out_features
                if isinstance(module, AdaptedLinear):
                    adapters += _ranks(module.pairs, slot) * (module.in_features + module.out_features)
            elif isinstance(module, ExpertWeight):  # A token uses the experts that it chooses.
                assert experts is not None, f"experts in layer {index}, which has none by its architecture"
                linears += experts.chosen * module.in_features * module.out_features
                adapters += experts.chosen * _ranks(module.pairs, slot) * (module.in_features + module.out_features)
            elif isinstance(module, torch.nn.Linear) and module.weight.requires_grad:
                trained += module.in_features * module.out_features
        linears += sum(weight.numel for weight in architecture.layer(index).weights if weight.kind == "fused")
    assert linears == 0 or trained == 0, "linears are frozen, or all of them are trained"
    rows, scores = model.head.token_rows, isinstance(model.head, RewardHead)
    return ActiveWeights(
        linears=linears + trained,
        linears_are_trained=trained > 0,
        adapters=adapters,
        head=0 if scores else (model.head.kept.numel if model.head.kept else whole_shape(model.head.weight).numel()),
        head_is_trained=not scores and any(parameter.requires_grad for parameter in model.head.parameters()),
        head_rows=model.head.weight.numel() if scores else 0 if rows is None else rows.rows.numel(),
        queries=queries_by_window(architecture),
    )


def _ranks(pairs: Iterable[LoRAPair], slot: int | None) -> int:
    return sum(pair.rank for pair in pairs if slot in (None, pair.slot))
