"""The quantized-weights cache: the same bits with and without it, whatever happened to its files."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distlora.architecture.safetensors_headers import read_header
from distlora.config import Config
from distlora.config.file import build, load_config
from distlora.loading import base_fingerprint, quantized_cache
from distlora.loading.load_base import Loaded
from distlora.model.adapters import AdaptedLinear
from distlora.parallel import Ranks
from distlora.planner.model import model_in
from distlora.planner.storage import disk_bytes
from distlora.planner.workload import Workload
from distlora.training.setup import start_run_model
from distlora.weights import quantized_cache_folder
from distlora.weights.quantized_cache_folder import ENTRY_NAME, Entry, entries, figures_of
from support.plan_inputs import cpu_machine
from support.planned import assert_close
from support.small_disks import small_disk
from support.small_models import make_run
from support.worlds import World, start_world

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


def start(
    ranks: Ranks, *, config: Config, boundary: Callable[..., None] | None = None, settled: float = 0.0
) -> Started:
    base_fingerprint.SETTLED_SECONDS = settled  # The model's files were written a moment ago.
    said: list[str] = []
    marks = boundary or (lambda *args, **kwargs: None)
    model, backend, loaded = start_run_model(config, ranks, log=said.append, boundary=marks)
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


def is_whole(started: Started) -> bool:
    return started.loaded.cached_weights == started.loaded.quantized_weights


def pieces(cache: Path) -> list[Path]:
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
        assert (plain.loaded.cache_bytes_written, kept.loaded.cached_weights, read.loaded.cache_bytes_written) == (
            0,
            0,
            0,
        )
        assert kept.loaded.cache_bytes_written > 0
        assert is_whole(read)
        assert read.loaded.how == "from the quantized-weights cache"
        assert kept.loaded.how == "and quantized and cached"
        assert read.said == []
        # Its rows of everything, once (in fp32, as the source), a checksum of 8 bytes a group, and its pieces' headers.
        rows = {name: rows for name, (rows, _) in read.rows.items() if not name.endswith(("offset", "row_norms"))}
        groups = sum(len(own) for name, own in rows.items() if name.endswith(".codes"))
        beside = read.loaded.bytes_read - sum(own.nbytes for own in rows.values()) - 8 * groups
        assert 0 < beside < 3 * 14_000


def test_other_world_sizes_read_cached_pieces_and_write_missing_ones(
    world: World, folders: Path, tmp_path: Path
) -> None:
    config = config_for(folders / "llama", tmp_path / "cache")
    world.run(2, start, config=config)
    of_two = pieces(tmp_path / "cache")
    assert len(of_two) == 3 * 2, "a piece for each block and rank"
    planned = disk_bytes(Workload.of(config), model_in(folders / "llama"), cpu_machine(2)).cache
    assert_close(sum(path.stat().st_size for path in of_two), planned, "a base's entry")
    lost = next(path for path in of_two if path.name.startswith("00001-1of2"))
    lost.unlink()

    on_four = world.run(4, start, config=config)
    assert all(0.6 < s.loaded.cached_weights / s.loaded.quantized_weights < 0.7 for s in on_four)
    assert any("in part (67% from the quantized-weights cache) and cached" in s.loaded.how for s in on_four)
    new = sorted(set(pieces(tmp_path / "cache")) - set(of_two))
    assert new
    assert all(path.name.startswith("00001-") for path in new)
    (entry,) = entries(tmp_path / "cache")
    assert figures_of(entry).share == 1.0
    held: dict[str, int] = {}
    for path in pieces(tmp_path / "cache"):
        for name, extent in quantized_cache_folder.read_piece(path, entry.key)[0].extents.items():
            held[name] = held.get(name, 0) + extent.stop - extent.first
    total = sum(rows.shape[0] for s in on_four for n, (rows, _) in s.rows.items() if n.endswith(".codes"))
    assert sum(held.values()) == total, "no group is stored twice"

    for size in (3, 1):
        without = world.run(size, start, config=config_for(folders / "llama", None))
        for plain, read in zip(without, world.run(size, start, config=config), strict=True):
            assert is_whole(read)
            assert_same(plain, read)
    assert set(pieces(tmp_path / "cache")) == {*of_two, *new} - {lost}


@pytest.mark.ci
def test_only_one_replica_writes_and_all_read(world: World, folders: Path, tmp_path: Path) -> None:
    without = world.run(2, start, config=config_for(folders / "llama", None))
    copies = {"parallel": {"shard_degree": 2}, "cluster": {"gpus_per_node": 4}}
    config = config_for(folders / "llama", tmp_path / "cache", **copies)
    first, second = world.run(4, start, config=config), world.run(4, start, config=config)
    assert [s.loaded.cache_bytes_written > 0 for s in first] == [True, True, False, False]
    for rank, (kept, read) in enumerate(zip(first, second, strict=True)):
        assert is_whole(read)
        assert_same(kept, read)
        assert_same(without[rank % 2], read)


@pytest.mark.slow
def test_zero3_and_fsdp2_share_the_cache(world: World, folders: Path, tmp_path: Path) -> None:
    with start_world(3, regroups=True) as alone:
        for offload in (False, True):
            zero3 = {"parallel": {"backend": "zero3", "offload_base": offload}}
            by_fsdp2, by_zero3 = tmp_path / f"fsdp2-{offload}", tmp_path / f"zero3-{offload}"
            without = world.run(3, start, config=config_for(folders / "llama", by_fsdp2))
            written = alone.run(3, start, config=config_for(folders / "llama", by_zero3, **zero3))
            assert [p.name for p in pieces(by_fsdp2)] == [p.name for p in pieces(by_zero3)]
            read = alone.run(3, start, config=config_for(folders / "llama", by_fsdp2, **zero3))
            back = world.run(3, start, config=config_for(folders / "llama", by_zero3))
            for plain, *others in zip(without, written, read, back, strict=True):
                assert is_whole(others[1])
                assert is_whole(others[2])
                for other in others:
                    assert_same(plain, other)


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
    assert len(pieces(tmp_path / "cache")) == 6, "pieces of the same groups have the same name"
    for started, plain in zip(world.run(2, start, config=config), without, strict=True):
        assert is_whole(started)
        assert_same(started, plain)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def first_of(path: Path, part: str) -> int:
    return min(s.offset for name, s in read_header(path).items() if name.endswith(part))


def zero_a_group(path: Path) -> None:
    """Zero codes, scales and checksum of the first weight's first group, as a disk that lost them."""
    segments = read_header(path)
    first = min(segments, key=lambda name: segments[name].offset).removesuffix(".codes")
    with path.open("r+b") as file:
        for part, (*_, num_bytes) in quantized_cache_folder.PARTS.items():
            file.seek(segments[f"{first}.{part}"].offset)
            file.write(bytes(num_bytes))


