"""Check each tracker by its own reader: what a run that was killed and resumed has logged, all trackers at once."""

import importlib
import importlib.util
import json
import os
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import yaml

from distlora.checkpoint.state import RunProgress
from distlora.config import Config, DataConfig, ModelConfig, TrackerConfig, UserError
from distlora.config.file import load_config
from distlora.system.exit_codes import FAILED, STOPPED
from distlora.training import trackers
from distlora.training.reporter import Reporter
from distlora.training.trackers import background
from distlora_launcher.compose.checks import check
from distlora_launcher.compose.compose import compose_config
from support.launcher_fakes import write_data, write_model, write_tokenizer
from support.loopback import silent_server
from support.wandb_server import read_wandb_log

HAS_SWANLAB = importlib.util.find_spec("swanlab") is not None
EXPECTED = {
    "eval_loss": [(0, 5.0), (3, 3.0)],
    "loss": [(1, 4.0), (2, 2.0), (3, 1.5), (4, 1.0)],
    "summary/adapter_bytes": [(4, 12.0)],
}


def make_reporter(run_dir, tracker, start_step=0):
    config = Config(
        model=ModelConfig(path="base"), data=DataConfig(path="data.jsonl"), tracker=tracker, run_dir=str(run_dir)
    )
    return Reporter(run_dir, config, rank=0, world=2, total_steps=4, progress=RunProgress(step=start_step))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Return a run that was killed after step 3 and resumed from step 2, and failed after step 4."""
    root = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "SWANLAB_"))]:
            if name != "TRACKIO_DIR":  # Of conftest.py.
                environment.delenv(name)
        environment.setenv("WANDB_MODE", "offline")
        environment.setenv("SWANLAB_SAVE_DIR", str(root / "no-key"))
        # MLflow's database takes ten seconds to create; `test_mlflow_makes_a_database` does.
        environment.setenv("MLFLOW_TRACKING_URI", (root / "mlruns").as_uri())
        environment.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        run_dir = root / "my run"
        run_dir.mkdir()
        (run_dir / "adapter").mkdir()
        (run_dir / "adapter" / "weights").write_text("w")
        names = dict.fromkeys(("wandb", "tensorboard", "mlflow", "trackio"), True) | {"swanlab": HAS_SWANLAB}
        tracker = TrackerConfig(**names, project="a-project", tags=("a", "b"), artifact=True)
        killed = make_reporter(run_dir, tracker)
        killed.evaluation(0, {"eval_loss": 5.0})
        for step, loss in ((1, 4.0), (2, 2.0), (3, 1.5)):
            killed.log(step, {"loss": loss})
        killed.evaluation(3, {"eval_loss": 3.0})
        killed.close(STOPPED)
        resumed = make_reporter(run_dir, tracker, start_step=2)
        resumed.log(3, {"loss": 1.5})
        best = {"category": "best", "reward": 0.5, "prompt": "p", "text": "t"}
        resumed.samples(3, [("a|b", "c\nd")], [best])
        resumed.evaluation(3, {"eval_loss": 3.0})
        resumed.log(4, {"loss": 1.0})
        resumed.summary({"adapter_bytes": 12, "names": ["x"]})
        resumed.result(run_dir / "adapter")
        resumed.close(FAILED)
        yield run_dir


def test_tensorboard_reads_each_step_once_and_the_settings(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import api_pb2, metadata

    read = EventAccumulator(str(run_dir / "tensorboard"))
    read.Reload()
    assert {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]} == EXPECTED
    (answers,) = read.Tensors("answers/text_summary")
    assert b"| 3 | best | 0.5 | p | t | None | None |" in answers.tensor_proto.string_val[0]
    (samples,) = read.Tensors("samples/text_summary")
    assert samples.step == 3
    assert b"| 3 | a\\|b | c d |" in samples.tensor_proto.string_val[0]
    parts = read.summary_metadata
    begun = metadata.parse_session_start_info_plugin_data(parts[metadata.SESSION_START_INFO_TAG].plugin_data.content)
    assert begun.hparams["adapter.r"].number_value == 16
    assert begun.hparams["world"].number_value == 2
    ended = metadata.parse_session_end_info_plugin_data(parts[metadata.SESSION_END_INFO_TAG].plugin_data.content)
    assert ended.status == api_pb2.STATUS_FAILURE


def mlflow_run(uri):
    """Return (client, run, {metric: [(step, value)]}) of the only run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("a-project").experiment_id])
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return client, run, {name: [(point.step, point.value) for point in points] for name, points in history.items()}


