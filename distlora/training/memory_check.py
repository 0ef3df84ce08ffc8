"""Measure the memory of one early step and compare it with the plan."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from distlora.config import TrainConfig
from distlora.model.build import CausalLM
from distlora.parallel import Backend
from distlora.planner.memory import KINDS, measured
from distlora.planner.memory.measured import RECORDED, MeasuredRank
from distlora.run_folder.layout import PLAN_NAME, read_record
from distlora.training.memory_meter import MemoryMeter, Part, StepMemory
from distlora.training.optimizers import Optimizer

_PARTS: tuple[Part, ...] = get_args(Part)
_REASON_BYTES = 240
"""Bytes of the message by which a rank reports a failed measurement to the others."""


def measured_step(first_step: int, settings: TrainConfig) -> int | None:
    """Return the step to measure after a start at `first_step`, counted from 0; None if there is no suitable step.

    It is the second. The first creates the optimizer states, checks the base, teaches DeepSpeed the order of units and
    settles resident layers. A step after an evaluation or samples is skipped, because it frees tensors that they left.
    """
    between = [every for every in (settings.eval_every, settings.sample_every) if every is not None]
    if 1 in between:
        return None
    return next(step for step in itertools.count(first_step + 1) if all(step % every for every in between))


def read_plan(run_dir: Path, *, measure: bool) -> dict[str, Any]:
    """Return RUN/plan.json; empty if nothing is planned or measured. Raises UserError for a damaged file."""
    return read_record(run_dir / PLAN_NAME, RECORDED) if measure else {}


def memory_check(
    plan: Mapping[str, Any],
    train: TrainConfig,
    model: CausalLM,
    optimizer: Optimizer,
    backend: Backend,
    *,
    first_step: int,
    measure: bool,
) -> MemoryCheck | None:
    """Return the check for a start at `first_step`; None if nothing is measured."""
    step = measured_step(first_step, train)
    if not measure or step is None:
        return None
    return MemoryCheck(model, optimizer, backend, plan=plan, step=step)


class MemoryCheck:
    """Measurement of one step. Every rank makes it after loading, before the first step, and calls it alike."""

    def __init__(
        self, model: CausalLM, optimizer: Optimizer, backend: Backend, *, plan: Mapping[str, Any], step: int
    ) -> None:
        """Prepare to measure `step` (`measured_step`). `plan`: RUN/plan.json, or empty."""
        self._meter, self._backend, self._plan = MemoryMeter(model, optimizer), backend, plan
        self._step = step
        self.figures: dict[str, int] = {}
        """Bytes on the rank with the highest peak; empty until they are known."""
        self.warning: str | None = None
        """Difference from the plan, or the reason why nothing was measured."""

    def measures(self, step: int) -> bool:
        """Return whether this step, counted from 0, is to be measured."""
        return step == self._step

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Measure the step within this context.

        If the measurement fails on a rank, but not the step, there are no metrics, `warning` has the reason, and the
        run continues.
        """
        # Free what an earlier step left: its size is not known.
        self._backend.zero_gradients()
        with self._meter.step():
            yield
        if (failed := self._failed(self._meter.failure)) is not None:
            rank, reason = failed
            self.warning = f"WARNING: what memory this step took was not measured on rank {rank}: {reason}"
            return
        assert self._meter.memory is not None
        of_worst = self._worst(self._meter.memory)
        self.figures, self.warning = measured.figures(of_worst, self._plan), measured.warning(of_worst, self._plan)

    def of_step(self, step: int) -> dict[str, int]:
        """Return the metrics if they belong to this step, counted from 0."""
        return self.figures if step == self._step else {}

    def _failed(self, reason: str | None) -> tuple[int, str] | None:
        """Return (rank, reason) of the first failed measurement; None if all succeeded."""
        encoded = (reason or "").encode()[:_REASON_BYTES]
        for rank, message in enumerate(self._gather(list(encoded.ljust(_REASON_BYTES, b"\0")))):
            if text := bytes(message).rstrip(b"\0").decode(errors="ignore"):
                return rank, text
        return None

    def _gather(self, values: list[int]) -> list[list[int]]:
        gathered: list[list[int]] = self._backend.gather_ranks(
            torch.tensor(values, device=self._backend.ranks.device)
        ).tolist()
        return gathered

    def _worst(self, memory: StepMemory) -> MeasuredRank:
        ranks = self._gather([memory.peak, _PARTS.index(memory.part), *(memory.by_kind.get(kind, 0) for kind in KINDS)])
        rank = max(range(len(ranks)), key=lambda index: ranks[index][0])
        peak, part, *kinds = ranks[rank]
        of_worst = {kind: nbytes for kind, nbytes in zip(KINDS, kinds, strict=True) if nbytes}
        return MeasuredRank(rank=rank, peak=peak, by_kind=of_worst, part=_PARTS[part])
