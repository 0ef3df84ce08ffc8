"""Paths in settings: local files and folders, or names on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".xz", ".bz2", ".zip", ".jinja")


def cache_place(name: str) -> str:
    """Return the default folder of a cache; DISTLORA_CACHE moves all of them."""
    return f"{os.environ.get('DISTLORA_CACHE') or '~/.cache/distlora'}/{name}"


def means_hub(path: str) -> bool:
    """Return whether a typed path means org/name on the Hub rather than a local path.

    What exists here is local; so is what ends like a file or whose first part is a folder here: a mistyped path should
    be looked for where its writer thinks it is. Depends on the working folder: for composing settings alone.
    """
    return is_hub_name(path) and not Path(path).exists() and not Path(path).parent.is_dir()


def place_of(path: str) -> str:
    """Return a typed path as an absolute path, or the name of a Hub repository unchanged."""
    return path if means_hub(path) else str(Path(path).expanduser().absolute())


def is_hub_name(path: str) -> bool:
    """Return whether a path of composed settings is org/name; local paths are absolute there."""
    return _HUB_NAME.fullmatch(path) is not None and not path.endswith(FILE_SUFFIXES)