FIRST_DAMAGE = "a bit of the codes"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the codes": lambda path: flip(path, first_of(path, ".codes") + 1000),
    "a bit of a checksum": lambda path: flip(path, -1),
    "the length of the header": lambda path: flip(path, 1),
    "a digit of the header": lambda path: path.write_bytes(path.read_bytes().replace(b'[0, \\"', b'[1, \\"', 1)),
    "a group that comes back as zeros": lambda path: zero_a_group(path),
    "its last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "another piece in its place": lambda path: shutil.copy(sorted(path.parent.glob("00002-*"))[0], path),
}


@pytest.mark.parametrize(
    "what", [name if name == FIRST_DAMAGE else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES]
)
def test_damaged_piece_is_reported_and_quantized_again(folders: Path, tmp_path: Path, what: str) -> None:
    config = config_for(folders / "llama", tmp_path / "cache")
    plain = start(SINGLE, config=config_for(folders / "llama", None))
    start(SINGLE, config=config)
    (damaged,) = (tmp_path / "cache").glob("*/00001-*.safetensors")
    whole = damaged.read_bytes()
    DAMAGES[what](damaged)
    assert damaged.read_bytes() != whole
    started = start(SINGLE, config=config)
    assert_same(started, plain)
    assert 0 < started.loaded.cached_weights < started.loaded.quantized_weights
    assert any(str(damaged) in line and "is damaged" in line for line in started.said), started.said
    assert damaged.read_bytes() == whole
    again = start(SINGLE, config=config)
    assert is_whole(again)
    assert again.said == []


