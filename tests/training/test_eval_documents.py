"""Sum held-out losses by document, on any number of ranks, for tokens and for pairs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distlora.config import UserError
from distlora.data.loader import StepLoader
from distlora.data.rows import open_split
from distlora.run_folder.eval_documents import EVAL_DOCUMENTS_NAME, DocumentRecord, check_paired, read_documents
from distlora.training.objectives.documents import DocumentLosses
from support.runs import run_once
from support.small_models import make_run, read_metrics, tokenizer
from support.worlds import World

ALONE: Any = SimpleNamespace(ranks=SimpleNamespace(device=torch.device("cpu")), sum_over_ranks=lambda tensor: tensor)
"""A backend of one rank, as far as sums need one."""


def added_up(run_dir: Path, *, world: int = 1, micro_batch: int = 4) -> DocumentRecord:
    """Return the record of an evaluation in which each token's loss is its number, seen by `world` ranks in turn."""
    rows = open_split(run_dir, "eval")
    assert rows is not None
    losses = DocumentLosses(rows)
    for rank in range(world):
        loader = StepLoader(
            rows, global_batch=8, micro_batch=micro_batch, rank=rank, world=world, seed=0, shuffle=False
        )
        for step in range(loader.steps_per_epoch):
            for batch in loader.batch(step).micro_batches:
                losses.add(batch, torch.where(batch.labels >= 0, batch.labels, 0).float())
    return losses.record(3, ALONE)


@pytest.fixture(scope="module")
def prepared(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare a run whose held-out documents are longer than a sequence of 64 tokens, and so span several."""
    run_dir = tmp_path_factory.mktemp("prepared") / "run"
    make_run(run_dir, folders, data={"eval_fraction": 0.3, "too_long": "split"}, train={"eval_documents": True})
    return run_dir


def test_document_loss_sums_all_its_pieces(prepared: Path, folders: Path) -> None:
    record = added_up(prepared)
    texts = [json.loads(line)["text"] for line in (folders / "text.jsonl").read_text().splitlines()]
    encode = tokenizer()
    in_several = 0
    for number, loss, units in zip(record.documents, record.losses, record.units, strict=True):
        tokens = encode(texts[number])["input_ids"] + [encode.eos_token_id]
        pieces = [tokens[at : at + 64] for at in range(0, len(tokens), 64)]
        targets = [token for piece in pieces for token in piece[1:]]  # A piece's first token is predicted by nothing.
        assert (loss, units) == (sum(targets), len(targets))
        in_several += len(pieces) > 2
    assert in_several > 3
    assert len(record.documents) == len(set(record.documents)) > 6


def test_document_losses_do_not_depend_on_ranks(prepared: Path) -> None:
    alone = added_up(prepared)
    assert added_up(prepared, world=3, micro_batch=1) == alone
    assert added_up(prepared, world=2, micro_batch=5) == alone


@pytest.fixture(scope="module")
def alone(world: World, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(world, 1, folders, tmp_path_factory.mktemp("alone") / "run")


def trained(world: World, size: int, folders: Path, run_dir: Path, **settings: Any) -> Path:
    """Train a run of two steps with an evaluation after each."""
    make_run(
        run_dir,
        folders,
        data={"eval_fraction": 0.3},
        train={"max_steps": 2, "eval_every": 1, "eval_documents": True} | settings,
    )
    world.run(size, run_once, run_dir=run_dir)
    return run_dir


def test_run_writes_its_last_evaluation(alone: Path) -> None:
    record = read_documents(alone)
    last = read_metrics(alone)[-1]
    assert record.step == last["step"] == 2
    assert record.loss == pytest.approx(last["eval_loss"], rel=1e-6)


@pytest.mark.ci
def test_three_ranks_have_the_document_losses_of_one(world: World, folders: Path, tmp_path: Path, alone: Path) -> None:
    record = read_documents(trained(world, 3, folders, tmp_path / "run", micro_batch=1))
    expected = read_documents(alone)
    check_paired(record, expected, ("a", "b"))
    np.testing.assert_allclose(record.losses, expected.losses, rtol=2e-6)  # type: ignore[arg-type]


def test_preference_pair_is_one_document(world: World, folders: Path, preferences: Path, tmp_path: Path) -> None:
    data = {"path": str(preferences), "sequence_length": 160, "eval_fraction": 0.2}
    settings = {"objective": "dpo", "max_steps": 2, "global_batch": 6, "eval_documents": True}
    make_run(tmp_path / "run", folders, data=data, train=settings)
    world.run(1, run_once, run_dir=tmp_path / "run")
    record, rows = read_documents(tmp_path / "run"), open_split(tmp_path / "run", "eval")
    assert rows is not None
    assert set(record.units) == {1}
    assert len(record.units) == rows.pairs.sum() > len(rows)
    assert record.loss == pytest.approx(read_metrics(tmp_path / "run")[-1]["eval_loss"], rel=1e-6)
    assert len(set(record.losses)) == len(record.losses)


RECORD = DocumentRecord(step=1, rows="ab", documents=[0, 3], losses=[1.5, None], units=[2, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": [1.0]}, "does not have a loss and units"),
        ({"units": [2, 0]}, "does not have a loss and units"),
        ({"units": [2, "1"]}, r"units\[1\] is '1', not an integer"),
        ({"documents": [], "losses": [], "units": []}, "does not have a loss and units"),
    ],
)
def test_damaged_record_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / EVAL_DOCUMENTS_NAME).write_text(json.dumps(dataclasses.asdict(RECORD) | change))
    with pytest.raises(UserError, match=message):
        read_documents(tmp_path)


@pytest.mark.parametrize("change", [{"rows": "cd"}, {"documents": [0, 4]}, {"units": [2, 2]}])
def test_other_documents_are_not_compared(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"runs/a and runs/b were evaluated on different held-out sequences"):
        check_paired(RECORD, dataclasses.replace(RECORD, **change), ("runs/a", "runs/b"))
