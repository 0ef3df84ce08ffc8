"""A trained parameter that no gradient reaches is named, whatever kind it is and however it is cut over the ranks.

Rows of tokens are in test_tokens.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from distlora.training import worker
from support.family_models import SINGLE
from support.runs import FULL, run_once
from support.small_models import make_run
from support.worlds import World

BLOCK = "model.layers.1."


@pytest.fixture(scope="module")
def dead(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose second MLP is given zeros: the norm before it has no weight."""
    root = tmp_path_factory.mktemp("dead")
    shutil.copytree(folders / "llama", root / "llama")
    shutil.copy(folders / "text.jsonl", root)
    weights = root / "llama" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors[f"{BLOCK}post_attention_layernorm.weight"].zero_()
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    return root


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def test_adapters_and_sharded_weights_without_gradient_are_named(
    world: World, dead: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Longer than what is watched, and read once in an interval.
    make_run(tmp_path / "lora", dead, train={"max_steps": 6, "log_every": 6})
    worker.run(tmp_path / "lora", SINGLE)
    mlp = [f"{BLOCK}mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    expected = {f"{linear}.adapters.default.{part}" for linear in mlp for part in "AB"}
    assert set(summary(tmp_path / "lora")["parameters_without_gradient"]) == expected
    assert f"no gradient has reached {mlp[0]}.adapters.default.A, " in capsys.readouterr().out

    make_run(tmp_path / "full", dead, **FULL, train={"max_steps": 2})
    world.run(3, run_once, run_dir=tmp_path / "full")
    expected = {f"{linear}.weight" for linear in mlp} | {f"{BLOCK}post_attention_layernorm.weight"}
    assert set(summary(tmp_path / "full")["parameters_without_gradient"]) == expected


def test_with_every_gradient_the_list_is_empty_and_one_step_gives_no_verdict(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": "qv"}
    make_run(tmp_path / "two", folders, adapter=modules, train={"max_steps": 2})
    worker.run(tmp_path / "two", SINGLE)
    assert summary(tmp_path / "two")["parameters_without_gradient"] == []
    make_run(tmp_path / "one", folders, train={"max_steps": 1})
    worker.run(tmp_path / "one", SINGLE)
    # B starts at zero, so a gradient reaches A in the second step only.
    assert "parameters_without_gradient" not in summary(tmp_path / "one")
    assert "no gradient" not in capsys.readouterr().out
