"""The quantized-weights cache: the same bits with and without it, whatever happened to its files."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distlora.architecture.safetensors_headers import read_header
from distlora.config import Config
from distlora.config.file import build, load_config
from distlora.loading import load_base
from distlora.loading.load_base import Loaded
from distlora.model.adapters import AdaptedLinear
from distlora.parallel import Ranks
from distlora.planner.model import model_in
from distlora.planner.storage import disk_bytes
from distlora.planner.workload import Workload
from distlora.training.setup import StartOptions, start_run_model
from distlora.weights.quantized_cache_folder import ENTRY_NAME, entries
from support.small_disks import small_disk
from support.small_models import make_run
from support.worlds import World

SINGLE = Ranks(0, 1, torch.device("cpu"), None)


@dataclass(frozen=True)
class Started:
    rows: dict[str, tuple[Tensor, int]]
    """This rank's rows of everything frozen, and the first one's index; offsets and row norms whole."""
    loaded: Loaded
    said: list[str]


def config_for(folder: Path, cache: Path | None, **sections: dict[str, Any]) -> Config:
    """Return a DoRA config, whose row norms are computed from the quantized rows."""
    quant: dict[str, Any] = {"cache": False} if cache is None else {"cache_dir": str(cache)}
    base = {
        "model": {"path": str(folder)},
        "data": {"path": "none.jsonl", "sequence_length": 64},
        "adapter": {"target_modules": "all-linear", "r": 2, "use_dora": True},
        "train": {"dtype": "fp32"},
        "run_dir": "none",
    }
    return build(Config, {**base, **sections, "quant": quant | sections.get("quant", {})})


def start(ranks: Ranks, *, config: Config) -> Started:
    said: list[str] = []
    model, backend, loaded = start_run_model(config, ranks, StartOptions(log=said.append))
    rows = {
        model.hf_name(name): (backend.local_rows(parameter)[0].clone(), backend.local_rows(parameter)[1])
        for name, parameter in model.named_parameters()
        if ".adapters." not in name and name.rpartition(".")[2] not in ("A", "B", "magnitude")
    }
    for name, buffer in model.named_buffers():
        if name.endswith("offset"):
            rows[name] = (buffer.clone(), 0)
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and module.row_norms_squared is not None:
            rows[f"{name}.row_norms"] = (module.row_norms_squared.clone(), 0)
    return Started(rows, loaded, said)


def assert_same(one: Started, other: Started) -> None:
    assert one.rows.keys() == other.rows.keys()
    for name, (rows, first) in one.rows.items():
        assert torch.equal(rows, other.rows[name][0]), name
        assert first == other.rows[name][1]


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


@pytest.mark.parametrize("model", ["llama", pytest.param("mixtral", marks=pytest.mark.ci)])
def test_second_start_reads_only_its_rows_and_is_bit_identical(
    world: World, folders: Path, tmp_path: Path, model: str
) -> None:
    dora = {"adapter": {"target_modules": "all-linear" if model == "llama" else "attention", "use_dora": True}}
    without = world.run(2, start, config=config_for(folders / model, None, **dora))
    config = config_for(folders / model, tmp_path / "cache", **dora)
    first = world.run(2, start, config=config)
    second = world.run(2, start, config=config)
    for plain, kept, read in zip(without, first, second, strict=True):
        assert_same(plain, kept)
        assert_same(plain, read)
        assert [started.loaded.how for started in (plain, kept, read)] == [
            "and quantized",
            "and quantized and cached",
            "from the quantized-weights cache",
        ]
        assert read.said == []
        # Its rows of everything, once (in fp32, as the source), and two maps for each quantized weight.
        rows = {name: rows for name, (rows, _) in read.rows.items() if not name.endswith(("offset", "row_norms"))}
        weights = sum(name.endswith(".codes") for name in rows)
        beside = read.loaded.bytes_read - sum(own.nbytes for own in rows.values())
        assert -weights * 2**14 < beside <= weights * (16 + 256) * 4, "without the padding of last groups"
    planned = disk_bytes(Workload.of(config), model_in(folders / model)).cache
    assert sum(path.stat().st_size for path in files(tmp_path / "cache")) == planned
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_any_number_of_ranks_writes_the_same_bytes_and_reads_them(world: World, folders: Path, tmp_path: Path) -> None:
    of_two, of_three = (config_for(folders / "llama", tmp_path / name) for name in ("two", "three"))
    world.run(2, start, config=of_two)
    world.run(3, start, config=of_three)
    for one, other in zip(files(tmp_path / "two"), files(tmp_path / "three"), strict=True):
        assert one.read_bytes() == other.read_bytes()
    for size in (4, 1):
        without = world.run(size, start, config=config_for(folders / "llama", None))
        for plain, read in zip(without, world.run(size, start, config=of_two), strict=True):
            assert read.loaded.from_cache
            assert_same(plain, read)


@pytest.mark.ci
def test_only_one_replica_writes_and_all_read(world: World, folders: Path, tmp_path: Path) -> None:
    without = world.run(2, start, config=config_for(folders / "llama", None))
    copies = {"parallel": {"shard_degree": 2}, "cluster": {"gpus_per_node": 4}}
    config = config_for(folders / "llama", tmp_path / "cache", **copies)
    first, second = world.run(4, start, config=config), world.run(4, start, config=config)
    assert [s.loaded.cache_bytes_written > 0 for s in first] == [True, True, False, False]
    for rank, (kept, read) in enumerate(zip(first, second, strict=True)):
        assert read.loaded.from_cache
        assert_same(kept, read)
        assert_same(without[rank % 2], read)


def two_runs(ranks: Ranks, *, config: Config) -> Started:
    """Start one run on ranks 0 and 1 and another on ranks 2 and 3."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    dist.barrier(ranks.group)
    return start(Ranks(ranks.rank % 2, 2, ranks.device, groups[ranks.rank // 2]), config=config)


def test_two_concurrent_starts_on_an_empty_cache(world: World, folders: Path, tmp_path: Path) -> None:
    config = config_for(folders / "llama", tmp_path / "cache")
    without = world.run(2, start, config=config_for(folders / "llama", None))
    for number, started in enumerate(world.run(4, two_runs, config=config)):
        assert_same(started, without[number % 2])
        assert started.said == []
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for started, plain in zip(world.run(2, start, config=config), without, strict=True):
        assert started.loaded.from_cache
        assert_same(started, plain)


def start_on(ranks: Ranks, *, configs: list[Config]) -> Started:
    """Start each rank with a config of its own, as the first rank of a node."""
    with mock.patch.dict(os.environ, LOCAL_RANK="0"):
        return start(ranks, config=configs[ranks.rank])


@pytest.mark.ci
def test_each_node_keeps_its_ranks_groups_on_its_own_disk(world: World, folders: Path, tmp_path: Path) -> None:
    without = world.run(2, start, config=config_for(folders / "llama", None))
    configs = [config_for(folders / "llama", tmp_path / node) for node in "ab"]
    # Nodes that change places, or that are one less, have none of their ranks' groups, and write them.
    swapped = configs[::-1]
    for order, is_read in ((configs, False), (configs, True), (swapped, False), (swapped, True)):
        for plain, started in zip(without, world.run(2, start_on, configs=order), strict=True):
            assert started.loaded.from_cache == is_read
            assert_same(plain, started)
    for is_read in (False, True):
        alone = start(SINGLE, config=configs[0])
        assert alone.loaded.from_cache == is_read
        assert alone.said == []


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def place_of(path: Path, part: str) -> int:
    return next(segment.offset for name, segment in read_header(path).items() if name.endswith(part))


def other_record(path: Path) -> None:
    record = path.parent / ENTRY_NAME
    record.write_text(record.read_text().replace('"shards": 1', '"shards": "1"'))


FIRST_DAMAGE = "a bit of the codes"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the codes": lambda path: flip(path, place_of(path, "up_proj.weight") + 1000),
    "a bit of the scales": lambda path: flip(path, place_of(path, "up_proj.weight.absmax") + 10),
    "a bit of a map": lambda path: flip(path, place_of(path, "nested_quant_map") + 3),
    "the length of a header": lambda path: flip(path, 1),
    "its last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "another layer in its place": lambda path: shutil.copy(sorted(path.parent.glob("*3-of-*"))[0], path),
    "no file": lambda path: path.unlink(),
    "the record": other_record,
}


@pytest.mark.parametrize(
    "what", [name if name == FIRST_DAMAGE else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES]
)
def test_damaged_entry_is_reported_and_made_again(folders: Path, tmp_path: Path, what: str) -> None:
    config = config_for(folders / "llama", tmp_path / "cache")
    plain = start(SINGLE, config=config)
    whole = {path: path.read_bytes() for path in files(tmp_path / "cache")}
    DAMAGES[what]([*whole][1])
    started = start(SINGLE, config=config)
    assert_same(started, plain)
    assert not started.loaded.from_cache
    (line,) = started.said
    assert f"{entries(tmp_path / 'cache')[0].path} is damaged (" in line
    assert {path: path.read_bytes() for path in files(tmp_path / "cache")} == whole
    again = start(SINGLE, config=config)
    assert again.loaded.from_cache
    assert again.said == []


def test_damage_on_one_rank_quantizes_on_all(world: World, folders: Path, tmp_path: Path) -> None:
    config = config_for(folders / "llama", tmp_path / "cache")
    first = world.run(3, start, config=config)
    flip(files(tmp_path / "cache")[2], place_of(files(tmp_path / "cache")[2], "up_proj.weight"))
    second = world.run(3, start, config=config)
    assert "model.layers.2.mlp.up_proj.weight has other bytes" in second[0].said[-1]
    for one, two, three in zip(first, second, world.run(3, start, config=config), strict=True):
        assert not two.loaded.from_cache
        assert_same(one, two)
        assert_same(one, three)
        assert three.loaded.from_cache


@pytest.mark.ci
def test_ranks_with_different_base_files_cache_nothing(world: World, folders: Path, tmp_path: Path) -> None:
    for machine in "ab":
        shutil.copytree(folders / "llama", tmp_path / machine)
    os.utime(tmp_path / "b" / "model.safetensors", (1, 1))
    configs = [config_for(tmp_path / machine, tmp_path / "cache") for machine in "ab"]
    started = world.run(2, start_on, configs=configs)
    assert "the ranks see different files of the base" in started[0].said[-1]
    assert entries(tmp_path / "cache") == []
    assert {one.loaded.cache_bytes_written for one in started} == {0}


def die_while_writing(config: Config) -> None:
    write, calls = load_base.write_groups, itertools.count()

    def write_some(*args: Any) -> None:
        if next(calls) == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args)

    load_base.write_groups = write_some
    start(SINGLE, config=config)


def test_killed_writer_leaves_no_entry_and_its_files_are_removed(folders: Path, tmp_path: Path) -> None:
    config = config_for(folders / "llama", tmp_path / "cache")
    killed = multiprocessing.get_context("fork").Process(target=die_while_writing, args=(config,))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    (unfinished,) = (tmp_path / "cache").iterdir()
    assert entries(tmp_path / "cache") == []
    plain = start(SINGLE, config=config_for(folders / "llama", None))
    assert_same(start(SINGLE, config=config), plain)
    assert unfinished.exists(), "it may still be written"
    for path in (unfinished, *unfinished.iterdir()):
        os.utime(path, (1, 1))
    shutil.rmtree(entries(tmp_path / "cache")[0].path)  # Who writes tidies.
    assert_same(start(SINGLE, config=config), plain)
    assert not unfinished.exists()
    assert start(SINGLE, config=config).loaded.from_cache


def test_rest_of_an_entry_is_replaced_unless_other_files_are_in_it(folders: Path, tmp_path: Path) -> None:
    config = config_for(folders / "llama", tmp_path / "cache")
    start(SINGLE, config=config)
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / ENTRY_NAME).unlink()
    assert start(SINGLE, config=config).said == []
    assert start(SINGLE, config=config).loaded.from_cache
    (entry / ENTRY_NAME).unlink()
    (entry / "notes.txt").write_text("theirs")
    kept_out = start(SINGLE, config=config)
    (line,) = kept_out.said
    assert f"{entry.name} holds files of other programs" in line
    assert kept_out.loaded.how == "and quantized"
    assert [*(tmp_path / "cache").rglob("*")] == [entry, entry / "notes.txt"]


