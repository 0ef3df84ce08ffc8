"""Collect the files of a hub repository or export folder: what a run trained, with a model card.

Imports no torch, except for a saved step of PiSSA.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distlora.architecture.tokens import tokenizer_files
from distlora.config import UserError
from distlora.config.base import is_pissa
from distlora.data.rows import TOKENIZER_FILES
from distlora.run_folder.layout import BEST_STEP_NAME, TEMPLATE_NAME, Result, read_record
from distlora.training.model_card import model_card, read_metadata
from distlora.weights.initial_adapter_file import require_initial_adapter
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME

Files = Mapping[str, bytes | Path]
"""Content, or the file that holds it, by path in the repository."""


@contextlib.contextmanager
def as_plain_adapter(result: Result) -> Iterator[Result]:
    """Yield the result; for a saved step of PiSSA, the plain adapter that the run would publish."""
    if result.adapter is None or not is_pissa(str(result.adapter.get("init_lora_weights"))):
        yield result
        return
    adapter, run_dir = result.config.adapter, result.config.run_dir
    require_initial_adapter(run_dir, adapter, None)
    from distlora.loading.decomposed_adapters import plain_form

    with plain_form(result.folder, adapter, run_dir) as place:
        yield dataclasses.replace(result, folder=place, adapter=read_record(place / CONFIG_NAME))


def collect(result: Result, *, repository: str, base: str | None) -> dict[str, bytes | Path]:
    """Return the files of the repository. adapter_config.json names the base by its hub name, never by a folder."""
    own_card = read_metadata(Path(result.config.model.path) / "README.md")
    inherited: dict[str, Any] = {
        key: own_card[key] for key in ("license", "license_name", "license_link") if key in own_card
    }
    card = model_card(result, repository=repository, base=base, license_of_base=inherited)
    files: dict[str, bytes | Path] = {"README.md": card.encode()}
    if result.adapter is None:
        paths = sorted(path for path in result.folder.iterdir() if path.is_file() and path.name != BEST_STEP_NAME)
        files |= {path.name: path for path in paths}
        return own_files(files)
    same_base = base is not None and base == result.config.model.name
    adapter = dict(result.adapter) | {
        "base_model_name_or_path": base,
        "revision": result.config.model.revision if same_base else None,
    }
    files[CONFIG_NAME] = (json.dumps(adapter, indent=2) + "\n").encode()
    files[WEIGHTS_NAME] = result.folder / WEIGHTS_NAME
    if result.config.model.changes_tokenizer:
        published = {path.name: path for pattern in TOKENIZER_FILES for path in result.folder.glob(pattern)}
        files |= published or tokenizer_files(result.config.spec)  # A saved step has no tokenizer.
    if result.chat_template is not None:  # From the run's record, as a saved step has no template file.
        files[TEMPLATE_NAME] = result.chat_template.encode()
    return own_files(files)


def own_files(files: dict[str, bytes | Path]) -> dict[str, bytes | Path]:
    """Return `files`. Raises UserError for a link, which could publish any file of this node."""
    for path in files.values():
        if isinstance(path, Path) and path.is_symlink():
            raise UserError(
                f"{path} is a link to {path.readlink()}, and a run writes no links; put a copy of the file in its "
                "place if it is to be published"
            )
    return files


def write_files(files: Files, folder: Path) -> None:
    """Write the files into an existing folder."""
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_bytes(content)
