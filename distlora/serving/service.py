"""Do what clients of a training service ask for: check limits, hand operations to the engine, keep what is done.

Every method is called on the event loop and submits its operations before it waits for anything, so the engine gets a
model's calls in the order in which they came. A user's ids are looked up together with the user: those of others do not
exist for him.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tinker import types

from distlora.config import require
from distlora.config.serve import ServeConfig
from distlora.serving import wire
from distlora.serving.futures import Call, Calls, Reply, json_reply
from distlora.serving.operations import (
    Adapter,
    CreateModel,
    ForwardBackward,
    Load,
    Operation,
    OptimStep,
    Save,
    Unload,
)
from distlora.serving.store import SAMPLER, TRAINING, RefusedError, Row, Store, adapter_of, missing

log = logging.getLogger("distlora.serve")

Finish = Callable[[], Awaitable[Reply]]
"""Waits for the operations of a call and makes its reply."""

SEED_BITS = 31


class EngineLike(Protocol):
    """Methods of the engine that the service calls."""

    def submit(self, operation: Operation) -> Future[Any]:
        """Queue an operation behind the model's others, and return its result to come."""

    def snapshot(self) -> dict[str, float]:
        """Return figures of the engine by name."""


@dataclass(frozen=True, slots=True)
class ServedBase:
    """Facts about the base that clients are told."""

    names: tuple[str, ...]
    """Names by which clients ask for it; the first one is told to those who do not."""
    tokenizer: str
    """Name or folder that clients load its tokenizer by."""
    context: int
    """Most tokens of a sequence."""