def test_mlflow_reads_each_step_once_the_settings_samples_and_result(run_dir):
    client, run, history = mlflow_run(os.environ["MLFLOW_TRACKING_URI"])
    assert history == EXPECTED
    assert (run.info.run_name, run.info.status, run.data.tags["exit_code"]) == ("my run", "FAILED", "1")
    assert (run.data.params["adapter.r"], run.data.params["world"], run.data.tags["a"]) == ("16", "2", "true")
    folder = client.download_artifacts(run.info.run_id, "")
    with open(f"{folder}/samples/step_3.json") as file:
        assert json.load(file) == {"columns": ["step", "prompt", "text"], "data": [[3, "a|b", "c\nd"]]}
    with open(f"{folder}/adapter/weights") as file:
        assert file.read() == "w"


def test_trackio_reads_each_step_once_the_settings_and_a_failure(run_dir):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("a-project")
    assert (run.name, run.config["adapter.r"], run.config["world"]) == ("my run", 16, 2)
    lines = SQLiteStorage.get_logs("a-project", run_id=run.id)
    assert {name: [(line["step"], line[name]) for line in lines if name in line] for name in EXPECTED} == EXPECTED
    (table,) = [line["samples"]["_value"] for line in lines if "samples" in line]
    assert table == [{"step": 3, "prompt": "a|b", "text": "c\nd"}]
    assert [alert["text"] for alert in run.alerts()] == ["exit code 1"]


