"""The HTTP side of a training service: routes of the Tinker SDK's protocol, keys, limits of requests, figures, drain.

`docs/service.md` lists what is supported. Every call but the health check and the figures needs an API key.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from tinker import types

from distlora.config import UserError
from distlora.config.serve import ServeConfig
from distlora.serving.futures import Reply
from distlora.serving.keys import find_user, read_hashes
from distlora.serving.service import EngineLike, ServedBase, Service
from distlora.serving.store import RefusedError, Row, adapter_of
from distlora.serving.wire import PROTOBUF, Body, WeightsInfoRequest, forward_backward, metadata, read

log = logging.getLogger("distlora.serve")

POLL_SECONDS = 30.0
"""How long a client waits for a result before it asks again; its own limit is 45."""
BODY_SECONDS = 60.0
"""How long a client may take to send a body."""
CLEAN_SECONDS = 60.0
BUCKETS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0)
"""Upper bounds of the histogram of a route's times, in seconds."""

Handler = Callable[["Call"], Awaitable[Any]]
Read = Callable[[bytes], Any]
"""Makes a request of a body."""
Start = Callable[[str, Any, bytes], dict[str, object]]
"""(user, request, body) -> what the client is told at once."""


@dataclass(frozen=True, slots=True)
class Call:
    """One authenticated request."""

    owner: str
    data: bytes
    request: Request

    def read(self, kind: type[Body]) -> Body:
        """Return the JSON of the body as a request of the SDK."""
        return read(kind, self.data)

    def part(self, name: str) -> str:
        """Return a variable part of the path."""
        return str(self.request.path_params[name])

    def page(self) -> tuple[int, int]:
        """Return offset and limit of a listing."""
        try:
            offset, limit = (int(self.request.query_params.get(name, value)) for name, value in _PAGE)
        except ValueError as error:
            raise UserError("offset or limit is not an integer") from error
        return min(max(offset, 0), 1 << 40), min(max(limit, 1), 1000)


_PAGE = (("offset", "0"), ("limit", "100"))
_ABOUT = ("user_metadata", "display_name")
"""Fields of create_session that the session's description has."""


@dataclass(slots=True)
class Figures:
    """Figures of the requests in /metrics."""

    count: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    buckets: Counter[tuple[str, int]] = field(default_factory=Counter)
    open: Counter[str] = field(default_factory=Counter)
    """Requests of a route that are not answered yet."""

    def add(self, route: str, status: int, seconds: float) -> None:
        """Count a request of a route."""
        self.open[route] -= 1
        self.count[route, status] += 1
        self.seconds[route] += seconds  # type: ignore[assignment]
        self.buckets[route, bisect_left(BUCKETS, seconds)] += 1

    def lines(self) -> list[str]:
        """Return the figures in the text format of Prometheus."""
        name, lines = "distlora_serve_request", []
        lines.append(f"# TYPE {name}s_total counter")
        for (route, status), count in sorted(self.count.items()):
            lines.append(f'{name}s_total{{route="{route}",status="{status}"}} {count}')
        lines.append(f"# TYPE {name}s_open gauge")
        lines += [f'{name}s_open{{route="{route}"}} {count}' for route, count in sorted(self.open.items())]
        lines.append(f"# TYPE {name}_seconds histogram")
        for route in sorted(self.seconds):
            total = 0
            for index, bound in enumerate([*BUCKETS, "+Inf"]):
                total += self.buckets[route, index]
                lines.append(f'{name}_seconds_bucket{{route="{route}",le="{bound}"}} {total}')
            lines.append(f'{name}_seconds_sum{{route="{route}"}} {self.seconds[route]:.6f}')
            lines.append(f'{name}_seconds_count{{route="{route}"}} {total}')
        return lines


