"""The preparation process: files to a cache entry, its counts, its refusals and its exit codes."""

import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml

from distlora.config import Config, DataConfig, ModelConfig, SourceConfig, TrainConfig, UserError
from distlora.config.checks import check_settings
from distlora.config.file import as_mapping
from distlora.data.loader import StepLoader
from distlora.data.prepare import prepare_and_print, prepare_run, summary
from distlora.data.rows import STARTS, open_split, read_meta
from distlora.system.exit_codes import run_to_exit_code
from support.data_folders import CHATML, chat, prepare, write_lines, write_model
from support.small_disks import fill, small_disk

TEXTS = [{"text": f"{number} foxes sleep. " * (1 + number % 7)} for number in range(60)]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), CHATML)


@pytest.fixture
def make_config(tmp_path, model):
    """Return a function that writes RUN/config.yaml for documents and data settings."""

    def make(documents, *, seed=0, model_path=model, **settings):
        path = write_lines(tmp_path / "data.jsonl", documents)
        options = {"path": str(path), "sequence_length": 32, "cache_dir": str(tmp_path / "cache"), **settings}
        config = Config(
            model=ModelConfig(path=str(model_path)),
            data=DataConfig(**options),
            train=TrainConfig(seed=seed),
            run_dir=str(tmp_path / "run"),
        )
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(as_mapping(config)))
        return config

    return make


