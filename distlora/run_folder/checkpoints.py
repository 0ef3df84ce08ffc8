"""The folders of checkpoints on the disk: their names, whether one is whole, what a kill left beside them. No torch.

    RUN/checkpoints/step_00000100/  adapter_config.json, adapter_model.safetensors (PEFT's format; model.safetensors for
                                    adapter=full), trainer.safetensors (optimizer), state.json, manifest.json (SHA-256)

A checkpoint is written to a temporary folder, synced and renamed, so a name `step_*` always stands for a complete one;
the manifest tells of later damage.
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
    """Where the state after `step` steps is saved."""
    return checkpoints / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The steps done before a checkpoint."""
    match = _STEP.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1])


def steps(checkpoints: Path) -> list[Path]:
    """The checkpoint folders, whole or not, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted((path for path in checkpoints.iterdir() if _STEP.fullmatch(path.name)), key=step_of)


def temporary_folder(folder: Path) -> Path:
    """Where what will be `folder` is written."""
    return folder.with_name(f".{folder.name}{_TEMPORARY}")


def replaced_folder(folder: Path) -> Path:
    """Where an older `folder` is while a new one takes its name."""
    return folder.with_name(f".{folder.name}{_REPLACED}")


def write_manifest(folder: Path, sums: Mapping[str, str], base_fingerprint: str) -> None:
    """manifest.json of the files in `folder`, by their SHA-256 in hexadecimal, and of the base that they belong to."""
    content = {"files": dict(sorted(sums.items())), "base_fingerprint": base_fingerprint}
    atomic_io.write_json(folder / MANIFEST_NAME, content)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest and every byte of its files; None where it is whole.

    Reads within `folder` alone, whatever the manifest names. The one check that everything else relies on.
    """
    found = _fault(folder)
    return None if found is None else in_one_line(found)


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
    """SHA-256 by file of a manifest. ValueError for one that is not ours."""
    sums = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(sums, dict):
        raise ValueError("it lists no files")
    for name, value in sums.items():
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r} is no file of this folder")
        if not isinstance(value, str) or _SHA256.fullmatch(value) is None:
            raise ValueError(f"{name} has no SHA-256 but {value!r}")
    missing = sorted({STATE_NAME, TRAINER_NAME} - sums.keys())
    if missing:
        raise ValueError(f"it does not list {missing[0]}")
    return sums


def newest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None, and one line for each newer one that is damaged. Reads all their bytes."""
    damaged: list[str] = []
    for folder in reversed(steps(checkpoints)):
        found = fault(folder)
        if found is None:
            return folder, damaged
        damaged.append(f"checkpoint {folder.name} is damaged ({found}) and was not used")
    return None, damaged


def set_aside(folder: Path) -> Path:
    """Give a checkpoint that a start does not go on from a name that is no checkpoint's; returns where it is now.

    The run saves those steps anew: were it still among them, and readable by then, it would cost these their place.
    """
    for number in itertools.count(1):
        aside = folder.with_name(f"unused_{folder.name}" + (f"_{number}" if number > 1 else ""))
        if not aside.exists():
            break
    folder.rename(aside)
    atomic_io.sync(aside.parent)
    return aside


def tidy(parent: Path, name: str) -> None:
    """Remove what a killed writer left of the folders in `parent` that match `name` (a glob pattern); one that it had
    set aside and not yet replaced gets its name back. For the start of a run, while nothing writes there.
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
    """In hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
