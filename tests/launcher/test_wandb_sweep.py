"""Test wandb sweeps: what is registered, real agents against a fake server, and what wandb records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from distlora.training.trackers.wandb_agent import VARIABLES, AgentRun, agrees
from distlora_launcher.cli.main import main
from distlora_launcher.compose.compose import parse_overrides
from distlora_launcher.launch.lock import holders
from distlora_launcher.studies import wandb_sweep, worker
from distlora_launcher.studies.sweep import split
from distlora_launcher.studies.wandb_sweep import parameter
from support.small_models import read_metrics
from support.wandb_server import WandbServer, read_wandb_log, running_wandb_server


@pytest.fixture(autouse=True)
def _no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def settings(folders: Path, place: Path) -> list[str]:
    """Return the settings of a run of a few seconds."""
    return [
        f"model.path={folders / 'llama'}",
        f"data.path={folders / 'text.jsonl'}",
        f"data.cache_dir={place / 'cache'}",
        "data.sequence_length=64",
        "data.eval_fraction=0.2",
        "train.max_steps=2",
        "train.global_batch=2",
        "train.micro_batch=2",
        "plan.measure=false",
        "cluster.gpus_per_node=1",
    ]


def printed(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> Any:
    """Return what `distlora sweep create --dry-run` prints."""
    capsys.readouterr()
    assert main(["sweep", "create", *words, "--dry-run"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_a_grid_is_registered_with_a_command_that_runs_it(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    words = [f"run_dir={tmp_path / 'sweep'}", "tracker.project=p", "tracker.entity=team", "name=n"]
    words += ["model.path=llama", "data.path=text.jsonl,./text.jsonl", "optim.lr=1e-4,2e-4", "train.save_every=null,5"]
    words += ["data.sequence_length=64"]
    found = printed(capsys, words)
    assert found["parameters"] == {
        "data.path": {"values": [str(folders / "text.jsonl")] * 2},
        "optim.lr": {"values": [1e-4, 2e-4]},
        "train.save_every": {"values": ["null", 5]},  # An agent would write None, which Hydra takes for a text.
    }
    assert (found["method"], found["project"], found["entity"], found["name"]) == ("grid", "p", "team", "n")
    assert found["metric"] == {"name": "eval_loss", "goal": "minimize"}
    assert not {"run_cap", "early_terminate"} & set(found)
    command = found["command"]
    assert command[:3] == ["${env}", "distlora", "train"]
    assert command[-1] == "${args_no_hyphens}"
    assert f"model.path={folders / 'llama'}" in command  # An agent may be started elsewhere.
    assert "name=n" in command
    assert not any(word.startswith("run_dir=") for word in command)
    assert not (tmp_path / "sweep").exists()


def test_kinds_of_values_and_an_early_end_are_said_in_wandbs_words(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*settings(folders, tmp_path), "sweep=optuna", "sweep.trials=12", "sweep.pruner_warmup=2"]
    words += ["train.eval_every=1", "optim.lr=tag(log,interval(1e-5,1e-3))", "optim.weight_decay=interval(0,0.1)"]
    words += ["adapter.r=tag(log,int(interval(4,64)))", "train.seed=range(1,5)", "optim.schedule=cosine,constant"]
    found = printed(capsys, words)
    assert found["parameters"] == {
        "optim.lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3},
        "optim.weight_decay": {"distribution": "uniform", "min": 0.0, "max": 0.1},
        "adapter.r": {"values": [4, 8, 16, 32, 64]},
        "train.seed": {"distribution": "int_uniform", "min": 1, "max": 4},
        "optim.schedule": {"values": ["cosine", "constant"]},
    }
    assert (found["method"], found["run_cap"]) == ("bayes", 12)
    assert found["early_terminate"] == {"type": "hyperband", "min_iter": 3}


@pytest.mark.parametrize(
    ("words", "said"),
    [(["quant=nf4,none"], "such as quant.method=a,b"), (["optim.lr=1e-4,-1"], "trial 1 (optim.lr=-1)")],
)
def test_what_wandb_cannot_search_is_refused(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["sweep", "create", *settings(folders, tmp_path), f"run_dir={tmp_path / 'sweep'}", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_without_a_server_the_file_stays_and_the_command_is_told(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # Nothing listens there.
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    place = tmp_path / "sweep"
    words = [*settings(folders, tmp_path), f"run_dir={place}", "optim.lr=1e-4,2e-4"]
    assert main(["sweep", "create", *words]) == 2
    said = capsys.readouterr().err
    assert "wandb did not register the sweep" in said
    assert f"wandb sweep --project distlora {place / 'wandb_sweep.yaml'}" in said
    assert yaml.safe_load((place / "wandb_sweep.yaml").read_text())["method"] == "grid"


@pytest.mark.parametrize(
    "word",
    [
        "data.template=null,chatml",
        "adapter.use_dora=true,false",
        "optim.lr=1e-5,0.3",
        "adapter.target_modules=[q_proj,v_proj],all-linear",
        r"name='a, b','it\'s'",
        "train.sample_prompts=[],[a]",
        "adapter.rank_pattern={q_proj:8},{q_proj:16,v_proj:4}",
    ],
)
def test_hydra_reads_what_an_agent_writes_as_the_value_that_was_meant(word: str) -> None:
    (dimension,), _ = split([word], {})
    asked = parameter(dimension, numbers=False)["values"]
    for value, meant in zip(asked, dimension.values, strict=True):
        (override,) = parse_overrides([f"{dimension.setting}={value}"])  # As an agent's f-string.
        read = override.value()
        assert (read if not hasattr(read, "text") else read.text) == meant
        assert agrees(wandb_sweep.parse_value(dimension.setting, value), meant)
        assert not agrees(wandb_sweep.parse_value(dimension.setting, value), "something else")


def start_as_agent(monkeypatch: pytest.MonkeyPatch, place: Path, values: dict[str, Any], text: str = "") -> None:
    """Set the variables that an agent sets for a run."""
    path = place / "values.yaml"
    path.write_text(text or yaml.safe_dump({name: {"value": value} for name, value in values.items()}))
    for name, value in zip(VARIABLES, ("s1", "run1", str(path)), strict=True):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "words", "said"),
    [
        ({"optim.lr": 5.0}, ["optim.lr=1e-3"], "optim.lr is 0.001 by this command, and the sweep s1 requests 5.0"),
        ({"adapter.r": 4}, [], "adapter.r is 16 by this command, and the sweep s1 requests 4"),
        ({"quant": "nf4"}, ["quant=nf4"], "in place of the whole section quant"),
    ],
)
def test_values_that_a_run_does_not_have_are_refused_before_anything_starts(
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, Any],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    start_as_agent(monkeypatch, tmp_path, values)
    assert main(["train", *settings(folders, tmp_path), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def environment(server: WandbServer, place: Path) -> dict[str, str]:
    own = {"WANDB_CONFIG_DIR": str(place / "config"), "WANDB_CACHE_DIR": str(place / "wandb-cache")}
    return (
        {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        | own
        | (server.environment | {"OMP_NUM_THREADS": "1"})
    )


def distlora(server: WandbServer, place: Path, *words: str) -> str:
    """Return the output of a command, which must succeed."""
    command = [sys.executable, "-m", "distlora_launcher.cli.main", *words]
    ended = subprocess.run(
        command, cwd=place, env=environment(server, place), capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with running_wandb_server() as running:
        yield running
        assert running.unknown == []


def logged(run: Path) -> dict[str, Any]:
    """Return the records of wandb's log of a run."""
    (folder,) = (run / "wandb").glob("offline-run-*")
    found: dict[str, Any] = {"losses": [], "exit": None, "artifacts": []}
    for record in read_wandb_log(folder):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            found["losses"] += [(row["_step"], row["loss"])] if "loss" in row else []
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
        elif kind == "artifact":
            found["artifacts"].append(record.artifact.name)
    return found


