"""The training loop. It reads like the maths, knows no backend, and reads nothing from the device inside a step.

A step: loss = sum over the target tokens of all ranks and micro-batches / their number, which the loader knows in
advance; backward; one sum over ranks; clip; update. Losses and norms stay on the device until the next log.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distlora.checkpoint import Progress
from distlora.config import Config
from distlora.data.loader import MicroBatch, StepBatch, StepLoader
from distlora.model import CausalLM
from distlora.optim import learning_rate
from distlora.parallel import Backend
from distlora.parallel.traffic import Traffic
from distlora.reporting import Reporter


@dataclass(slots=True)
class _Interval:
    """The steps since the last log: device scalars, read together."""

    first_step: int
    loss_sums: list[Tensor] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    grad_norms: list[Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)


class Trainer:
    """The steps of a run, from wherever it stands. Every rank calls `save(progress)` to write a checkpoint."""

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        optimizer: torch.optim.Optimizer,
        *,
        loader: StepLoader,
        eval_loader: StepLoader | None,
        progress: Progress,
        total_steps: int,
        reporter: Reporter,
        config: Config,
        save: Callable[[Progress], None],
    ) -> None:
        self.model, self.backend, self.optimizer = model, backend, optimizer
        self.loader, self.eval_loader, self.total_steps = loader, eval_loader, total_steps
        self.reporter, self.config, self.save = reporter, config, save
        self.progress = progress
        self.step_traffic: Traffic | None = None
        """What the last logged interval moved on this rank, a step; None before the first."""

    @property
    def passes_per_step(self) -> int:
        """Forward and backward passes of a step, which is how often it gathers each block."""
        return 2 * (self.loader.accumulation if self.config.train.accumulate == "step" else 1)

    def fit(self) -> None:
        """Train to the end; evaluate and save where the config says."""
        settings, start_step = self.config.train, self.progress.step
        if start_step == 0:
            self.evaluate()
        interval = _Interval(start_step)
        for step in range(start_step, self.total_steps):
            self._train_step(step, interval)
            done = step + 1
            is_last = done == self.total_steps
            evaluating = is_last or (settings.eval_every is not None and done % settings.eval_every == 0)
            saving = is_last or (settings.save_every is not None and done % settings.save_every == 0)
            if evaluating or saving or done % settings.log_every == 0:
                self._log(interval, done)
                if evaluating:
                    self.evaluate()
                if saving:
                    self.save(self.progress)
                interval = _Interval(done)

    def _train_step(self, step: int, interval: _Interval) -> None:
        batch = self.loader.batch(step)
        loss_sum = torch.zeros((), device=self.backend.ranks.device)
        self.backend.zero_gradients()
        micro_batches = self._as_run(batch)
        for index, micro_batch in enumerate(micro_batches):
            micro_sum = self._loss_sums(micro_batch).sum()
            self.backend.backward(micro_sum / batch.global_targets, last=index == len(micro_batches) - 1)
            loss_sum += micro_sum.detach()
        self.backend.finish_gradients()
        grad_norm = self.backend.clip_gradients(self.config.optim.max_grad_norm)
        rate = learning_rate(step, self.total_steps, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

        interval.loss_sums.append(loss_sum)
        interval.targets.append(batch.global_targets)
        interval.grad_norms.append(grad_norm)
        interval.rates.append(rate)
        interval.tokens += batch.global_rows * batch.micro_batches[0].labels.shape[1]

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
            )
        ]

    def _loss_sums(self, batch: MicroBatch) -> Tensor:
        device = self.backend.ranks.device
        tensors = (batch.input_ids, batch.position_ids, batch.labels)
        input_ids, position_ids, labels = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return self.model(input_ids, position_ids, labels)

    def evaluate(self) -> None:
        """Mean held-out loss over every held-out target token; does nothing without held-out rows."""
        if self.eval_loader is None:
            return
        self.model.set_num_micro(1)
        total = torch.zeros((), dtype=torch.float64, device=self.backend.ranks.device)
        targets = 0
        with torch.no_grad():
            for index in range(self.eval_loader.steps_per_epoch):
                batch = self.eval_loader.batch(index)
                targets += batch.global_targets
                for micro_batch in batch.micro_batches:
                    total += self._loss_sums(micro_batch).sum()
        loss = float(self.backend.sum_over_ranks(total)) / targets
        self.progress.evaluations[self.progress.step] = loss
        self.reporter.evaluation(self.progress.step, {"eval_loss": loss})
        self.backend.traffic.take()  # An evaluation's gathers are no training step's.

    def _log(self, interval: _Interval, done: int) -> None:
        """Read the interval's device scalars and write a line for each of its steps. The one host sync of training."""
        sums = self.backend.sum_over_ranks(torch.stack(interval.loss_sums)).tolist()
        norms = torch.stack(interval.grad_norms).tolist()
        seconds = time.monotonic() - interval.began
        self.progress.step = done
        self.progress.seconds += seconds
        self.progress.tokens += interval.tokens
        self.step_traffic = self.backend.traffic.take(len(sums))
        shared = {
            "tokens_per_second": interval.tokens / seconds,
            "peak_memory_bytes": peak_memory_bytes(self.backend.ranks.device),
            "gathered_bytes": self.step_traffic.gathered_bytes,
            "reduced_bytes": self.step_traffic.reduced_bytes,
        }
        for index, (loss_sum, norm) in enumerate(zip(sums, norms, strict=True)):
            loss = loss_sum / interval.targets[index]
            figures = {"loss": loss, "lr": interval.rates[index], "grad_norm": norm, **shared}
            self.reporter.log(interval.first_step + index + 1, figures)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(
                    f"step {interval.first_step + index + 1}: loss {loss}, gradient norm {norm}; not saved. "
                    "A lower optim.lr or a longer optim.warmup_ratio usually helps"
                )


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held: of the allocator on a GPU; resident, file pages included, on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
