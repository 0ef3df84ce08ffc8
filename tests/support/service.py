"""A server with a deterministic engine in place of a model, and what its tests send."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from distlora.config.serve import ServeConfig
from distlora.serving.app import Server, start_http
from distlora.serving.keys import add_users
from distlora.serving.losses import check_call
from distlora.serving.operations import (
    CreateModel,
    ForwardBackward,
    ForwardBackwardResult,
    Load,
    Operation,
    OptimStep,
    OptimStepResult,
    Sample,
    SampledSequence,
    SampleResult,
    Save,
    Unload,
)
from distlora.serving.sampler import check_sample
from distlora.serving.service import ServedBase

CONTEXT, VOCABULARY = 64, 100
STOP = (7,)
"""Tokens that end a completion of a call that names none."""
BASE = ServedBase(("Qwen/Qwen3-8B", "base"), "tokenizer", CONTEXT)


class CountingEngine:
    """An engine whose models are a number: each step adds the gradients, which are the sums of the rows' weights."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.gradients: dict[str, float] = {}
        self.done: list[Operation] = []
        self.held: list[tuple[Future[Any], Operation]] | None = None
        """A list: operations wait in it until `release`."""

    def submit(self, operation: Operation) -> Future[Any]:
        future: Future[Any] = Future()
        if self.held is not None:
            self.held.append((future, operation))
        else:
            self._run(future, operation)
        return future

    def release(self) -> None:
        held, self.held = self.held or [], None
        for future, operation in held:
            self._run(future, operation)

    def _run(self, future: Future[Any], operation: Operation) -> None:
        try:
            future.set_result(self._do(operation))
        except Exception as error:
            future.set_exception(error)

    def _do(self, operation: Operation) -> Any:
        self.done.append(operation)
        match operation:
            case CreateModel(model_id, adapter):
                self.values[model_id], self.gradients[model_id] = float(adapter.rank), 0.0
            case ForwardBackward(model_id, rows):
                check_call(operation, vocabulary=VOCABULARY, context=CONTEXT)
                logprobs = [-row.tokens.astype(np.float32) for row in rows]
                losses = [-row.inputs["weights"] * values for row, values in zip(rows, logprobs, strict=True)]
                if operation.backward:
                    self.gradients[model_id] += float(sum(row.inputs["weights"].sum() for row in rows))
                return ForwardBackwardResult(logprobs, losses, {"loss:sum": float(sum(map(np.sum, losses)))})
            case OptimStep(model_id, rate):
                self.values[model_id] += rate * self.gradients[model_id]
                self.gradients[model_id] = 0.0
                return OptimStepResult({"value": self.values[model_id]})
            case Save(model_id, folder):
                folder.mkdir()
                (folder / "value").write_text(repr(self.values[model_id]))
            case Load(model_id, folder):
                self.values[model_id] = float((folder / "value").read_text())
            case Unload(model_id):
                del self.values[model_id]
            case Sample():
                check_sample(operation, vocabulary=VOCABULARY, context=CONTEXT)
                folder = operation.weights_folder
                value = 0.0 if folder is None else float((folder / "value").read_text())
                stops = STOP if operation.stop_tokens is None else operation.stop_tokens
                one = SampledSequence([1, *stops], [value, *[-1.0] * len(stops)], "stop")
                scores = [None, *[-0.5] * (len(operation.tokens) - 1)] if operation.prompt_logprobs else None
                return SampleResult([one] * operation.num_samples, scores)
        return None

    def snapshot(self) -> dict[str, float]:
        return {"models": len(self.values)}


class Started:
    """A server with its engine and a key per user."""

    def __init__(self, folder: Path, keys: dict[str, str], settings: ServeConfig) -> None:
        self.keys, self.folder, self.engine = keys, folder, CountingEngine()
        self.server: Server = start_http(self.engine, settings, BASE, folder)
        self.url = f"http://127.0.0.1:{self.server.port}"

    def post(self, user: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        data = {"content": body} if isinstance(body, bytes) else {"json": {} if body is None else body}
        headers = {"X-API-Key": self.keys.get(user, user), "Accept": "application/x-protobuf, application/json"}
        return httpx.post(f"{self.url}/api/v1/{path}", **data, headers=headers | options.pop("headers", {}), **options)

    def get(self, user: str, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}/api/v1/{path}", headers={"X-API-Key": self.keys[user]})

    def result(self, user: str, request_id: str) -> httpx.Response:
        return self.post(user, "retrieve_future", {"request_id": request_id}, timeout=10)

    def session(self, user: str) -> str:
        created = self.post(user, "create_session", {"tags": [], "sdk_version": "0.38.0", "user_metadata": None})
        return str(created.json()["session_id"])

    def model(self, user: str, session: str, number: int = 0, **lora: Any) -> httpx.Response:
        body = {"session_id": session, "model_seq_id": number, "base_model": "base", "lora_config": {"rank": 4} | lora}
        return self.post(user, "create_model", body)


@contextlib.contextmanager
def started(folder: Path, keys: dict[str, str] | None = None, **settings: Any) -> Iterator[Started]:
    """Serve in a folder; keys: of an earlier start in it."""
    config = ServeConfig(port=0, users=("ann", "ben"), drain_seconds=2.0, **settings)
    service = Started(folder, (keys or {}) | add_users(folder, config.users), config)
    try:
        yield service
    finally:
        service.engine.release()
        service.server.stop()