def documents_in(rows):
    """Return the documents of packed rows as token lists, padding left out."""
    found = []
    for tokens, flags in zip(rows.tokens, rows.flags, strict=True):
        bounds = [*np.flatnonzero(flags & STARTS).tolist(), len(tokens)]
        found += [tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    return sorted(document for document in found if set(document) != {rows.pad_token_id})


def test_every_document_is_in_exactly_one_split_and_comes_out_as_it_was_tokenized(make_config, model, tmp_path):
    from transformers import AutoTokenizer

    config = make_config(TEXTS, eval_fraction=0.3, sequence_length=512)
    record = prepare_run(config.run_dir)
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = sorted([*tokenizer(item["text"]).input_ids, tokenizer.eos_token_id] for item in TEXTS)
    splits = {split: open_split(config.run_dir, split) for split in ("train", "eval")}
    assert sorted(documents_in(splits["train"]) + documents_in(splits["eval"])) == whole
    assert 8 <= record["splits"]["eval"]["documents"] <= 28
    for split, rows in splits.items():
        counts = record["splits"][split]
        assert counts["documents"] == len(documents_in(rows))
        assert counts["rows"] == len(rows)
        assert counts["tokens"] + counts["padding"] == rows.tokens.size
        assert counts["targets"] == counts["tokens"] - counts["documents"] == rows.targets.sum()
        loader = StepLoader(rows, global_batch=2, micro_batch=1, rank=0, world=1, seed=0, shuffle=False)
        batches = [loader.batch(step) for step in range(loader.steps_per_epoch)]
        labels = sum(int((part.labels != -100).sum()) for batch in batches for part in batch.micro_batches)
        assert labels == sum(batch.global_targets for batch in batches) == counts["targets"]


def test_what_becomes_of_a_document_that_is_too_long_can_be_chosen_and_is_counted(make_config):
    documents = [chat("Hi", "fox " * 100), chat("fox " * 100, "Hi"), chat("Hi", "Hello"), chat("Hi?")]

    def counts(documents, too_long):
        entry = prepare(make_config(documents, eval_fraction=0, too_long=too_long))
        found = read_meta(entry)["splits"]["train"]
        return [found[key] for key in ("documents", "truncated", "split", "dropped_long", "dropped")]

    assert counts(documents, "truncate") == counts(documents, "auto") == [2, 1, 0, 0, 2]
    assert counts(documents, "drop") == [1, 0, 0, 2, 1], "too long and without a trained token are counted apart"
    documents_used, truncated, split, dropped_long, dropped = counts(documents, "split")
    assert (documents_used, truncated, dropped_long, dropped) == (3, 0, 0, 1)
    assert split >= 1
    texts = [{"text": "fox " * 100}, {"text": "fox"}, {"text": "fox fox"}]
    assert counts(texts, "drop") == [2, 0, 0, 1, 0]
    assert counts(texts, "truncate") == [3, 1, 0, 0, 0]
    assert counts(texts, "split") == counts(texts, "auto") == [3, 0, 1, 0, 0]


def test_settings_that_change_nothing_share_an_entry_and_those_that_do_have_their_own(make_config):
    texts = prepare(make_config(TEXTS))
    for setting, value in (("train_on", "last"), ("template", "chatml")):
        with pytest.raises(UserError, match=rf"data\.{setting}={value} has no effect: no source holds chats"):
            prepare(make_config(TEXTS, **{setting: value}))
    with pytest.raises(UserError, match=r"data\.eot_tokens=.* has no effect: no source holds chats"):
        prepare(make_config(TEXTS, eot_tokens=["<|im_end|>"]))
    assert prepare(make_config(TEXTS, too_long="drop")) != texts
    chats = [chat("Hi", f"Hello {n}", "So?", "Yes") for n in range(6)]
    entries = {prepare(make_config(chats, **settings)) for settings in ({}, {"train_on": "last"}, {"train_on": "all"})}
    assert len(entries) == 3


def test_duplicates_are_left_out_of_training_and_counted(make_config, tmp_path):
    texts = [{"text": f"The dog {n} sleeps."} for n in range(6)]
    write_lines(tmp_path / "held.jsonl", [texts[0], texts[0], {"text": "A cat."}])
    write_lines(tmp_path / "more.jsonl", [texts[2], {"text": "A bird."}])
    sources = [SourceConfig(path=str(tmp_path / name)) for name in ("data.jsonl", "more.jsonl")]
    mixed = {"path": None, "sources": sources, "eval_path": str(tmp_path / "held.jsonl"), "eval_fraction": 0}
    config = make_config([*texts, texts[1]], deduplicate=True, **mixed)
    splits = read_meta(prepare(config))["splits"]
    assert [splits["train"][key] for key in ("documents", "duplicates", "dropped")] == [6, 3, 0]
    assert (splits["eval"]["documents"], splits["eval"]["duplicates"]) == (3, 0), "held-out documents stay as they are"
    plain = read_meta(prepare(make_config([*texts, texts[1]], **mixed)))["splits"]["train"]
    assert plain["documents"] == 9
    assert "duplicates" not in plain
    # A fraction is chosen by the index of the documents, so no duplicate of a held-out one is trained.
    config = make_config([*texts, *texts, *texts], deduplicate=True, eval_fraction=0.4)
    assert "12 skipped as duplicates" in summary_of(prepare_run(config.run_dir))
    train, held = (documents_in(open_split(config.run_dir, split)) for split in ("train", "eval"))
    assert not {*map(tuple, train)} & {*map(tuple, held)}
    assert len(train) + len(held) == 6
    with pytest.raises(UserError, match="every document equals an earlier or a held-out one"):
        prepare(make_config([texts[0]], deduplicate=True, **mixed))
    with pytest.raises(UserError, match=r"data\.deduplicate=true compares all documents"):
        check_settings(make_config(texts, deduplicate=True, streaming=True))


def summary_of(record) -> str:
    """Return the summary, with the duplicates of both splits in one number."""
    counts = [split.pop("duplicates") for split in record["splits"].values()]
    record["splits"]["train"]["duplicates"] = sum(counts)
    return summary(record)


def test_a_run_says_where_its_data_lies_now_even_if_the_entry_was_made_from_elsewhere(make_config, tmp_path):
    config = make_config(TEXTS)
    first = prepare_run(config.run_dir)
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "data.jsonl").rename(moved)
    config = make_config(TEXTS, path=str(moved))
    again = prepare_run(config.run_dir)
    assert (again["reused"], again["cache"]) == (True, first["cache"])
    assert {source["path"] for counts in again["splits"].values() for source in counts["sources"]} == {str(moved)}


