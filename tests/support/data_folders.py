"""Data files, tokenizers trained on the spot and model folders for the tests of distlora/data."""

import json
from functools import partial
from pathlib import Path

from distlora.config import Config
from distlora.config.file import load_config
from distlora.data import prepare as preparation
from distlora.data.preview import preview, show_rows
from distlora.system.exit_codes import run_to_exit_code

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The same text as CHATML, with the assistant's parts marked by the template."""

_CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then the lazy dog sleeps.",
    "How many birds are there? There are seven birds in the old tree.",
    "A line, and two empty ones.\n\n",
    "user assistant system\nHello! What is the capital of France? It is Paris.",
]


def write_lines(path: Path, documents: list) -> Path:
    """Write a jsonl file; a document that is bytes is written unchanged."""
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in documents]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def chat(*contents: str, first: str = "user") -> dict:
    """Return a conversation that alternates between user and assistant."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def write_model(folder: Path, template: str | None, *, bos: bool = False, eos: bool = True) -> Path:
    """Return a model folder with config.json and a byte-level BPE tokenizer of 400 tokens.

    `bos`: the tokenizer puts <|bos|> in front of every text, as Llama's does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", special.index("<|bos|>"))]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>" if bos else None,
        eos_token="<|eos|>" if eos else None,
        chat_template=template,
        model_max_length=32,
    ).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400}))
    return folder


def prepare(config: Config) -> Path:
    """Prepare the data of a run and return the cache entry."""
    return preparation.prepare(config.model, config.data, config.train)


def show_preview(folder: str | Path, *, documents: int = 2, read_all: bool = False) -> int:
    """Print the preview of the settings in FOLDER/config.yaml and return the exit code."""
    config = load_config(folder)
    show = partial(preview, config.model, config.data, config.train)
    return run_to_exit_code(lambda: show(documents=documents, read_all=read_all))


def show_row(run_dir: str | Path, *numbers: int) -> int:
    """Print packed sequences of a run and return the exit code."""
    return run_to_exit_code(lambda: show_rows(str(run_dir), numbers))
