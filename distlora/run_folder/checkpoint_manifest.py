"""Folders of checkpoints: names, completeness, leftovers of a kill. Needs no torch.

    RUN/checkpoints/step_00000100/  adapter_config.json, adapter_model.safetensors (PEFT's format; model.safetensors for
                                    adapter=full), trainer.safetensors (optimizer), state.json, manifest.json (SHA-256)

A checkpoint is written to a temporary folder, synced and renamed, so a name `step_*` always stands for a complete one.
The manifest reveals later damage.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distlora.config.errors import in_one_line
from distlora.system import atomic_io

MANIFEST_NAME, STATE_NAME, TRAINER_NAME = "manifest.json", "state.json", "trainer.safetensors"

_STEP = re.compile(r"step_(\d{8,})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEMPORARY, _REPLACED = ".tmp", ".old"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of the state after `step` steps."""
    return checkpoints / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Return the number of steps before a checkpoint."""
    match = _STEP.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1])


def steps(checkpoints: Path) -> list[Path]:
    """List the checkpoint folders, whole or not, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted((path for path in checkpoints.iterdir() if _STEP.fullmatch(path.name)), key=step_of)


def temporary_folder(folder: Path) -> Path:
    """Return the folder in which `folder` is written before it is renamed."""
    return folder.with_name(f".{folder.name}{_TEMPORARY}")


def replaced_folder(folder: Path) -> Path:
    """Return the folder to which an older `folder` moves while a new one takes its name."""
    return folder.with_name(f".{folder.name}{_REPLACED}")


def write_manifest(folder: Path, sums: Mapping[str, str], base_fingerprint: str) -> None:
    """Write manifest.json with the SHA-256 of each file and the base's identity."""
    content = {"files": dict(sorted(sums.items())), "base_fingerprint": base_fingerprint}
    atomic_io.write_json(folder / MANIFEST_NAME, content)


def fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint by its manifest and every byte; None if it is whole.

    Reads only within `folder`, whatever the manifest names.
    """
    reason = _fault(folder)
    return None if reason is None else in_one_line(reason)


def _fault(folder: Path) -> str | None:
    try:
        if not (folder / MANIFEST_NAME).is_file():
            return f"{MANIFEST_NAME} is missing"
        sums = _sums(json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST_NAME}: {error}"
    for name, expected in sums.items():
        path = folder / name
        try:
            if not path.is_file() or path.is_symlink():
                return f"{name} is missing"
            if sha256(path) != expected:
                return f"{name} is not what was saved"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return None


def _sums(manifest: Any) -> dict[str, str]:
    """Return the SHA-256 by file of a manifest. Raises ValueError for an invalid one."""
    sums = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(sums, dict):
        raise ValueError("it lists no files")
    for name, value in sums.items():
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r} is not a file of this folder")
        if not isinstance(value, str) or _SHA256.fullmatch(value) is None:
            raise ValueError(f"{name} has no SHA-256 but {value!r}")
    missing = sorted({STATE_NAME, TRAINER_NAME} - sums.keys())
    if missing:
        raise ValueError(f"it does not list {missing[0]}")
    return sums


def newest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Return (the newest whole checkpoint or None, one line per newer damaged one). Reads all their bytes."""
    damaged: list[str] = []
    for folder in reversed(steps(checkpoints)):
        reason = fault(folder)
        if reason is None:
            return folder, damaged
        damaged.append(f"checkpoint {folder.name} is damaged ({reason}) and was not used")
    return None, damaged


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that it no longer counts as one; return its new path.

    The run saves those steps again: if the old folder became readable by then, it would take their place.
    """
    for number in itertools.count(1):
        aside = folder.with_name(f"unused_{folder.name}" + (f"_{number}" if number > 1 else ""))
        if not aside.exists():
            break
    folder.rename(aside)
    atomic_io.sync(aside.parent)
    return aside


def tidy(parent: Path, name: str) -> None:
    """Remove what a killed writer left of the folders in `parent` that match the glob pattern `name`.

    A folder that was set aside and not replaced gets its name back. Call it at the start of a run, while nothing writes
    there.
    """
    for path in sorted(parent.glob(f".{name}{_REPLACED}")):
        folder = parent / path.name[1 : -len(_REPLACED)]
        if not folder.exists():
            path.rename(folder)
            atomic_io.sync(parent)
    for pattern in (f".{name}{_REPLACED}", f".{name}{_TEMPORARY}"):
        for path in parent.glob(pattern):
            shutil.rmtree(path)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
