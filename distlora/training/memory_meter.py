"""What the memory of a training step is, by kind: measured, where the planner (distlora/planner/memory) calculates it.

What is held from step to step is walked, each storage once. The rest is read from the allocator's own events of one
step, which torch's profiler records: every allocation and every free of it, on the CPU and on a GPU, those of
`storage.resize_` too, by which FSDP2 gathers and lets go and which no dispatch mode sees. An allocation is told by the
part of the step in which it was made (marks, by hooks of this one step), by whether FSDP2 or DeepSpeed made it to
gather, and by how long it lived. Nothing is patched and no number of the run changes.

What a library takes by itself is not counted: gloo stages what it gathers (a copy of it, while it is on the wire), as
NCCL has buffers and MKL has; those are no tensors of a step. Where one of gloo's threads was the last to have a tensor
of a collective, it lets go of it unseen (`_end_unseen`).
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile, record_function
from torch.distributed.tensor import DTensor

from distlora.model.adapters import adapter_parameters
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import PACKED_PARTS, FrozenTensor
from distlora.parallel.shards import local_rows
from distlora.planner.memory.kinds import Kind
from distlora.training.optimizers import Optimizer
from distlora_kernels import scratch

Part = Literal["start", "forward", "head", "head_backward", "block", "update"]
"""Of a micro-batch: up to the last norm; last norm and head; their backward; the blocks' backward and what ends a step
before the update."""
_MARK = "distlora: "
_GATHERS = ("FSDP::", "DeepSpeed::")
"""How the backends name what they do in a profile: torch's FSDP2, and distlora/parallel/zero3.py."""
_REDUCES = ("FSDP::post_backward_reduce", "FSDP::post_backward_rs_wait")
_ADDS_UP = ("FSDP::post_backward_accumulate", "FSDP::post_backward_reshard")
"""Where FSDP2 makes whole fp32 gradients of micro-batches before the last one; nothing else is made there."""
_STAGES = ("gloo:", "c10d::")
"""Of torch's ProcessGroupGloo, in threads of its own, and of a collective while it is called."""
_DEQUANTIZES = "bitsandbytes::dequantize_4bit"
_FAULTS = (RuntimeError, AttributeError, LookupError, TypeError, ValueError)
"""Of a profiler that does not start or stop, and of a version of torch whose events are others."""

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes that a rank had in one step. Of tensors: not what libraries take beside them."""

    held: dict[Kind, int]
    """From step to step."""
    at_peak: dict[Kind, int]
    """Beside it, when most was there."""
    part: Part
    """In which part of the step that was."""
    peaks: dict[Part, int]
    """The most in each part, beside what is held."""
    left: int
    """Of what the step made and is no kind of what is held: still there at its end."""

    @property
    def persistent(self) -> int:
        return sum(self.held.values())

    @property
    def peak(self) -> int:
        return self.persistent + sum(self.at_peak.values())

    @property
    def by_kind(self) -> dict[Kind, int]:
        """At the peak."""
        return dict(Counter(self.held) + Counter(self.at_peak))


class MemoryMeter:
    """Measures single steps of a model. Make it when all is loaded and before the first step, when every block is cut;
    then `with meter.step(): ...` around a whole training step, whose figures are `meter.found` afterwards.

    The step should not be a run's first, which makes the optimizer's state and checks the base. Memory of before that
    it lets go is not seen, of which torch says a line on stderr: gradients that a step makes anew are to be gone by
    then (`backend.zero_gradients()`), and nothing but a step should have come before it. On the CPU an evaluation
    leaves what is gathered last.
    """

    def __init__(self, model: CausalLM, *optimizers: Optimizer) -> None:
        """One optimizer, or of a pack one of each trial."""
        self._model, self._optimizers = model, optimizers
        self._device = model.head.weight.device
        self._base = dict(_base(model))
        self.found: StepMemory | None = None
        self.failure: str | None = None
        """Why there is nothing found of a step that went well."""

    def held(self) -> dict[Kind, int]:
        """Bytes of what is there now and stays from step to step."""
        return _sums(self._held())

    def _held(self) -> dict[tuple[int, int], Kind]:
        """(address, bytes) of each storage."""
        found = dict(self._base)
        for parameter in self._model.parameters():
            whole = parameter.data
            if not isinstance(whole, DTensor) and whole.untyped_storage().nbytes():
                found.setdefault(_storage(whole), "resident")
        for tensor, kind in _of_training(self._model, self._optimizers):
            found.setdefault(_storage(tensor), kind)
        return found

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one step. When it ends without an exception `found` is set, or `failure` where the measurement failed
        and not the step."""
        self.found = self.failure = None
        for block in self._model.blocks:
            block.forget_rows()
        recorder = Recorder(self._device)
        before = self._tried(self._held)
        self._tried(recorder.start)
        try:
            with _marks(self._model, self._optimizers):
                mark("start")
                yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # A fault of the step's kernels is said here, as the step's.
        finally:
            self._tried(recorder.stop)
        if before is not None:
            self.found = self._tried(lambda: account(recorder.events(), before, self._held()))

    def _tried(self, doing: Callable[[], _Found]) -> _Found | None:
        """What the instrument does by itself, unless it has failed already. A step is never part of it."""
        if self.failure is None:
            try:
                return doing()
            except _FAULTS as fault:
                self.failure = f"{type(fault).__name__}: {fault}"
        return None


