"""`distlora data row`: what a message that names a row is about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_folders import show_row
from distlora.config import UserError
from distlora.data.prepare import open_split
from distlora_launcher.cli.data import main as command
from small_models import make_run, tokenizer


def test_a_row_is_shown_document_by_document_with_what_is_trained(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", folders)
    rows = open_split(tmp_path / "run", "train")
    assert rows is not None
    number = int(np.argmax(rows.flags[:, 1:].sum(axis=1)))  # Of several documents.
    assert show_row(tmp_path / "run", number) == 0
    shown = capsys.readouterr().out
    assert f"row {number}: 64 tokens, {rows.targets[number]} trained" in shown
    texts = shown.split("--- tokens ")[1:]
    assert len(texts) > 1
    marked = "".join(text.partition("[[")[2].partition("]]")[0] for text in texts)
    trained = np.flatnonzero(rows.flags[number] & 1) + 1
    assert marked == tokenizer().decode(np.array(rows.tokens[number])[trained].tolist())


def test_rows_that_are_not_there_are_refused(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", folders)
    assert show_row(tmp_path / "run", 100_000) == 2
    assert "there is no row 100,000" in capsys.readouterr().err
    for words in (["row"], ["row", str(tmp_path / "run")], ["row", str(tmp_path / "run"), "first"]):
        with pytest.raises(UserError, match="argument"):
            command(words)
    with pytest.raises(UserError, match="holds no run"):
        command(["row", str(tmp_path), "0"])


def test_a_cut_record_of_the_data_is_named(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", folders)
    record = tmp_path / "run" / "data.json"
    record.write_text(record.read_text()[:100])
    assert show_row(tmp_path / "run", 0) == 2
    message = capsys.readouterr().err
    assert f"{record} is damaged" in message
    assert f"distlora data prepare {tmp_path / 'run'}" in message
