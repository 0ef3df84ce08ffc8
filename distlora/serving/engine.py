"""Run the operations of all users on one base, in rounds.

A round takes what waits: of each model the operations that may run together, in their order, as many as the round's
tokens allow, the models that had the fewest tokens first. Rows of all models run in one forward and backward; samples
of all models in one batch. Rank 0 has the queue and sends each round to the others, which follow it.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import threading
import time
import typing
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from distlora.config import ModelSpec, UserError
from distlora.generation.prompts import context_limit
from distlora.model.build import CausalLM
from distlora.parallel import Backend, from_rank_0, watch
from distlora.serving.adapters import ServedAdapter, adapter_config, check_whole, read_saved
from distlora.serving.losses import check_call
from distlora.serving.messages import shared
from distlora.serving.operations import (
    Adapter,
    CreateModel,
    ForwardBackward,
    Load,
    Operation,
    OptimStep,
    OptimStepResult,
    Result,
    Sample,
    Save,
    Unload,
)
from distlora.serving.passes import Call, Passes
from distlora.serving.sampler import Sampler, Sampling
from distlora.system.stop_signals import Stopped
from distlora.training.multi_trial.trainer import together

MOST_MODELS = 128
"""Models of one round; below the model's number of slots."""
IDLE_ROUND_SECONDS = 1.0
"""Seconds after which the ranks agree on an empty round."""


class EngineStoppedError(RuntimeError):
    """Report that the engine has stopped before it ran an operation. Another start may run it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """Sizes of rounds, and of what stays in memory."""

    micro_batch_tokens: int = 4096
    """Tokens of a rank's micro-batch, padding included."""
    round_tokens: int = 32768
    """Tokens of a round's forward and backward, of its forward, and of its samples; one operation may have more."""
    most_on_device: int = 64
    """Adapters with their states in the memory of the device; those used last stay."""
    host_seconds: float = 120.0
    """Seconds without an operation after which an adapter goes to host memory."""
    disk_seconds: float = 1200.0
    """The same, to a folder."""
    snapshots: int = 16
    """Saved adapters for sampling in memory; those used last stay."""


@dataclass(frozen=True, slots=True)
class _Park:
    """Move an idle model to host memory, or to a folder."""

    model_id: str
    on_disk: bool


@dataclass(slots=True, eq=False)
class _Waiting:
    """An operation that waits on rank 0."""

    operation: Operation
    future: Future[Any]


@dataclass(slots=True, eq=False)
class _Queue:
    """Operations of one model that wait, in order."""

    waiting: deque[_Waiting] = field(default_factory=deque)
    served: float = 0.0
    """Tokens that it had, or would have had if it had never been idle."""


@dataclass(slots=True)
class _Figures:
    """Counts since the start."""

    rounds: int = 0
    busy_seconds: float = 0.0
    trained_tokens: int = 0
    forward_tokens: int = 0
    sampled_tokens: int = 0
    optimizer_steps: int = 0
    failed: int = 0
    last_models: int = 0
    last_rows: int = 0


def _phase(operation: Operation | _Park) -> int:
    """Return the order of an operation within a round: states, forward and backward, forward, samples."""
    if isinstance(operation, ForwardBackward):
        return 1 if operation.backward else 2
    return 3 if isinstance(operation, Sample) else 0


def _cost(operation: Operation) -> int:
    """Return the tokens of an operation."""
    if isinstance(operation, ForwardBackward):
        return sum(len(row.tokens) for row in operation.rows)
    if isinstance(operation, Sample):
        return len(operation.tokens) + operation.num_samples * (operation.max_tokens or 1)
    return 0