@pytest.mark.ci
def test_temporary_read_error_keeps_the_piece(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(folders / "llama", tmp_path / "cache")
    plain = start(SINGLE, config=config)
    before = {path: path.stat().st_ino for path in pieces(tmp_path / "cache")}

    for name, code, held in (("read_piece", errno.ESTALE, False), ("_pread", errno.EIO, True)):

        def refuse(*args: Any, code: int = code) -> Any:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patched:
            patched.setattr(quantized_cache, name, refuse)
            # Only reading: what opens or writes elsewhere is not what is tried here.
            patched.setattr(quantized_cache.QuantizedCacheWriter, "write", lambda *args: None)
            patched.setattr(Entry, "begin", lambda *args: None)
            started = start(SINGLE, config=config)
        assert_same(started, plain)
        assert started.loaded.cached_weights == 0
        assert any("cannot be read now" in line and os.strerror(code) in line for line in started.said), name
        assert not any("is damaged" in line for line in started.said)
        assert any("quantized again: 0, 1, 2" in line for line in started.said) is held
        assert {path: path.stat().st_ino for path in pieces(tmp_path / "cache")} == before
    assert is_whole(start(SINGLE, config=config))


def with_other_offset(path: Path, weight: str) -> None:
    """Rewrite the piece with another offset, as a node with other kernels would write it."""
    key = path.parent.name
    extents = dict(quantized_cache_folder.read_piece(path, key)[0].extents)
    data = path.read_bytes()[min(s.offset for s in read_header(path).values()) :]
    extents[weight] = replace(extents[weight], offset=extents[weight].offset + 1)
    path.write_bytes(quantized_cache_folder.header_of(key, extents) + data)


@pytest.mark.ci
def test_pieces_with_contradicting_offsets_are_quantized_again(world: World, folders: Path, tmp_path: Path) -> None:
    config = config_for(folders / "llama", tmp_path / "cache")
    weight = "model.layers.1.mlp.up_proj.weight"
    plain = world.run(2, start, config=config)
    first, second = (tmp_path / "cache").glob("*/00001-*")
    for size in (1, 2):  # One rank that reads both, and two of which one does not.
        with_other_offset(second, weight)
        without = world.run(size, start, config=config_for(folders / "llama", None))
        started = world.run(size, start, config=config)
        for one, other in zip(started, without, strict=True):
            assert_same(one, other)
            assert 0 < one.loaded.cached_weights < one.loaded.quantized_weights
        assert any("two offsets" in line for line in started[0].said)
        assert all(map(is_whole, world.run(size, start, config=config)))
        if size == 1:
            assert not first.exists()
            assert not second.exists()
            assert len(pieces(tmp_path / "cache")) == 5
            shutil.rmtree(tmp_path / "cache")
            for one, other in zip(plain, world.run(2, start, config=config), strict=True):
                assert_same(one, other)


def start_on(ranks: Ranks, *, configs: list[Config]) -> Started:
    return start(ranks, config=configs[ranks.rank])


@pytest.mark.ci
def test_ranks_with_different_base_files_cache_nothing(world: World, folders: Path, tmp_path: Path) -> None:
    for machine in "ab":
        shutil.copytree(folders / "llama", tmp_path / machine)
    weights = tmp_path / "b" / "model.safetensors"
    flip(weights, read_header(weights)["model.layers.1.mlp.up_proj.weight"].offset + 8)
    configs = [config_for(tmp_path / machine, tmp_path / "cache") for machine in "ab"]
    started = world.run(2, start_on, configs=configs)
    assert "the ranks see different files of the base" in started[0].said[-1]
    assert entries(tmp_path / "cache") == []
    assert {one.loaded.cache_bytes_written for one in started} == {0}


def test_damage_on_one_rank_quantizes_the_layer_on_all(world: World, folders: Path, tmp_path: Path) -> None:
    config = config_for(folders / "llama", tmp_path / "cache")
    first = world.run(3, start, config=config)
    (damaged,) = (tmp_path / "cache").glob("*/00002-1of3-*.safetensors")
    flip(damaged, first_of(damaged, ".codes"))
    second = world.run(3, start, config=config)
    assert (
        "cached layers that are damaged, missing or unreadable on some rank, quantized again: 2" in second[0].said[-1]
    )
    assert len({started.loaded.cached_weights for started in second}) == 1
    for one, two, three in zip(first, second, world.run(3, start, config=config), strict=True):
        assert_same(one, two)
        assert_same(one, three)
        assert is_whole(three)


def die_while_writing(config: Config) -> None:
    write, calls = quantized_cache._write_bytes, iter(range(100))

    def write_some(file: Any, tensor: Tensor) -> None:
        if next(calls) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, tensor)

    quantized_cache._write_bytes = write_some
    start(SINGLE, config=config)


