"""Sources of documents: files, folders, saved data sets; refusals and fingerprints."""

import gzip
import json

import pytest

from distlora.config import DataConfig, SourceConfig, UserError
from distlora.config.checks import check_section
from distlora.data.sources import check_sources, find_source
from support.data_folders import write_lines

TEXTS = [{"text": f"{number} foxes"} for number in range(20)]


def source(path, **settings):
    return find_source(SourceConfig(path=str(path), **settings))


def texts(path, **settings):
    _, documents = source(path, **settings).open(has_template=True)
    return [document.value["text"] for document in documents]


def check(path, limit=1000, **settings):
    (format,) = check_sources(DataConfig(path=str(path), **settings), limit=limit)
    return format


@pytest.fixture
def saved(tmp_path):
    """Return a folder of save_to_disk with one data set and one with two splits."""
    import datasets

    rows = datasets.Dataset.from_list(TEXTS)
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(str(tmp_path / "two"))
    return tmp_path


def test_a_folder_is_all_its_files_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    write_lines(folder / "c.jsonl", TEXTS[:2])
    (folder / "b" / "a.json").write_text(json.dumps(TEXTS[2:4]))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    (folder / "README.md").write_text("not data")
    write_lines(folder / ".hidden" / "x.jsonl", TEXTS[5:])
    assert texts(folder) == ["2 foxes", "3 foxes", "0 foxes", "1 foxes", "packed"]
    assert check(folder) == "text"


def test_a_folder_of_splits_is_not_trained_on_whole(tmp_path):
    write_lines(tmp_path / "train-00000.jsonl", TEXTS)
    assert check(tmp_path) == "text"
    write_lines(tmp_path / "test-00000.jsonl", TEXTS)
    with pytest.raises(UserError, match=r"several splits.*data\.path=.*train-00000\.jsonl.*eval_path=.*test-00000"):
        check(tmp_path)


def test_a_saved_data_set_is_read_by_split(saved):
    assert texts(saved / "one") == [item["text"] for item in TEXTS]
    assert texts(saved / "two", split="test") == [item["text"] for item in TEXTS[:5]]
    _, documents = source(saved / "two").open(has_template=True)
    assert next(documents).place == f"{saved / 'two'} row 1"
    with pytest.raises(UserError, match=r"no split 'tset' \(did you mean 'test'\?\); its splits are train, test"):
        texts(saved / "two", split="tset")
    (saved / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"one/state\.json is damaged"):
        texts(saved / "one")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"path": "absnt.jsonl"}, r"absnt\.jsonl does not exist \(did you mean 'absent\.jsonl'\?\)"),
        ({"path": "fold/*.jsonl"}, r"patterns are not expanded; name the folder, fold, whose files"),
        ({"path": "chats.jsonl"}, r"data\.path=.*chats\.jsonl does not exist; name a file"),
        ({"path": "empty"}, "holds no file of a known format"),
        ({"path": "absent.jsonl", "split": "test"}, "is local and has one split, train, not 'test'"),
        ({"path": "absent.jsonl", "name": "x"}, "data.name=x belongs to a data set on the hub"),
        ({"path": "absent.jsonl", "revision": "v1"}, "data.revision=v1 belongs to a data set on the hub"),
        ({"path": "blank.jsonl"}, "blank.jsonl holds no document"),
        ({"path": "nothing.jsonl"}, "nothing.jsonl holds no document"),
        ({"path": "/dev/null"}, "neither a file nor a folder"),
        ({"path": "good.jsonl", "eval_path": "good.jsonl"}, "is both trained on and held out"),
        ({"path": "good.jsonl", "eval_path": "blank.jsonl"}, "blank.jsonl holds no document"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(tmp_path, monkeypatch, settings, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "absent.jsonl").touch()
    (tmp_path / "nothing.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    write_lines(tmp_path / "good.jsonl", TEXTS)
    with pytest.raises(UserError, match=complaint):
        check_sources(DataConfig(**settings), limit=10)


@pytest.mark.parametrize(
    "held_out", ["data/test.jsonl", "other/../data/test.jsonl", "link/test.jsonl", "data", "hard.jsonl"]
)
def test_a_file_is_not_trained_on_and_held_out_however_it_is_named(tmp_path, held_out):
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    write_lines(tmp_path / "data" / "a.jsonl", TEXTS)
    write_lines(tmp_path / "data" / "test.jsonl", TEXTS)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "data" / "test.jsonl")
    with pytest.raises(UserError, match=r"both trained on and held out; name another"):
        check_sources(DataConfig(path=str(tmp_path / "data"), eval_path=str(tmp_path / held_out)), limit=10)
    sources = tuple(SourceConfig(path=str(tmp_path / path)) for path in ("data", held_out))
    with pytest.raises(UserError, match="twice, so its held-out documents would be trained on"):
        check_sources(DataConfig(sources=sources), limit=10)
    good = DataConfig(path=str(tmp_path / "data" / "a.jsonl"), eval_path=str(tmp_path / "hard.jsonl"))
    assert check_sources(good, limit=10) == ["text", "text"]


def test_a_split_of_a_saved_data_set_is_not_trained_on_and_held_out(saved):
    path = str(saved / "two")
    assert check_sources(DataConfig(path=path, eval_split="test"), limit=10) == ["text", "text"]
    with pytest.raises(UserError, match=r"two \(split train\) is both trained on and held out"):
        check_sources(DataConfig(path=path, eval_path=str(saved / "one" / ".." / "two")), limit=10)


def test_sample_by_needs_a_text_file(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", TEXTS)
    text = tmp_path / "b.txt"
    text.write_text("a\nb\n")
    for settings in ({"path": str(lines)}, {"sources": (SourceConfig(path=str(lines), sample_by="line"),)}):
        with pytest.raises(UserError, match=r"data\.sample_by=line has no effect: .*a\.jsonl holds no \.txt file"):
            check_sources(DataConfig(**({"sample_by": "line"} if "path" in settings else {}), **settings), limit=10)
    both = DataConfig(path=str(lines), eval_path=str(text), sample_by="line")
    assert check_sources(both, limit=10) == ["text", "text"]


def test_a_fingerprint_changes_with_the_content_and_the_reading_but_not_with_the_place(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", TEXTS)
    first = source(path).fingerprint()
    assert source(path, format="text").fingerprint() == first, "what auto came to"
    moved = tmp_path / "moved.jsonl"
    path.rename(moved)
    assert source(moved).fingerprint() == first
    write_lines(moved, [*TEXTS, {"text": "more"}])
    assert source(moved).fingerprint() != first
    paragraphs = tmp_path / "a.txt"
    paragraphs.write_text("a\n\nb\nc\n")
    assert source(paragraphs).fingerprint() != source(paragraphs, sample_by="line").fingerprint()


@pytest.mark.parametrize(("setting", "value"), [("name", "x"), ("split", "test"), ("columns", {"text": "body"})])
def test_settings_of_one_source_have_no_effect_beside_several_and_are_refused(setting, value):
    with pytest.raises(UserError, match=rf"data\.{setting}=.* it belongs into each entry of data\.sources"):
        check_section("data", DataConfig(sources=(SourceConfig(path="a.jsonl"),), **{setting: value}))
