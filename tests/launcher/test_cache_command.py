"""`distlora cache`: what is kept, and removal, in a moment and without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from distlora.config import UserError
from distlora.system.numbers import size
from distlora.weights.quantized_cache_folder import ENTRY_NAME, Entry, Extent, entries, header_of
from distlora_launcher.cli.main import main, run_command

GROUPS = 10


def write_entry(cache: Path, number: int, base: str, *, groups: int, days: float = 0.0) -> Entry:
    """Make a cache entry of one weight of GROUPS groups, with the first `groups` present."""
    entry = Entry(cache / f"{number:x}".ljust(64, "0"))
    entry.begin({"base": base, "format": 1, "weights": {"w": GROUPS}})
    path = entry.path_of(0, 0, 1, {"w": range(groups)})
    content = header_of(entry.key, {"w": Extent(0, groups, 0.5, {})})
    path.write_bytes(content + bytes(groups * (8192 + 256 + 4 + 8)))
    used = (entry.path / ENTRY_NAME).stat().st_mtime - days * 86_400
    os.utime(entry.path / ENTRY_NAME, (used, used))
    return entry


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTLORA_CACHE", str(tmp_path))
    write_entry(tmp_path / "quantized", 0xAAAA1, "org/large", groups=GROUPS)
    write_entry(tmp_path / "quantized", 0xAAAA2, "org/large", groups=GROUPS, days=9)
    write_entry(tmp_path / "quantized", 0xBBBB1, "/models/small", groups=7, days=30)
    return tmp_path / "quantized"


def keys(cache: Path) -> list[str]:
    return [entry.key[:5] for entry in entries(cache)]


def test_list_says_what_is_kept_of_which_base_and_what_removal_frees(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "list"]) == 0
    head, *lines, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["entry", "size", "holds", "last", "use", "base"]
    assert [line.split()[0] for line in lines] == ["aaaa10000000", "aaaa20000000", "bbbb10000000"]
    assert [line.split()[3] for line in lines] == ["100%", "100%", "70%"]
    assert lines[2].endswith("/models/small")
    kept = sum(path.stat().st_size for path in cache.glob("*/*"))
    assert total == f"3 entries, {size(kept)} in {cache}"
    assert main(["cache", "list", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [entry["share"] for entry in values["entries"]] == [1.0, 1.0, 0.7]
    assert values["bytes"] == kept


def test_clear_removes_what_is_named_and_nothing_else(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["cache", "clear", "--older-than", "20"])
    assert "/models/small" in capsys.readouterr().out
    assert keys(cache) == ["aaaa1", "aaaa2"]
    main(["cache", "clear", "aaaa2"])
    assert keys(cache) == ["aaaa1"]
    main(["cache", "clear", "org/large", "--older-than", "1"])
    assert keys(cache) == ["aaaa1"]
    (cache / "sources").mkdir()
    (cache / "sources" / f"source-{'5' * 32}.json").write_text("{}")
    (cache / "aaaa1".ljust(64, "0") / f".{ENTRY_NAME}-{'6' * 16}").write_bytes(bytes(1000))
    capsys.readouterr()
    kept = sum(path.stat().st_size for path in cache.glob("*/*") if path.parent.name != "sources")
    main(["cache", "clear", "--all"])
    assert list(cache.iterdir()) == []
    assert capsys.readouterr().out.splitlines()[-1] == f"{size(kept)} freed in {cache}"
    assert main(["cache", "list"]) == 0
    assert "no quantized shards are cached" in capsys.readouterr().out


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