@pytest.mark.skipif(not HAS_SWANLAB, reason="needs swanlab: pip install 'distlora[swanlab]' (it requires protobuf < 7)")
def test_swanlab_reads_the_steps_of_both_starts_under_one_id(run_dir):
    """It drops repeated steps when the files are uploaded; the reader of that is its server."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.proto.swanlab.run.v1.run_pb2 import RunState
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    ids, states, points = set(), [], set()
    for path in sorted((run_dir / "swanlab").glob("*/run-*.swanlab")):
        reader = DataStoreReader()
        reader.open(path)
        for record in map(Record.FromString, reader):
            kind = record.WhichOneof("record_type")
            if kind == "start":
                ids.add((record.start.id, record.start.name, record.start.project, *record.start.tags))
            elif kind == "finish":
                states.append(RunState.Name(record.finish.state))
            elif kind == "scalar":
                points.add((record.scalar.key, record.scalar.step, record.scalar.value.number))
        reader.close()
        settings = yaml.safe_load((path.parent / "files" / "config.yaml").read_text())
        assert (settings["adapter"]["value"]["r"], settings["world"]["value"]) == (16, 2)
    assert ids == {((run_dir / "swanlab" / "run_id.txt").read_text().strip(), "my run", "a-project", "a", "b")}
    assert states == ["RUN_STATE_ABORTED", "RUN_STATE_CRASHED"]
    assert points == {(name, step, value) for name, pairs in EXPECTED.items() for step, value in pairs}


def test_wandb_logs_beside_the_others(run_dir):
    folders = sorted((run_dir / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime_ns)
    records = [record for folder in folders for record in read_wandb_log(folder)]
    assert {r.run.run_id for r in records if r.WhichOneof("record_type") == "run"} == {
        (run_dir / "wandb" / "run_id.txt").read_text().strip()
    }
    assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [STOPPED, 1]


@pytest.mark.ci
def test_mlflow_makes_a_database_beside_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "run").mkdir()
    for start_step in (0, 1):
        with make_reporter(tmp_path / "run", TrackerConfig(mlflow=True, project="a-project"), start_step) as reporter:
            reporter.log(1, {"loss": 4.0})
            if start_step == 1:
                reporter.log(2, {"loss": 2.0})
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    _, run, history = mlflow_run(uri)
    assert history == {"loss": [(1, 4.0), (2, 2.0)]}
    assert run.info.status == "FINISHED"
    assert f"show it with `mlflow ui --backend-store-uri {uri}`" in capsys.readouterr().out


def test_a_server_that_is_not_there_is_reported_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # Nothing listens there.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with make_reporter(tmp_path, TrackerConfig(mlflow=True, tensorboard=True)) as reporter:
        for step in range(1, 4):
            reporter.log(step, {"loss": 1.0})
    shown = capsys.readouterr().out
    assert shown.count("WARNING: mlflow failed (MlflowException: ") == 1
    assert "WARNING: tensorboard" not in shown
    assert (tmp_path / "metrics.jsonl").read_text().count("loss") == 3


@pytest.mark.parametrize(("name", "variable"), [("mlflow", "MLFLOW_TRACKING_URI"), ("trackio", "TRACKIO_SERVER_URL")])
def test_a_server_that_never_answers_delays_neither_a_start_nor_a_step(tmp_path, monkeypatch, capsys, name, variable):
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "token")
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 2.0)
    importlib.import_module(name)
    with silent_server() as url:
        monkeypatch.setenv(variable, url)
        with make_reporter(tmp_path, TrackerConfig(**{name: True})) as reporter:
            reporter.log(1, {"loss": 1.0})
    assert f"WARNING: {name} did not finish in time" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text().count("loss") == 1


def test_no_step_waits_for_a_tracker_that_hangs(tmp_path, monkeypatch, capsys):
    hangs = threading.Event()
    client = SimpleNamespace(TrackerRun=lambda start: hangs.wait())
    monkeypatch.setitem(sys.modules, "distlora.training.trackers.tensorboard_run", client)
    monkeypatch.setattr(background, "MOST_PENDING", 3)
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.2)
    began = time.monotonic()
    for name, steps in (("short", 1), ("long", 9)):
        (tmp_path / name).mkdir()
        with make_reporter(tmp_path / name, TrackerConfig(tensorboard=True)) as reporter:
            for step in range(1, steps + 1):
                reporter.log(step, {"loss": 1.0})
    assert time.monotonic() - began < 30
    hangs.set()
    warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(warnings) == 2
    assert "tensorboard did not finish in time" in warnings[0]
    assert "tensorboard failed (TimeoutError: 3 calls wait for it)" in warnings[1]


PATHS = ("model.path=base", "data.path=data.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tracker.name=wandb"], "there is no setting tracker.name; write tracker=wandb, or several as tracker="),
        (["tracker=tensorboard", "tracker.project=x"], "tracker.project has no effect with tracker=tensorboard"),
        (["tracker=[wandb,tensor]"], "did you mean 'tensorboard'?"),
    ],
)
def test_wrong_trackers_are_refused_with_what_to_type(words, message):
    with pytest.raises(UserError) as refused:
        compose_config([*PATHS, *words])
    assert message in str(refused.value)


def test_a_missing_package_is_refused_before_a_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data.jsonl")
    write_tokenizer(model)
    paths = [f"model.path={model}", f"data.path={data}", f"run_dir={tmp_path / 'run'}"]
    config = compose_config([*paths, "data.sequence_length=64", "tracker=mlflow"])
    with pytest.raises(UserError, match=r"needs mlflow, which is not installed; `pip install 'distlora\[mlflow\]'`"):
        check(config, new_run=True)


def test_a_run_of_an_earlier_version_keeps_its_tracker(tmp_path):
    for old, new in (("{name: none, project: x}", ()), ("{name: wandb, project: x}", ("wandb",))):
        sections = f"model: {{path: base}}\ndata: {{path: x}}\ntracker: {old}\nrun_dir: {tmp_path}\n"
        (tmp_path / "config.yaml").write_text(sections)
        assert load_config(tmp_path).tracker.names == new
    assert load_config(tmp_path).tracker.project == "x"