class Service:
    """The calls of all users on one engine."""

    def __init__(self, engine: EngineLike, settings: ServeConfig, base: ServedBase, folder: Path) -> None:
        self.engine, self.settings, self.base = engine, settings, base
        self.store = Store(folder)
        self.calls = Calls()
        self.loaded: dict[str, str] = {}
        """Owner of each model that the engine holds."""
        self.last_seq: dict[str, int] = {}
        """Largest seq_id of each model that was taken."""
        self.steps: dict[str, int] = {}
        """Optimizer steps of each model since its snapshot."""

    # What several calls share.

    def _submit(self, operation: Operation) -> asyncio.Future[Any]:
        return asyncio.wrap_future(self.engine.submit(operation))

    def _start(
        self,
        owner: str,
        request_id: str,
        body: bytes,
        tokens: int,
        submit: Callable[[], Finish],
    ) -> dict[str, object]:
        """Start a call unless the client sent it before; return what the client asks for its result with.

        submit: hands the operations to the engine and returns what waits for them.
        """
        fingerprint = hashlib.sha256(body).digest()
        before = self.calls.find(owner, request_id)
        if before is not None:
            require(before.fingerprint == fingerprint, "seq_id was used for another call; count up")
        elif self.store.reply(owner, request_id) is None:
            limit = self.settings.max_tokens_in_flight
            if tokens > limit:
                raise RefusedError(413, f"the call has {tokens:,} tokens, above the limit of {limit:,}; send fewer")
            if (
                self.calls.tokens[owner] + tokens > limit
                or self.calls.in_flight[owner] >= self.settings.max_calls_in_flight
            ):
                raise RefusedError(
                    429, f"calls with {self.calls.tokens[owner]:,} tokens wait already; send fewer at once"
                )
            finish = submit()
            self.calls.start(Call(owner, request_id, fingerprint, tokens), finish)
        return {"request_id": request_id}

    def _known(self, owner: str, model_id: str) -> Row:
        row = self.store.owned("model", owner, model_id)
        if row["unloaded"]:
            raise missing("model", model_id)
        return row

    def _check_base(self, name: str | None) -> None:
        if name is not None and name not in self.base.names:
            raise missing("base model", f"{name}; this server has {', '.join(self.base.names)}")

    def _check_adapter(self, owner: str, adapter: Adapter) -> None:
        most = self.settings.max_rank
        require(adapter.rank <= most, f"lora_config.rank={adapter.rank} is above the limit of {most}")
        count = sum(user == owner for user in self.loaded.values())
        if count >= self.settings.max_adapters:
            raise RefusedError(403, f"{count} adapters are loaded, which is the limit; unload one, or end a session")

    def _check_disk(self, owner: str) -> None:
        used, most = self.store.disk_bytes(owner), self.settings.max_disk_bytes
        if used >= most:
            raise RefusedError(403, f"your checkpoints have {used:,} bytes, the limit is {most:,}; delete some")

    def _training_call(
        self,
        owner: str,
        model_id: str,
        seq: int,
        body: bytes,
        submit: Callable[[Row], Finish],
        *,
        tokens: int = 0,
        changes: bool = False,
    ) -> dict[str, object]:
        """Start a call of a model in its order. changes: a crash before the next snapshot loses what it did."""
        row = self._known(owner, model_id)
        require(0 < seq < 1 << 31, f"seq_id={seq} is not within 1 and {(1 << 31) - 1}")

        def in_order() -> Finish:
            if seq <= self.last_seq.get(model_id, row["done_seq"]):
                raise RefusedError(410, f"seq_id={seq} of {model_id} is done, and its result is forgotten")
            if model_id not in self.loaded:
                self._load(row)
            pending = row["pending_seq"]
            if pending is not None and pending < seq and model_id not in self.last_seq:
                self.store.note_pending(model_id, None)
                raise RefusedError(
                    410,
                    f"the server restarted, and {model_id} is as it was after seq_id={row['done_seq']}: calls from "
                    f"seq_id={pending} on are lost; send them again, or load a checkpoint",
                )
            finish = submit(row)
            self.last_seq[model_id] = seq
            if changes and (pending is None or pending > seq):
                self.store.note_pending(model_id, seq)
            return finish

        return self._start(owner, f"{model_id}:{seq}", body, tokens, in_order) | {"model_id": model_id}

    def _load(self, row: Row) -> None:
        """Have the engine hold a model again, as its snapshot has it."""
        operations: list[Operation] = [CreateModel(row["id"], adapter_of(row))]
        if row["state"] is not None:
            operations.append(Load(row["id"], self.store.weights / row["state"], optimizer=True))
        for operation in operations:
            self.engine.submit(operation).add_done_callback(_log_fault)
        self.loaded[row["id"]] = row["owner"]

    # Models.

    def create_model(self, owner: str, request: types.CreateModelRequest, data: bytes) -> dict[str, object]:
        """Create an adapter."""
        session, name = request.session_id, request.base_model
        model_id = self._new_model(owner, session, request.model_seq_id)
        self._check_base(name)
        adapter, about = wire.adapter_of(request), wire.metadata(request.user_metadata)
        if adapter.seed is None:
            adapter = replace(adapter, seed=secrets.randbits(SEED_BITS))

        def submit() -> Finish:
            self._check_adapter(owner, adapter)
            created = self._submit(CreateModel(model_id, adapter))
            self.loaded[model_id] = owner

            async def finish() -> Reply:
                await self._created(model_id, created)
                self.store.add_model(owner, session, model_id, name, adapter, about, None)
                return json_reply(type="create_model", model_id=model_id)

            return finish

        return self._start(owner, f"{model_id}:0", data, 0, submit) | {"model_id": model_id}

    def _new_model(self, owner: str, session: str, seq: int | None) -> str:
        """Return the id of a session's model."""
        self.store.owned("session", owner, session)
        return f"{session}:train:{wire.counted('model_seq_id', seq)}"

    async def _created(self, model_id: str, *operations: Awaitable[Any]) -> None:
        """Wait for operations that make a model; if one fails there is none."""
        try:
            for operation in operations:
                await operation
        except BaseException:
            self.loaded.pop(model_id, None)
            raise

    def load_weights(self, owner: str, request: types.LoadWeightsRequest, data: bytes) -> dict[str, object]:
        """Load a checkpoint into a model, or into a new one."""
        require(not request.weights_access_token, "weights_access_token is not supported; leave it out")
        wire.check_optimizer(request.optimizer_config)
        path, with_optimizer = request.path, request.optimizer
        saved = self.store.checkpoint(owner, path)
        has_states = saved["kind"] == TRAINING
        require(has_states or not with_optimizer, f"{path} has no optimizer states; load it without them")
        source = self.store.weights / saved["folder"]
        if request.session_id is None:
            model_id, seq = request.model_id or "", wire.counted("seq_id", request.seq_id)
            require(
                adapter_of(self._known(owner, model_id)).rank == adapter_of(saved).rank,
                f"{path} has rank {adapter_of(saved).rank}, another one than {model_id}",
            )

            def submit(row: Row) -> Finish:
                reply: dict[str, object] = {"type": "load_weights", "path": path, "model_id": model_id}
                return self._step(row, seq, Load(model_id, source, with_optimizer), reply)

            return self._training_call(owner, model_id, seq, data, submit, changes=True)
        session, about = request.session_id, wire.metadata(request.user_metadata)
        new_id = self._new_model(owner, session, request.model_seq_id)
        self._check_base(request.base_model)

        def submit_new() -> Finish:
            self._check_adapter(owner, adapter_of(saved))
            folder = self.store.new_folder()
            operations = (
                self._submit(CreateModel(new_id, adapter_of(saved))),
                self._submit(Load(new_id, source, with_optimizer)),
                self._submit(Save(new_id, folder, optimizer=True)),
            )
            self.loaded[new_id] = owner

            async def finish() -> Reply:
                await self._created(new_id, *operations)
                self.store.add_model(owner, session, new_id, saved["base"], adapter_of(saved), about, folder)
                return json_reply(type="load_weights", path=path, model_id=new_id)

            return finish

        return self._start(owner, f"{new_id}:0", data, 0, submit_new) | {"model_id": new_id}

    def unload_model(self, owner: str, request: types.UnloadModelRequest, data: bytes) -> dict[str, object]:
        """Forget a model for good; its checkpoints stay."""
        model_id = request.model_id

        def submit() -> Finish:
            self._known(owner, model_id)
            unloaded = self._submit(Unload(model_id)) if model_id in self.loaded else None
            self.loaded.pop(model_id, None)
            self.store.unload(model_id)

            async def finish() -> Reply:
                if unloaded is not None:
                    await unloaded
                return json_reply(type="unload_model", model_id=model_id)

            return finish

        return self._start(owner, f"{model_id}:unload", data, 0, submit) | {"model_id": model_id}

    # Training.

    def forward_backward(self, owner: str, request: tuple[ForwardBackward, int], data: bytes) -> dict[str, object]:
        """Compute losses of rows and, unless the call is forward only, add their gradients."""
        operation, seq = request
        tokens = sum(len(row.tokens) for row in operation.rows)

        def submit(_: Row) -> Finish:
            computed = self._submit(operation)

            async def finish() -> Reply:
                return Reply(wire.forward_backward_output(await computed), wire.PROTOBUF)

            return finish

        return self._training_call(
            owner, operation.model_id, seq, data, submit, tokens=tokens, changes=operation.backward
        )

    def optim_step(self, owner: str, request: types.OptimStepRequest, data: bytes) -> dict[str, object]:
        """Make an optimizer step."""
        operation, seq = wire.optim_step(request), wire.counted("seq_id", request.seq_id)

        def submit(row: Row) -> Finish:
            return self._step(row, seq, operation, {"type": "optim_step"})

        return self._training_call(owner, operation.model_id, seq, data, submit, changes=True)

    def _step(self, row: Row, seq: int, operation: OptimStep | Load, reply: dict[str, object]) -> Finish:
        """Submit an operation that changes a model's state, and a snapshot behind it where one is due."""
        model_id = row["id"]
        self.steps[model_id] = self.steps.get(model_id, 0) + 1
        done = self._submit(operation)
        folder = None
        if isinstance(operation, Load) or self.steps[model_id] >= self.settings.snapshot_steps:
            folder, self.steps[model_id] = self.store.new_folder(), 0
            saved = self._submit(Save(model_id, folder, optimizer=True))

        async def finish() -> Reply:
            result = await done
            values = reply if isinstance(operation, Load) else reply | {"metrics": result.metrics}
            if folder is not None:
                await saved
                self.store.note_snapshot(row, folder, seq, **values)
            return json_reply(**values)

        return finish

    # Checkpoints.

    def save(
        self, owner: str, request: types.SaveWeightsRequest | types.SaveWeightsForSamplerRequest, data: bytes
    ) -> dict[str, object]:
        """Save weights, and with the optimizer states too where the client does not save them for sampling."""
        model_id, seq, sampler_seq = request.model_id, wire.counted("seq_id", request.seq_id), None
        name, about = wire.checkpoint_name(request.path), wire.metadata(request.user_metadata)
        kind, overwrite, seconds = TRAINING, False, request.ttl_seconds
        if isinstance(request, types.SaveWeightsRequest):
            overwrite = request.overwrite
        else:
            kind = SAMPLER
            require(request.kind == "snapshot", f"kind={request.kind} is not supported; leave it out")
            if name is None:
                sampler_seq = wire.counted("sampling_session_seq_id", request.sampling_session_seq_id)
        require(seconds is None or wire.counted("ttl_seconds", seconds) > 0, "ttl_seconds=0 is not a time")
        unnamed = f"{'unnamed' if sampler_seq is not None else 'step'}-{seq}"

        def submit(row: Row) -> Finish:
            self._check_disk(owner)
            folder = self.store.new_folder()
            saved = self._submit(Save(model_id, folder, optimizer=kind == TRAINING))

            async def finish() -> Reply:
                await saved
                try:
                    self.store.add_checkpoint(
                        row,
                        folder,
                        kind=kind,
                        name=name or unnamed,
                        seq=seq,
                        seconds=seconds,
                        about=about,
                        overwrite=overwrite,
                        sampler_seq=sampler_seq,
                    )
                except Exception:
                    self.store.remove(folder.name)
                    raise
                return Reply(self.store.reply(owner, f"{model_id}:{seq}") or b"")

            return finish

        return self._training_call(owner, model_id, seq, data, submit)

    # Sampling.

    def create_sampling_session(self, owner: str, request: types.CreateSamplingSessionRequest) -> dict[str, object]:
        """Keep which weights a sampling client samples from."""
        session, path, name = request.session_id, request.model_path, request.base_model
        self.store.owned("session", owner, session)
        saved = self._weights(owner, path, name)
        base = saved["base"] if saved is not None else name
        folder = None if saved is None else saved["folder"]
        seq = wire.counted("sampling_session_seq_id", request.sampling_session_seq_id)
        sampler = self.store.add_sampler(owner, session, seq, base or self.base.names[0], folder, path)
        return {"type": "create_sampling_session", "sampling_session_id": sampler}

    def _weights(self, owner: str, path: str | None, name: str | None) -> Row | None:
        """Return the checkpoint of a path, or None for the base alone."""
        require(path is not None or name is not None, "model_path and base_model are both missing; send one of them")
        self._check_base(name)
        return None if path is None else self.store.checkpoint(owner, path)

    def sample(self, owner: str, request: types.SampleRequest, data: bytes) -> dict[str, object]:
        """Sample answers to a prompt."""
        operation, scored = wire.sample(request)
        if request.sampling_session_id is None:
            saved = self._weights(owner, request.model_path, request.base_model)
            folder, request_id = None if saved is None else saved["folder"], f"sample:{secrets.token_hex(12)}"
        else:
            sampler = self.store.owned("sampling session", owner, request.sampling_session_id)
            folder, request_id = sampler["folder"], f"{sampler['id']}:{wire.counted('seq_id', request.seq_id)}"
        if folder is not None:
            operation = replace(operation, weights_folder=self.store.weights / folder)
        most = operation.max_tokens or max(self.base.context - len(operation.tokens), 1)
        tokens = len(operation.tokens) + operation.num_samples * most

        def submit() -> Finish:
            if operation.weights_folder is not None and not operation.weights_folder.is_dir():
                raise RefusedError(404, "the weights of this sampling session are deleted; save them again")
            sampled = self._submit(operation)

            async def finish() -> Reply:
                return Reply(wire.sample_response(await sampled, scored), wire.PROTOBUF)

            return finish

        started = self._start(owner, request_id, data, tokens, submit)
        return started | {"sample_sequence_ids": [f"{request_id}:{index}" for index in range(operation.num_samples)]}

    # Results.

    async def result(self, owner: str, request_id: str, seconds: float) -> Reply | None:
        """Return the reply to a call; None: it takes longer than `seconds`."""
        call = self.calls.find(owner, request_id)
        if call is not None:
            return await self.calls.wait(call, seconds)
        kept = self.store.reply(owner, request_id)
        if kept is None:
            raise RefusedError(410, f"there is no call {request_id!r:.160}; the server may have restarted")
        return Reply(kept)

    def drop_idle(self) -> None:
        """Take adapters of idle sessions out of the engine, and delete what has expired."""
        for model_id in self.store.clean(self.settings.idle_minutes * 60):
            owner = self.loaded.pop(model_id, None)
            if owner is not None:
                self.engine.submit(Unload(model_id)).add_done_callback(_log_fault)


def _log_fault(done: Future[Any]) -> None:
    if not done.cancelled() and done.exception() is not None:
        log.error("a model could not be loaded or unloaded: %s", done.exception())