class Recorder:
    """What a device's allocator does between `start` and `stop`, and the marks. Once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._profile: profile | None = None

    def start(self) -> None:
        # Kineto, which torch's profiler is, says on stderr when it starts and stops. It reads this when it is first
        # used.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        started = profile(use_kineto=True, profile_memory=True)
        started.__enter__()
        self._profile = started

    def stop(self) -> None:
        if self._profile is not None:
            self._profile.__exit__(None, None, None)

    def events(self) -> list[Event]:
        """In order, once it has stopped. RuntimeError where the profiler has none."""
        results = None if self._profile is None else self._profile.kineto_results
        if results is None:
            raise RuntimeError("torch's profiler has recorded nothing")
        return _events(results.experimental_event_tree(), self._device)


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _sums(storages: dict[tuple[int, int], Kind]) -> dict[Kind, int]:
    sums: Counter[Kind] = Counter()
    for (_, nbytes), kind in storages.items():
        sums[kind] += nbytes
    return {kind: nbytes for kind, nbytes in sums.items() if nbytes}


def _base(model: CausalLM) -> Iterator[tuple[tuple[int, int], Kind]]:
    """The storages of parameters and buffers: of what is cut, this rank's rows with what fills them up."""
    adapters = set(adapter_parameters(model).values())
    matrices = {model.embedding, model.head}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind: Kind = "norms"
            if parameter in adapters:
                kind = "adapters"
            elif module in matrices:
                kind = "embeddings"
            elif name in PACKED_PARTS:
                kind = "codes" if name == "codes" else "scales"
            elif name == "weight" and isinstance(module, (FrozenTensor, nn.Linear)):
                kind = "weights"
            rows = local_rows(parameter)[0]
            if rows.device.type != model.head.weight.device.type:
                continue  # A base in host memory is not on the card.
            # DeepSpeed's rows with what fills them up; where they are in host memory, many of them in one storage.
            filled = getattr(parameter, "ds_tensor", None)
            yield _storage(rows) if filled is None else (filled.data_ptr(), filled.nbytes), kind
        for name, buffer in module.named_buffers(recurse=False):
            of_buffer: dict[str, Kind] = {"offset": "scales", "row_norms_squared": "adapters"}
            yield _storage(buffer), of_buffer.get(name, "norms")
    for block in model.blocks:
        for start in block.started.values():
            yield _storage(start), "adapters"


def _of_training(model: CausalLM, optimizers: Sequence[Optimizer]) -> Iterator[tuple[Tensor, Kind]]:
    updated = (parameter for optimizer in optimizers for parameter in optimizer.parameters.values())
    for parameter in (*model.parameters(), *updated):
        if parameter.grad is not None:
            yield local_rows(parameter.grad)[0], "gradients"
    for state in (state for optimizer in optimizers for state in optimizer.inner.state.values()):
        for value in state.values():
            if isinstance(value, Tensor):
                yield value, "optimizer"
    device = model.head.weight.device
    if device.type == "cuda":
        arena = scratch.arena(device)
        yield arena.one, "scratch"
        yield arena.kept, "scratch"


def mark(part: Part) -> None:
    """A part of a step begins."""
    with record_function(_MARK + part):
        pass


