"""Measure the memory of an early training step by category, and compare it with the plan (distlora/planner/memory).

Memory held from step to step is walked, each storage once. The rest comes from the allocator's events in one step,
which torch's profiler records: every allocation and free, on the CPU and on a GPU, including those of
`storage.resize_`, by which FSDP2 gathers and frees and which no dispatch mode sees. An allocation is classified by the
part of the step in which it was made (marks, by hooks of this one step), by whether FSDP2 or DeepSpeed made it to
gather, and by its lifetime. Nothing is patched, and no number of the run changes.

Memory of libraries is not counted: gloo copies what it gathers during the transfer, and NCCL and MKL have buffers. If
one of gloo's threads is the last user of a collective's tensor, its free is not recorded (`_end_unseen`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile, record_function
from torch.distributed.tensor import DTensor

from distlora.config.training import Cadence
from distlora.model.adapters import adapter_parameters
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import FrozenTensor
from distlora.parallel import Backend
from distlora.parallel.ranks import local_rows
from distlora.planner.memory import KINDS, Kind, measured
from distlora.planner.memory.measured import MeasuredRank
from distlora.training.optimizers import Optimizer
from distlora_kernels import operands, products

Part = Literal["start", "forward", "head", "head_backward", "block", "update"]
"""Part of a micro-batch: up to the last norm; last norm and head; their backward; the layers' backward and the rest of
the step before the update."""
_MARK = "distlora: "
_GATHERS = ("FSDP::", "DeepSpeed::", "OnDemand::")
"""Names of the backends' gathers in a profile: torch's FSDP2, and distlora/parallel/zero3.py."""
_REDUCES = ("FSDP::post_backward_reduce", "FSDP::post_backward_rs_wait")
_ADDS_UP = ("FSDP::post_backward_accumulate", "FSDP::post_backward_reshard")
"""Function in which FSDP2 allocates unsharded fp32 gradients of all micro-batches but the last."""
_STAGES = ("gloo:", "c10d::")
"""Names in torch's ProcessGroupGloo, in its threads, and of a collective during its call."""
_DEQUANTIZES = "bitsandbytes::dequantize_4bit"
_FAULTS = (RuntimeError, AttributeError, LookupError, TypeError, ValueError)
"""Errors of a profiler that does not start or stop, or of a torch version with other events."""

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Tensor memory of a rank in one step, in bytes, without memory of libraries."""

    held: dict[Kind, int]
    """Bytes held from step to step, by category."""
    at_peak: dict[Kind, int]
    """Further bytes at the peak, by category."""
    part: Part
    """Part of the step with the peak."""
    peaks: dict[Part, int]
    """Peak bytes in each part, beside what is held."""
    left: int
    """Bytes made in the step, of no held category, that are still there at its end."""

    @property
    def persistent(self) -> int:
        """Return the bytes held through the whole step."""
        return sum(self.held.values())

    @property
    def peak(self) -> int:
        """Return the peak bytes."""
        return self.persistent + sum(self.at_peak.values())

    @property
    def by_kind(self) -> dict[Kind, int]:
        """Return the bytes by category at the peak."""
        return dict(Counter(self.held) + Counter(self.at_peak))


class MemoryMeter:
    """Measure single steps of a model: `with meter.step(): ...` around a whole step, then read `meter.memory`.

    Make it after loading and sharding, before the first step. Do not measure the first step, which makes the optimizer
    states and checks the base. Frees of earlier memory are not seen (torch prints a line about them): call
    `backend.zero_gradients()` before, and run nothing but steps before it. On the CPU an evaluation leaves what is
    gathered last.
    """

    def __init__(self, model: CausalLM, *optimizers: Optimizer) -> None:
        """Prepare to measure. Pass one optimizer, or in multi-trial training one per trial."""
        self._model, self._optimizers = model, optimizers
        self._device = model.head.weight.device
        self._base = dict(_base(model))
        self.memory: StepMemory | None = None
        self.failure: str | None = None
        """Reason why a successful step has no measurement."""

    def held(self) -> dict[Kind, int]:
        """Return the bytes that exist now and stay from step to step."""
        return _sums(self._held())

    def _held(self) -> dict[tuple[int, int], Kind]:
        """Return the category of each storage, by (address, bytes)."""
        entries = dict(self._base)
        for parameter in self._model.parameters():
            whole = parameter.data
            if not isinstance(whole, DTensor) and whole.untyped_storage().nbytes():
                entries.setdefault(_storage(whole), "resident")
        for tensor, kind in _of_training(self._model, self._optimizers):
            entries.setdefault(_storage(tensor), kind)
        return entries

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Measure one step. Afterwards `memory` is set, or `failure` if the measurement failed but not the step."""
        self.memory = self.failure = None
        for block in self._model.blocks:
            block.forget_rows()
        before = self._tried(self._held)
        recorder = self._tried(start_recording)
        try:
            with _marks(self._model, self._optimizers):
                mark("start")
                yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # Errors of the step's kernels surface here, as the step's.
        finally:
            if recorder is not None:
                self._tried(lambda: recorder.__exit__(None, None, None))
        if before is not None and recorder is not None:
            self.memory = self._tried(lambda: account(recorded_events(recorder, self._device), before, self._held()))

    def _tried(self, doing: Callable[[], _Found]) -> _Found | None:
        """Run a part of the measurement, unless it has failed already. A step is never part of it."""
        if self.failure is None:
            try:
                return doing()
            except _FAULTS as fault:
                self.failure = f"{type(fault).__name__}: {fault}"
        return None


