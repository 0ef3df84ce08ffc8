"""What a path in a setting means: something on this machine, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".xz", ".bz2", ".zip", ".jinja")


def cache_place(name: str) -> str:
    """Where one kind of what is kept between runs lies, unless a setting says otherwise; DISTLORA_CACHE moves all."""
    return f"{os.environ.get('DISTLORA_CACHE') or '~/.cache/distlora'}/{name}"


def means_hub(path: str) -> bool:
    """Whether a path that a user typed means org/name on the hub rather than a place here.

    What exists here is local; so is what ends like a file or whose first part is a folder here: a mistyped path should
    be looked for where its writer thinks it is. Depends on the working folder: for composing settings alone.
    """
    return is_hub_name(path) and not Path(path).exists() and not Path(path).parent.is_dir()


def place_of(path: str) -> str:
    """A path that a user typed as it is named from here on, wherever a process runs; a name on the hub as it is."""
    return path if means_hub(path) else str(Path(path).expanduser().absolute())


def is_hub_name(path: str) -> bool:
    """Whether a path of composed settings is org/name: all local ones are absolute there, wherever a process runs."""
    return _HUB_NAME.fullmatch(path) is not None and not path.endswith(FILE_SUFFIXES)
