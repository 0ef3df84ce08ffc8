"""The worker of `distlora combine`: reads the adapters a weight at a time and writes one in PEFT's format."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from distlora.checkpoint.files import new_folder, write_files
from distlora.parallel import Backend, Ranks, Shards
from distlora.post.combine.record import record, told
from distlora.post.combine.request import RECORD_NAME, Request
from distlora.post.combine.result import Combination, held
from distlora.post.combine.whole import new_token_owner
from distlora.post.merge.kept import DTYPES
from distlora.post.merge.merge import merge_to
from distlora.post.trained import Name
from distlora.run_folder.checkpoints import sha256
from distlora.system import atomic_io
from distlora.system.exit_codes import DONE, request_text, run_to_exit_code
from distlora.system.progress_lines import Progress, quieten
from distlora.weights.peft_folder import CONFIG_NAME, NF4_MARK, WEIGHTS_NAME
from distlora.weights.reader import Reader

_SINGLE = Ranks(0, 1, torch.device("cpu"), None)


def run(request: Request) -> dict[str, Any]:
    """Write the adapter, or the base with it; returns its record."""
    say = Progress()
    out = Path(request.out)
    if request.onto is None:
        return write_adapter(request, out, say)
    assert request.base_folder is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".distlora-combine-", dir=out.parent) as scratch:
        folder = Path(scratch) / "adapter"
        found = write_adapter(request, folder, say)
        trained = Name(place=str(folder), base=request.base_folder, quant=request.quant).read()
        trained = dataclasses.replace(trained, config=held(trained.config, request))
        receipt = merge_to(trained, out, onto=request.onto, dtype=DTYPES[request.dtype], say=say)
    atomic_io.write_json(out / RECORD_NAME, found)
    # The adapter is gone: what it was made of is in the record.
    made_of = {**(receipt.adapter or {}), "place": RECORD_NAME, "folder": RECORD_NAME}
    files = receipt.files | {RECORD_NAME: sha256(out / RECORD_NAME)}
    dataclasses.replace(receipt, adapter=made_of, files=files).write(out)
    return found


def write_adapter(request: Request, out: Path, say: Progress) -> dict[str, Any]:
    """The folder in PEFT's format, whole or not at all; returns its record."""
    backend = Backend(_SINGLE, Shards.over(_SINGLE, 1))
    with Reader() as reader:
        made = Combination(request, reader, say)
        say.line(f"combining {len(made.members)} adapters, {len(made.paths):,} weights, by {request.method}")
        for_nf4 = any(member.file.read.settings["init_from_loftq"] for member in made.members)
        with new_folder(out) as folder:
            files = {CONFIG_NAME: made.config(), WEIGHTS_NAME: made.tensors()}
            write_files(folder, files, backend, metadata=NF4_MARK if for_nf4 else {})
            owner = None if made.base is None else new_token_owner(made.members, made.base)
            if owner is not None:
                copy_tokenizer(owner.file.read.folder, folder)
            found = record(request, made, folder)
            atomic_io.write_json(folder / RECORD_NAME, found)
    return found


def copy_tokenizer(source: Path, folder: Path) -> None:
    """What an adapter with new tokens is published with, beside its weights."""
    for path in source.iterdir():
        if path.is_file() and path.name not in (CONFIG_NAME, WEIGHTS_NAME, RECORD_NAME, "README.md"):
            shutil.copy2(path, folder / path.name)


def main(argument: str) -> int:
    """Combine; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    quieten()

    def work() -> int:
        request = Request.read(request_text(argument))
        found = run(request)
        print(told(request, found))
        what = "an adapter in PEFT's format" if request.onto is None else f"the merged model in {request.dtype}"
        print(f"wrote {request.out}: {what}, and {RECORD_NAME}")
        return DONE

    return run_to_exit_code(work)