def start_recording() -> profile:
    """Return torch's profiler of memory, started. The caller exits it, and reads `recorded_events`."""
    # Kineto, torch's profiler, prints to stderr when it starts and stops, unless this is set before its first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return profile(use_kineto=True, profile_memory=True).__enter__()


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _sums(storages: dict[tuple[int, int], Kind]) -> dict[Kind, int]:
    sums: Counter[Kind] = Counter()
    for (_, nbytes), kind in storages.items():
        sums[kind] += nbytes
    return {kind: nbytes for kind, nbytes in sums.items() if nbytes}


def _base(model: CausalLM) -> Iterator[tuple[tuple[int, int], Kind]]:
    """Yield the storages of parameters and buffers: for sharded ones this rank's rows with their padding."""
    adapters = set(adapter_parameters(model).values())
    matrices, tower = {model.embedding, model.head, model.head.matrix}, set(model.tower())
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind: Kind = "norms"
            if parameter in adapters:
                kind = "adapters"
            elif module in matrices:
                kind = "embeddings"
            elif parameter in tower:
                kind = "images"
            elif isinstance(module, FrozenTensor) and name in module.part_names:
                kind = "codes" if name == module.part_names[0] else "scales"
            elif name == "weight" and isinstance(module, (FrozenTensor, nn.Linear)):
                kind = "weights"
            rows = local_rows(parameter)[0]
            if rows.device.type != model.head.weight.device.type:
                continue  # An offloaded base is not on the GPU.
            # DeepSpeed's rows with their padding; in host memory, many of them share a storage.
            filled = getattr(parameter, "ds_tensor", None)
            yield _storage(rows) if filled is None else (filled.data_ptr(), filled.nbytes), kind
        for name, buffer in module.named_buffers(recurse=False):
            kind = "adapters" if name == "row_norms_squared" else "norms"
            if isinstance(module, FrozenTensor) and module.format is not None and kind == "norms":
                kind = "scales"
            yield _storage(buffer), kind
    for block in model.blocks:
        for start in block.started.values():
            yield _storage(start), "adapters"
    for tensor in model.reward_tensors:
        yield _storage(tensor), "rewards"


def _of_training(model: CausalLM, optimizers: Sequence[Optimizer]) -> Iterator[tuple[Tensor, Kind]]:
    updated = (parameter for optimizer in optimizers for parameter in optimizer.parameters.values())
    for module in model.modules():  # Made in the first forward.
        if isinstance(module, FrozenTensor) and module.dense_copy is not None:
            yield module.dense_copy, "dense"
    for parameter in (*model.parameters(), *updated):
        if parameter.grad is not None:
            yield local_rows(parameter.grad)[0], "gradients"
    for state in (state for optimizer in optimizers for inner in optimizer.inners for state in inner.state.values()):
        for value in state.values():
            if isinstance(value, Tensor):
                yield value, "optimizer"
    device = model.head.weight.device
    if device.type == "cuda":
        yield operands.scratch_buffer(device), "scratch"
    elif (blocks := products.widened_blocks()) is not None:
        yield blocks, "scratch"


