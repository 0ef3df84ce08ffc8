"""Data sets on the hub, by the real clients (datasets, huggingface_hub) against a hub on the loopback interface."""

import io
import json
import re
import subprocess
import sys

import pytest
import yaml

from distlora.config import Config, DataConfig, ModelConfig, SourceConfig, TrainConfig, UserError
from distlora.config.file import as_mapping
from distlora.data.sources import find_source
from support.data_folders import CHATML, chat, write_model
from support.hub_server import start_hub

ANSWERS = [chat(f"What is {number}?", f"{number} is a number.") for number in range(40)]
STORIES = [{"text": f"Fox {number} sleeps under the old tree. " * 8} for number in range(2000)]
CONFIGURED = b"""---
configs:
- config_name: english
  data_files: [{split: train, path: en/train.jsonl}, {split: test, path: en/test.jsonl}]
- config_name: french
  data_files: [{split: train, path: fr/train.jsonl}]
---
"""
CHECK = """
import json, sys
from distlora.config import DataConfig, UserError
from distlora.data.sources import check_sources
for settings in json.loads(sys.argv[1]):
    try:
        print(json.dumps(check_sources(DataConfig(**settings), limit=10)))
    except UserError as error:
        print(json.dumps(str(error)))
"""

PREPARE = """
import sys
from distlora.architecture.tokens import tokenize_alone
tokenize_alone()
from distlora.data.prepare import prepare_and_print
from distlora.system.exit_codes import run_to_exit_code
sys.exit(max(run_to_exit_code(lambda: prepare_and_print(run)) for run in sys.argv[1:]))
"""


def lines(documents):
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)


def parquet(documents):
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(documents), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def hub():
    with start_hub() as running:
        running.add("org/answers", {"train.jsonl": lines(ANSWERS), "test.jsonl": lines(ANSWERS[:7])}, kind="datasets")
        shards = {f"data/train-{n:05}.parquet": parquet(STORIES[n * 100 : n * 100 + 100]) for n in range(20)}
        running.add("org/stories", shards, kind="datasets")
        files = {"README.md": CONFIGURED, "en/train.jsonl": lines(ANSWERS), "en/test.jsonl": lines(ANSWERS[:5])}
        running.add("org/configured", files | {"fr/train.jsonl": lines(ANSWERS[:30])}, kind="datasets")
        running.add("org/gated", {"README.md": b"gated", "a.jsonl": lines(ANSWERS)}, kind="datasets", gated=True)
        running.add("org/private", {"a.jsonl": lines(ANSWERS)}, kind="datasets", private=True)
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), CHATML)


