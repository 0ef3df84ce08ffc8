"""A run as GGUF: what its readers compute is what was trained, and a file of something else is not left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from distlora.config import UserError
from distlora.parallel import Ranks
from distlora.post.export import client_check, worker
from distlora.post.export.formats import FORMATS, ExportRequest, refuse
from distlora.post.export.gguf import clients, model_format
from distlora.post.trained import Name
from distlora.training import worker as training_worker
from small_models import make_run, write_model_folder, write_text_file

RUNS: dict[str, dict[str, Any]] = {
    "dora": {"adapter": {"r": 4, "use_dora": True}, "new_tokens": ["<|im_start|>", "kettle"]},
    "pissa": {"adapter": {"r": 4, "init": "pissa", "use_rslora": True}, "train": {"save_every": 2}},
    "full": {"adapter": {"method": "full"}, "quant": {"method": "none"}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base with grouped queries, and a run of each kind."""
    root = tmp_path_factory.mktemp("gguf")
    write_model_folder(root / "llama", "llama")
    write_text_file(root / "text.jsonl")
    for name, sections in RUNS.items():
        sections = {key: dict(value) if isinstance(value, dict) else value for key, value in sections.items()}
        sections["train"] = {"max_steps": 3, "global_batch": 3} | sections.get("train", {})
        make_run(root / name, root, "llama", sections.pop("new_tokens", ()), optim={"lr": 2e-2}, **sections)
        training_worker.run(root / name, Ranks(0, 1, torch.device("cpu"), None))
    return root


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the client in this process, without llama.cpp, which CI lacks."""

    def run(request: ExportRequest) -> tuple[int, str]:
        return 0, json.dumps(client_check.run(request))

    monkeypatch.setattr(worker, "in_own_process", run)
    for module in ("model_format", "adapter_format"):
        monkeypatch.setattr(f"distlora.post.export.gguf.{module}.has_llama_cpp", lambda: False)


def exported(run: Path, form: str, out: Path, dtype: str | None = None, onto: Any = "trained", **name: Any) -> int:
    """Return the exit code of the worker, as the command starts it."""
    named = Name(place=str(run), **name)
    trained = named.read()
    request = ExportRequest(
        name=named, format=form, out=str(out), dtype=FORMATS[form].dtype_for(trained, dtype), onto=onto
    )
    refuse(trained, request)
    return worker.run(request)


@pytest.mark.parametrize(
    ("run", "form", "dtype", "name"),
    [
        ("dora", "gguf", None, {}),
        ("dora", "gguf", "q8_0", {}),
        ("pissa", "gguf", "bf16", {}),
        ("pissa", "gguf-lora", None, {"checkpoint": "step_2"}),
        ("pissa", "gguf-lora", "fp16", {}),
        ("pissa", "gguf", "fp16", {"adapter": "base"}),
        ("pissa", "gguf", "bf16", {"onto": "original"}),
        ("full", "gguf", None, {}),
    ],
)
def test_what_was_trained_is_in_the_file(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    run: str,
    form: str,
    dtype: str | None,
    name: dict[str, Any],
) -> None:
    """By logits to 1e-4 before anything is rounded, and by weights to what rounding may move each."""
    assert exported(place / run, form, tmp_path / "out.gguf", dtype, **name) == 0
    printed = capsys.readouterr().out
    assert "bound 1.0e-04: met" in printed or form == "gguf-lora"
    assert (form == "gguf" or dtype is not None) == ("may move each" in printed)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["general.type"].contents() == ("adapter" if form == "gguf-lora" else "model")
    if form == "gguf":
        tokens = fields["tokenizer.ggml.tokens"].contents()
        assert ("kettle" in tokens) == (run == "dora")
        assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"


@pytest.mark.parametrize("dtype", ["bf16", "q8_0"])
def test_a_file_without_the_adapter_is_not_left_behind(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Whatever the rounding of the type may hide of logits."""
    write = model_format.write

    def without_adapter(export: Any) -> None:
        write(replace(export, trained=Name(place=str(place / "pissa"), adapter="base").read()))

    monkeypatch.setattr(model_format, "write", without_adapter)
    assert exported(place / "pissa", "gguf", tmp_path / "out.gguf", dtype) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_an_adapter_of_llama_cpp_cannot_say_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"use_dora=true, and llama\.cpp adds B A .* write --format gguf"):
        exported(place / "dora", "gguf-lora", tmp_path / "out.gguf")
    with pytest.raises(UserError, match="trained the whole model"):
        exported(place / "full", "gguf-lora", tmp_path / "out.gguf")


@pytest.mark.llama_cpp
@pytest.mark.skipif(not clients.has_llama_cpp(), reason="llama-cpp-python is not installed; `make test-llama-cpp`")
@pytest.mark.parametrize("form", ["gguf", "gguf-lora"])
def test_llama_cpp_computes_what_was_trained(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    for module in ("model_format", "adapter_format"):
        monkeypatch.setattr(f"distlora.post.export.gguf.{module}.has_llama_cpp", lambda: True)
    assert exported(place / "pissa", form, tmp_path / "out.gguf", "fp32") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  llama.cpp"))
    assert "(bound 1.0e-04: met)" in line