def test_a_full_disk_leaves_no_part_of_an_entry_and_the_next_preparation_succeeds(make_config, tmp_path, capsys):
    with small_disk(tmp_path / "disk", 64) as disk:
        config = make_config(TEXTS, cache_dir=str(disk / "cache"))
        filler = fill(disk)
        assert run_to_exit_code(lambda: prepare_and_print(config.run_dir)) == 1
        assert re.fullmatch(r"error: .*No space left on device; .*\n", capsys.readouterr().err)
        assert [*disk.glob("cache/.*")] == []
        assert not (tmp_path / "run" / "data.json").exists()
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert run_to_exit_code(lambda: prepare_and_print(config.run_dir)) == 2
        assert "Read-only file system; name a place that you may read and write" in capsys.readouterr().err
        subprocess.run(["mount", "-o", "remount,rw,size=4m", str(disk)], check=True)
        assert prepare_run(config.run_dir)["reused"] is False


@pytest.mark.parametrize(
    ("documents", "settings", "complaint"),
    [
        ([chat("Hi?"), chat("So?")], {}, "none of its 2 documents has a token to train; every chat needs an assistant"),
        ([chat("fox " * 50, "Hi")], {}, "1 were truncated before it: raise data.sequence_length=32"),
        ([chat("fox " * 50, "Hi")], {"too_long": "drop"}, "1 were left out as longer than a row: raise data.sequence"),
        ([{"text": "one"}], {}, "none could be held out for evaluation; set data.eval_fraction=0,"),
        ([{"text": "one"}, {"text": "two"}], {"eval_fraction": 0.999999}, "none was left to train on"),
        ([{"text": "one"}, b"{"], {}, "data.jsonl:2: not valid JSON"),
        ([{"text": "one"}], {"path": "absent.jsonl"}, "absent.jsonl does not exist"),
    ],
)
def test_bad_data_ends_with_exit_code_2_and_one_message(make_config, capsys, tmp_path, documents, settings, complaint):
    config = make_config(documents, **settings)
    assert run_to_exit_code(lambda: prepare_and_print(config.run_dir)) == 2
    output = capsys.readouterr()
    assert complaint in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert not (tmp_path / "run" / "data.json").exists()
    assert not (tmp_path / "cache").exists() or os.listdir(tmp_path / "cache") == []


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(make_config, tmp_path):
    folder = write_model(tmp_path / "model", CHATML)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 50}))
    with pytest.raises(UserError, match=r"beyond vocab_size=50 in .*config\.json"):
        prepare(make_config(TEXTS, model_path=folder))


def test_a_model_folder_without_a_tokenizer_is_refused(make_config, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 50}))
    with pytest.raises(UserError, match="holds no tokenizer that can be loaded"):
        prepare(make_config(TEXTS, model_path=tmp_path / "empty"))
    with pytest.raises(UserError, match="is not a folder"):
        prepare(make_config(TEXTS, model_path=tmp_path / "absent"))


def test_the_command_prepares_a_run_and_sums_it_up_and_says_when_it_reuses(make_config, tmp_path):
    config = make_config(TEXTS)
    command = [sys.executable, "-m", "distlora.data.prepare", config.run_dir]
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported, which takes seconds')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    first, second = (subprocess.run(command, capture_output=True, text=True, env=environment) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stderr == "", "no library's advice"
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    assert len(open_split(config.run_dir, "train")) == record["splits"]["train"]["rows"]
    assert f"{record['splits']['train']['documents']} documents in" in first.stdout
    assert "held out " in first.stdout
    assert f"cached in     {record['cache']}" in first.stdout
    assert f"reused in     {record['cache']}" in second.stdout