@pytest.fixture
def prepare(hub, home, model, tmp_path):
    """Return a function that prepares runs: their RUN/data.json and the output."""

    def run(runs, max_steps=None, **environment):
        folders = []
        for name, settings in runs.items():
            data = DataConfig(sequence_length=128, cache_dir=str(home / "rows"), **settings)
            train = TrainConfig(max_steps=max_steps, global_batch=4)
            folder = tmp_path / name
            config = Config(model=ModelConfig(path=str(model)), data=data, train=train, run_dir=str(folder))
            folder.mkdir(exist_ok=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(as_mapping(config)))
            folders.append(folder)
        # One process for all, since its imports take longer than its work.
        finished = subprocess.run(
            [sys.executable, "-c", PREPARE, *map(str, folders)],
            env=hub.environment(home) | environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert finished.returncode == 0, finished.stderr
        return [json.loads((folder / "data.json").read_text()) for folder in folders], finished.stdout

    return run


def check(hub, home, cases, token=None, **environment):
    """Return the outcome of the launcher's check for each case: the formats, or the message of a refusal."""
    finished = subprocess.run(
        [sys.executable, "-c", CHECK, json.dumps(cases)],
        env=hub.environment(home, token=token) | environment,
        capture_output=True,
        text=True,
        cwd=home,
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


def test_what_the_hub_refuses_is_one_sentence_before_anything_is_downloaded(hub, home):
    cases = {
        "org/absent is neither a file or folder here nor a data set on the hub": {"path": "org/absent"},
        "org/private is neither a file or folder here nor a data set": {"path": "org/private"},
        "data.revision=v7: org/answers has no such branch, tag or commit": {"path": "org/answers", "revision": "v7"},
        "its splits are train, test": {"path": "org/answers", "split": "trian"},
        "several; its configurations are english, french: set data.name=english": {"path": "org/configured"},
        "no configuration 'englsh' (did you mean 'english'?)": {"path": "org/configured", "name": "englsh"},
        "no split 'test'": {"path": "org/configured", "name": "french", "split": "test"},
        "data.path=org/gated is gated": {"path": "org/gated"},
        "takes a slice": {"path": "org/stories", "split": "train[:10%]", "streaming": True},
        "org/answers (split train) is both": {"path": "org/answers", "eval_path": "org/answers"},
        "(split train) is both trained on and": {"path": "org/answers", "eval_split": "train[:5%]"},
        "(split test) is both trained on and": {"path": "org/answers", "split": "train+test", "eval_split": "test"},
        "train) is both trained on": {"path": "org/answers", "split": "train[:5%]", "eval_split": "train[:5%]"},
    }
    good = [
        {"path": "org/answers"},
        {"path": "org/configured", "name": "english", "eval_split": "test"},
        {"path": "org/stories", "streaming": True},
        {"path": "org/answers", "split": "train[10%:]", "eval_split": "train[:10%]"},
    ]
    before = len(hub.requests)
    outcomes = check(hub, home, [*cases.values(), *good])
    for expected, outcome in zip(cases, outcomes, strict=False):
        assert expected in outcome
    assert outcomes[len(cases) :] == [[None], [None, None], [None], [None, None]]
    asked = hub.requests[before:]
    assert not any(r.method == "GET" and r.path.endswith((".jsonl", ".parquet")) for r in asked)


@pytest.mark.ci
def test_a_token_without_access_is_told_where_to_ask_and_one_with_access_is_let_in(hub, home):
    case = [{"path": "org/gated"}]
    (refused,) = check(hub, home, case, token="hf_guest")
    assert re.search(
        "org/gated is gated .*; accept its licence at http://127.0.0.1:.*/datasets/org/gated, and log in", refused
    )
    assert check(hub, home, case, token="hf_owner") == [[None]]


@pytest.mark.ci
def test_without_a_network_the_message_says_so(hub, home, tmp_path):
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    (message,) = check(hub, home, [{"path": "org/answers"}], **unreachable)
    assert "the hub cannot be reached" in message
    assert "is not in the cache" in message
    (message,) = check(hub, home, [{"path": "org/answers"}], **unreachable, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set, and the data set org/answers is not in the cache" in message


def test_columns_of_media_are_refused_until_they_are_ignored(tmp_path):
    import datasets

    features = {"text": datasets.Value("string"), "image": datasets.Image(), "pages": datasets.List(datasets.Image())}
    rows = {"text": ["a"], "image": [None], "pages": [[]]}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"the column 'image' holds media.*data\.ignore_columns=\[image,pages\]"):
        find_source(SourceConfig(path=str(tmp_path / "saved"))).open(has_template=True)
    ignoring = SourceConfig(path=str(tmp_path / "saved"), ignore_columns=("image", "pages"))
    _, documents = find_source(ignoring).open(has_template=True)
    assert [document.value for document in documents] == [{"text": "a"}]


@pytest.mark.ci
def test_a_preview_streams_a_hub_data_set_and_downloads_no_more_than_its_head(hub, home, model, tmp_path):
    command = [sys.executable, "-m", "distlora_launcher.cli.main", "data", "preview", f"model.path={model}", "--rows=0"]
    command += ["data.path=org/many", "data.sequence_length=128"]
    hub.add(
        "org/many",
        {f"data/train-{n:05}.parquet": parquet([*STORIES, {"text": f"{n}"}]) for n in range(4)},
        kind="datasets",
    )

    def shards_after(*flags):
        before = len(hub.requests)
        finished = subprocess.run(
            [*command, *flags], env=hub.environment(home), capture_output=True, text=True, cwd=tmp_path
        )
        assert finished.returncode == 0, finished.stderr
        asked = {r.path for r in hub.requests[before:] if r.method == "GET" and r.path.endswith(".parquet")}
        return finished.stdout, len(asked)

    printed, shards = shards_after()
    assert "the first 1,000 documents; --all reads the rest" in printed
    assert shards <= 2
    printed, shards = shards_after("--all")
    assert "all 8,004 documents" in printed
    assert shards == 4


def test_a_run_reads_the_commit_that_it_started_with_whatever_is_pushed_later(hub, prepare):
    settings = {"path": "org/answers", "eval_split": "test"}
    (first,), _ = prepare({"run": settings})
    assert (first["splits"]["train"]["documents"], first["splits"]["eval"]["documents"]) == (40, 7)
    repo = hub.repos["datasets", "org/answers"]
    old = repo.refs["main"]
    assert first["splits"]["train"]["sources"][0]["commit"] == old
    repo.commit({"train.jsonl": lines(ANSWERS[:25])})

    runs = {"run": settings, "other": settings, "pinned": settings | {"revision": old}}
    (resumed, newer, pinned), _ = prepare(runs)
    assert (resumed["reused"], resumed["cache"]) == (True, first["cache"])
    assert newer["splits"]["train"]["documents"] == 25
    assert (pinned["reused"], pinned["cache"]) == (True, first["cache"])


@pytest.mark.ci
def test_what_was_read_once_is_there_offline(hub, prepare):
    settings = {"path": "org/configured", "name": "french", "split": "train[:50%]"}
    (online,), _ = prepare({"online": settings})
    before = len(hub.requests)
    runs = {"offline": settings, "another": settings | {"split": "train[50%:]"}}
    (offline, another), _ = prepare(runs, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == before
    assert (offline["reused"], offline["cache"]) == (True, online["cache"])
    for record in (offline, another):
        assert sum(counts["documents"] for counts in record["splits"].values()) == 15


@pytest.mark.ci
def test_streaming_downloads_and_tokenizes_no_more_than_the_steps_need(hub, prepare):
    settings = {"path": "org/stories", "streaming": True}
    small = {"path": "org/answers", "streaming": True}
    (record, again, ended), printed = prepare({"run": settings, "again": settings, "small": small}, max_steps=50)
    asked = [r.path for r in hub.requests if r.method == "GET" and "org/stories" in r.path]
    shards = {path.rpartition("/")[2] for path in asked if path.endswith(".parquet")}
    assert shards <= {"train-00000.parquet", "train-00001.parquet", "train-00002.parquet"}
    splits = record["splits"]
    assert 200 <= splits["train"]["rows"] <= 250
    read = splits["train"]["documents"] + splits["eval"]["documents"]
    assert read % 32 == 0, "whole batches"
    assert 0 < splits["eval"]["documents"] / read < 0.2
    assert "streamed       until 200 rows were full" in printed
    assert record["ended"] == [False]
    assert (again["reused"], again["cache"]) == (True, record["cache"])

    assert ended["ended"] == [True]
    assert f"to the end: {ended['splits']['train']['rows']} of the 200 rows that the steps need" in printed
