"""Load a GGUF file with transformers and with llama.cpp."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LLAMA_CPP = "llama_cpp"
HOW_TO_GET_IT = "`pip install llama-cpp-python` builds it, in some minutes, with a C++ compiler"


def transformers_model(path: Path, config: Any) -> Any:
    """Load a model in fp32.

    `config` is passed as GGUF files lack some rotary embeddings and head sizes for transformers.
    """
    import transformers

    if config.model_type == "mistral":  # GGUF stores Mistral as Llama.
        values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
        config = transformers.LlamaConfig(**values)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
    )
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, input_ids: Tensor) -> Tensor:
    """Return logits (1, T, V) in fp32 of a transformers model."""
    logits: Tensor = model(input_ids=input_ids).logits
    return logits


def has_llama_cpp() -> bool:
    """Return True if llama-cpp-python is installed."""
    return importlib.util.find_spec(LLAMA_CPP) is not None


class LlamaCpp:
    """llama.cpp on the CPU with fp32 keys and values (fp16 by default)."""

    def __init__(self, path: Path, adapter: Path | None = None, *, context: int) -> None:
        import llama_cpp

        fp32 = llama_cpp.GGML_TYPE_F32
        self.model = llama_cpp.Llama(
            str(path),
            lora_path=None if adapter is None else str(adapter),
            n_ctx=context,
            n_batch=context,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            logits_all=True,
            type_k=fp32,
            type_v=fp32,
            flash_attn=False,
            n_gpu_layers=0,
            verbose=False,
        )

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return logits (1, T, V) in fp32."""
        ids = input_ids.flatten().tolist()
        self.model.reset()
        self.model.eval(ids)
        return torch.from_numpy(np.array(self.model.scores[: len(ids)], dtype=np.float32))[None]

    def tokenize(self, text: str) -> list[int]:
        """Tokenize without start and end tokens; special tokens in the text are text."""
        ids: list[int] = self.model.tokenize(text.encode(), add_bos=False, special=False)
        return ids

    def greedy(self, input_ids: Tensor, count: int) -> list[int]:
        """Return the next tokens by greedy decoding."""
        made = []
        for token in self.model.generate(input_ids.flatten().tolist(), temp=0.0, repeat_penalty=1.0, top_k=1):
            made.append(int(token))
            if len(made) == count:
                break
        return made