def test_killed_writer_leaves_whole_pieces_and_leftovers_are_removed(folders: Path, tmp_path: Path) -> None:
    config = config_for(folders / "llama", tmp_path / "cache")
    killed = multiprocessing.get_context("fork").Process(target=die_while_writing, args=(config,))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    (unfinished,) = (tmp_path / "cache").glob("*/.*")
    (entry,) = entries(tmp_path / "cache")
    assert 0 <= figures_of(entry).share < 1
    plain = start(SINGLE, config=config_for(folders / "llama", None))
    assert_same(start(SINGLE, config=config), plain)
    assert unfinished.exists(), "it may still be written"
    long_ago = unfinished.stat().st_mtime - quantized_cache_folder.ABANDONED_SECONDS
    os.utime(unfinished, (long_ago, long_ago))
    pieces(tmp_path / "cache")[0].unlink()  # Who writes tidies.
    assert_same(start(SINGLE, config=config), plain)
    assert not unfinished.exists()


@pytest.mark.ci
def test_changed_source_gets_another_entry(folders: Path, tmp_path: Path) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(folders / "llama", folder)
    config = config_for(folder, cache)
    weights = folder / "model.safetensors"
    first = start(SINGLE, config=config)
    assert any("fingerprinting" in line for line in first.said)
    assert start(SINGLE, config=config).said == [], "its bytes are known"

    # In place, of the same size, with its old time of modification, outside of the fingerprint's samples.
    before = weights.stat()
    segment = read_header(weights)["model.layers.1.mlp.up_proj.weight"]
    flip(weights, segment.offset + 8)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = start(SINGLE, config=config)
    assert changed.loaded.cached_weights == 0
    assert_same(changed, start(SINGLE, config=config_for(folder, None)))
    assert len(entries(cache)) == 2

    # Where its files lie does not matter, nor what else is beside them.
    shutil.copytree(folders / "llama", tmp_path / "copy")
    assert is_whole(start(SINGLE, config=config_for(tmp_path / "copy", cache)))
    # A file that was written a moment ago is not remembered: it may change again without another time.
    moments = start(SINGLE, config=config_for(tmp_path / "copy", tmp_path / "other"), settled=3600.0)
    again = start(SINGLE, config=config_for(tmp_path / "copy", tmp_path / "other"), settled=3600.0)
    assert is_whole(again)
    assert moments.said == again.said != []


