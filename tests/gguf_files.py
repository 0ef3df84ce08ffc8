"""GGUF files of tiny models, and a tokenizer as SentencePiece's become."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models

from distlora.post.base_weights import open_base
from distlora.post.export.gguf.model_format import write_model
from distlora.post.export.gguf.tensors import Weight
from distlora.weights.reader import Reader
from family_models import config_for

VARIANTS = ["llama-biases", "llama3-tied", "llama-yarn", "mistral-window", "qwen2-tied-window", "qwen3"]
"""Every architecture and every rotary embedding."""


def write_gguf(folder: Path, path: Path, dtype: str, tokenizer: Any, say: Callable[[str], object] = print) -> None:
    """Write the model of a folder as it is on disk."""
    base = open_base(config_for(folder, quant={"method": "none"}).spec)
    with Reader() as reader:
        weights = {
            name: Weight(
                name=name, shape=weight.shape, rows=lambda weight=weight: (part for _, part in weight.rows(reader))
            )
            for name, weight in base.weights.items()
        }
        write_model(path, base.model.hf_config, weights, tokenizer, dtype=dtype, name="tiny", say=say)


@torch.no_grad()
def logits_of(folder: Path, input_ids: torch.Tensor, **how: Any) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    logits: torch.Tensor = model(input_ids).logits
    return logits


def sentencepiece_spec() -> dict[str, Any]:
    """Return a tokenizer.json as transformers makes it from SentencePiece: a merge per way to join tokens."""
    words = ["the", "value", "of", "an", "expression", "statement", "is", "not", "in", "import", "return", "function"]
    texts = list(dict.fromkeys("▁" + word[:end] for word in words for end in range(1, len(word) + 1)))
    texts += list(dict.fromkeys(word[a:b] for word in words for a in range(len(word)) for b in range(a + 2, a + 5)))
    texts = [text for text in dict.fromkeys(texts) if len(text) > 1]
    letters = sorted(set("".join(texts)))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for text in (*texts, *letters):
        vocabulary.setdefault(text, len(vocabulary))
    merges = [
        (text[:cut], text[cut:])
        for text in texts
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    spec: dict[str, Any] = json.loads(made.to_str())
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return spec
