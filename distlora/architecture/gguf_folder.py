"""Find a GGUF file by model.path, and keep a folder in the cache that describes it. Needs no torch.

The folder has config.json, the tokenizer and gguf.json (`gguf_note`), and no weights: those are read from the file.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

from distlora.architecture.gguf_note import NOTE_NAME
from distlora.architecture.spec import derived, kept_text, versions
from distlora.config import UserError, require
from distlora.config.base import cache_root
from distlora.config.json_files import object_or_empty
from distlora.system.atomic_io import private_folder
from distlora.system.exit_codes import require_package

SUFFIX = ".gguf"
_METADATA_BYTES = 2**24
"""Bytes that hold the metadata and the tokenizer of any file that we know: at most 11 MB."""


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
    key = json.dumps([str(file), file.stat().st_mtime_ns, versions()])
    read_by = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = cache_root() / "gguf" / _content_key(file) / read_by / file.stem
    _describe(file, folder)
    return folder


def restore_folder(folder: Path, file: Path) -> None:
    """Make the folder of `described` again if the cache lacks it, cannot be read, or describes a file elsewhere.

    Raises UserError for a file that is missing, or is not the one that the folder was made from.
    """
    place = "set model.gguf_file in the run's config.yaml to its place"
    if not file.is_file():
        raise UserError(f"{file} is missing, the GGUF file that the run trained on; put it back there, or {place}")
    if folder.parts[-3:-2] != (_content_key(file),):
        raise UserError(f"{file} is not the GGUF file that the run trained on, but another; put that back, or {place}")
    is_whole = (folder / "config.json").is_file() and object_or_empty(folder / NOTE_NAME).get("file") == str(file)
    _describe(file, folder, again=not is_whole)


def _content_key(file: Path) -> str:
    """Return a digest of a file's size and its first bytes, which hold its metadata."""
    with file.open("rb") as stream:
        content = stream.read(_METADATA_BYTES)
    return hashlib.sha256(f"{file.stat().st_size} ".encode() + content).hexdigest()[:16]


def _describe(file: Path, folder: Path, *, again: bool = False) -> None:
    note = folder / NOTE_NAME
    if note.is_file() and not again:
        return
    require_package("gguf", f"{{model.path}}={file}")
    try:
        private_folder(folder)
        tempfile.TemporaryFile(dir=folder).close()
        if again:
            note.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}, which is to describe {file}, cannot be written ({error.strerror}); set DISTLORA_CACHE to a "
            "folder that can"
        ) from error
    kept_text(note, lambda: derived(f"reading {file.name}", "--gguf", str(file), str(folder)))
