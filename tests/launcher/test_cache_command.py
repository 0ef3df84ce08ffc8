"""`distlora cache`: what is kept, and removal, in a moment and without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from distlora.config import UserError
from distlora.system.numbers import size
from distlora.weights.quantized_cache_folder import ENTRY_NAME, entries
from distlora_launcher.cli.main import main, run_command


def write_entry(cache: Path, number: int, base: str, *, file: str, days: float = 0.0) -> None:
    path = cache / f"{number:x}".ljust(64, "0")
    path.mkdir(parents=True)
    (path / ENTRY_NAME).write_text(json.dumps({"base": base, "format": 3}))
    (path / file).write_bytes(bytes(1000))
    used = (path / ENTRY_NAME).stat().st_mtime - days * 86_400
    os.utime(path / ENTRY_NAME, (used, used))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTLORA_CACHE", str(tmp_path))
    file, of_older_version = "model-00001-of-00002.safetensors", "00000-0of1-0123456789abcdef.safetensors"
    write_entry(tmp_path / "quantized", 0xAAAA1, "org/large", file=file)
    write_entry(tmp_path / "quantized", 0xAAAA2, "org/large", file=file, days=9)
    write_entry(tmp_path / "quantized", 0xBBBB1, "/models/small", file=of_older_version, days=30)
    return tmp_path / "quantized"


def keys(cache: Path) -> list[str]:
    return [entry.key[:5] for entry in entries(cache)]


def test_list_says_what_is_kept_of_which_base_and_what_removal_frees(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "list"]) == 0
    head, *lines, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["entry", "size", "last", "use", "base"]
    assert [line.split()[0] for line in lines] == ["aaaa10000000", "aaaa20000000", "bbbb10000000"]
    assert lines[2].endswith("/models/small")
    kept = sum(path.stat().st_size for path in cache.glob("*/*"))
    assert total == f"3 entries, {size(kept)} in {cache}"
    assert main(["cache", "list", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["bytes"] == sum(entry["bytes"] for entry in values["entries"]) == kept


def test_clear_removes_what_is_named_and_nothing_else(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["cache", "clear", "--older-than", "20"])
    assert "/models/small" in capsys.readouterr().out
    assert keys(cache) == ["aaaa1", "aaaa2"]
    main(["cache", "clear", "aaaa2"])
    assert keys(cache) == ["aaaa1"]
    main(["cache", "clear", "org/large", "--older-than", "1"])
    assert keys(cache) == ["aaaa1"]
    unfinished = cache / f".{'5' * 64}-{'6' * 16}"
    unfinished.mkdir()
    (unfinished / "model-00001-of-00002.safetensors").write_bytes(bytes(1000))
    capsys.readouterr()
    kept = sum(path.stat().st_size for path in cache.glob("*/*"))
    main(["cache", "clear", "--all"])
    assert list(cache.iterdir()) == []
    assert capsys.readouterr().out.splitlines()[-1] == f"{size(kept)} freed in {cache}"
    assert main(["cache", "list"]) == 0
    assert "no quantized weights are cached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["clear"], "no entry is named; write an ENTRY of `distlora cache list`, --older-than DAYS, or --all"),
        (["clear", "aaaa"], "aaaa begins the names of 2 entries"),
        (["clear", ""], "'' is too short; write 4 digits or more"),
        (["clear", "bbb"], "'bbb' is too short; write 4 digits or more"),
        (["clear", "org/larg"], "did you mean 'org/large'"),
        (["clear", "--all", "aaaa1"], "--all removes every entry"),
        (["clear", "--older-than", "-1"], "is not a valid number of days"),
        (["clear", "--al"], "did you mean '--all'"),
        (["lst"], "did you mean 'list'"),
        (["list", "aaaa1"], "'aaaa1' is one argument too many"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_removed(cache: Path, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("--", "-+").replace("(", r"\(")):
        run_command(["cache", *words])
    assert len(entries(cache)) == 3
