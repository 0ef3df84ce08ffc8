"""Damage a run folder: no damaged checkpoint is ever resumed, and each command names the damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.checkpoint.state import check_matches, identity_of, load_state
from distlora.checkpoint.verify import Item, verify
from distlora.config.file import load_config
from distlora.parallel import Ranks
from distlora.run_folder.layout import newest, read_record
from distlora.training import worker
from distlora.training.optimizers import build_optimizer
from distlora.training.publish import restore
from distlora.training.setup import start_run_model
from distlora.weights.initial_adapter_file import base_identity
from support.damage import Reader, any_json, any_lines, any_tensors, any_yaml, holds, holds_without
from support.small_models import make_run

SINGLE = Ranks(0, 1, torch.device("cpu"), None)
STEP = "run/checkpoints/step_00000002"

pytestmark = pytest.mark.ci


def make_place(folder: Path, folders: Path) -> Path:
    """Make a stopped run with two checkpoints."""
    settings = {"max_steps": 2, "save_every": 1, "global_batch": 2, "eval_every": 1}
    data = {"cache_dir": str(folder / "cache")}
    make_run(folder / "run", folders, "llama", train=settings, data=data, adapter={"r": 2, "target_modules": "qv"})
    worker.run(folder / "run", SINGLE)
    for name in ("adapter", "best"):
        shutil.rmtree(folder / "run" / name)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, folders: Path) -> Path:
    return make_place(tmp_path_factory.mktemp("fuzz"), folders)


def read_newest(folder: Path) -> tuple[bytes | None, str]:
    """Return (the files of the checkpoint that a start chooses, its name)."""
    found, damaged = newest(folder / "run" / "checkpoints")
    assert found is not None, "the older one is whole"
    assert all(line.isprintable() for line in damaged), damaged
    return None if damaged else content(found), found.name


def content(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "manifest.json")


def of_checkpoint(name: str, damages: Any) -> Reader:
    """Check that a damaged newest checkpoint is replaced by the one before, or that every byte is as saved."""
    whole: list[bytes] = []

    def check(found: tuple[bytes | None, str]) -> None:
        saved, chosen = found
        assert (saved is None) == (chosen == "step_00000001")
        if saved is not None:
            whole.append(saved)
            assert saved == whole[0]  # The first is of the undamaged one.

    return Reader(file=f"{STEP}/{name}", damages=damages, read=read_newest, check=check, examples=25)


def read_verified(folder: Path) -> list[Item]:
    return list(verify(folder / "run"))


def says_lines(items: list[Item]) -> None:
    for item in items:
        assert item.state in ("ok", "note", "damaged")
        assert f"{item.name}{item.message}".isprintable(), item


def read_state(folder: Path) -> None:
    """Resume from a checkpoint whose manifest matches the damaged bytes."""
    step, run_dir = folder / STEP, folder / "run"
    state = load_state(step)
    config, data = load_config(run_dir), read_record(run_dir / "data.json")
    base = base_identity(CheckpointFiles(config.model.path), config.adapter, run_dir)
    check_matches(
        state, step, identity_of(config, data_digest=data["content"], base_identity=base), reference="adapter.init_from"
    )


def restoring() -> Callable[[Path], None]:
    """Fill a model and its optimizer from the newest checkpoint, ignoring its manifest; then take a step."""
    built: list[Any] = []

    def read(folder: Path) -> None:
        if not built:
            config = load_config(folder / "run")
            model, backend, _ = start_run_model(config, SINGLE)
            trained = worker.trained_parameters(model)
            backend.reduce_gradients_of(trained.values(), config.parallel.bucket_mb)
            built.extend((config, model, backend, trained))
        config, model, backend, trained = built
        optimizer = build_optimizer(backend.updated(trained), config.optim)
        restore(folder / STEP, model, optimizer, trained, backend)
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(1e-3, torch.tensor(True))

    return read


def with_own_manifest(file: str, damages: Any, read: Callable[[Path], None], examples: int) -> Reader:
    return Reader(f"{STEP}/{file}", damages, read, ("step_00000002",), examples=examples)


READERS = {
    "state": of_checkpoint("state.json", any_json),
    "manifest": of_checkpoint("manifest.json", any_json),
    "moments": of_checkpoint("trainer.safetensors", any_tensors),
    "adapter": of_checkpoint("adapter_model.safetensors", any_tensors),
    "state with its own manifest": with_own_manifest("state.json", any_json, read_state, 40),
    "moments with their own manifest": with_own_manifest("trainer.safetensors", any_tensors, restoring(), 30),
    "adapter with its own manifest": with_own_manifest("adapter_model.safetensors", any_tensors, restoring(), 30),
    **{
        f"verify {file}": Reader(file=file, damages=damages, read=read_verified, check=says_lines, examples=15)
        for file, damages in (
            ("run/config.yaml", any_yaml),
            ("run/data.json", any_json),
            ("run/metrics.jsonl", any_lines),
            ("run/summary.json", any_json),
            (f"{STEP}/state.json", any_json),
            (f"{STEP}/manifest.json", any_json),
            (f"{STEP}/adapter_config.json", any_json),
            (f"{STEP}/trainer.safetensors", any_tensors),
        )
    },
}


@pytest.mark.parametrize("name", READERS)
def test_damage_is_refused_or_harmless(name: str, place: Path) -> None:
    holds(READERS[name], place)


@pytest.mark.parametrize("name", READERS)
def test_non_files_are_refused_or_missing(name: str, place: Path) -> None:
    holds_without(READERS[name], place)