class App:
    """Routes of one service. `draining` refuses calls that start work."""

    def __init__(self, service: Service, hashes: dict[str, str]) -> None:
        self.service, self.hashes = service, hashes
        self.figures = Figures()
        self.draining = False
        runs = "/api/v1/training_runs"
        checkpoint = f"{runs}/{{run}}/checkpoints/{{kind}}/{{name}}"
        routes: list[tuple[str, str, Handler]] = [
            ("POST", "/api/v1/client/config", self.client_config),
            ("POST", "/api/v1/client/dynamic_config", self.client_config),
            ("POST", "/api/v1/telemetry", self.telemetry),
            ("GET", "/api/v1/get_server_capabilities", self.capabilities),
            ("POST", "/api/v1/create_session", self.create_session),
            ("POST", "/api/v1/session_heartbeat", self.heartbeat),
            ("POST", "/api/v1/sessions/{session}/finish", self.finish_session),
            ("GET", "/api/v1/sessions/{session}", self.session),
            ("GET", "/api/v1/sessions", self.sessions),
            ("POST", "/api/v1/get_info", self.get_info),
            ("POST", "/api/v1/weights_info", self.weights_info),
            ("POST", "/api/v1/create_sampling_session", self.create_sampling_session),
            ("GET", "/api/v1/samplers/{sampler}", self.sampler),
            ("POST", "/api/v1/retrieve_future", self.retrieve_future),
            ("GET", runs, self.training_runs),
            ("GET", f"{runs}/{{run}}", self.training_run),
            ("GET", f"{runs}/{{run}}/checkpoints", self.run_checkpoints),
            ("DELETE", checkpoint, self.delete_checkpoint),
            ("GET", "/api/v1/checkpoints", self.checkpoints),
        ]
        starts: list[tuple[str, Read, Start]] = [
            ("create_model", partial(read, types.CreateModelRequest), service.create_model),
            ("unload_model", partial(read, types.UnloadModelRequest), service.unload_model),
            ("forward_backward", forward_backward, service.forward_backward),
            ("optim_step", partial(read, types.OptimStepRequest), service.optim_step),
            ("load_weights", partial(read, types.LoadWeightsRequest), service.load_weights),
            ("save_weights", partial(read, types.SaveWeightsRequest), service.save),
            ("save_weights_for_sampler", partial(read, types.SaveWeightsForSamplerRequest), service.save),
            ("asample", partial(read, types.SampleRequest), service.sample),
        ]
        routes += [("POST", f"/api/v1/{name}", self._starting(reader, start)) for name, reader, start in starts]
        self.asgi = Starlette(
            routes=[
                Route("/api/v1/healthz", lambda _: JSONResponse({"status": "ok"})),
                Route("/metrics", self.metrics),
                *(Route(path, self._answering(path, handler), methods=[method]) for method, path, handler in routes),
            ]
        )

    # How each request is answered.

    def _starting(self, reader: Read, start: Start) -> Handler:
        async def handler(call: Call) -> dict[str, object]:
            if self.draining:
                raise RefusedError(503, "the server is shutting down; send the call again later")
            return start(call.owner, reader(call.data), call.data)

        return handler

    def _answering(self, path: str, handler: Handler) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def answer(request: Request) -> Response:
            began, user = time.monotonic(), "-"
            self.figures.open[path] += 1
            try:
                user = self._user(request)
                call = Call(user, await self._body(request), request)
                result = await handler(call)
                response = result if isinstance(result, Response) else JSONResponse(result)
            except RefusedError as error:
                response = JSONResponse({"error": str(error)}, error.status)
            except UserError as error:
                response = JSONResponse({"error": str(error)}, 400)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception:
                log.exception("request failed route=%s user=%s", path, user)
                response = JSONResponse({"error": "the server failed; its log has the reason"}, 500)
            seconds = time.monotonic() - began
            self.figures.add(path, response.status_code, seconds)
            log.info("route=%s status=%d ms=%.1f user=%s", path, response.status_code, seconds * 1000, user)
            return response

        return answer

    def _user(self, request: Request) -> str:
        """Return the user of a request's key. Raises RefusedError without a valid one."""
        key = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        user = find_user(self.hashes, key)
        if user is None:
            raise RefusedError(401, "the API key is missing or unknown; set TINKER_API_KEY to the one that was printed")
        return user

    async def _body(self, request: Request) -> bytes:
        """Return the body, as long as the limit allows."""
        limit, data = self.service.settings.max_request_bytes, bytearray()
        if request.headers.get("content-encoding", "identity") != "identity":
            raise RefusedError(415, "compressed bodies are not supported; send the body as it is")
        too_large = RefusedError(413, f"the body has more than {limit:,} bytes; send less at once")
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    data += part
                    if len(data) > limit:
                        raise too_large
        except TimeoutError as error:
            raise RefusedError(408, f"the body did not come within {BODY_SECONDS:g} s") from error
        return bytes(data)

    async def metrics(self, request: Request) -> Response:
        """Return figures for Prometheus; they name no user and no model."""
        calls = self.service.calls
        gauges = {"calls_in_flight": sum(calls.in_flight.values()), "tokens_in_flight": sum(calls.tokens.values())}
        gauges |= {"adapters_loaded": len(self.service.loaded), "reply_bytes": calls.bytes}
        lines = self.figures.lines()
        for name, value in (gauges | self.service.engine.snapshot()).items():
            lines += [f"# TYPE distlora_serve_{name} gauge", f"distlora_serve_{name} {float(value):g}"]
        return PlainTextResponse("\n".join(lines) + "\n")

    # What clients are told.

    async def client_config(self, call: Call) -> dict[str, object]:
        """Return the flags of the SDK: chunks in order, bodies as they are, no tokens but API keys."""
        limit = self.service.settings.max_request_bytes
        return {
            "pjwt_auth_enabled": False,
            "parallel_fwdbwd_chunks": False,
            "proto_compress_fwdbwd": False,
            "fwdbwd_max_chunk_bytes_count": min(5_000_000, limit // 2),
        }

    async def telemetry(self, call: Call) -> dict[str, object]:
        """Accept telemetry, and drop it."""
        return {"status": "accepted"}

    async def capabilities(self, call: Call) -> dict[str, object]:
        """Return the base by each of its names."""
        base = self.service.base
        about = {"max_context_length": base.context, "trainable": True, "sampleable": True}
        return {"supported_models": [{"model_name": name, **about} for name in base.names]}

    async def create_session(self, call: Call) -> dict[str, object]:
        """Keep a new session."""
        about = metadata(call.read(types.CreateSessionRequest).model_dump(include={"tags", *_ABOUT}))
        return {"type": "create_session", "session_id": self.service.store.add_session(call.owner, about)}

    async def heartbeat(self, call: Call) -> dict[str, object]:
        """Note that a session is alive."""
        session = call.read(types.SessionHeartbeatRequest).session_id
        self.service.store.owned("session", call.owner, session)
        self.service.store.touch(session)
        return {"type": "session_heartbeat"}

    async def finish_session(self, call: Call) -> Response:
        """End a session: what was its own alone goes at the next cleaning."""
        self.service.store.owned("session", call.owner, call.part("session"))
        self.service.store.touch(call.part("session"), 0.0)
        return Response(status_code=204)

    async def session(self, call: Call) -> dict[str, object]:
        """Return a session's models and samplers."""
        store = self.service.store
        row = store.owned("session", call.owner, call.part("session"))
        models = store.all("SELECT id FROM models WHERE session = ? ORDER BY created", row["id"])
        samplers = store.all("SELECT id FROM samplers WHERE session = ? ORDER BY created", row["id"])
        about = json.loads(row["about"])
        names = {name: about.get(name) for name in _ABOUT}
        return {"training_run_ids": [x["id"] for x in models], "sampler_ids": [x["id"] for x in samplers], **names}

    async def sessions(self, call: Call) -> dict[str, object]:
        """List a user's sessions."""
        offset, limit = call.page()
        query = "SELECT id FROM sessions WHERE owner = ? ORDER BY created DESC LIMIT ? OFFSET ?"
        return {"sessions": [row["id"] for row in self.service.store.all(query, call.owner, limit, offset)]}

    async def get_info(self, call: Call) -> dict[str, object]:
        """Describe a model."""
        model_id = call.read(types.GetInfoRequest).model_id
        row = self.service.store.owned("model", call.owner, model_id)
        data = {"model_name": row["base"], "tokenizer_id": self.service.base.tokenizer}
        about = {"is_lora": True, "lora_rank": adapter_of(row).rank, "model_name": row["base"]}
        return {"type": "get_info", "model_id": model_id, "model_data": data, **about}

    async def weights_info(self, call: Call) -> dict[str, object]:
        """Describe a checkpoint's adapter."""
        row = self.service.store.checkpoint(call.owner, call.read(WeightsInfoRequest).tinker_path)
        adapter = adapter_of(row)
        trained = {"train_attn": adapter.attention, "train_mlp": adapter.mlp, "train_unembed": adapter.unembed}
        return {"base_model": row["base"], "is_lora": True, "lora_rank": adapter.rank, **trained}

    async def create_sampling_session(self, call: Call) -> dict[str, object]:
        """Keep which weights a sampling client samples from."""
        return self.service.create_sampling_session(call.owner, call.read(types.CreateSamplingSessionRequest))

    async def sampler(self, call: Call) -> dict[str, object]:
        """Describe a sampling session."""
        row = self.service.store.owned("sampling session", call.owner, call.part("sampler"))
        return {"sampler_id": row["id"], "base_model": row["base"], "model_path": row["path"]}

    async def retrieve_future(self, call: Call) -> Response:
        """Return a call's result, or 408 if it takes longer."""
        request_id = call.read(types.FutureRetrieveRequest).request_id
        reply: Reply | None = await self.service.result(call.owner, request_id, POLL_SECONDS)
        if reply is None:
            waiting = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
            return JSONResponse(waiting, 408)
        if reply.media_type == PROTOBUF and PROTOBUF not in call.request.headers.get("accept", ""):
            raise RefusedError(406, f"this result is {PROTOBUF}; send it in Accept, as tinker 0.38 does")
        return Response(reply.body, media_type=reply.media_type)

    # Listings.

    def _run(self, row: Row) -> dict[str, object]:
        query = "SELECT * FROM checkpoints WHERE model = ? AND kind = ? AND session IS NULL ORDER BY created DESC"
        newest = [self.service.store.one(query, row["id"], kind) for kind in ("weights", "sampler_weights")]
        return {
            "training_run_id": row["id"],
            "base_model": row["base"],
            "model_owner": row["owner"],
            "is_lora": True,
            "lora_rank": adapter_of(row).rank,
            "last_request_time": _time(row["seen"]),
            "last_checkpoint": newest[0] and _checkpoint(newest[0]),
            "last_sampler_checkpoint": newest[1] and _checkpoint(newest[1]),
            "user_metadata": json.loads(row["about"]) or None,
        }

    async def training_runs(self, call: Call) -> dict[str, object]:
        """List a user's models."""
        (offset, limit), store = call.page(), self.service.store
        query = "SELECT * FROM models WHERE owner = ? ORDER BY created DESC LIMIT ? OFFSET ?"
        rows = store.all(query, call.owner, limit, offset)
        total = store.all("SELECT COUNT(*) FROM models WHERE owner = ?", call.owner)[0][0]
        cursor = {"offset": offset, "limit": limit, "total_count": total}
        return {"training_runs": [self._run(row) for row in rows], "cursor": cursor}

    async def training_run(self, call: Call) -> dict[str, object]:
        """Describe one of a user's models."""
        return self._run(self.service.store.owned("training run", call.owner, call.part("run")))

    async def run_checkpoints(self, call: Call) -> dict[str, object]:
        """List the named checkpoints of a model."""
        await self.training_run(call)
        query = "SELECT * FROM checkpoints WHERE model = ? AND session IS NULL ORDER BY created"
        return {"checkpoints": [_checkpoint(row) for row in self.service.store.all(query, call.part("run"))]}

    async def checkpoints(self, call: Call) -> dict[str, object]:
        """List the named checkpoints of a user."""
        (offset, limit), store = call.page(), self.service.store
        owned = "FROM checkpoints WHERE owner = ? AND session IS NULL"
        rows = store.all(f"SELECT * {owned} ORDER BY created DESC LIMIT ? OFFSET ?", call.owner, limit, offset)
        total = store.all(f"SELECT COUNT(*) {owned}", call.owner)[0][0]
        cursor = {"offset": offset, "limit": limit, "total_count": total}
        return {"checkpoints": [_checkpoint(row) for row in rows], "cursor": cursor}

    async def delete_checkpoint(self, call: Call) -> Response:
        """Delete a checkpoint."""
        path = f"tinker://{call.part('run')}/{call.part('kind')}/{call.part('name')}"
        row = self.service.store.checkpoint(call.owner, path)
        self.service.store.delete_checkpoints([row["folder"]])
        return Response(status_code=204)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _checkpoint(row: Row) -> dict[str, object]:
    return {
        "checkpoint_id": f"{row['kind']}/{row['name']}",
        "checkpoint_type": {"weights": "training", "sampler_weights": "sampler"}[row["kind"]],
        "time": _time(row["created"]),
        "tinker_path": f"tinker://{row['model']}/{row['kind']}/{row['name']}",
        "size_bytes": row["bytes"],
        "user_metadata": json.loads(row["about"]) or None,
        "expires_at": None if row["expires"] is None else _time(row["expires"]),
    }


class Server:
    """A service that listens, in a thread of its own."""

    def __init__(self, app: App, listener: socket.socket) -> None:
        self.app, self._listener = app, listener
        self.port = int(listener.getsockname()[1])
        options: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "off", "timeout_keep_alive": 75}
        self._uvicorn = uvicorn.Server(uvicorn.Config(app.asgi, **options))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="http")
        self._thread.start()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        cleaning = self._loop.create_task(self._clean())
        try:
            await self._uvicorn.serve(sockets=[self._listener])
        finally:
            cleaning.cancel()
            self.app.service.store.close()

    async def _clean(self) -> None:
        while True:
            await asyncio.sleep(CLEAN_SECONDS)
            try:
                self.app.service.drop_idle()
            except Exception:  # A full disk, say; the next try comes in a minute.
                log.exception("cleaning failed")

    def stop(self) -> None:
        """Refuse new calls, wait for those in flight, and close. A second call waits for the first."""
        if self.app.draining:
            self._thread.join()
            return
        service, loop = self.app.service, self._loop
        self.app.draining = True
        log.info("draining calls=%d", sum(service.calls.in_flight.values()))
        if loop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # The loop has ended meanwhile.
                drained = asyncio.run_coroutine_threadsafe(service.calls.drain(service.settings.drain_seconds), loop)
                drained.result()
        self._uvicorn.should_exit = True
        self._thread.join()
        log.info("stopped")


def start_http(engine: EngineLike, settings: ServeConfig, base: ServedBase, folder: Path) -> Server:
    """Listen at once, and answer until `Server.stop`. folder: of keys, store and weights.

    Raises UserError if the port is taken.
    """
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    service = Service(engine, settings, base, folder)
    try:
        listener = socket.create_server((settings.host, settings.port), backlog=512)
    except OSError as error:
        service.store.close()
        cure = "set serve.port to another one, or to 0 for any free one"
        raise UserError(
            f"serve.port={settings.port} on serve.host={settings.host}: {error.strerror}; {cure}"
        ) from error
    server = Server(App(service, read_hashes(folder)), listener)
    log.info("listening address=http://%s:%d models=%s", settings.host, server.port, ",".join(base.names))
    return server
