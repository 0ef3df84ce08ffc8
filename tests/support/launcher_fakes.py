"""A model's folder made by hand, for tests of the launcher: config.json, tokenizer.json, safetensors full of zeros."""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

HIDDEN, INNER, VOCABULARY, LAYERS = 8, 16, 32, 2

MODEL_CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def block_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one decoder layer of Llama by shape."""
    prefix = f"model.layers.{layer}."
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}self_attn.{name}.weight": (HIDDEN, HIDDEN) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    shapes |= {f"{prefix}mlp.{name}.weight": (INNER, HIDDEN) for name in ("gate_proj", "up_proj")}
    shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INNER)
    shapes |= {f"{prefix}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes


def model_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= block_shapes(layer)
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """fp32 zeros in the format's layout: the header's length in 8 bytes, the header, the data."""
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def write_model(folder: Path, *, shards: int = 1) -> Path:
    """Write a whole model; with several shards, their index too."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    shapes = model_shapes()
    if shards == 1:
        write_safetensors(folder / "model.safetensors", shapes)
        return folder
    names = sorted(shapes)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        own = names[number::shards]
        write_safetensors(folder / file, {name: shapes[name] for name in own})
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_data(path: Path, num_documents: int = 5) -> Path:
    """Write a jsonl file of plain text."""
    path.write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(num_documents)))
    return path


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer that transformers can load: one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "good": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def every_nth(cases: Iterable[Any], step: int) -> list[Any]:
    """Return the parameters of a test with all but every `step`-th marked slow."""
    return [
        pytest.param(*case, marks=pytest.mark.slow if number % step else ())
        for number, case in enumerate(case if isinstance(case, tuple) else (case,) for case in cases)
    ]
