"""Check the plan in `distlora train` before workers start: its decisions, refusals, messages and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from distlora.config import UserError
from distlora.config.file import load_config
from distlora.planner.machine import LocalHardware
from distlora_launcher.cli.main import main
from distlora_launcher.compose import planning
from distlora_launcher.compose.compose import compose_run
from distlora_launcher.compose.planning import planned
from distlora_launcher.launch import local
from support.launcher_fakes import write_data, write_model

GIB = 2**30
GEFORCE = LocalHardware(devices=(("NVIDIA GeForce RTX 4090", 24_564 * 2**20),), host_bytes=64 * GIB)
UNKNOWN, SMALL_HOST = LocalHardware(devices=None, host_bytes=GIB), LocalHardware(host_bytes=1 << 20)
Shows = Callable[[LocalHardware], None]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the runs whose workers would have been started; a model and data are there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.jsonl")
    runs: list[Path] = []

    def prepare(run_dir: Path, **_: object) -> int:
        (run_dir / "data.json").write_text(json.dumps({"cache": str(run_dir)}))
        return 0

    monkeypatch.setattr(local, "prepare", prepare)
    monkeypatch.setattr(local, "run_workers", lambda run_dir, **_: runs.append(run_dir) or 0)
    return runs


@pytest.fixture
def shows(monkeypatch: pytest.MonkeyPatch) -> Shows:
    """Have this machine show what a test says."""

    def show(found: LocalHardware) -> None:
        monkeypatch.setattr(planning, "found_here", lambda **_: found)

    return show


def words(*more: str) -> list[str]:
    return ["model.path=model", "data.path=data.jsonl", "data.sequence_length=64", "run_dir=run", *more]


def train(*more: str) -> int:
    return main(["train", *words(*more)])


def test_what_is_decided_is_in_the_runs_settings(trained: list[Path], shows: Shows) -> None:
    for number, (found, method) in enumerate([(GEFORCE, "none"), (UNKNOWN, "nf4")]):
        shows(found)
        assert train("quant=auto", f"run_dir={number}") == 0
        assert load_config(Path(str(number))).quant.method == method
        assert json.loads((Path(str(number)) / "plan.json").read_text())["settings"]["quant"]["method"] == method
    shows(GEFORCE)
    assert planned(load_config(Path("1"))).config.quant.method == "nf4", "a resume decides nothing"


def test_what_does_not_fit_is_refused_unless_it_is_wanted_or_has_run_before(
    trained: list[Path], shows: Shows, capsys: pytest.CaptureFixture[str]
) -> None:
    shows(SMALL_HOST)
    assert train() == 2
    assert "does not fit CPU by calculation" in capsys.readouterr().err
    assert (trained, Path("run").exists()) == ([], False)
    assert train("plan.refuse=false") == 0
    assert trained == [Path("run").absolute()]
    assert "does NOT fit" in capsys.readouterr().out
    shows(GEFORCE)
    assert train("run_dir=other") == 0
    config = load_config(Path("other"))
    shows(SMALL_HOST)
    with pytest.raises(UserError, match=r"refuse: false under plan in other/config\.yaml"):
        planned(config, run_dir=Path("other"))
    (Path("other") / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert planned(config, run_dir=Path("other")).fits is False, "said, by the plan that is kept"


def test_of_gpus_that_nothing_describes_nothing_is_refused_and_nothing_chosen(
    trained: list[Path], shows: Shows, capsys: pytest.CaptureFixture[str]
) -> None:
    shows(UNKNOWN)
    assert train() == 0
    assert "unknown whether it fits" in capsys.readouterr().out
    for where, said in (((), "this node"), (("cluster=slurm",), "cluster=slurm")):
        assert train("plan=auto", "run_dir=other", *where) == 2
        assert f"which is unknown for {said}; add gpu=h100" in capsys.readouterr().err


@pytest.mark.ci
def test_a_job_of_a_sweep_that_does_not_fit_leaves_the_others_alone(
    trained: list[Path], shows: Shows, capsys: pytest.CaptureFixture[str]
) -> None:
    shows(UNKNOWN)
    sweep = ("-m", "gpu.memory_gib=0.70,0.6001", "run_dir=sweep")
    assert train(*sweep) == 2
    assert trained == [Path("sweep/0").absolute()]
    said = capsys.readouterr()
    assert "job 1: " in said.out
    assert said.err.count("does not fit a GPU of 0.6001 GiB") == 1
    assert train(*sweep, "cluster=slurm", "run_dir=array") == 2
    assert "job 1 (gpu.memory_gib=0.6001): this run does not fit" in capsys.readouterr().err
    assert not Path("array").exists(), "the tasks of an array are made together"


@pytest.mark.parametrize("launcher", ["slurm", "torchrun"])
def test_a_run_that_machines_start_themselves_is_planned_for_what_they_show(
    launcher: str, trained: list[Path], shows: Shows
) -> None:
    cluster = ("cluster=torchrun", "cluster.nodes=2", "cluster.rdzv_endpoint=127.0.0.2:29500")
    config = compose_run(words(*(cluster if launcher == "torchrun" else ("cluster=slurm",)))).config
    shows(SMALL_HOST)
    assert planned(config).fits is None, "the machine that submits says nothing of them"
    with pytest.raises(UserError, match="does not fit CPU"):
        planned(config, runs_here=True)
    shows(GEFORCE)
    auto = compose_run(words("quant=auto", *(cluster if launcher == "torchrun" else ("cluster=slurm",))))
    assert planning.choices(auto).config.quant.method == "nf4", "alike on each machine, whatever it shows"
    plan = planned(config, runs_here=True)
    assert (plan.fits, plan.machine.name, plan.machine.ranks) == (True, "RTX 4090 24 GB", config.cluster.ranks)
