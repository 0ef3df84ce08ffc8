"""The quantized-weights cache's folder may hold other files: only the cache's own files are removed."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from distlora.weights import quantized_cache_folder as cache
from distlora.weights.quantized_cache_folder import ENTRY_NAME, Entry, entries
from distlora_launcher.cli.main import main

PIECE = "00000-0of1-0123456789abcdef.safetensors"
SECRET = "5" * 16


def make_entry(cache: Path, digit: str, *, size: int = 100, age: float = 9e6) -> Entry:
    entry = Entry(cache / (digit * 64))
    entry.begin({"base": f"org/{digit}", "format": 1, "weights": {"w": 4}})
    (entry.path / PIECE).write_bytes(bytes(size))
    used = (entry.path / ENTRY_NAME).stat().st_mtime - age
    os.utime(entry.path / ENTRY_NAME, (used, used))
    return entry


def write_strangers(folder: Path, home: Path) -> None:
    """Write files of other programs into a folder, symlinks to `home` among them, many with similar names."""
    key = "e" * 64
    for path in (
        ".git/HEAD",
        ".ssh/id",
        ".bashrc",
        ".removed-old/notes",
        f".removed-{'a' * 12}-{SECRET}/notes",
        f".removed-{'b' * 12}-{SECRET}/{PIECE}/notes",
        "sources/main.c",
        f"sources/{'5' * 32}.json",
        "sources/.hidden",
        f"{'d' * 64}/config.v2.json",
        f"{'d' * 64}/.hidden",
        f"{key}/entry.json",
        f"{key}/.entry.json",
        f"{'f' * 63}/{PIECE}",
        f"{'f' * 63}/.{PIECE}-{SECRET}",
        f".{PIECE}-{SECRET}",
        f".entry.json-{SECRET}",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("theirs")
    (folder / ("c" * 64)).symlink_to(home)
    (folder / f".removed-{'d' * 12}-{SECRET}").symlink_to(home)
    (folder / ("9" * 64)).write_text("no folder")
    make_entry(home, "7")
    for path in (".ssh/id", ".bashrc", f".{PIECE}-{SECRET}", f"source-{'5' * 32}.json", PIECE, ENTRY_NAME):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text("of home")


def tree(folder: Path) -> dict[str, str]:
    """Return every path in a folder and its content; symlinks are not followed."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        is_file = stat.S_ISREG(mode)
        found[str(path.relative_to(folder))] = path.read_bytes().hex() if is_file else str(stat.S_IFMT(mode))
    return found


def make_old(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (1, 1), follow_symlinks=False)


def clear(*words: str) -> Callable[[Path], object]:
    return lambda folder: main(["cache", "clear", *words, "--dir", str(folder)])


REMOVALS: dict[str, Callable[[Path], object]] = {
    "a start": lambda folder: cache.remove_leftovers(folder),
    "a start that needs room": lambda folder: cache.make_room(folder, Entry(folder / ("0" * 64)), 10, 11),
    "clear --older-than": clear("--older-than", "0"),
    "clear --all": clear("--all"),
}


@pytest.mark.parametrize("how", REMOVALS)
@pytest.mark.parametrize("sources", ["folder", "link"])
def test_files_of_other_programs_stay(tmp_path: Path, how: str, sources: str) -> None:
    folder, home = tmp_path / "folder", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    write_strangers(folder, home)
    if sources == "link":
        shutil.rmtree(folder / "sources")
        (folder / "sources").symlink_to(home)
    make_old(tmp_path)
    before = tree(tmp_path)
    REMOVALS[how](folder)
    assert tree(tmp_path) == before


def test_other_files_in_a_removed_entry_stay(tmp_path: Path) -> None:
    entry, home = make_entry(tmp_path / "cache", "1"), tmp_path / "home"
    home.mkdir()
    (home / "key").write_text("secret")
    (entry.path / "notes.txt").write_text("theirs")
    (entry.path / PIECE.replace("0of1", "1of2")).symlink_to(home / "key")
    (entry.path / PIECE.replace("0of1", "0of2")).mkdir()
    (entry.path / f".{PIECE}-{SECRET}").symlink_to(home)
    make_old(tmp_path)
    assert cache.remove_leftovers(tmp_path / "cache") == 0
    size = (entry.path / ENTRY_NAME).stat().st_size + 100
    assert entry.bytes_on_disk() == entry.remove() == size
    assert sorted(path.name for path in entry.path.iterdir()) == sorted(
        ["notes.txt", PIECE.replace("0of1", "1of2"), PIECE.replace("0of1", "0of2"), f".{PIECE}-{SECRET}"]
    )
    assert (home / "key").read_text() == "secret"


def test_symlink_in_place_of_an_entry_is_not_used(tmp_path: Path) -> None:
    home = make_entry(tmp_path / "elsewhere", "1")
    link = Entry(tmp_path / ("2" * 64))
    link.path.symlink_to(home.path)
    assert (link.piece_names(), link.remove(), entries(tmp_path)) == ([], 0, [])
    with pytest.raises(NotADirectoryError, match="a link is in an entry's place"):
        link.begin({})
    assert len(tree(home.path)) == 2


def test_entry_of_another_user_stays_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, theirs, mine = (
        make_entry(tmp_path, digit, size=1000, age=age) for digit, age in (("1", 0), ("2", 9e6), ("3", 8e6))
    )
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != theirs.path and access(path, mode))  # Root may all.
    removed, fits = cache.make_room(tmp_path, own, 1000, 1900)
    assert ([figures.key for figures in removed], fits) == ([mine.key], False)
    assert set(entries(tmp_path)) == {own, theirs}
    main(["cache", "clear", theirs.key, "--dir", str(tmp_path)])
    assert f"{theirs.path} cannot be removed (Permission denied)" in capsys.readouterr().out
    assert theirs.is_ours()


def test_leftovers_are_removed_after_an_hour(tmp_path: Path) -> None:
    entry = make_entry(tmp_path, "1")
    old, new = entry.path / f".{PIECE}-{SECRET}", entry.path / f".{ENTRY_NAME}-{SECRET}"
    source = tmp_path / "sources" / f".source-{'5' * 32}.json-{SECRET}"
    begun = tmp_path / ("2" * 64) / new.name
    for path, size in ((old, 5), (new, 5), (source, 6), (begun, 8)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
    for path in (old, source, begun):
        os.utime(path, (1, 1))
    assert cache.remove_leftovers(tmp_path) == 5 + 6 + 8
    assert [path.exists() for path in (old, new, source, begun)] == [False, True, False, False]
    assert cache.remove_leftovers(tmp_path, older_than=0.0) == 5
    assert entries(tmp_path) == [entry]
    cache.remove_leftovers(tmp_path / "absent")
