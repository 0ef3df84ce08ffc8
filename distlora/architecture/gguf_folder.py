"""Find a GGUF file by model.path, and keep a folder in the cache that describes it. Needs no torch.

The folder has config.json, the tokenizer and gguf.json (`gguf_note`), and no weights: those are read from the file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from distlora.architecture.gguf_note import NOTE_NAME
from distlora.architecture.spec import derived, kept_text, versions
from distlora.config import UserError, require
from distlora.config.base import cache_root
from distlora.system.exit_codes import require_package

SUFFIX = ".gguf"


def gguf_file(path: str | Path) -> Path | None:
    """Return the GGUF file that a path names: itself, or the only one of a folder without safetensors; else None.

    Raises UserError for a folder with several.
    """
    place = Path(path)
    if place.suffix == SUFFIX and not place.is_dir():
        return place
    files = sorted(place.glob(f"*{SUFFIX}")) if place.is_dir() else []
    if not files or any(place.glob("*.safetensors")):
        return None
    names = ", ".join(file.name for file in files[:8])
    require(len(files) == 1, f"{place} has {len(files)} GGUF files ({names}); set {{model.path}} to one of them")
    return files[0]


def described(file: Path) -> Path:
    """Return the folder in the cache that describes a GGUF file; make it if there is none.

    Raises UserError for a file that is missing, damaged, or of a model that cannot be read exactly.
    """
    if not file.is_file():
        raise UserError(
            f"{{model.path}}={file} is missing or not a file; set {{model.path}} to a GGUF file, or to a model's folder"
        )
    file = file.absolute()
    status = file.stat()
    key = json.dumps([str(file), status.st_size, status.st_mtime_ns, versions()])
    folder = cache_root() / "gguf" / hashlib.sha256(key.encode()).hexdigest()[:16] / file.stem
    if not (folder / NOTE_NAME).is_file():
        require_package("gguf", f"{{model.path}}={file}")
    kept_text(folder / NOTE_NAME, lambda: derived(f"reading {file.name}", "--gguf", str(file), str(folder)))
    return folder
