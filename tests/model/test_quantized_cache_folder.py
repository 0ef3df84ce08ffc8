"""The quantized-weights cache's folder may hold other files: only the cache's own files are removed."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from distlora.weights import quantized_cache_folder as cache
from distlora.weights.quantized_cache_folder import ENTRY_NAME, entries, remove
from distlora_launcher.cli.main import main

FILE, OLD_FILE = "model-00001-of-00002.safetensors", "00000-0of1-0123456789abcdef.safetensors"
SECRET = "5" * 16


def make_entry(cache: Path, digit: str, *, size: int = 100, age: float = 9e6, name: str = FILE) -> Path:
    path = cache / (digit * 64)
    path.mkdir(parents=True)
    (path / ENTRY_NAME).write_text(json.dumps({"base": f"org/{digit}", "format": 3}))
    (path / name).write_bytes(bytes(size))
    used = (path / ENTRY_NAME).stat().st_mtime - age
    os.utime(path / ENTRY_NAME, (used, used))
    return path


def write_strangers(folder: Path, home: Path) -> None:
    """Write files of other programs into a folder, symlinks to `home` among them, many with similar names."""
    for path in (
        ".git/HEAD",
        ".ssh/id",
        ".bashrc",
        FILE,
        f"{'d' * 64}/config.json",
        f"{'e' * 64}/entry.json",
        f"{'e' * 64}/.{FILE}",
        f"{'f' * 63}/{FILE}",
        f".{'a' * 64}/{FILE}",
        f".{'a' * 64}-{SECRET}/notes",
        f".{'b' * 64}-{SECRET}/{FILE}/notes",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("theirs")
    (folder / ("c" * 64)).symlink_to(home)
    (folder / f".{'c' * 64}-{SECRET}").symlink_to(home)
    (folder / ("9" * 64)).write_text("no folder")
    make_entry(home, "7")
    for path in (".ssh/id", ".bashrc", FILE, ENTRY_NAME):
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
    "a start that needs room": lambda folder: cache.make_room(folder, "0" * 64, 10, 11),
    "clear --older-than": clear("--older-than", "0"),
    "clear --all": clear("--all"),
}


@pytest.mark.parametrize("how", REMOVALS)
def test_files_of_other_programs_stay(tmp_path: Path, how: str) -> None:
    folder, home = tmp_path / "folder", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    write_strangers(folder, home)
    make_old(tmp_path)
    before = tree(tmp_path)
    REMOVALS[how](folder)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", [FILE, OLD_FILE])
def test_other_files_in_a_removed_entry_stay(tmp_path: Path, name: str) -> None:
    path, home = make_entry(tmp_path / "cache", "1", name=name), tmp_path / "home"
    home.mkdir()
    (home / "key").write_text("secret")
    (path / "notes.txt").write_text("theirs")
    (path / "model.safetensors").symlink_to(home / "key")
    (path / "config.json").mkdir()
    (entry,) = entries(tmp_path / "cache")
    assert entry.num_bytes == (path / ENTRY_NAME).stat().st_size + 100
    assert remove(path) == entry.num_bytes
    assert sorted(left.name for left in path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert (home / "key").read_text() == "secret"
    assert entries(tmp_path / "cache") == []


def test_entry_whose_removal_is_killed_becomes_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_entry(tmp_path, "1")

    def die(path: Path, *, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            remove(path)
    assert not path.exists()
    assert cache.remove_leftovers(tmp_path, older_than=0.0) > 0
    assert list(tmp_path.iterdir()) == []


def test_symlink_in_place_of_an_entry_is_not_listed(tmp_path: Path) -> None:
    home = make_entry(tmp_path / "elsewhere", "1")
    (tmp_path / ("2" * 64)).symlink_to(home)
    assert entries(tmp_path) == []


def test_entry_of_another_user_stays_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, theirs, mine = (
        make_entry(tmp_path, digit, size=1000, age=age) for digit, age in (("1", 0), ("2", 9e6), ("3", 8e6))
    )
    unlink = Path.unlink

    def refuse(path: Path, *, missing_ok: bool = False) -> None:  # Root may remove all.
        if theirs.name in path.parent.name:
            raise PermissionError(13, os.strerror(13))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    removed, fits = cache.make_room(tmp_path, own.name, 1000, 1900)
    assert ([entry.path for entry in removed], fits) == ([mine], False)
    main(["cache", "clear", theirs.name, "--dir", str(tmp_path)])
    assert f"{theirs} cannot be removed (Permission denied)" in capsys.readouterr().out
    assert {entry.path for entry in entries(tmp_path)} == {own, theirs}


def test_leftovers_are_removed_after_an_hour(tmp_path: Path) -> None:
    make_entry(tmp_path, "1")
    old, new = (tmp_path / f".{digit * 64}-{SECRET}" for digit in "23")
    for path, size in ((old, 5), (new, 6)):
        path.mkdir()
        (path / FILE).write_bytes(bytes(size))
        os.utime(path, (1, 1))
    os.utime(old / FILE, (1, 1))
    assert cache.remove_leftovers(tmp_path) == 5
    assert [path.exists() for path in (old, new)] == [False, True]
    assert cache.remove_leftovers(tmp_path, older_than=0.0) == 6
    assert len(entries(tmp_path)) == 1
    cache.remove_leftovers(tmp_path / "absent")
