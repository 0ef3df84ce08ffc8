"""Embedding and head trained whole beside adapters: cut over the ranks, saved, resumed, started from, generated from.

That they are PEFT's, with its gradients and its logits, is a row of the table in test_methods.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.config.file import load_config
from distlora.post.load_trained import load_trained
from distlora.post.trained import of_run
from distlora.run_folder.layout import steps
from support.closeness import assert_adapters_close, assert_losses_close
from support.family_models import SINGLE, dequantized, our_logits, tokens
from support.planned import assert_disk_as_planned
from support.runs import losses_of, run_once, run_until
from support.small_models import make_run, read_metrics
from support.worlds import World

BOTH = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": "qv", "r": 4}
NAMES = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")


def saved(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "save_every": 2,
    "eval_every": 3,
    "keep": 9,
    "global_batch": 6,
    "micro_batch": 2,
}


@pytest.fixture(scope="module")
def whole(world: World, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on two ranks that was never stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    make_run(run_dir, folders, "llama-tied", adapter=BOTH, train=SETTINGS)
    world.run(2, run_until, run_dir=run_dir, stop_before=None)
    return run_dir


@pytest.mark.ci
def test_a_run_resumes_bit_for_bit_and_on_another_number_of_ranks(
    world: World, folders: Path, tmp_path: Path, whole: Path
) -> None:
    for name, sizes in (("same", (2, 2)), ("moved", (2, 1, 3))):
        make_run(tmp_path / name, folders, "llama-tied", adapter=BOTH, train=SETTINGS)
        for size, stop in zip(sizes, (*range(3, 3 + 2 * (len(sizes) - 1), 2), None), strict=True):
            world.run(size, run_until, run_dir=tmp_path / name, stop_before=stop)
    expected, same, moved = (saved(run / "adapter") for run in (whole, tmp_path / "same", tmp_path / "moved"))
    assert set(NAMES) <= expected.keys()
    assert all(torch.equal(same[name], tensor) for name, tensor in expected.items())
    assert_adapters_close(moved, expected)
    assert_losses_close(*(losses_of(read_metrics(run)) for run in (tmp_path / "moved", whole)))
    best = saved(whole / "best")
    assert all(torch.equal(best[name], tensor) for name, tensor in expected.items()), "the last is the best here"
    newest = steps(whole / "checkpoints")[-1]
    assert all(torch.equal(saved(newest)[name], tensor) for name, tensor in expected.items())
    assert_disk_as_planned(whole, ranks=2)


@pytest.mark.ci
def test_another_run_starts_from_them_and_generation_has_pefts_logits(
    world: World, folders: Path, tmp_path: Path, whole: Path
) -> None:
    make_run(
        tmp_path / "next",
        folders,
        "llama-tied",
        adapter=BOTH | {"init_from": str(whole / "adapter")},
        train={"max_steps": 1, "micro_batch": 2},
    )
    world.run(3, run_once, run_dir=tmp_path / "next")
    held_out = [
        [line["eval_loss"] for line in read_metrics(r) if "eval_loss" in line] for r in (tmp_path / "next", whole)
    ]
    assert_losses_close(held_out[0][:1], held_out[1][-1:])

    ours, _ = load_trained(of_run(load_config(whole), str(whole / "adapter")), SINGLE)
    assert not any(p.requires_grad for p in (*ours.head.parameters(), *ours.embedding.parameters()))
    base = dequantized(folders / "llama-tied", ours)
    ids = tokens(2, 30)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, whole / "adapter")(input_ids=ids).logits
        assert (theirs - our_logits(ours, ids)).abs().max() <= 1e-4