def mark(part: Part) -> None:
    """Mark the start of a part of a step."""
    with record_function(_MARK + part):
        pass


@contextlib.contextmanager
def _marks(model: CausalLM, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Mark each part of a step within this context.

    The hooks run before the backends', so that gathers for a part count to it.
    """

    def begin(part: Part) -> Any:
        return lambda *arguments: mark(part)

    def at_gradient(part: Part) -> Any:
        def watch(module: nn.Module, arguments: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: mark(part))

        return watch

    handles: list[Any] = [
        model.register_forward_pre_hook(begin("forward"), prepend=True),
        (model.final_norm or model.head).register_forward_pre_hook(begin("head"), prepend=True),
        model.head.register_forward_hook(at_gradient("head_backward"), prepend=True),
        model.blocks[-1].register_forward_hook(at_gradient("block"), prepend=True),
        *(inner.register_step_pre_hook(begin("update")) for optimizer in optimizers for inner in optimizer.inners),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True)
class _Made:
    """Allocation of the step."""

    nbytes: int
    address: int
    kind: Kind | None
    """Category; None: determined by the part of the step in which it was made."""
    part: Part
    let_go: int | None = None
    """Index of the event that freed it; None: it still exists."""


@dataclass(frozen=True, slots=True)
class Event:
    """Allocation, free or mark."""

    time: int
    """Time in nanoseconds."""
    nbytes: int = 0
    """Bytes allocated, or freed if negative."""
    address: int = 0
    kind: Kind | None = None
    """Category, if the event shows it."""
    mark: Part | None = None


def recorded_events(recorder: profile, device: torch.device) -> list[Event]:
    """Return the events of a profiler that has been exited, in order: memory of `device`, and marks."""
    entries = []
    tree = recorder.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    waiting: list[tuple[Any, Kind | None]] = [(event, None) for event in reversed(tree)]
    while waiting:
        event, kind = waiting.pop()
        if event.tag.name == "Allocation":
            fields = event.extra_fields
            if fields.device.type == device.type:
                entries.append(Event(event.start_time_ns, fields.alloc_size, fields.ptr, kind))
            continue
        name = event.name
        if name.startswith(_MARK):
            entries.append(Event(event.start_time_ns, mark=name.removeprefix(_MARK)))
        elif name.startswith(_STAGES):
            continue
        elif name.startswith(_REDUCES):
            kind = "communication"
        elif name.startswith(_ADDS_UP):
            kind = "gradients"
        elif name.startswith(_GATHERS):
            kind = "gathered"
        elif name == _DEQUANTIZES:
            kind = "scratch"
        waiting += [(child, kind) for child in reversed(event.children)]
    return sorted(entries, key=lambda event: event.time)


def account(events: list[Event], before: dict[tuple[int, int], Kind], after: dict[tuple[int, int], Kind]) -> StepMemory:
    """Compute the step's memory from its events and the (address, bytes) held before and after it."""
    part: Part = "start"
    alive: dict[int, _Made] = {}
    made: list[tuple[int, _Made]] = []
    parts: list[Part] = []
    for index, event in enumerate(events):
        part = event.mark or part
        parts.append(part)
        gone = alive.pop(event.address, None) if event.nbytes else None
        if gone is not None:  # If an address is used again, another thread has freed it.
            gone.let_go = index
        if event.nbytes > 0:
            alive[event.address] = _Made(event.nbytes, event.address, event.kind, part)
            made.append((index, alive[event.address]))
    kinds = {address: kind for (address, _), kind in after.items()}
    for allocation in alive.values():
        allocation.kind = kinds.get(allocation.address, allocation.kind)
    _end_unseen(
        [(index, allocation) for index, allocation in made if allocation.address not in kinds or allocation.let_go],
        events,
        parts,
    )
    changes = [0] * len(events)
    for index, allocation in made:
        changes[index] += allocation.nbytes
        if allocation.let_go is not None:
            changes[allocation.let_go] -= allocation.nbytes
    peaks: dict[Part, int] = {}
    total, most, top = 0, -1, 0
    for index, change in enumerate(changes):
        total += change
        peaks[parts[index]] = max(total, peaks.get(parts[index], 0))
        if total > most:
            most, top = total, index
    at_peak: Counter[Kind] = Counter()
    for index, allocation in made:
        if index <= top and (allocation.let_go is None or allocation.let_go > top):
            until = parts[allocation.let_go] if allocation.let_go is not None else None
            at_peak[allocation.kind or _kind(allocation.part, until, parts[top])] += allocation.nbytes
    return StepMemory(
        held=_sums(before),
        at_peak=dict(at_peak),
        part=parts[top] if parts else "start",
        peaks=peaks,
        left=sum(
            allocation.nbytes
            for allocation in alive.values()
            if allocation.address not in kinds and allocation.let_go is None
        ),
    )


def _end_unseen(made: list[tuple[int, _Made]], events: list[Event], parts: list[Part]) -> None:
    """Set the end of collectives' tensors that are gone after the step but that this thread did not free.

    gloo's threads hold them until a collective is done, and the last holder frees. Frees of other threads are recorded
    late, when the address is used again, or never. The tensor ends when the next one of its category is made, or with
    its part of the step.
    """
    following: dict[Kind, int] = {}
    for index, allocation in reversed(made):
        if allocation.kind not in ("gathered", "communication"):
            continue
        if allocation.let_go is None or events[allocation.let_go].nbytes > 0:
            ends = (later for later in range(index, len(parts)) if parts[later] != allocation.part)
            over = following.get(allocation.kind, next(ends, len(parts) - 1))
            allocation.let_go = over if allocation.let_go is None else min(over, allocation.let_go)
        following[allocation.kind] = index


def _kind(part: Part, until: Part | None, at: Part) -> Kind:
    """Return the category of memory made in `part` of the step and freed in `until`, seen from `at`."""
    if part == "forward" and until != "forward":
        return "kept"
    if part in ("head", "head_backward") and at in ("head", "head_backward"):
        return "logits"
    return "working"


_PARTS: tuple[Part, ...] = get_args(Part)


def measured_step(first_step: int, between: Sequence[Cadence]) -> int | None:
    """Return the step to measure after a start at `first_step`, counted from 0; None if there is no suitable step.

    It is the second. The first creates the optimizer states, checks the base, teaches DeepSpeed the order of units and
    settles resident layers. A step after an evaluation or samples (`between`) is skipped, because it frees tensors that
    they left.
    """
    if any(cadence.times >= cadence.steps for cadence in between):
        return None
    steps = itertools.count(first_step + 1)
    return next(step for step in steps if not any(cadence.is_due(step) for cadence in between))


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

        If the measurement fails on a rank, but not the step, there are no metrics, that rank prints the reason, and
        the run continues.
        """
        # Free what an earlier step left: its size is not known.
        self._backend.zero_gradients()
        with self._meter.step():
            yield
        if (reason := self._meter.failure) is not None:
            print(f"the memory of this step was not measured: {reason}", flush=True)
        failed = [rank for rank, (has_failed,) in enumerate(self._gather([int(reason is not None)])) if has_failed]
        if failed:
            self.warning = f"WARNING: the memory of this step was not measured on rank {failed[0]}; its log says why"
            return
        assert self._meter.memory is not None
        worst = self._worst(self._meter.memory)
        self.figures, self.warning = measured.figures(worst, self._plan), measured.warning(worst, self._plan)

    def step_figures(self, step: int) -> dict[str, int]:
        """Return the metrics if they belong to this step, counted from 0."""
        return self.figures if step == self._step else {}

    def _gather(self, values: list[int]) -> list[list[int]]:
        gathered: list[list[int]] = self._backend.gather_ranks(
            torch.tensor(values, device=self._backend.ranks.device)
        ).tolist()
        return gathered

    def _worst(self, memory: StepMemory) -> MeasuredRank:
        ranks = self._gather([memory.peak, _PARTS.index(memory.part), *(memory.by_kind.get(kind, 0) for kind in KINDS)])
        rank = max(range(len(ranks)), key=lambda index: ranks[index][0])
        peak, part, *kinds = ranks[rank]
        worst = {kind: nbytes for kind, nbytes in zip(KINDS, kinds, strict=True) if nbytes}
        return MeasuredRank(rank=rank, peak=peak, by_kind=worst, part=_PARTS[part])