class Engine:
    """Trains and samples adapters on one base. Every rank makes it and calls `run`; only rank 0 gets operations."""

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        spec: ModelSpec,
        *,
        end_tokens: Sequence[int] = (),
        tokenizer: Any = None,
        limits: EngineLimits | None = None,
        context: int | None = None,
        spill_folder: Path | None = None,
        boundary: watch.Marker = watch.at,
        on_stop: Callable[[], None] | None = None,
    ) -> None:
        """Start without models.

        `spec`: the base, as `model` was built, with slots for adapters. `context`: most tokens of a sequence; None: the
        model's positions. `spill_folder`: an existing folder of idle adapters, the same on every rank; None: they stay
        in host memory. `boundary` is called between rounds on every rank. It may raise Stopped: `on_stop` is called,
        once, and has to lead to `close`; None: `close`.
        """
        self._model, self._backend, self._spec, self._limits = model, backend, spec, limits or EngineLimits()
        self._spill_folder, self._boundary, self._on_stop = spill_folder, boundary, on_stop or self.close
        self._context = context or context_limit(model)
        self._passes = Passes(model, backend, most_tokens=self._limits.micro_batch_tokens)
        self._sampler = Sampler(
            model, backend, self._passes, end_tokens=end_tokens, tokenizer=tokenizer, context=self._context
        )
        self._models: dict[str, ServedAdapter | Path] = {}
        """Models by their ids; those on disk by their folders."""
        self._snapshots: OrderedDict[Path, ServedAdapter] = OrderedDict()
        """Saved adapters that were sampled from, the last used at the end."""
        self._queues: dict[tuple[str, str], _Queue] = {}
        self._condition = threading.Condition()
        self._used: dict[str, float] = {}
        """Time of each model's last operation, of those on the device, and in host memory."""
        self._in_host: set[str] = set()
        self._closing = False
        self._stopped: BaseException | None = None
        self._figures = _Figures()

    # On rank 0, from any thread

    def submit(self, operation: Operation) -> Future[Any]:
        """Queue an operation, and return the future of its result. Never blocks.

        The future raises UserError for a fault of the caller, EngineStoppedError if the engine stops before, and other
        errors for faults of the server. Cancelling it before it runs removes it from the queue.
        """
        future: Future[Any] = Future()
        try:
            operation = self._checked(operation)
        except UserError as error:
            future.set_exception(error)
            return future
        with self._condition:
            if self._closing or self._stopped is not None:
                future.set_exception(EngineStoppedError("the server is stopping; send the request again later"))
                return future
            key = _key(operation)
            queue = self._queues.setdefault(key, _Queue())
            if not queue.waiting:  # A model that was idle has no claim on the tokens of that time.
                active = [each.served for each in self._queues.values() if each.waiting]
                queue.served = max(queue.served, min(active, default=0.0))
            queue.waiting.append(_Waiting(operation, future))
            self._condition.notify()
        return future

    def snapshot(self) -> dict[str, float]:
        """Return figures for metrics, by name."""
        figures = self._figures
        with self._condition:
            waiting = [each.operation for queue in self._queues.values() for each in queue.waiting]
            held = list(self._models.values())
            in_host = len(self._in_host)
        adapters = [each for each in held if isinstance(each, ServedAdapter)]
        return {
            "queued_operations": len(waiting),
            "queued_tokens": sum(map(_cost, waiting)),
            "rounds_total": figures.rounds,
            "busy_seconds_total": figures.busy_seconds,
            "trained_tokens_total": figures.trained_tokens,
            "forward_tokens_total": figures.forward_tokens,
            "sampled_tokens_total": figures.sampled_tokens,
            "optimizer_steps_total": figures.optimizer_steps,
            "failed_operations_total": figures.failed,
            "last_batch_models": figures.last_models,
            "last_batch_rows": figures.last_rows,
            "models": len(held),
            "models_in_host_memory": in_host,
            "models_on_disk": len(held) - len(adapters),
            "sampling_snapshots": len(self._snapshots),
            "adapter_bytes": sum(adapter.nbytes() for adapter in adapters),
        }

    def close(self) -> None:
        """Take no more operations; `run` returns on every rank once the queue is empty."""
        with self._condition:
            self._closing = True
            self._condition.notify()

    def _checked(self, operation: Operation) -> Operation:
        """Return an operation with its seed. Raises UserError for one that cannot be run."""
        if isinstance(operation, ForwardBackward):
            check_call(operation, vocabulary=self._model.vocabulary.rows, context=self._context)
        elif isinstance(operation, Sample):
            self._sampler.check(operation)
            if operation.seed is None:
                operation = replace(operation, seed=secrets.randbits(62))
        elif isinstance(operation, CreateModel):
            adapter_config(operation.adapter)
            if operation.adapter.seed is None:
                operation = replace(operation, adapter=replace(operation.adapter, seed=secrets.randbits(31)))
        elif isinstance(operation, OptimStep):
            _check_step(operation)
        return operation

    # On every rank, in the thread that computes

    def run(self) -> None:
        """Run rounds until `close`, or a request to stop, and until the queue is empty. Every rank must call it."""
        error: BaseException = EngineStoppedError("the server has stopped; send the request again later")
        is_stopping = False
        try:
            while True:
                try:
                    self._boundary(None, "waiting for operations", long=True)
                except Stopped:
                    if not is_stopping:
                        self._on_stop()
                    is_stopping = True
                taken = self._take() if self._backend.writes else []
                sent = None if taken is None else [operation for operation, _ in taken]
                operations = shared(sent, (*typing.get_args(Operation), _Park), self._backend.ranks)
                if operations is None:
                    break
                self._round(operations, [future for _, future in taken or []])
        except BaseException as failure:
            error = failure
            raise
        finally:
            with self._condition:
                self._stopped = error
                for queue in self._queues.values():
                    for each in queue.waiting:
                        each.future.set_exception(EngineStoppedError(f"the engine has stopped: {error}"))
                    queue.waiting.clear()

    def _take(self) -> list[tuple[Operation | _Park, Future[Any] | None]] | None:
        """Return the next round on rank 0, in the order in which it runs; None if no round follows."""
        with self._condition:
            if not any(queue.waiting for queue in self._queues.values()) and not self._closing:
                self._condition.wait(IDLE_ROUND_SECONDS)
            self._queues = {
                key: queue for key, queue in self._queues.items() if queue.waiting or key[1] in self._models
            }
            queues = [queue for queue in self._queues.values() if queue.waiting]
            if not queues and self._closing:
                return None
            spent = [0, 0, 0, 0]
            taken: list[tuple[Operation | _Park, Future[Any] | None]] = []
            for queue in sorted(queues, key=lambda queue: queue.served)[:MOST_MODELS]:
                taken += self._taken_of(queue, spent)
        taken.sort(key=lambda each: _phase(each[0]))
        return [*taken, *((parked, None) for parked in self._idle({each[0].model_id for each in taken}))]

    def _taken_of(self, queue: _Queue, spent: list[int]) -> Iterator[tuple[Operation, Future[Any]]]:
        """Remove and yield the first operations of a queue that fit the round, of which so many tokens are spent."""
        phase = 0
        while queue.waiting:
            operation = queue.waiting[0].operation
            next_phase, cost = _phase(operation), _cost(operation)
            if next_phase < phase or (spent[next_phase] and spent[next_phase] + cost > self._limits.round_tokens):
                return
            future, phase = queue.waiting.popleft().future, next_phase
            if future.set_running_or_notify_cancel():
                spent[phase] += cost
                queue.served += cost
                yield operation, future

    def _idle(self, busy: Iterable[str | None]) -> Iterator[_Park]:
        """Yield what leaves the device, or host memory, on rank 0."""
        now, busy = time.monotonic(), set(busy)
        self._used |= {each: now for each in busy if each in self._used}
        quiet = [
            (now - used, model_id)
            for model_id, used in sorted(self._used.items(), key=lambda item: item[1])
            if model_id not in busy and not self._is_pinned(model_id)
        ]
        surplus = len(self._used) - len(self._in_host) - self._limits.most_on_device
        for seconds, model_id in quiet:
            in_host = model_id in self._in_host
            is_surplus = surplus > 0 and not in_host
            surplus -= is_surplus
            if seconds > self._limits.disk_seconds and self._spill_folder is not None:
                yield _Park(model_id, on_disk=True)
            elif not in_host and (is_surplus or seconds > self._limits.host_seconds):
                yield _Park(model_id, on_disk=False)

    def _is_pinned(self, model_id: str) -> bool:
        """Return whether a model has gradients that no optimizer step has taken."""
        adapter = self._models.get(model_id)
        return not isinstance(adapter, ServedAdapter) or adapter.has_gradients

    def _round(self, operations: Sequence[Operation | _Park], futures: Sequence[Future[Any] | None]) -> None:
        """Run a round's operations, whose futures rank 0 has."""
        if not operations:
            return
        began = time.monotonic()
        waiting = dict(enumerate(futures))

        def answer(index: int, result: Result | BaseException) -> None:
            future = waiting.pop(index, None)
            if isinstance(result, BaseException):
                self._figures.failed += 1
            if future is None:
                return
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

        try:
            for phase, run in ((0, self._run_states), (1, self._run_rows), (2, self._run_rows), (3, self._run_samples)):
                mine = [(index, each) for index, each in enumerate(operations) if _phase(each) == phase]
                if mine:
                    run(mine, answer)
        except BaseException as error:
            for future in waiting.values():
                if future is not None:
                    future.set_exception(EngineStoppedError(f"the engine has failed: {type(error).__name__}"))
            raise
        self._figures.rounds += 1
        self._figures.busy_seconds += time.monotonic() - began

    def _run_states(self, operations: Sequence[tuple[int, Any]], answer: Callable[[int, Any], None]) -> None:
        for index, operation in operations:
            watch.at(None, type(operation).__name__, long=True)
            try:
                answer(index, self._run_state(operation))
            except (UserError, OSError) as error:  # A disk that refuses a write does so on rank 0 alone.
                answer(index, error)

    def _run_state(self, operation: Any) -> Result:
        """Run an operation on a model's state."""
        model_id = operation.model_id
        if isinstance(operation, CreateModel):
            if model_id in self._models:
                raise UserError(f"model {model_id} exists already")
            if operation.adapter.unembed and self._backend.sharded and not isinstance(self._model.head, FSDPModule):
                raise UserError("train_unembed=True needs a base sharded by FSDP2 or whole; set train_unembed=False")
            self._hold(model_id, self._made(operation.adapter))
            return None
        if isinstance(operation, Unload):
            held = self._models.pop(model_id, None)
            if held is None:
                raise _unknown(model_id)
            self._forget(model_id, held)
            return None
        if isinstance(operation, _Park):
            self._park(model_id, on_disk=operation.on_disk)
            return None
        adapter = self.adapter(model_id)
        if isinstance(operation, OptimStep):
            norm = adapter.step(operation)
            self._figures.optimizer_steps += 1
            return OptimStepResult({"optimizer/step": float(adapter.steps), "grad_norm": norm})
        if isinstance(operation, Save):
            adapter.save(operation.folder, optimizer=operation.optimizer)
        else:
            assert isinstance(operation, Load), f"{type(operation).__name__} is no operation"
            check_whole(operation.folder, self._backend)
            together(lambda: adapter.load(operation.folder, optimizer=operation.optimizer), self._backend.ranks)
        return None

    def _run_rows(self, operations: Sequence[tuple[int, Any]], answer: Callable[[int, Any], None]) -> None:
        """Run forwards, or forwards and backwards, of all models together."""
        calls: dict[int, Call] = {}
        for index, operation in operations:
            try:
                calls[index] = Call(operation, self.adapter(operation.model_id))
            except UserError as error:
                answer(index, error)
        if not calls:
            return
        backward = next(iter(calls.values())).operation.backward
        results = self._passes.run(list(calls.values()), backward=backward)
        tokens = sum(_cost(call.operation) for call in calls.values())
        figures = self._figures
        if backward:
            figures.trained_tokens += tokens
            figures.last_models = len({call.operation.model_id for call in calls.values()})
            figures.last_rows = sum(len(call.operation.rows) for call in calls.values())
        else:
            figures.forward_tokens += tokens
        for index, result in zip(calls, results, strict=True):
            answer(index, result)

    def _run_samples(self, operations: Sequence[tuple[int, Any]], answer: Callable[[int, Any], None]) -> None:
        """Sample for all models together."""
        calls: dict[int, Sampling] = {}
        for index, operation in operations:
            try:
                calls[index] = Sampling(operation, self._sampled_adapter(operation))
            except UserError as error:
                answer(index, error)
        if not calls:
            return
        results = self._sampler.run(list(calls.values()))
        for index, result in zip(calls, results, strict=True):
            self._figures.sampled_tokens += sum(len(sequence.tokens) for sequence in result.sequences)
            answer(index, result)

    def _sampled_adapter(self, operation: Sample) -> ServedAdapter | None:
        if operation.model_id is not None:
            return self.adapter(operation.model_id)
        folder = operation.weights_folder
        if folder is None:
            return None
        if folder not in self._snapshots:
            self._snapshots[folder] = self._loaded(folder, optimizer=False)
            if len(self._snapshots) > self._limits.snapshots:
                self._snapshots.popitem(last=False)
        self._snapshots.move_to_end(folder)
        return self._snapshots[folder]

    # Where the adapters are, on every rank alike

    def _made(self, adapter: Adapter) -> ServedAdapter:
        return ServedAdapter(self._model, self._backend, self._spec, adapter)

    def _loaded(self, folder: Path, *, optimizer: bool) -> ServedAdapter:
        """Return a new adapter with what was saved in a folder. Raises UserError, on every rank, if that fails."""

        def load() -> ServedAdapter:
            adapter = self._made(read_saved(folder)[0])
            adapter.load(folder, optimizer=optimizer)
            return adapter

        check_whole(folder, self._backend)
        return together(load, self._backend.ranks)

    def _hold(self, model_id: str, adapter: ServedAdapter) -> None:
        with self._condition:
            self._models[model_id] = adapter
        self._used[model_id] = time.monotonic()

    def adapter(self, model_id: str) -> ServedAdapter:
        """Return a model's adapter, read from the disk if it is there. Raises UserError for an unknown model."""
        held = self._models.get(model_id)
        if held is None:
            raise _unknown(model_id)
        if isinstance(held, Path):
            self._hold(model_id, self._loaded(held, optimizer=True))
            self._remove(held)
        self._used[model_id] = time.monotonic()
        self._in_host.discard(model_id)
        adapter = self._models[model_id]
        assert isinstance(adapter, ServedAdapter)
        return adapter

    def _park(self, model_id: str, *, on_disk: bool) -> None:
        """Move an idle model to host memory or to a folder. A disk that refuses it leaves it in host memory."""
        adapter = self._models.get(model_id)
        if not isinstance(adapter, ServedAdapter):
            return
        adapter.move(torch.device("cpu"))
        adapter.drop_gradients()
        self._in_host.add(model_id)
        if not on_disk or self._spill_folder is None:
            return
        folder = self._spill_folder / hashlib.sha256(model_id.encode()).hexdigest()[:32]
        refused: OSError | None = None
        try:
            adapter.save(folder, optimizer=True)
        except OSError as error:
            refused = error
        if from_rank_0(int(refused is not None), self._backend.ranks):
            self._used[model_id] = time.monotonic()  # Try again later.
            print(f"WARNING: {folder} could not be written ({refused}); an idle model stays in host memory", flush=True)
            return
        with self._condition:
            self._models[model_id] = folder
        self._forget(model_id, None)

    def _forget(self, model_id: str, held: ServedAdapter | Path | None) -> None:
        """Forget where a model is, after it has left."""
        self._used.pop(model_id, None)
        self._in_host.discard(model_id)
        if isinstance(held, Path):
            self._remove(held)

    def _remove(self, folder: Path) -> None:
        if self._backend.writes:
            shutil.rmtree(folder, ignore_errors=True)


def _key(operation: Operation) -> tuple[str, str]:
    """Return the queue of an operation: its model's, else that of what it samples from."""
    if operation.model_id is None:
        assert isinstance(operation, Sample), "an operation without a model"
        return "folder", str(operation.weights_folder)
    return "model", operation.model_id


def _unknown(model_id: str) -> UserError:
    return UserError(f"model {model_id} does not exist, or was unloaded; create it")


def _check_step(step: OptimStep) -> None:
    """Raise UserError for settings of AdamW that are not valid."""
    valid = {
        f"learning_rate={step.learning_rate}": 0 <= step.learning_rate < 1e3,
        f"beta1={step.beta1}": 0 <= step.beta1 < 1,
        f"beta2={step.beta2}": 0 <= step.beta2 < 1,
        f"eps={step.eps}": 0 <= step.eps < 1,
        f"weight_decay={step.weight_decay}": 0 <= step.weight_decay < 1e3,
        f"grad_clip_norm={step.grad_clip_norm}": 0 <= step.grad_clip_norm < 1e9,
    }
    for setting, is_valid in valid.items():
        if not is_valid:
            raise UserError(f"optim_step: {setting} is not valid for AdamW")
