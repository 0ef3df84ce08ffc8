"""Start a real vLLM server on loopback, from the environment that `make test-servers` builds, and ask it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from support.measured import free_port

VLLM = Path(__file__).parents[2] / ".servers" / "bin" / "vllm"
SECONDS = 300.0
"""Longest start: it is about 40 s on two free cores."""


class NotServed(RuntimeError):
    """A server that ended before it answered, or never did."""


@contextlib.contextmanager
def vllm_server(base: Path, log: Path, *flags: str) -> Iterator[str]:
    """Serve a base in fp32 with LoRA within this context: its URL. Raises NotServed."""
    port = free_port()
    command = [str(VLLM), "serve", str(base), "--host=127.0.0.1", f"--port={port}", "--dtype=float32", "--enable-lora"]
    command += ["--max-lora-rank=16", "--max-loras=2", "--max-model-len=256", "--max-num-seqs=16", "--enforce-eager"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "HF_HUB_OFFLINE": "1"}
    settings |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(log.parent / "cache"), "VLLM_HOST_IP": "127.0.0.1"}
    # Not the tests' own variables; without a compiler, as nothing here is called often enough to be worth compiling.
    environment = {key: os.environ[key] for key in ("PATH", "HOME")} | settings | {"TORCH_COMPILE_DISABLE": "1"}
    url = f"http://127.0.0.1:{port}"
    with serving([*command, *flags], f"{url}/health", log, environment):
        yield url


@contextlib.contextmanager
def serving(
    command: Sequence[str], health: str, log: Path, environment: Mapping[str, str], *, seconds: float = SECONDS
) -> Iterator[None]:
    """Run a server within this context, from its first answer at the URL `health` on. Raises NotServed.

    The output goes to `log`, and the command runs in its folder.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, cwd=log.parent, start_new_session=True
        )
        try:
            end = time.monotonic() + seconds
            while not _answers(health):
                if (code := process.poll()) is not None:
                    raise NotServed(f"{command[0]} ended with code {code}: {_end_of(log)}")
                if time.monotonic() > end:
                    raise NotServed(f"{command[0]} is not up after {seconds:g} s: {_end_of(log)}")
                time.sleep(0.5)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _end_of(log: Path) -> str:
    """Return the last error line of a server's log, and its end."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error: " in line and "Engine core initialization failed" not in line]
    return "\n".join([*(line.rpartition("] ")[2] for line in errors[-1:]), *lines[-20:]])


def ask(url: str, path: str, **body: Any) -> Any:
    """Return a server's answer to a POST, or to a GET without a body, as JSON or text."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        text = answer.read().decode()
        return json.loads(text) if "json" in answer.headers.get("Content-Type", "") else text


def answered(url: str, model: str, prompt: Sequence[int], **fields: Any) -> tuple[list[int], list[float], list[float]]:
    """Return 16 greedy tokens, their log-probabilities, and those of the prompt's tokens but the first, in nats."""
    fields |= {"max_tokens": 16, "temperature": 0, "logprobs": 0, "return_token_ids": True}
    (choice,) = ask(url, "/v1/completions", model=model, prompt=list(prompt), **fields)["choices"]
    places = choice["prompt_logprobs"] or []
    asked = [place[str(token)]["logprob"] for place, token in zip(places[1:], prompt[1:], strict=False)]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"], asked
