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
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distlora.config import require
from distlora.config.serve import ServeConfig
from distlora.serving import wire
from distlora.serving.futures import Call, Calls, Reply, json_reply
from distlora.serving.operations import Adapter, CreateModel, Load, Operation, OptimStep, Save, Unload
from distlora.serving.store import SAMPLER, TRAINING, Row, Store, adapter_of

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
    vocabulary: int
    stop_tokens: tuple[int, ...]
    """Tokens that end an answer where the client names no stop."""


class RefusedError(Exception):
    """A call that gets an HTTP status of its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def missing(what: str, name: str) -> RefusedError:
    """Return the error for something that a user does not have, which says nothing of whether others do."""
    return RefusedError(404, f"you have no {what} {name!r:.160}")


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
        row = self.store.model(owner, model_id)
        if row is None or row["unloaded"]:
            raise missing("model", model_id)
        return row

    def _check_base(self, name: str | None) -> None:
        if name is not None and name not in self.base.names:
            raise missing("base model", f"{name}; this server has {', '.join(self.base.names)}")

    def _check_session(self, owner: str, session: str) -> None:
        if self.store.session(owner, session) is None:
            raise missing("session", session)

    def _check_adapter(self, owner: str, adapter: Adapter) -> None:
        most = self.settings.max_rank
        require(adapter.rank <= most, f"lora_config.rank={adapter.rank} is above the limit of {most}")
        count = sum(user == owner for user in self.loaded.values())
        if count >= self.settings.max_adapters:
            raise RefusedError(403, f"{count} adapters are loaded, which is the limit; unload one, or end a session")

    def _check_tokens(self, tokens: Sequence[int] | np.ndarray, new: int, what: str) -> None:
        values = np.asarray(tokens)
        largest = self.base.vocabulary - 1
        within = bool((values >= 0).all() and (values <= largest).all())
        require(within, f"{what} has a token that is not within 0 and {largest}")
        require(
            len(values) + new <= self.base.context,
            f"{what} has {len(values)} tokens and {new} new ones, and the model's context is {self.base.context}",
        )

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

    def create_model(self, owner: str, body: wire.Body, data: bytes) -> dict[str, object]:
        """Create an adapter."""
        session, seq = body.text("session_id"), body.integer("model_seq_id")
        self._check_session(owner, session)
        name = body.text("base_model")
        self._check_base(name)
        adapter, model_id = wire.adapter_of(body), f"{session}:train:{seq}"
        if adapter.seed is None:
            adapter = replace(adapter, seed=secrets.randbits(SEED_BITS))

        def submit() -> Finish:
            self._check_adapter(owner, adapter)
            created = self._submit(CreateModel(model_id, adapter))
            self.loaded[model_id] = owner

            async def finish() -> Reply:
                await self._created(model_id, created)
                about = body.object("user_metadata").values
                self.store.add_model(owner, session, model_id, name, adapter, about, None)
                return json_reply(type="create_model", model_id=model_id)

            return finish

        return self._start(owner, f"{model_id}:0", data, 0, submit) | {"model_id": model_id}

    async def _created(self, model_id: str, *operations: Awaitable[Any]) -> None:
        """Wait for operations that make a model; if one fails there is none."""
        try:
            for operation in operations:
                await operation
        except BaseException:
            self.loaded.pop(model_id, None)
            raise

    def load_weights(self, owner: str, body: wire.Body, data: bytes) -> dict[str, object]:
        """Load a checkpoint into a model, or into a new one."""
        require(not body.values.get("weights_access_token"), "weights_access_token is not supported; leave it out")
        path, with_optimizer = body.text("path"), body.flag("optimizer", False)
        saved = self.store.checkpoint(owner, path)
        if saved is None:
            raise missing("checkpoint", path)
        has_states = saved["kind"] == TRAINING
        require(has_states or not with_optimizer, f"{path} has no optimizer states; load it without them")
        source = self.store.weights / saved["folder"]
        if body.values.get("session_id") is None:
            model_id = body.text("model_id")
            require(
                adapter_of(self._known(owner, model_id)).rank == adapter_of(saved).rank,
                f"{path} has rank {adapter_of(saved).rank}, another one than {model_id}",
            )

            def submit(row: Row) -> Finish:
                reply: dict[str, object] = {"type": "load_weights", "path": path, "model_id": model_id}
                return self._step(row, body.integer("seq_id"), Load(model_id, source, with_optimizer), reply)

            return self._training_call(owner, model_id, body.integer("seq_id"), data, submit, changes=True)
        session, seq = body.text("session_id"), body.integer("model_seq_id")
        self._check_session(owner, session)
        self._check_base(body.optional_text("base_model"))
        new_id = f"{session}:train:{seq}"

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
                about = body.object("user_metadata").values
                self.store.add_model(owner, session, new_id, saved["base"], adapter_of(saved), about, folder)
                return json_reply(type="load_weights", path=path, model_id=new_id)

            return finish

        return self._start(owner, f"{new_id}:0", data, 0, submit_new) | {"model_id": new_id}

    def unload_model(self, owner: str, body: wire.Body, data: bytes) -> dict[str, object]:
        """Forget a model for good; its checkpoints stay."""
        model_id = body.text("model_id")

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

    def forward_backward(self, owner: str, data: bytes) -> dict[str, object]:
        """Compute losses of rows and, unless the call is forward only, add their gradients."""
        operation, seq = wire.forward_backward(data)
        for index, row in enumerate(operation.rows):
            self._check_tokens(row.tokens, 0, f"datum {index}")
            if "target_tokens" in row.inputs:
                self._check_tokens(row.inputs["target_tokens"], 0, f"target_tokens of datum {index}")
        tokens = sum(len(row.tokens) for row in operation.rows)

        def submit(_: Row) -> Finish:
            computed = self._submit(operation)

            async def finish() -> Reply:
                return Reply(wire.forward_backward_output(await computed), wire.PROTOBUF)

            return finish

        return self._training_call(
            owner, operation.model_id, seq, data, submit, tokens=tokens, changes=operation.backward
        )

    def optim_step(self, owner: str, body: wire.Body, data: bytes) -> dict[str, object]:
        """Make an optimizer step."""
        operation, seq = wire.optim_step(body), body.integer("seq_id")

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

    def save(self, owner: str, body: wire.Body, data: bytes, kind: str) -> dict[str, object]:
        """Save weights, and for TRAINING the optimizer states too."""
        model_id, seq, name = body.text("model_id"), body.integer("seq_id"), wire.checkpoint_name(body)
        sampler_seq = None
        if kind == SAMPLER and name is None:
            sampler_seq = body.integer("sampling_session_seq_id")
        seconds = None if body.values.get("ttl_seconds") is None else body.integer("ttl_seconds")
        require(seconds is None or 0 < seconds < 1 << 40, f"ttl_seconds={seconds} is not a time")
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
                        about=body.object("user_metadata").values,
                        overwrite=body.flag("overwrite", False),
                        sampler_seq=sampler_seq,
                    )
                except Exception:
                    self.store.remove(folder.name)
                    raise
                return Reply(self.store.reply(owner, f"{model_id}:{seq}") or b"")

            return finish

        return self._training_call(owner, model_id, seq, data, submit)

    # Sampling.

    def create_sampling_session(self, owner: str, body: wire.Body) -> dict[str, object]:
        """Keep which weights a sampling client samples from."""
        session = body.text("session_id")
        self._check_session(owner, session)
        path, name = body.optional_text("model_path"), body.optional_text("base_model")
        saved = self._weights(owner, path, name)
        base = saved["base"] if saved is not None else name
        folder = None if saved is None else saved["folder"]
        seq = body.integer("sampling_session_seq_id")
        sampler = self.store.add_sampler(owner, session, seq, base or self.base.names[0], folder, path)
        return {"type": "create_sampling_session", "sampling_session_id": sampler}

    def _weights(self, owner: str, path: str | None, name: str | None) -> Row | None:
        """Return the checkpoint of a path, or None for the base alone."""
        require(path is not None or name is not None, "model_path and base_model are both missing; send one of them")
        self._check_base(name)
        if path is None:
            return None
        saved = self.store.checkpoint(owner, path)
        if saved is None:
            raise missing("checkpoint", path)
        return saved

    def sample(self, owner: str, body: wire.Body, data: bytes) -> dict[str, object]:
        """Sample answers to a prompt."""
        operation = wire.sample(body, self.base.stop_tokens)
        scored = wire.last_n(body, len(operation.tokens))
        room = self.base.context - len(operation.tokens)
        most = operation.max_tokens or max(room, 1)
        operation = replace(operation, max_tokens=most)
        self._check_tokens(operation.tokens, most, "the prompt")
        sampler_id = body.optional_text("sampling_session_id")
        if sampler_id is None:
            saved = self._weights(owner, body.optional_text("model_path"), body.optional_text("base_model"))
            folder, request_id = None if saved is None else saved["folder"], f"sample:{secrets.token_hex(12)}"
        else:
            sampler = self.store.sampler(owner, sampler_id)
            if sampler is None:
                raise missing("sampling session", sampler_id)
            folder, request_id = sampler["folder"], f"{sampler_id}:{body.integer('seq_id')}"
        if folder is not None:
            operation = replace(operation, weights_folder=self.store.weights / folder)
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
