"""Serve a small model by the part of vLLM's HTTP interface that `distlora.generation.remote` uses, on loopback.

Adapters are real: PEFT loads them over the base, and they change what is sampled. Answers, names of fields, codes and
messages follow vLLM 4ba787ec9 (vllm/entrypoints/openai/completion/protocol.py, vllm/entrypoints/serve/lora).
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from support import loopback


class Server:
    """A server's model, its adapters, and what was asked of it.

    `fail_next` requests are answered with 500, those to the path `refuses` with 404.
    """

    def __init__(self, base: Path) -> None:
        self.base = str(base)
        self._model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.adapters: list[str] = []
        self.loaded: list[str] = []
        self.fail_next = 0
        self.refuses: str | None = None
        self.key: str | None = None
        """What it asks for, as `vllm serve --api-key` does."""
        self.loads_adapters = True
        """VLLM_ALLOW_RUNTIME_LORA_UPDATING; without it there are no such addresses."""
        self._lock = threading.Lock()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Return the status and the answer, JSON or text."""
        with self._lock:
            if self.fail_next > 0:
                self.fail_next -= 1
                return 500, {"error": {"message": "EngineCore encountered an issue", "code": 500}}
            if path.endswith("_lora_adapter") and not (self.loads_adapters and body):
                return (405, {"detail": "Method Not Allowed"}) if self.loads_adapters else (404, _error("Not Found"))
            if path == self.refuses:
                return 404, _error("no")
            if path == "/v1/models":
                names = [self.base, *self.adapters]
                return 200, {
                    "object": "list",
                    "data": [{"id": name, "object": "model", "owned_by": "vllm"} for name in names],
                }
            if path == "/v1/load_lora_adapter":
                return self._load(body["lora_name"], body["lora_path"])
            if path == "/v1/unload_lora_adapter":
                return self._unload(body["lora_name"])
            if path == "/v1/completions":
                return self._complete(body)
            return 404, {"error": {"message": "Not Found", "code": 404}}

    def _load(self, name: str, path: str) -> tuple[int, Any]:
        if name in self.adapters:
            return 400, _error(f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / "adapter_config.json").is_file():
            return 404, _error(f"Loading lora {name} failed: No adapter found for {path}")
        if isinstance(self._model, peft.PeftModel):
            self._model.load_adapter(path, name)
        else:
            self._model = peft.PeftModel.from_pretrained(self._model, path, adapter_name=name)
        self.adapters.append(name)
        self.loaded.append(name)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, name: str) -> tuple[int, Any]:
        if name not in self.adapters:
            return 404, _error(f"The lora adapter '{name}' cannot be found.")
        self.adapters.remove(name)
        if self.adapters:  # PEFT keeps at least one.
            self._model.set_adapter(self.adapters[-1])
            self._model.delete_adapter(name)
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    @torch.no_grad()
    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] not in self.adapters:
            return 404, _error(f"The model `{body['model']}` does not exist.")
        self._model.set_adapter(body["model"])
        generator, ids = torch.Generator().manual_seed(body["seed"]), list(body["prompt"])
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < body["max_tokens"] and (not tokens or tokens[-1] not in body["stop_token_ids"]):
            logits = self._model(torch.tensor([ids + tokens])).logits[0, -1]
            scaled = (logits / (body["temperature"] or 1.0)).log_softmax(dim=-1)
            if body["temperature"] == 0:
                token = int(scaled.argmax())
            else:
                token = int(torch.multinomial(scaled.exp(), 1, generator=generator))
            tokens.append(token)
            logprobs.append(float(scaled[token]))
        ended = tokens[-1] in body["stop_token_ids"]
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": "stop" if ended else "length",
            "stop_reason": tokens[-1] if ended else None,
            "logprobs": {"token_logprobs": logprobs, "tokens": [str(token) for token in tokens]},
            "token_ids": tokens if body.get("return_token_ids") else None,
        }
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "InvalidUserInput", "param": None, "code": 400}}


@contextlib.contextmanager
def serving(base: Path) -> Iterator[tuple[str, Server]]:
    """Serve a Hugging Face folder within this context: (URL, server)."""
    server = Server(base)

    class VllmHandler(loopback.Handler):
        def do_GET(self) -> None:
            self._ask({})

        def do_POST(self) -> None:
            self._ask(json.loads(self.body()))

        def _ask(self, body: dict[str, Any]) -> None:
            known = server.key is None or self.headers["Authorization"] == f"Bearer {server.key}"
            self.answer(*(server.answer(self.path, body) if known else (401, {"error": "Unauthorized"})))

    with loopback.serving(VllmHandler) as url:
        yield url, server
