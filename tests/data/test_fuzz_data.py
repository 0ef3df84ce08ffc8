"""Damage data files, tokenizers and cache entries: refused with file and position, or harmless."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distlora.architecture.tokens import load_tokenizer
from distlora.config import Config, DataConfig
from distlora.config.file import build
from distlora.data.formats import ROLES
from distlora.data.loader import StepLoader
from distlora.data.rows import PackedRows
from distlora.data.sources import find_sources
from support.damage import Reader, any_bytes, any_json, any_lines, holds, holds_without
from support.data_folders import MARKED, chat, prepare, write_lines
from support.data_folders import write_model as write_model_with_tokenizer

CHATS = [
    chat("How are you?", "Well, thank you."),
    {"messages": [{"role": "system", "content": "Be short."}, *chat("And you?", "Fine.")["messages"]]},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [
    {
        "messages": [
            {"role": "user", "content": "Add"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "add", "content": "3"},
            {"role": "assistant", "content": "3", "reasoning_content": "easy"},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}],
    }
]
ALPACA = [{"instruction": "Say a", "input": "", "output": "a"}, {"instruction": "Say b", "input": "x", "output": "b"}]
PAIRS = [{"prompt": "Hello", "chosen": "Hi there", "rejected": "No"}]
SHAREGPT = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]
TEXTS = "".join(f"A line of text, number {number}.\n\n" for number in range(20))

pytestmark = pytest.mark.ci


def make_place(folder: Path) -> Path:
    """Make a folder with an undamaged file of each data format, a model with a tokenizer, and a cache entry."""
    import pyarrow
    import pyarrow.parquet

    write_lines(folder / "chats.jsonl", CHATS)
    write_lines(folder / "tools.jsonl", TOOLS)
    write_lines(folder / "pairs.jsonl", PAIRS)
    write_lines(folder / "sharegpt.jsonl", SHAREGPT)
    (folder / "alpaca.json").write_text(json.dumps(ALPACA, indent=1))
    (folder / "whole.json").write_text(json.dumps({"version": 1, "data": ALPACA}))
    (folder / "text.txt").write_text(TEXTS)
    rows = io.StringIO()
    csv.writer(rows).writerows([["prompt", "completion"], ["a, b", 'c "d"'], ["e\nf", "g"]])
    (folder / "rows.csv").write_text(rows.getvalue())
    (folder / "rows.tsv").write_text("prompt\tcompletion\na\tb\nc\td\n")
    table = pyarrow.table({"prompt": ["a", "b"] * 50, "completion": [f"answer {n}" for n in range(100)]})
    pyarrow.parquet.write_table(table, folder / "table.parquet")
    lines = (folder / "chats.jsonl").read_bytes()
    (folder / "chats.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (folder / "chats.jsonl.bz2").write_bytes(bz2.compress(lines))
    (folder / "chats.jsonl.xz").write_bytes(lzma.compress(lines))
    (folder / "chats.jsonl.zst").write_bytes(zstandard(lines))
    write_model_with_tokenizer(folder / "model", MARKED)
    prepare(config_of(folder))
    (folder / "cache").joinpath(os.listdir(folder / "cache")[0]).rename(folder / "entry")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("fuzz"))


def zstandard(content: bytes) -> bytes:
    import pyarrow

    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(content)
    return bytes(buffer.getvalue().to_pybytes())


def config_of(folder: Path) -> Config:
    data = {"path": str(folder / "chats.jsonl"), "sequence_length": 64, "eval_fraction": 0.0}
    values = {"model": {"path": str(folder / "model")}, "data": {**data, "cache_dir": str(folder / "cache")}}
    return build(Config, {**values, "run_dir": str(folder / "run")})


def documents(name: str) -> Callable[[Path], list[Any]]:
    """Read every document of a file, as the preparation does."""

    def read(folder: Path) -> list[Any]:
        sources = find_sources(DataConfig(path=str(folder / name)))
        return [document.value for source in sources["train"] for document in source.open(has_template=True)[1]]

    return read


def can_be_encoded(found: list[Any]) -> None:
    """Check that documents are texts, conversations or pairs that a tokenizer accepts."""
    for value in found:
        sides = [value["chosen"], value["rejected"]] if "chosen" in value else [value]
        for side in sides:
            texts = [side[key] for key in ("text", "prompt", "completion") if key in side]
            for message in side.get("messages", []):
                assert message["role"] in ROLES
                texts.append(message.get("content") or "")
            for text in texts:
                assert isinstance(text, str)
                text.encode("utf-8")


def read_tokenizer(folder: Path) -> list[int]:
    tokenizer = load_tokenizer(folder / "model")
    tokens: list[int] = tokenizer("The quick brown fox").input_ids
    return tokens


def are_tokens(tokens: list[int]) -> None:
    assert all(isinstance(token, int) and token >= 0 for token in tokens)


def batches(folder: Path) -> int:
    """Read every sequence of a cache entry, as a worker does."""
    rows = PackedRows.open(folder / "entry", "train")
    loader = StepLoader(rows, global_batch=2, micro_batch=1, rank=0, world=1, seed=0, shuffle=False)
    largest = 0
    for step in range(loader.steps_per_epoch):
        for micro in loader.batch(step).micro_batches:
            assert micro.input_ids.min() >= 0
            largest = max(largest, int(micro.input_ids.max()))
    return largest


def are_of_the_model(largest: int) -> None:
    assert largest < 400


def of_data(file: str, damages: Any, examples: int = 15) -> Reader:
    return Reader(file, damages, documents(file), check=can_be_encoded, examples=examples)


def of_tokenizer(file: str, examples: int) -> Reader:
    names = ("model.path=", "tokenizer")
    return Reader(f"model/{file}", any_json, read_tokenizer, names, are_tokens, examples=examples)


def of_entry(file: str, damages: Any, examples: int) -> Reader:
    return Reader(f"entry/{file}", damages, batches, ("entry",), are_of_the_model, examples=examples)


READERS = {
    "chats": of_data("chats.jsonl", any_lines, 60),
    "tools": of_data("tools.jsonl", any_lines, 40),
    "pairs": of_data("pairs.jsonl", any_lines, 20),
    "sharegpt": of_data("sharegpt.jsonl", any_lines, 20),
    "alpaca": of_data("alpaca.json", any_json, 30),
    "object": of_data("whole.json", any_json, 20),
    "text": of_data("text.txt", any_bytes),
    "csv": of_data("rows.csv", any_bytes, 30),
    "tsv": of_data("rows.tsv", any_bytes),
    "parquet": of_data("table.parquet", any_bytes, 40),
    "gzip": of_data("chats.jsonl.gz", any_bytes, 20),
    "bzip2": of_data("chats.jsonl.bz2", any_bytes),
    "xz": of_data("chats.jsonl.xz", any_bytes),
    "zstandard": of_data("chats.jsonl.zst", any_bytes, 20),
    "tokenizer": of_tokenizer("tokenizer.json", 20),
    "tokenizer's settings": of_tokenizer("tokenizer_config.json", 15),
    "meta": of_entry("meta.json", any_json, 40),
    **{
        f"entry's {name}": of_entry(f"train_{name}.npy", any_bytes, 20)
        for name in ("tokens", "flags", "targets", "pairs", "documents")
    },
}


@pytest.mark.parametrize("name", READERS)
def test_damage_is_refused_or_harmless(name: str, place: Path) -> None:
    holds(READERS[name], place)


@pytest.mark.parametrize("name", READERS)
def test_non_files_are_refused_or_missing(name: str, place: Path) -> None:
    holds_without(READERS[name], place)
