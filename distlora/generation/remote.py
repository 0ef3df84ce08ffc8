"""Generate with a vLLM server instead of the trainer's own weights: completions by HTTP, adapters loaded as versions.

The server serves the same base, and has LoRA and their loading at run time switched on:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank R \
        --logprobs-mode processed_logprobs

Paths of adapters are read by the server, so both need the same file system. Source: vLLM 4ba787ec9,
vllm/entrypoints/openai/completion/protocol.py and vllm/entrypoints/serve/lora.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlora.config import UserError, require

if TYPE_CHECKING:  # It imports torch, and the launcher asks the server without it.
    from distlora.generation.sampling import Request, Sample

AT_ONCE = 64
"""Requests that wait for an answer together; the server batches them."""
TRIES, FIRST_WAIT = 4, 1.0
"""Attempts of a request that gets no answer, and seconds before the second; each wait is twice the one before. A
request has a seed, so a second answer is as good as the first."""


KEY = "VLLM_API_KEY"
"""Environment variable with the server's key; vLLM reads the same one."""
MOST_SEED = 2**63 - 1
"""vLLM's seeds are signed."""
LOAD = "/v1/load_lora_adapter"
OTHER_SERVERS = {"llamacpp": "llama.cpp's llama-server", "me": "llama-cpp-python's server"}
"""Servers that load adapters at their start alone, by what their /v1/models names as owner of a model."""


class ServerError(RuntimeError):
    """A server that does not answer, or answers with an error.

    `code`: the status of an HTTP error.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class RemoteEngine:
    """A vLLM server in the place of `Engine`. One process uses it; others get its samples from that one.

    `stop_tokens` are what `Engine` ends a completion with. `seconds`: the longest wait for an answer.
    """

    def __init__(self, url: str, *, stop_tokens: Sequence[int], run: str, seconds: float = 600.0) -> None:
        self.url, self._seconds = url.rstrip("/").removesuffix("/v1"), seconds
        self._stop_tokens, self._run = list(stop_tokens), run
        self.adapter: str | None = None
        """Name of the adapter that samples; None before `load`."""

    def connect(self) -> list[str]:
        """Return the names of the models and adapters that the server has.

        Raises UserError if it does not answer, or cannot load adapters while it runs.
        """
        try:
            models = self._models(tries=1)
            names, loads = list(models), self._loads_adapters()
        except ServerError as error:
            raise UserError(f"rollout.url={self.url}: {error}; start `vllm serve`, or leave it out") from error
        server = next((OTHER_SERVERS[owner] for owner in models.values() if owner in OTHER_SERVERS), None)
        cure = "start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora (docs/rl.md), or leave it out"
        require(
            loads,
            f"rollout.url={self.url}: {server or 'the server'} cannot load a run's adapters while it serves (it has no "
            f"{LOAD}); {cure}",
        )
        return names

    def load(self, folder: Path, version: int) -> None:
        """Sample with the adapter in a PEFT folder from now on, and remove the version before it from the server.

        Raises ServerError if the server refuses it.
        """
        name, before = f"{self._run}-{version}", self.adapter
        if name in self._models():  # Left by a run that was killed: it may have other weights.
            self._unload(name)
        self._call(LOAD, {"lora_name": name, "lora_path": str(folder.resolve())})
        self.adapter = name
        if before is not None and before != name:
            self._unload(before)

    def close(self) -> None:
        """Remove the adapter from the server, if it still answers: the run's result does not depend on it."""
        if self.adapter is not None:
            with contextlib.suppress(ServerError):
                self._unload(self.adapter)
            self.adapter = None

    def run(self, requests: Sequence[Request]) -> list[Sample]:
        """Return a sample of each request, in their order. Raises ServerError."""
        assert self.adapter is not None, "load an adapter first"
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._complete, requests))

    def _models(self, *, tries: int = TRIES) -> dict[str, str | None]:
        """Return the owners of models and adapters by name. Raises ServerError."""
        models = self._call("/v1/models", tries=tries)
        with self._reading("/v1/models"):
            return {model["id"]: model.get("owned_by") for model in models["data"]}

    def _loads_adapters(self) -> bool:
        """Return whether the server loads adapters while it runs: then it refuses GET at that address, and has one."""
        try:
            self._call(LOAD, tries=1)
        except ServerError as error:
            if error.code in (404, 405):
                return error.code == 405
            raise
        return False

    @contextlib.contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        """Turn errors in reading an answer of another form into a ServerError."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(f"{self.url} answers {path} in another form than vLLM's ({error!r})") from error

    def _complete(self, request: Request) -> Sample:
        from distlora.generation.sampling import Sample

        body = {
            "model": self.adapter,
            "prompt": request.tokens,
            "max_tokens": request.max_new_tokens,
            "seed": request.seed & MOST_SEED,
            # All of them: what is left out comes from the generation_config.json of the server's model.
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": list(request.stop),
            "stop_token_ids": self._stop_tokens,
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }
        answer = self._call("/v1/completions", body)
        with self._reading("/v1/completions"):
            (choice,) = answer["choices"]
            ended = choice["finish_reason"] == "stop"
            tokens, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(tokens, list) or not isinstance(logprobs, list) or len(tokens) != len(logprobs):
            raise ServerError(
                f"{self.url} answers without the token ids and log-probabilities of its samples (return_token_ids, "
                "logprobs); use vLLM 0.10.2 or later"
            )
        return Sample(tokens, logprobs, ended)

    def _unload(self, name: str) -> None:
        self._call("/v1/unload_lora_adapter", {"lora_name": name})

    def _call(self, path: str, body: dict[str, Any] | None = None, *, tries: int = TRIES) -> Any:
        """Return the answer to a request, as JSON or text. Raises ServerError."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        if key := os.environ.get(KEY, "").strip():
            request.add_unredirected_header("Authorization", f"Bearer {key}")  # Never sent to another server.
        code = None
        for attempt in range(tries):
            try:
                with urllib.request.urlopen(request, timeout=self._seconds) as answer:
                    text = answer.read().decode()
                    return json.loads(text) if "json" in answer.headers.get("Content-Type", "") else text
            except urllib.error.HTTPError as error:
                code, reason = error.code, f"answers {path} with {error.code}: {_message(error)}"
                if code < 500:
                    break
            except (OSError, ValueError, http.client.HTTPException) as error:
                reason = f"does not answer {path} ({error})"
            if attempt + 1 < tries:
                time.sleep(FIRST_WAIT * 2**attempt)
        raise ServerError(f"{self.url} {reason}", code)


def _message(error: urllib.error.HTTPError) -> str:
    """Return the message in an error's body, {"error": {"message": ...}} or {"message": ...}, else the body's start."""
    text = error.read().decode(errors="replace")
    try:
        value = json.loads(text)
        return str(value.get("error", value)["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return text[:200]
