"""Send a training service malformed, oversized, foreign and cut requests, and check what it still holds after each.

Run in the repository: `PYTHONPATH=.:kernels:launcher:tests python tests/tools/serve_fuzz.py [requests] [seed]`.
The server is real and its engine counts (tests/support/service.py): a wrong value of a model shows at once.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from serving.test_http import rows
from support.service import Started, started

START = (
    "create_model unload_model forward_backward optim_step load_weights save_weights save_weights_for_sampler asample"
)
OTHER = (
    "client/config client/dynamic_config telemetry create_session session_heartbeat get_info weights_info "
    "create_sampling_session retrieve_future"
)
POSTS = [*START.split(), *OTHER.split()]
GETS = "get_server_capabilities sessions sessions/{id} samplers/{id} training_runs training_runs/{id} checkpoints"
NAMES = (
    "session_id model_id model_seq_id seq_id base_model lora_config path name sampling_session_id prompt num_samples "
    "sampling_params adam_params request_id tinker_path model_path sampling_session_seq_id ttl_seconds optimizer "
    "forward_backward_input"
)
LIMIT = 100_000


def main(requests: int, seed: int) -> int:
    """Fuzz one server; print counts per kind and status. Returns the number of faults."""
    rng, counts, faults = random.Random(seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder, started(Path(folder) / "s", max_request_bytes=LIMIT) as service:
        session = service.session("ann")
        model = service.model("ann", session).json()["model_id"]
        ids = [session, model, f"{model}:0", f"tinker://{model}/weights/kept"]
        home = service.session("ben")
        own = [home, service.model("ben", home).json()["model_id"]]
        value = 4.0
        for number in range(requests):
            kind = rng.choice(["malformed", "foreign", "oversized", "cut"])
            status, text = _send(service, rng, kind, ids, own)
            counts[f"{kind} {status}"] += 1
            leak = kind == "foreign" and status == 200 and any(name in text for name in ids)
            if status >= 500 or leak:
                faults += 1
                print(f"request {number} (seed {seed}): {kind} status {status}: {text[:300]}")
            if number % 20 == 0:
                value += 0.5 * _step(service, model, number // 20 * 2 + 1)
                held = service.engine.values.get(model)
                if held != value:
                    raise SystemExit(f"request {number} (seed {seed}): the model is {held}, acknowledged is {value}")
    for name, count in sorted(counts.items()):
        print(f"{name} {count}")
    print(f"{requests} requests, seed {seed}: {faults} faults")
    return faults


def _step(service: Started, model: str, seq: int) -> float:
    """Train ann's model by one step through HTTP; return the gradient. Fails if either call is not acknowledged."""
    # forward_backward is a protobuf message; the SDK writes it.
    one = rows(model, seq)
    two = {"model_id": model, "seq_id": seq + 1, "adam_params": {"learning_rate": 0.5}}
    for path, body in (("forward_backward", one), ("optim_step", two)):
        sent = service.post("ann", path, body)
        assert sent.status_code == 200, f"{path}: {sent.text}"
        got = service.result("ann", sent.json()["request_id"])
        assert got.status_code == 200, f"{path}: {got.text}"
    return 1.0


def _send(service: Started, rng: random.Random, kind: str, ids: list[str], own: list[str]) -> tuple[int, str]:
    path = rng.choice(POSTS)
    if kind == "oversized":
        answer = service.post("ben", path, b"[" * (LIMIT + rng.randrange(1, LIMIT)))
    elif kind == "cut":
        return _cut(service, rng, path), ""
    elif kind == "foreign":
        if rng.random() < 0.3:
            answer = service.get(
                "ben", rng.choice([*GETS.split(), "training_runs/{id}/checkpoints"]).format(id=rng.choice(ids[:2]))
            )
        else:
            answer = service.post("ben", path, _object(rng, ids, foreign=True))
    else:
        body = json.dumps(_object(rng, own, foreign=False)).encode()
        if path == "forward_backward":
            body = rows(own[1], rng.randrange(1000))
        answer = service.post("ben", path, _damaged(rng, body), headers=_headers(rng))
    return answer.status_code, answer.text


def _headers(rng: random.Random) -> dict[str, str]:
    return {"Content-Type": rng.choice(["application/json", "application/x-protobuf", "text/plain"])}


def _damaged(rng: random.Random, body: bytes) -> bytes:
    match rng.randrange(4):
        case 0:
            return body[: rng.randrange(len(body))]
        case 1:
            return rng.randbytes(rng.randrange(200))
        case 2:
            place = rng.randrange(len(body))
            return body[:place] + rng.randbytes(3) + body[place:]
    return rng.choice([b"", b"null", b"[" * 50_000, b'{"a":' * 10_000, b"1e999", b'{"seq_id": 1' + b"0" * 5000 + b"}"])


def _object(rng: random.Random, ids: list[str], *, foreign: bool) -> dict[str, Any]:
    odd = [None, True, -1, 0, 1 << 70, 1e308, "", "../../etc", "\ud800", "x" * 999, [], {}, [[]], {"rank": -1}]
    usable = ids * 4 + [0, 1, "kept", {"rank": 4}, {"max_tokens": 2}] if foreign else odd + ids
    return {name: rng.choice(usable) for name in NAMES.split() if rng.random() < 0.7}


def _cut(service: Started, rng: random.Random, path: str) -> int:
    """Close a connection in the middle of a request."""
    head = f"POST /api/v1/{path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.keys['ben']}\r\nContent-Length: 500\r\n\r\n"
    data = head.encode() + b"{" + b" " * 300
    with socket.create_connection(("127.0.0.1", service.server.port), timeout=5) as sock:
        sock.sendall(data[: rng.randrange(1, len(data))])
    return 0


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    sys.exit(min(main(*(given + [1000, 0][len(given) :])), 100))