@contextlib.contextmanager
def _marks(model: CausalLM, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """While this lasts, each part of a step says when it begins. Before the backends' own hooks, so that what they
    gather for a part is counted to it."""

    def begin(part: Part) -> Any:
        return lambda *arguments: mark(part)

    def at_gradient(part: Part) -> Any:
        def watch(module: nn.Module, arguments: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: mark(part))

        return watch

    handles: list[Any] = [
        model.register_forward_pre_hook(begin("forward"), prepend=True),
        model.final_norm.register_forward_pre_hook(begin("head"), prepend=True),
        model.head.register_forward_hook(at_gradient("head_backward"), prepend=True),
        model.blocks[-1].register_forward_hook(at_gradient("block"), prepend=True),
        *(optimizer.inner.register_step_pre_hook(begin("update")) for optimizer in optimizers),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True)
class _Made:
    """A piece of memory that the step took."""

    nbytes: int
    address: int
    kind: Kind | None
    """None: by the part of the step in which it was made."""
    part: Part
    let_go: int | None = None
    """By which event; None: it is still there."""


@dataclass(frozen=True, slots=True)
class Event:
    """Memory that was taken or let go, or a mark."""

    time: int
    """In nanoseconds."""
    nbytes: int = 0
    """Taken, or let go where below 0."""
    address: int = 0
    kind: Kind | None = None
    """Where what took it tells."""
    mark: Part | None = None


def _events(tree: list[Any], device: torch.device) -> list[Event]:
    """What the profiler saw, in order: memory of `device`, and marks."""
    found = []
    waiting: list[tuple[Any, Kind | None]] = [(event, None) for event in reversed(tree)]
    while waiting:
        event, kind = waiting.pop()
        if event.tag.name == "Allocation":
            fields = event.extra_fields
            if fields.device.type == device.type:
                found.append(Event(event.start_time_ns, fields.alloc_size, fields.ptr, kind))
            continue
        name = event.name
        if name.startswith(_MARK):
            found.append(Event(event.start_time_ns, mark=name.removeprefix(_MARK)))
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
    return sorted(found, key=lambda event: event.time)


def account(events: list[Event], before: dict[tuple[int, int], Kind], after: dict[tuple[int, int], Kind]) -> StepMemory:
    """The step that made these events, between what was held before it and after it, as (address, bytes)."""
    part: Part = "start"
    alive: dict[int, _Made] = {}
    made: list[tuple[int, _Made]] = []
    parts: list[Part] = []
    for index, event in enumerate(events):
        part = event.mark or part
        parts.append(part)
        gone = alive.pop(event.address, None) if event.nbytes else None
        if gone is not None:  # Where an address is taken again, another thread has let it go.
            gone.let_go = index
        if event.nbytes > 0:
            alive[event.address] = _Made(event.nbytes, event.address, event.kind, part)
            made.append((index, alive[event.address]))
    kinds = {address: kind for (address, _), kind in after.items()}
    for each in alive.values():
        each.kind = kinds.get(each.address, each.kind)
    _end_unseen([(index, each) for index, each in made if each.address not in kinds or each.let_go], events, parts)
    changes = [0] * len(events)
    for index, each in made:
        changes[index] += each.nbytes
        if each.let_go is not None:
            changes[each.let_go] -= each.nbytes
    peaks: dict[Part, int] = {}
    total, most, top = 0, -1, 0
    for index, change in enumerate(changes):
        total += change
        peaks[parts[index]] = max(total, peaks.get(parts[index], 0))
        if total > most:
            most, top = total, index
    at_peak: Counter[Kind] = Counter()
    for index, each in made:
        if index <= top and (each.let_go is None or each.let_go > top):
            until = parts[each.let_go] if each.let_go is not None else None
            at_peak[each.kind or _kind(each.part, until, parts[top])] += each.nbytes
    return StepMemory(
        held=_sums(before),
        at_peak=dict(at_peak),
        part=parts[top] if parts else "start",
        peaks=peaks,
        left=sum(each.nbytes for each in alive.values() if each.address not in kinds and each.let_go is None),
    )


def _end_unseen(made: list[tuple[int, _Made]], events: list[Event], parts: list[Part]) -> None:
    """Say when tensors of collectives went that are gone after the step and that this thread did not let go.

    gloo's threads have them too, until a collective is done: whoever is last lets go, and a thread's frees are seen by
    nobody else, or as late as its address is taken again. It is over when the next one of its kind is made, or with the
    part of the step where none follows.
    """
    following: dict[Kind, int] = {}
    for index, each in reversed(made):
        if each.kind not in ("gathered", "communication"):
            continue
        if each.let_go is None or events[each.let_go].nbytes > 0:
            ends = (later for later in range(index, len(parts)) if parts[later] != each.part)
            over = following.get(each.kind, next(ends, len(parts) - 1))
            each.let_go = over if each.let_go is None else min(over, each.let_go)
        following[each.kind] = index


def _kind(part: Part, until: Part | None, at: Part) -> Kind:
    """What memory is that was taken in `part` of the step and let go in `until`, by whoever counts in `at`."""
    if part == "forward" and until != "forward":
        return "kept"
    if part in ("head", "head_backward") and at in ("head", "head_backward"):
        return "logits"
    return "working"
