"""What a path in a setting means: something on this machine, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".xz", ".bz2", ".zip", ".jinja")


def is_hub_name(path: str) -> bool:
    """Whether `path` reads as org/name rather than as a place here.

    What exists here is local; so is what ends like a file or whose first part is a folder here: a mistyped path should
    be looked for where its writer thinks it is.
    """
    if _HUB_NAME.fullmatch(path) is None or path.endswith(FILE_SUFFIXES):
        return False
    return not Path(path).exists() and not Path(path).parent.is_dir()
