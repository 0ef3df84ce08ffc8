"""Fingerprint a checkpoint's files on ranks that see one file, or one copy per node."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

from distlora.config import Config
from distlora.config.file import build
from distlora.loading import base_fingerprint
from distlora.loading.base_fingerprint import content_of
from distlora.parallel import Ranks
from distlora.system.stop_signals import Stopped
from support.runs import build_run_model, parallelize_run
from support.worlds import World

CONTENT = bytes(range(256)) * 40


def look(
    ranks: Ranks, *, config: Config, root: Path, machines: list[str], stop_at: int | None = None
) -> tuple[tuple[dict[Path, str], int] | None, list[str], int] | str:
    """Return what a rank finds for the file `model` in its node's folder, with one cache."""
    before = base_fingerprint.SETTLED_SECONDS, base_fingerprint.PART_BYTES
    base_fingerprint.SETTLED_SECONDS, base_fingerprint.PART_BYTES = 0.0, 1024
    said: list[str] = []
    marks = 0

    def mark(step: int | None, phase: str, part: int | None = None, *, long: bool = False) -> None:
        nonlocal marks
        marks += 1
        if marks == stop_at:
            raise Stopped(signal.SIGTERM)

    backend = parallelize_run(build_run_model(config), ranks, config)
    file = root / machines[ranks.rank] / "model"
    try:
        found = content_of([file], root / f"cache-{machines[ranks.rank]}", backend, said.append, mark)
    except Stopped:
        return "stopped"
    finally:
        base_fingerprint.SETTLED_SECONDS, base_fingerprint.PART_BYTES = before
    return found, said, marks


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for machine in "ab":
        (tmp_path / machine).mkdir()
        (tmp_path / machine / "model").write_bytes(CONTENT)
    return tmp_path


@pytest.fixture
def config(folders: Path) -> Config:
    sections = {"model": {"path": str(folders / "llama")}, "data": {"path": "none", "sequence_length": 64}}
    return build(Config, {**sections, "run_dir": "none"})


def digest_of(file: Path) -> str:
    parts = [base_fingerprint.Part(file, at, at + 1024) for at in range(0, len(CONTENT), 1024)]
    return base_fingerprint.digest_of(base_fingerprint.hash_parts(parts), len(CONTENT))


def test_each_node_hashes_its_copy_and_a_shared_file_is_divided(world: World, root: Path, config: Config) -> None:
    of_one = world.run(3, look, config=config, root=root, machines=["a", "a", "a"])
    assert {found[0][root / "a" / "model"] for found, *_ in of_one} == {digest_of(root / "a" / "model")}
    assert sum(found[1] for found, *_ in of_one) == len(CONTENT)
    assert [len(said) for _, said, _ in of_one] == [1, 0, 0]
    assert {marks for *_, marks in of_one} == {1}, "all ranks meet as often"

    apart = ["a", "a", "b"]
    shutil.rmtree(root / "cache-a")
    alike = world.run(3, look, config=config, root=root, machines=apart)
    assert [found[1] for found, *_ in alike] == [len(CONTENT) // 2, len(CONTENT) // 2, len(CONTENT)]
    assert len({*(digest for found, *_ in alike for digest in found[0].values())}) == 1

    # One byte of machine b's copy rots, in a part that a rank of machine a would look at if all shared.
    rotten = root / "b" / "model"
    rotten.write_bytes(CONTENT[:1500] + b"x" + CONTENT[1501:])
    differing = world.run(3, look, config=config, root=root, machines=["b", "a", "a"])
    assert [found for found, *_ in differing] == [None] * 3
    assert base_fingerprint.remembered(root / "cache-b" / "sources", rotten) == digest_of(rotten)


def test_stop_is_honored_while_hashing(world: World, root: Path, config: Config) -> None:
    stopped = world.run(2, look, config=config, root=root, machines=["a", "b"], stop_at=2)
    assert stopped == ["stopped", "stopped"]
    assert not list(root.glob("cache-*/sources/*"))


def test_records_of_two_nodes_are_separate(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check two copies with different inodes and times that share one cache."""
    monkeypatch.setattr(base_fingerprint, "SETTLED_SECONDS", 0.0)
    file, records, copy = root / "a" / "model", root / "sources", root / "b" / "model"
    of_one, of_other = base_fingerprint.state_of(file), base_fingerprint.state_of(copy)
    base_fingerprint.remember(records, file, of_one, "tree:a", began=time.time() + 1)
    monkeypatch.setattr(base_fingerprint, "state_of", lambda path: of_other)
    base_fingerprint.remember(records, file, of_other, "tree:b", began=time.time() + 1)
    assert base_fingerprint.remembered(records, file) == "tree:b"
    monkeypatch.setattr(base_fingerprint, "state_of", lambda path: of_one)
    assert base_fingerprint.remembered(records, file) == "tree:a"
    for content in (b"{", b"[]", b"[" * 100_000, b"\xff", b'{"state": 5}'):  # Damaged records are read again.
        for record in records.iterdir():
            record.write_bytes(content)
        assert base_fingerprint.remembered(records, file) is None