def test_commands_that_share_a_folder_start_workers_with_their_own_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started: list[list[str]] = []
    places = []

    def run(arguments: Sequence[str], *_: Any, **__: Any) -> list[int]:
        places.append(len(holders(Path("trials"))))
        started.append(list(arguments))
        return [0]

    monkeypatch.setattr(wandb_sweep, "run_together", run)
    for words in (["e/p/one", "--count", "2"], ["e/p/two", "sweep.workers=2"]):
        assert wandb_sweep.start_agents([*words, "run_dir=trials"]) == 0
    assert places == [1, 1]
    asked = []
    monkeypatch.setattr(wandb_sweep, "_run_agent", lambda request, index, _: asked.append((request, index)) or 0)
    for index, (module, *arguments) in enumerate(started):
        assert module == worker.__name__
        monkeypatch.setattr(sys, "argv", ["worker", *arguments, "--index", str(index)])
        assert worker.main() == 0
    assert [(request.sweep, request.count, index) for request, index in asked] == [
        ("e/p/one", 2, 0),
        ("e/p/two", None, 1),
    ]


@pytest.mark.slow
def test_real_agents_train_a_registered_grid(server: WandbServer, folders: Path, tmp_path: Path) -> None:
    """Run `wandb sweep` and two `wandb agent`s offline, and read the logs back."""
    grid = ("optim.lr=1e-3,4e-3", "adapter.r=4,8", "tracker.group=g", "tracker.tags=[a,b]", "tracker.artifact=true")
    said = distlora(server, tmp_path, "sweep", "create", *settings(folders, tmp_path), *grid, "run_dir=sweep")
    assert "distlora sweep agent local/distlora/sweep0" in said
    distlora(server, tmp_path, "sweep", "agent", "local/distlora/sweep0", "sweep.workers=2", "run_dir=trials")
    sweep = server.sweeps["sweep0"]
    assert sorted(map(len, sweep.by_agent.values())) == [2, 2]
    losses = {}
    for run, values in sweep.handed_out.items():
        found = logged(tmp_path / "trials" / run)
        record, config = found["run"], found["config"]
        assert (record.run_id, record.sweep_id, record.run_group, list(record.tags)) == (run, "sweep0", "g", ["a", "b"])
        assert (config["optim"]["lr"], config["adapter"]["r"]) == (values["optim.lr"], values["adapter.r"])
        assert (config["optim.lr"], config["adapter.r"]) == (values["optim.lr"], values["adapter.r"])
        assert config["planned"]["device"]["peak"] > 0
        assert found["exit"] == 0
        assert found["artifacts"] == [f"adapter-{run}"]
        lines = read_metrics(tmp_path / "trials" / run)
        assert found["losses"] == [(line["step"], line["loss"]) for line in lines if "loss" in line]
        losses[tuple(values.values())] = [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    assert len(set(losses.values())) == 4


@pytest.mark.slow
def test_runs_that_fail_end_no_agent_and_one_that_is_stopped_goes_on(
    server: WandbServer, folders: Path, tmp_path: Path
) -> None:
    """Check more failures than an agent allows by default: three in its first minute."""
    words = settings(folders, tmp_path)
    file = tmp_path / "sweep.yaml"
    command = ["${env}", "distlora", "train", *words, "train.max_steps=300", "${args_no_hyphens}"]
    parameters = {"adapter.r": {"values": [-1, -2, -3, -4, 4]}}
    file.write_text(yaml.safe_dump({"method": "grid", "parameters": parameters, "command": command}))
    wandb = [sys.executable, "-m", "wandb", "sweep", "--project", "p", str(file)]
    subprocess.run(wandb, env=environment(server, tmp_path), cwd=tmp_path, check=True, timeout=60)
    agent = [sys.executable, "-m", "distlora_launcher.cli.main", "sweep", "agent", "local/p/sweep0"]
    process = subprocess.Popen(agent, env=environment(server, tmp_path), cwd=tmp_path)
    run = tmp_path / "runs" / "sweep0" / "sweep0run4"
    deadline = time.monotonic() + 240
    try:
        while not (run / "metrics.jsonl").is_file() or len(read_metrics(run)) < 4:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
    finally:
        process.kill()
    step = json.loads((run / "stopped.json").read_text())["step"]
    assert step >= 1
    said = distlora(server, tmp_path, "resume", "runs/sweep0")
    assert "sweep0run4 resumes" in said
    assert (run / "adapter").is_dir()
    steps = [line["step"] for line in read_metrics(run) if "loss" in line]
    assert steps == list(range(1, 301))
    kept = AgentRun.of_run(run)
    assert kept is not None
    assert kept.values == {"adapter.r": 4}


@pytest.mark.slow
def test_a_run_that_wandb_ends_early_saves_and_stays_ended(server: WandbServer, folders: Path, tmp_path: Path) -> None:
    server.stop_runs.add("sweep0run0")
    words = [word for word in settings(folders, tmp_path) if not word.startswith("train.max_steps")]
    distlora(server, tmp_path, "sweep", "create", *words, "train.max_steps=2000,2", "run_dir=made")
    distlora(server, tmp_path, "sweep", "agent", "sweep0")
    ended, whole = (tmp_path / "runs" / "sweep0" / f"sweep0run{number}" for number in (0, 1))
    assert wandb_sweep.was_ended_early(ended)
    assert not (ended / "adapter").exists()
    assert (whole / "adapter").is_dir()
    assert "resumes" not in distlora(server, tmp_path, "resume", "runs/sweep0")