@pytest.mark.ci
def test_changed_base_gets_another_entry(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(folders / "llama", folder)
    config = config_for(folder, cache)
    weights = folder / "model.safetensors"
    start(SINGLE, config=config)
    # In place, of the same size, outside of the fingerprint's samples.
    flip(weights, read_header(weights)["model.layers.1.mlp.up_proj.weight"].offset + 8)
    changed = start(SINGLE, config=config)
    assert not changed.loaded.from_cache
    assert_same(changed, start(SINGLE, config=config_for(folder, None)))
    assert len(entries(cache)) == 2
    # Where its files lie does not matter.
    shutil.copytree(folder, tmp_path / "copy")
    assert start(SINGLE, config=config_for(tmp_path / "copy", cache)).loaded.from_cache
    # A base that changes while it is read is not kept.
    times = itertools.count()
    monkeypatch.setattr(load_base, "state_of", lambda file: str(next(times)))
    assert start(SINGLE, config=config).loaded.cache_bytes_written == 0
    assert len(list(cache.iterdir())) == 2


def test_hub_cache_names_file_content(folders: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blob = repository / "snapshots" / "abc", repository / "blobs" / ("5" * 64)
    shutil.copytree(folders / "llama", snapshot)
    blob.parent.mkdir()
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    config = config_for(snapshot, tmp_path / "cache")
    config = replace(config, model=replace(config.model, name="org/name"))
    start(SINGLE, config=config)
    os.utime(blob, (1, 1))
    assert start(SINGLE, config=config).loaded.from_cache
    (entry,) = entries(tmp_path / "cache")
    assert entry.base == "org/name"


@pytest.mark.ci
def test_pissa_base_has_its_own_entry(folders: Path, tmp_path: Path) -> None:
    cache = {"cache": True, "cache_dir": str(tmp_path / "cache")}
    adapter = {"init": "pissa", "r": 4}
    first = start(SINGLE, config=make_run(tmp_path / "one", folders, adapter=adapter, quant=cache))
    second = start(SINGLE, config=make_run(tmp_path / "two", folders, quant=cache))
    assert not second.loaded.from_cache
    assert len(entries(tmp_path / "cache")) == 2
    again = start(SINGLE, config=load_config(tmp_path / "one"))
    assert again.loaded.from_cache
    assert_same(first, again)
    dense = make_run(tmp_path / "three", folders, quant={"method": "none", "cache_dir": str(tmp_path / "none")})
    start(SINGLE, config=dense)
    assert not (tmp_path / "none").exists()


def test_read_only_cache_is_reported_once_and_still_read(folders: Path, tmp_path: Path) -> None:
    plain = start(SINGLE, config=config_for(folders / "llama", None))
    (tmp_path / "file").write_text("no folder")
    impossible = start(SINGLE, config=config_for(folders / "llama", tmp_path / "file" / "cache"))
    assert_same(impossible, plain)
    (line,) = impossible.said
    assert "set quant.cache_dir" in line

    with small_disk(tmp_path / "disk", 8192) as disk:
        start(SINGLE, config=config_for(folders / "llama", disk / "cache"))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert start(SINGLE, config=config_for(folders / "llama", disk / "cache")).loaded.from_cache
        started = start(SINGLE, config=config_for(folders / "qwen3", disk / "cache"))
        (line,) = started.said
        assert "Read-only" in line


def test_full_disk_is_reported_once_and_keeps_free_space(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = start(SINGLE, config=config_for(folders / "llama", None))
    with small_disk(tmp_path / "disk", 128) as disk:
        config = config_for(folders / "llama", disk / "cache")
        for share, said in ((load_base.FREE_SHARE, "stay free"), (-10.0, "No space left")):
            monkeypatch.setattr(load_base, "FREE_SHARE", share)
            started = start(SINGLE, config=config)
            assert_same(started, plain)
            (line,) = started.said
            assert said in line
            assert list((disk / "cache").iterdir()) == []


def fake_entry(cache: Path, number: int, *, size: int, age: float) -> None:
    path = cache / f"{number:064x}"
    path.mkdir(parents=True)
    (path / ENTRY_NAME).write_text(json.dumps({"base": f"org/base-{number}", "format": 1, "weights": {"w": 4}}))
    (path / "model-00001-of-00001.safetensors").write_bytes(bytes(size))
    used = (path / ENTRY_NAME).stat().st_mtime - age
    os.utime(path / ENTRY_NAME, (used, used))


def test_least_recently_used_entry_is_removed_first(folders: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fake_entry(cache, 1, size=10**6, age=9e5)
    fake_entry(cache, 2, size=10**6, age=5e5)
    fake_entry(cache, 3, size=10**6, age=10)
    config = config_for(folders / "llama", cache, quant={"cache_gb": 2.6e-3})
    started = start(SINGLE, config=config)
    kept = {entry.key for entry in entries(cache)}
    assert len(kept) == 3
    assert kept > {f"{number:064x}" for number in (2, 3)}
    assert sum("org/base-1" in line for line in started.said) == 1
    assert start(SINGLE, config=config).loaded.from_cache
    # The own entry is used now: another base's start would find it in use.
    tight = start(SINGLE, config=config_for(folders / "qwen3", cache, quant={"cache_gb": 1.3e-3}))
    removed, kept_out = (line for line in tight.said if line.startswith("quantized-weights cache"))
    assert "org/base-2" in removed
    assert "leaves no room" in kept_out
    assert tight.loaded.cache_bytes_written == 0
    # What is whole is read, and nothing said or removed, under a limit that it would not fit.
    within = start(SINGLE, config=config_for(folders / "llama", cache, quant={"cache_gb": 1e-4}))
    assert within.loaded.from_cache
    assert within.said == []
    assert len(entries(cache)) == 2
