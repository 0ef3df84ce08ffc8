"""The content-addressed cache of tokenized rows: names entries and publishes them whole. Needs numpy alone.

An entry is a folder that is complete from the moment it has its name: it is written beside it, fsynced and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distlora.data.rows import ARRAYS, FORMAT_VERSION, split_file
from distlora.system.atomic_io import sync

TOKENIZER_FILES = (
    "config.json",  # names the tokenizer's class where tokenizer_config.json does not
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
)
"""Patterns of the files in a model's folder that decide how its tokenizer and chat template behave."""
TEMPLATE_FILES = ("tokenizer_config.json", "chat_template*", "additional_chat_templates/*")
"""Files that can hold a chat template."""

_ABANDONED_AFTER = 86_400.0
"""Seconds after which a partial entry belongs to a process that was killed: no preparation takes a day."""


def cache_key(sources: list[dict[str, Any]], model_dir: Path, settings: dict[str, Any]) -> str:
    """SHA-256, in 64 hex digits, over the documents and the tokenizer, the settings and the versions.

    `sources` are the fingerprints of where the documents come from (`Source.fingerprint`). `settings` holds plain JSON
    values: all that decide what the rows are, and nothing else. Where files lie does not matter. The versions of
    transformers and tokenizers count, since both have changed tokenizations.
    """
    header = {
        "layout": FORMAT_VERSION,
        "settings": settings,
        "sources": sources,
        "tokenizer": {
            str(path.relative_to(model_dir)): file_digest(path)
            for pattern in TOKENIZER_FILES
            for path in sorted(model_dir.glob(pattern))
            if path.is_file()
        },
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers")},
    }
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(folder: Path, splits: Sequence[str]) -> str:
    """SHA-256, in hex, over the arrays of an entry: equal where every row of every split is.

    The key of an entry says what it was made from; this says what came of it.
    """
    arrays = {f"{split}/{name}": file_digest(split_file(folder, split, name)) for split in splits for name in ARRAYS}
    return hashlib.sha256(json.dumps(arrays, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def new_entry(cache_dir: Path, key: str) -> Iterator[Path]:
    """Return a folder to write an entry in; at the end of the block it becomes `cache_dir`/`key`, or nothing at all.

    When another process published the same key meanwhile, ours is thrown away: the contents are equal. After an
    exception ours is removed; after a kill it stays under its temporary name, which nobody opens, until a later
    preparation finds it a day old.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(cache_dir)
    partial = cache_dir / f".partial-{key[:12]}-{secrets.token_hex(8)}"
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.iterdir(), partial]:
            sync(path)
        try:
            partial.rename(cache_dir / key)
        except OSError:
            # A folder is not renamed onto one that has files: another process was first.
            if not (cache_dir / key).is_dir():
                raise
        sync(cache_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(cache_dir: Path) -> None:
    for partial in cache_dir.glob(".partial-*"):
        # Another preparation may remove or publish it at the same moment.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(partial)
