"""Exports of trained runs by the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distlora.parallel import Ranks
from distlora.post.export import client_check, gguf_model, worker
from distlora.post.export.formats import FORMATS, ExportRequest, refuse
from distlora.post.trained import Name
from distlora.training import worker as training_worker
from support.small_models import make_run, write_model_folder, write_text_file

SINGLE = Ranks(0, 1, torch.device("cpu"), None)
# Rows are whole blocks: for rows of 96 bitsandbytes' own CPU kernel is wrong (tests/kernels/test_nf4.py).
EVEN = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32}
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"r": 4, "use_rslora": True}},
    "dora": {"adapter": {"r": 4, "use_dora": True, "lora_dropout": 0.1}, "new_tokens": ["<|im_start|>", "kettle"]},
    "pissa": {"adapter": {"r": 4, "init": "pissa", "use_rslora": True}, "train": {"save_every": 2}},
    # What training holds of an fp32 base in bf16 is rounded, and so must be what is exported.
    "loftq-bf16": {"adapter": {"r": 4, "init": "loftq"}, "train": {"dtype": "bf16"}},
}
FULL = {"adapter": {"method": "full"}, "quant": {"method": "none"}}


@pytest.fixture(scope="module", name="place")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base, and a run of each kind."""
    root = tmp_path_factory.mktemp("exporting")
    write_model_folder(root / "llama", "llama", **EVEN)
    write_text_file(root / "text.jsonl")
    for name, sections in {**RUNS, "full": FULL}.items():
        run(root, name, **sections)
    return root


def run(root: Path, name: str, model: str = "llama", new_tokens: Any = (), **sections: Any) -> Path:
    sections |= {"train": {"max_steps": 3, "global_batch": 3} | sections.get("train", {})}
    make_run(root / name, root, model, new_tokens, optim={"lr": 2e-2}, **sections)
    training_worker.run(root / name, SINGLE)
    return root / name


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the client in this process, as a start costs seconds, and without llama.cpp; one test starts it really."""

    def run(request: ExportRequest) -> tuple[int, str]:
        return 0, f"of a library\n{json.dumps(client_check.run(request))}\n"

    monkeypatch.setattr(worker, "in_own_process", run)
    monkeypatch.setattr(gguf_model, "has_llama_cpp", lambda: False)


def export(
    place: Path,
    run: str,
    form: str,
    out: Path,
    dtype: str | None = None,
    onto: Any = "trained",
    converter: Path | None = None,
    **name: Any,
) -> int:
    """Export as the command does, with llama.cpp's converter for GGUF; returns the exit code."""
    named = Name(place=str(place / run), **name)
    trained = named.read()
    request = ExportRequest(
        run="",
        name=named,
        format=form,
        out=str(out),
        dtype=FORMATS[form].dtype_for(trained, dtype),
        onto=onto,
        converter=None if converter is None else str(converter),
    )
    refuse(trained, request)
    return worker.run(request)


def exported(place: Path, run: str, form: str, out: Path, *how: Any, **name: Any) -> dict[str, Any]:
    """Export; returns export.json."""
    assert export(place, run, form, out, *how, **name) == 0
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    record: dict[str, Any] = json.loads((out / "export.json").read_text())
    return record
