"""`distlora serve`, typed: two ranks serve the official client, through a kill of a worker and one of every process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

tinker = pytest.importorskip("tinker", reason="the official client is not installed: pip install 'tinker>=0.38,<0.39'")
types = tinker.types
pytestmark = pytest.mark.ci

DISTLORA = Path(sys.executable).with_name("distlora")
NAME, STEPS = "org/tiny", 5
ROWS = [[5 + (7 * row + 3 * place) % 60 for place in range(9 + 4 * row)] for row in range(3)]


class Serving:
    """A `distlora serve` and what it has printed."""

    def __init__(self, words: list[str], cwd: Path) -> None:
        self.process = subprocess.Popen(
            [DISTLORA, "serve", *words],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._coming: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._seen: list[psutil.Process] = []

    def _read(self) -> None:
        for line in self.process.stdout or []:
            self._coming.put(line)
        self._coming.put(None)

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """Return the next line with a text."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while (line := self._coming.get(timeout=max(deadline - time.monotonic(), 0.1))) is not None:
                self.lines.append(line)
                if text in line:
                    self.family()
                    return line
        raise AssertionError(f"{text!r} was not printed:\n{''.join(self.lines)}")

    def family(self) -> list[psutil.Process]:
        """Return every process that it has started, itself first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            self._seen = [own, *own.children(recursive=True)]
        return self._seen

    def workers(self) -> list[psutil.Process]:
        """Return the ranks, which listen to no other process and are leaders of their sessions."""
        return [process for process in self.family()[1:] if os.getsid(process.pid) == process.pid]

    def kill(self) -> None:
        """End all of them at once, as a node that loses its power does."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(timeout=30)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@pytest.fixture
def serve(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Serving]]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    started: list[Serving] = []
    words = ["recipe=serve", f"model.path={folders / 'llama'}", f"serve.names=[{NAME}]", "serve.port=0"]
    words += ["cluster.gpus_per_node=2", "train.dtype=fp32", "data.sequence_length=64", "quant.cache=false"]

    def start() -> Serving:
        started.append(Serving(words, tmp_path))
        return started[-1]

    yield start
    for serving in started:
        serving.kill()


def address(serving: Serving) -> str:
    return serving.wait_for("serving ").split(" at ")[1].split(";")[0]


def step(training: Any, number: int) -> list[float]:
    """Make a step, and return the log-probabilities that its forward had."""
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={"target_tokens": row[1:], "weights": [1.0] * (len(row) - 1)},
        )
        for row in ROWS
    ]
    computed = training.forward_backward(data, "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-3 * (1 + number))).result()
    return [value for row in computed.loss_fn_outputs for value in row["logprobs"].to_numpy().tolist()]


def retried(call: Callable[[], list[float]]) -> list[float]:
    """Return what a call gives once the server is back: the call in flight fails with the SDK's own errors."""
    for _ in range(2):
        with contextlib.suppress(tinker.APIStatusError, tinker.RequestFailedError):
            return call()
    return call()


def test_users_come_back_from_a_killed_worker_and_from_a_kill_of_every_process(
    serve: Callable[[], Serving], tmp_path: Path
) -> None:
    first = serve()
    key = first.wait_for("API key of default").split()[-1]
    at = address(first)
    client = tinker.ServiceClient(base_url=at, api_key=key)
    whole = client.create_lora_training_client(NAME, rank=4, seed=3).result()
    expected = [step(whole, number) for number in range(STEPS)]
    assert expected[-1] != expected[0]

    training = client.create_lora_training_client(NAME, rank=4, seed=3).result()
    assert [step(training, number) for number in range(2)] == expected[:2]
    workers = first.workers()
    assert len(workers) == 2
    workers[1].kill()
    first.wait_for("from the last snapshot of each adapter")
    assert address(first) == at
    assert retried(lambda: step(training, 2)) == expected[2]
    saved = training.save_state("three").result().path

    with pytest.raises(AssertionError, match="service is already running on this node"):
        serve().wait_for("serving ")
    first.kill()

    again = serve()
    client = tinker.ServiceClient(base_url=address(again), api_key=key)
    resumed = client.create_training_client_from_state_with_optimizer(saved).result()
    assert [step(resumed, number) for number in range(3, STEPS)] == expected[3:]
    status = subprocess.run([DISTLORA, "status", "service"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "service serves on" in status.stdout
    assert "adapters  3 of 1 users" in status.stdout
    assert again.stop() == 0
    ended = subprocess.run([DISTLORA, "status", "service", "--json"], cwd=tmp_path, capture_output=True, check=True)
    assert json.loads(ended.stdout)["state"] == "ended"