def test_hub_cache_names_file_content(folders: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blob = repository / "snapshots" / "abc", repository / "blobs" / ("5" * 64)
    shutil.copytree(folders / "llama", snapshot)
    blob.parent.mkdir()
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    config = config_for(snapshot, tmp_path / "cache")
    config = replace(config, model=replace(config.model, name="org/name"))
    assert start(SINGLE, config=config).said == []
    assert is_whole(start(SINGLE, config=config))
    (entry,) = entries(tmp_path / "cache")
    assert figures_of(entry).base == "org/name"
    assert not (tmp_path / "cache" / "sources").exists()


@pytest.mark.ci
def test_pissa_base_has_its_own_entry(folders: Path, tmp_path: Path) -> None:
    cache = {"cache": True, "cache_dir": str(tmp_path / "cache")}
    adapter = {"init": "pissa", "r": 4}
    first = start(SINGLE, config=make_run(tmp_path / "one", folders, adapter=adapter, quant=cache))
    second = start(SINGLE, config=make_run(tmp_path / "two", folders, quant=cache))
    assert second.loaded.cached_weights == 0
    assert len(entries(tmp_path / "cache")) == 2
    again = start(SINGLE, config=load_config(tmp_path / "one"))
    assert is_whole(again)
    assert_same(first, again)
    dense = make_run(tmp_path / "three", folders, quant={"method": "none", "cache_dir": str(tmp_path / "none")})
    start(SINGLE, config=dense)
    assert not (tmp_path / "none").exists()


def test_read_only_cache_is_reported_once_and_still_read(folders: Path, tmp_path: Path) -> None:
    plain = start(SINGLE, config=config_for(folders / "llama", None))
    (tmp_path / "file").write_text("no folder")
    impossible = start(SINGLE, config=config_for(folders / "llama", tmp_path / "file" / "cache"))
    assert_same(impossible, plain)
    assert len(impossible.said) == 1
    assert "set quant.cache_dir" in impossible.said[0]

    with small_disk(tmp_path / "disk", 8192) as disk:
        config = config_for(folders / "llama", disk / "cache")
        start(SINGLE, config=config)
        next((disk / "cache").glob("*/00001-*")).unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        started = start(SINGLE, config=config)
        assert_same(started, plain)
        assert 0 < started.loaded.cached_weights < started.loaded.quantized_weights
        refused = [line for line in started.said if "cannot be cached" in line]
        assert len(refused) == 1
        assert "Read-only" in refused[0]


def test_full_disk_is_reported_once_and_keeps_free_space(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = start(SINGLE, config=config_for(folders / "llama", None))
    with small_disk(tmp_path / "disk", 256) as disk:
        config = config_for(folders / "llama", disk / "cache")
        started = start(SINGLE, config=config)
        assert_same(started, plain)
        assert sum("GB free" in line for line in started.said) == 1
        assert pieces(disk / "cache"), "as much as there was room for"
        monkeypatch.setattr(quantized_cache, "FREE_SHARE", -10.0)
        started = start(SINGLE, config=config)
        assert_same(started, plain)
        assert sum("No space left" in line for line in started.said) == 1
        assert not list((disk / "cache").glob("*/.*")), "half a piece is removed"
        for path in pieces(disk / "cache"):
            quantized_cache_folder.read_piece(path, path.parent.name)


def fake_entry(cache: Path, number: int, *, size: int, age: float) -> Entry:
    entry = Entry(cache / f"{number:064x}")
    entry.begin({"base": f"org/base-{number}", "format": 1, "weights": {"w": 4}})
    (entry.path / "00000-0of1-0123456789abcdef.safetensors").write_bytes(bytes(size))
    used = (entry.path / ENTRY_NAME).stat().st_mtime - age
    os.utime(entry.path / ENTRY_NAME, (used, used))
    return entry


def test_least_recently_used_entry_is_removed_first(folders: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fake_entry(cache, 1, size=10**6, age=9e5)
    fake_entry(cache, 2, size=10**6, age=5e5)
    fake_entry(cache, 3, size=10**6, age=10)
    config = config_for(folders / "llama", cache, quant={"cache_gb": 2.6e-3})
    started = start(SINGLE, config=config)
    assert {entry.key[-2:] for entry in entries(cache)} > {"02", "03"}
    assert len(entries(cache)) == 3
    assert sum("org/base-1" in line for line in started.said) == 1
    assert is_whole(start(SINGLE, config=config))
    # The own entry is used now: another base's start would find it in use.
    tight = start(SINGLE, config=config_for(folders / "qwen3", cache, quant={"cache_gb": 1.3e-3}))
    assert sum("leaves no room" in line for line in tight.said) == 2  # For base-2, which went, and for its own.
    assert tight.loaded.cache_bytes_written == 0
    # What is whole is read, and nothing said or removed, under a limit that it would not fit.
    within = start(SINGLE, config=config_for(folders / "llama", cache, quant={"cache_gb": 1e-4}))
    assert is_whole(within)
    assert within.said == []
    assert len(entries(cache)) == 2
