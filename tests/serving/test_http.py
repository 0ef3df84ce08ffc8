"""A service keeps users apart, refuses what is beyond its limits, and loses nothing that it acknowledged."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tinker.proto import tinker_public_pb2 as pb

from distlora.serving.keys import add_users
from distlora.serving.operations import ForwardBackward, OptimStep
from support.service import Started, started

ADAM = {"learning_rate": 1.0}
NEW: dict[str, Any] = {"model_seq_id": 5, "base_model": "base", "lora_config": {"rank": 4}}
LONG = "/" + "x" * 100


def rows(model: str, seq: int, *, tokens: int = 3, token: int = 5, forward_only: bool = False) -> bytes:
    """Return a ForwardBackwardRequest of one row, whose weights sum to 1."""
    chunk = pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=np.full(tokens, token, np.int32).tobytes()))
    targets, weights = np.full(tokens, token, np.int64).tobytes(), np.eye(1, tokens, dtype=np.float32).tobytes()
    inputs = {
        "target_tokens": pb.Tensor(dense=targets, dtype=pb.DTYPE_INT64, shape=[tokens]),
        "weights": pb.Tensor(dense=weights, dtype=pb.DTYPE_FLOAT32, shape=[tokens]),
    }
    data = [pb.Datum(model_input=[chunk], loss_fn_inputs=inputs)]
    about = {"model_id": model, "seq_id": seq, "loss_fn": "cross_entropy", "forward_only": forward_only}
    return bytes(pb.ForwardBackwardRequest(data=data, **about).SerializeToString())


def begun(service: Started, user: str = "ann") -> tuple[str, str]:
    """Return a new session and its model."""
    session = service.session(user)
    created = service.model(user, session).json()
    assert service.result(user, created["request_id"]).json() == {
        "type": "create_model",
        "model_id": created["model_id"],
    }
    return session, created["model_id"]


def step(service: Started, model: str, seq: int) -> dict[str, Any]:
    """Make an optimizer step and return its result."""
    body = {"model_id": model, "seq_id": seq, "adam_params": ADAM}
    started_call = service.post("ann", "optim_step", body)
    assert started_call.status_code == 200, started_call.text
    result: dict[str, Any] = service.result("ann", started_call.json()["request_id"]).json()
    return result


def test_a_user_finds_nothing_of_another(tmp_path: Path) -> None:
    with started(tmp_path) as service:
        session, model = begun(service)
        service.post("ann", "forward_backward", rows(model, 1))
        saved = service.post("ann", "save_weights", {"model_id": model, "seq_id": 2, "path": "mine"}).json()
        path = service.result("ann", saved["request_id"]).json()["path"]
        opened = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
        sampler = service.post("ann", "create_sampling_session", opened).json()["sampling_session_id"]
        own = service.session("ben")
        prompt = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}, "sampling_params": {"max_tokens": 1}}
        foreign: list[tuple[str, Any]] = [
            ("session_heartbeat", {"session_id": session}),
            ("get_info", {"model_id": model}),
            ("unload_model", {"model_id": model}),
            ("forward_backward", rows(model, 3)),
            ("optim_step", {"model_id": model, "seq_id": 3, "adam_params": ADAM}),
            ("save_weights", {"model_id": model, "seq_id": 3, "path": "theirs"}),
            ("save_weights_for_sampler", {"model_id": model, "seq_id": 3, "path": "theirs"}),
            (
                "create_model",
                {"session_id": session, "model_seq_id": 5, "base_model": "base", "lora_config": {"rank": 4}},
            ),
            ("load_weights", {"session_id": own, "model_seq_id": 0, "path": path, "optimizer": True}),
            ("weights_info", {"tinker_path": path}),
            ("create_sampling_session", {**opened, "session_id": own}),
            ("asample", {"sampling_session_id": sampler, "seq_id": 0, **prompt}),
            ("asample", {"model_path": path, **prompt}),
            (f"sessions/{session}/finish", {}),
        ]
        before = len(service.engine.done)
        for route, body in foreign:
            answer = service.post("ben", route, body)
            assert answer.status_code == 404, (route, answer.text)
        assert service.result("ben", saved["request_id"]).status_code == 410
        for route in (f"sessions/{session}", f"training_runs/{model}", f"training_runs/{model}/checkpoints"):
            assert service.get("ben", route).status_code == 404
        assert service.get("ben", f"samplers/{sampler}").status_code == 404
        assert service.get("ben", "training_runs").json()["training_runs"] == []
        assert service.get("ben", "checkpoints").json()["checkpoints"] == []
        assert service.get("ben", "sessions").json()["sessions"] == [own]
        for key in ("", "tml-", service.keys["ann"][:-1], service.keys["ann"] + "x"):
            assert service.post(key, "get_info", {"model_id": model}).status_code == 401
        assert len(service.engine.done) == before
    text = "".join(file.read_text() for file in tmp_path.glob("*.json"))
    assert not any(key in text or key[4:] in text for key in service.keys.values())
    assert set(add_users(tmp_path, ["ann", "cyd"])) == {"cyd"}  # ben has left, and needs a new key to come back.
    assert set(add_users(tmp_path, ["ann", "ben", "cyd"])) == {"ben"}


def test_calls_beyond_a_limit_are_refused_with_the_limit(tmp_path: Path) -> None:
    limits = {"max_rank": 8, "max_adapters": 2, "max_tokens_in_flight": 60, "max_request_bytes": 3000}
    with started(tmp_path, **limits, max_disk_bytes=4) as service:
        session, model = begun(service)
        sample = {"base_model": "base", "sampling_params": {"max_tokens": 40}}
        sample["prompt"] = {"chunks": [{"type": "encoded_text", "tokens": [1]}]}
        assert "limit of 8" in service.model("ann", session, 1, rank=9).json()["error"]
        assert service.post("ann", "get_info", b" " * 3001).status_code == 413
        assert service.post("ann", "asample", {**sample, "num_samples": 2}).status_code == 413
        assert service.post("ann", "forward_backward", rows(model, 1, tokens=61)).status_code == 413
        service.engine.held = []
        assert service.post("ann", "asample", sample).status_code == 200
        assert service.post("ann", "asample", sample).status_code == 429
        assert service.post("ben", "asample", sample).status_code == 200  # Limits are per user.
        service.engine.release()
        service.model("ann", session, 1)
        assert "2 adapters are loaded" in service.model("ann", session, 2).json()["error"]
        first = service.post("ann", "save_weights", {"model_id": model, "seq_id": 1, "path": "a"}).json()["request_id"]
        assert service.result("ann", first).json()["path"].endswith("/weights/a")
        wide = service.post("ann", "save_weights", {"model_id": model, "seq_id": 2, "path": "b"})
        assert wide.status_code == 200
        service.result("ann", wide.json()["request_id"])
        full = service.post("ann", "save_weights", {"model_id": model, "seq_id": 3, "path": "c"})
        assert (full.status_code, "delete some" in full.text) == (403, True)
        for name in ("../a", "/etc/passwd", "a/b", "", ".hidden", "a\x00b", "x" * 129):
            refused = service.post("ann", "save_weights", {"model_id": model, "seq_id": 4, "path": name})
            assert "is not a name for a checkpoint" in refused.json()["error"], name
        assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("service")) == [
            "keys.json",
            "weights",
        ]


def test_a_call_that_is_sent_again_is_done_once(tmp_path: Path) -> None:
    with started(tmp_path) as service:
        _, model = begun(service)
        ids = {service.post("ann", "forward_backward", rows(model, 1)).json()["request_id"] for _ in range(3)}
        assert len(ids) == 1
        assert step(service, model, 2) == step(service, model, 2) == {"type": "optim_step", "metrics": {"value": 5.0}}
        kinds = [type(operation) for operation in service.engine.done]
        assert (kinds.count(ForwardBackward), kinds.count(OptimStep)) == (1, 1)
        other = service.post("ann", "forward_backward", rows(model, 1, token=6))
        assert (other.status_code, "used for another call" in other.text) == (400, True)


def test_acknowledged_steps_and_saves_survive_a_kill(tmp_path: Path) -> None:
    with started(tmp_path) as service:
        session, model = begun(service)
        service.post("ann", "forward_backward", rows(model, 1))
        step(service, model, 2)
        saved = service.post("ann", "save_weights", {"model_id": model, "seq_id": 3, "path": "a"}).json()["request_id"]
        path = service.result("ann", saved).json()["path"]
        service.engine.held = []  # What comes now is never done: the server is killed with it.
        lost = service.post("ann", "forward_backward", rows(model, 4)).json()["request_id"]
        service.engine.held = []
    with started(tmp_path, service.keys) as again:
        assert again.result("ann", lost).status_code == 410  # The client raises its error of calls to repeat.
        assert again.result("ann", saved).json()["path"] == path
        refused = again.post("ann", "optim_step", {"model_id": model, "seq_id": 5, "adam_params": ADAM})
        assert (refused.status_code, "calls from seq_id=4 on are lost" in refused.text) == (410, True)
        again.post("ann", "forward_backward", rows(model, 6))
        assert step(again, model, 7)["metrics"] == {"value": 6.0}  # 4 at first, and a step of 1 before and after.
        loaded = {"session_id": session, "model_seq_id": 1, "path": path, "optimizer": True}
        again.result("ann", again.post("ann", "load_weights", loaded).json()["request_id"])
        assert again.engine.values[f"{session}:train:1"] == 5.0
        again.engine.held = []
        again.post("ann", "forward_backward", rows(model, 8))
        again.engine.held = []
    with started(tmp_path, service.keys) as third:  # A lost call that is sent again under its number is done.
        third.post("ann", "forward_backward", rows(model, 8))
        assert step(third, model, 9)["metrics"] == {"value": 7.0}
        folders = {path.name for path in (tmp_path / "weights").iterdir()}
        rows_kept = third.server.app.service.store.all("SELECT folder FROM checkpoints UNION SELECT state FROM models")
        assert folders == {row[0] for row in rows_kept}


def test_a_drain_ends_calls_in_flight_and_refuses_new_ones(tmp_path: Path) -> None:
    with started(tmp_path) as service:
        _, model = begun(service)
        service.engine.held = []
        waiting = service.post("ann", "forward_backward", rows(model, 1)).json()["request_id"]
        stopping = threading.Thread(target=service.server.stop)
        stopping.start()
        while not service.server.app.draining:
            pass
        assert service.post("ann", "forward_backward", rows(model, 2)).status_code == 503
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(service.result("ann", waiting)))
        asking.start()
        while not service.server.app.figures.open["/api/v1/retrieve_future"]:
            pass
        service.engine.release()
        asking.join()
        stopping.join()
        assert answers[0].status_code == 200


def test_two_hundred_malformed_requests_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    with started(tmp_path / "service") as service:
        _, kept = begun(service, "ben")
        session, model = begun(service)
        service.post("ann", "forward_backward", rows(model, 1))
        step(service, model, 2)
        bodies: dict[str, Any] = {
            "create_session": {"tags": [], "sdk_version": "0.38.0"},
            "session_heartbeat": {"session_id": session},
            "create_model": {
                "session_id": session,
                "model_seq_id": 1,
                "base_model": "base",
                "lora_config": {"rank": 4},
            },
            "get_info": {"model_id": model},
            "optim_step": {"model_id": model, "seq_id": 3, "adam_params": ADAM},
            "save_weights": {"model_id": model, "seq_id": 3, "path": "a"},
            "save_weights_for_sampler": {"model_id": model, "seq_id": 3, "sampling_session_seq_id": 0},
            "load_weights": {"model_id": model, "seq_id": 3, "path": f"tinker://{model}/weights/a", "optimizer": True},
            "create_sampling_session": {"session_id": session, "sampling_session_seq_id": 0, "base_model": "base"},
            "asample": {"base_model": "base", "prompt": {"chunks": []}, "sampling_params": {"max_tokens": 4}},
            "retrieve_future": {"request_id": f"{model}:2"},
            "weights_info": {"tinker_path": f"tinker://{model}/weights/a"},
        }
        chance = random.Random(0)
        statuses = []
        for _ in range(200):
            route = chance.choice([*bodies, "forward_backward"])
            body = rows(model, 3) if route == "forward_backward" else json.dumps(bodies[route]).encode()
            damaged = chance.choice(DAMAGE)(body, chance)
            try:
                statuses.append(service.post("ann", route, damaged, timeout=5).status_code)
            except httpx.HTTPError as error:
                pytest.fail(f"{route} {damaged!r:.200}: {error}")
            assert statuses[-1] < 500, (route, damaged, statuses[-1])
        assert sum(status >= 400 for status in statuses) > 100
        assert service.result("ann", f"{model}:2").json()["metrics"] == {"value": 5.0}
        assert service.engine.values[kept] == 4.0
        assert service.get("ben", f"training_runs/{kept}").status_code == 200
        assert httpx.get(f"{service.url}/api/v1/healthz").json() == {"status": "ok"}
        assert [path.name for path in tmp_path.iterdir()] == ["service"]


def _cut(body: bytes, chance: random.Random) -> bytes:
    return body[: chance.randrange(len(body))]


def _flip(body: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(body))
    return body[:at] + bytes([chance.randrange(256)]) + body[at + 1 :]


def _other_value(body: bytes, chance: random.Random) -> bytes:
    """Replace one value of a JSON object by one of another kind."""
    try:
        values = json.loads(body)
    except ValueError:
        return _flip(body, chance)
    odd = [None, True, -1, 1 << 70, 1e308, "../../x", LONG * 20, "\ud800", [], [[]], {}, {"rank": -1}, {"a": {"b": []}}]
    values[chance.choice(list(values))] = chance.choice(odd)
    return json.dumps(values).encode()


def _deep(_: bytes, chance: random.Random) -> bytes:
    return chance.choice([b"[" * 100_000, b'{"a":' * 50_000, b"9" * 20_000, b'{"model_id": NaN}', b"\xff" * 50, b""])


DAMAGE: list[Callable[[bytes, random.Random], bytes]] = [_cut, _flip, _other_value, _deep]
