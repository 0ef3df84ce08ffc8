"""The cache: what names an entry, that entries are whole or absent, and that two processes may make one at once."""

import multiprocessing
import os
import signal

import numpy as np
import pytest

from distlora.config import SourceConfig, UserError
from distlora.data.rows import FORMAT_VERSION, PackedRows, cache_key, content_digest, new_entry, read_meta, split_file
from distlora.data.sources import find_source
from distlora.system.atomic_io import write_json

FORK = multiprocessing.get_context("fork")  # The children touch numpy alone, and a spawned one imports for seconds.


def write_entry(folder, num_rows=3, length=4):
    """Return a whole entry with one split."""
    counted = ("documents", "pairs", "tokens", "targets", "padding", "truncated", "split", "dropped", "dropped_long")
    counts = dict.fromkeys((*counted, "unused", "pieces"), 0) | {"rows": num_rows, "sources": []}
    counts["largest_token"] = num_rows * length - 1
    meta = {"version": FORMAT_VERSION, "sequence_length": length, "pad_token_id": 0, "splits": {"train": counts}}
    meta |= {"created": 0.0, "objective": "sft", "chats": False, "chat_template": None, "settings": {}}
    meta["content"] = content_digest(folder, [])
    np.save(split_file(folder, "train", "tokens"), np.arange(num_rows * length, dtype=np.int32).reshape(-1, length))
    np.save(split_file(folder, "train", "flags"), np.zeros((num_rows, length), np.uint8))
    for name in ("targets", "pairs"):
        np.save(split_file(folder, "train", name), np.zeros(num_rows, np.int32))
    np.save(split_file(folder, "train", "documents"), np.zeros(0, np.int64))
    write_json(folder / "meta.json", meta)


@pytest.fixture
def sources(tmp_path):
    """Return a data file and a model folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_text("weights")
    (tmp_path / "data.jsonl").write_text('{"text": "a"}')
    return tmp_path


def key_of(sources, **settings):
    fingerprint = find_source(SourceConfig(path=str(sources / "data.jsonl"))).fingerprint()
    return cache_key([fingerprint], sources / "model", {"sequence_length": 8, **settings})


@pytest.mark.parametrize(
    "name", ["data.jsonl", "model/tokenizer.json", "model/chat_template.jinja", "model/tokenizer.model"]
)
def test_the_key_changes_with_every_byte_that_decides_the_tokens(sources, name):
    before = key_of(sources)
    (sources / name).write_text('{"text": "changed"}')
    assert key_of(sources) != before


def test_the_key_changes_with_the_settings_but_not_with_weights_or_places(sources, tmp_path_factory):
    before = key_of(sources)
    assert key_of(sources, seed=1) != before
    (sources / "model" / "model.safetensors").write_text("other weights")
    assert key_of(sources) == before
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    sources.rename(elsewhere)
    assert key_of(elsewhere) == before


def test_an_entry_has_its_name_only_when_it_is_whole(tmp_path):
    with new_entry(tmp_path, "key") as folder:
        write_entry(folder)
        assert not (tmp_path / "key").exists()
    assert len(PackedRows.open(tmp_path / "key", "train")) == 3
    assert os.listdir(tmp_path) == ["key"]


def test_a_kill_before_the_rename_leaves_nothing_visible_and_the_next_process_succeeds(tmp_path):
    def prepare_and_die():
        with new_entry(tmp_path, "key") as folder:
            write_entry(folder)
            os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=prepare_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left_over,) = tmp_path.iterdir()
    assert left_over.name.startswith(".partial-")
    with new_entry(tmp_path, "key") as folder:
        write_entry(folder)
    assert len(PackedRows.open(tmp_path / "key", "train")) == 3
    assert left_over.exists()  # It may belong to a process that still works on it,
    os.utime(left_over, (0, 0))
    with new_entry(tmp_path, "other"):
        assert not left_over.exists()  # but not after a day.


def test_of_two_processes_the_loser_uses_the_winners_entry(tmp_path):
    barrier = FORK.Barrier(2)

    def race():
        with new_entry(tmp_path, "key") as folder:
            write_entry(folder)
            barrier.wait(timeout=30)
        assert len(PackedRows.open(tmp_path / "key", "train")) == 3

    processes = [FORK.Process(target=race) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert os.listdir(tmp_path) == ["key"]


def test_a_damaged_or_foreign_entry_is_named_with_what_to_do(tmp_path):
    write_entry(tmp_path)
    with pytest.raises(UserError, match="holds no 'eval' rows, only train"):
        PackedRows.open(tmp_path, "eval")
    tokens = split_file(tmp_path, "train", "tokens")
    os.truncate(tokens, tokens.stat().st_size - 4)
    with pytest.raises(UserError, match=r"train_tokens\.npy cannot be read .* delete"):
        PackedRows.open(tmp_path, "train")
    np.save(tokens, np.zeros((3, 4), np.int64))
    with pytest.raises(UserError, match=r"holds int64 \(3, 4\), not int32 \(3, 4\)"):
        PackedRows.open(tmp_path, "train")
    meta = read_meta(tmp_path)
    write_json(tmp_path / "meta.json", meta | {"version": 0})
    with pytest.raises(UserError, match="version 0"):
        PackedRows.open(tmp_path, "train")
    with pytest.raises(UserError, match=r"no meta\.json"):
        PackedRows.open(tmp_path / "absent", "train")
