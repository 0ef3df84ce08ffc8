"""Small random models with a real tokenizer, and text to train on: everything that the tests fine-tune."""

from __future__ import annotations

import functools
import json
import pydoc_data.topics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from distlora.config import Config, check_settings
from distlora.config.file import as_mapping, build

if TYPE_CHECKING:
    import pytest

TYPES = ("qwen3_next", "glm4_moe", "gemma4_text", "lfm2", "granite", "qwen3_5", "mistral3")
"""Model types whose models tests of whole runs train: one for each kind of seam."""
VOCABULARY = 1001

"""Prime to every number of ranks, so that the embedding is cut unevenly."""

NEW_TOKENS = ("statement", "of the", "method")
"""Texts in the data, which the tokenizer has no tokens for."""

SHAPES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.08,
}
"""What the configs of the tiny models have in common."""


def use_chunks_of(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Make the LM head compute the logits of so many tokens at once."""
    monkeypatch.setattr("distlora.architecture.shapes.CHUNK_BYTES", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr("distlora.architecture.shapes.CHUNK_MULTIPLE", tokens)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def tokenizer() -> Any:
    """Train a byte-level BPE tokenizer of VOCABULARY entries on CPython's language reference."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )


def write_model_folder(folder: Path, name: str, **settings: Any) -> None:
    """Write a random model (llama, llama-tied, or another family's name) as save_pretrained does.

    It has three decoder layers of hidden size 96.
    """
    import torch
    import transformers

    family = name.partition("-")[0]
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
        "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
    }
    config_class, model_class = classes[family]
    values = {**SHAPES, "tie_word_embeddings": name.endswith("tied")}
    if family in ("mixtral", "gpt_oss"):
        values |= {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 72}
    if family == "qwen3_moe":
        values |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
    torch.manual_seed(0)
    model = model_class(config_class(**(values | settings)))
    with torch.no_grad():
        for parameter in model.parameters():  # Norms of exactly 1 would hide a missing one.
            if parameter.dim() == 1:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def write_text_file(path: Path, num_documents: int = 40) -> None:
    """Plain text documents of uneven length, from CPython's language reference."""
    topics = sorted(pydoc_data.topics.topics.values(), key=len)[:num_documents]
    path.write_text("".join(json.dumps({"text": text[:900]}) + "\n" for text in topics))


def config_with(
    base: Mapping[str, Mapping[str, Any]], sections: Mapping[str, Mapping[str, Any]], *, run_dir: str = "none"
) -> Config:
    """Return a config of the sections of `base`, overridden by `sections`."""
    values = {name: {**base.get(name, {}), **sections.get(name, {})} for name in base.keys() | sections.keys()}
    config = build(Config, {**values, "run_dir": run_dir})
    check_settings(config)
    return config


def write_type(folders: Path, model: str) -> None:
    """Write a small model of any type in model_types.py where it is not yet."""
    if not (folders / model).exists() and model.partition("@")[0] in TYPES:
        from support.family_models import write_family_folder

        write_family_folder(folders / model, model)
        tokenizer().save_pretrained(folders / model)


def make_run(
    run_dir: Path, folders: Path, model: str = "llama", new_tokens: Sequence[str] = (), **sections: dict[str, Any]
) -> Config:
    """Prepare a run folder (config.yaml, data.json) over `folders`: by default fp32, all-linear, six steps.

    A small model of any type in model_types.py is written there at its first use.
    """
    from distlora.data.prepare import prepare_run

    write_type(folders, model)
    batch = sections.get("train", {}).get("global_batch", 12)
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(folders / model), "new_tokens": list(new_tokens)},
        "data": {
            "path": str(folders / "text.jsonl"),
            "sequence_length": 64,
            "eval_fraction": 0.1,
            "cache_dir": str(folders / "cache"),
        },
        "adapter": {"target_modules": "all-linear", "r": 8},
        # What is read from a cache is not quantized; tests of the cache turn it on.
        "quant": {"cache": False},
        # Adam's first step is lr * g / (|g| + eps): an element whose gradient is below the rounding noise of its sum
        # (2e-8 here) turns that noise into a step of lr * 2e-8 / eps. With 1e-4 that is 4e-7, below the bound for a
        # tensor (1e-5 of a norm of 0.1); with 1e-5 one element of llama made 99 % of its tensor's error, 1.1e-5.
        "optim": {"lr": 2e-3, "eps": 1e-4},
        # Small passes cost what large ones do: by threes a run takes half the time that it takes row by row.
        "train": {"max_steps": 6, "global_batch": batch, "micro_batch": min(3, batch), "dtype": "fp32"},
        "tracker": {},
        # A measured step takes twice its time; it is on in test_memory_meter.py and wherever a command runs.
        "plan": {"measure": False},
    }
    config = config_with(base, sections, run_dir=str(run_dir))
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(as_mapping(config)))
    prepare_run(run_dir)
    return config


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
