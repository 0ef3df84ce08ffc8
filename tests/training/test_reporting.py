"""Check the run's logs: each step once in metrics.jsonl, the same in wandb's log, rank 0 alone."""

import contextlib
import json
import os
import signal
import sys
from dataclasses import replace

import psutil
import pytest
import wandb

from distlora.checkpoint.state import RunProgress
from distlora.config import Config, DataConfig, ModelConfig, OptimConfig, TrackerConfig
from distlora.system.stop_signals import Stopped
from distlora.training.reporter import Reporter
from support.small_disks import fill, small_disk
from support.wandb_server import read_wandb_log


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    """Hide all wandb credentials and settings of the user."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    wandb.teardown(exit_code=0)  # wandb reads the environment once in a process
    yield
    wandb.teardown(exit_code=0)


def make_config(run_dir, tracker=None):
    return Config(
        model=ModelConfig(path="base"),
        data=DataConfig(path="data.jsonl"),
        optim=OptimConfig(lr=2e-4),
        tracker=TrackerConfig(**{tracker: True}, project="project", group="group", tags=("a", "b"))
        if tracker
        else TrackerConfig(),
        name="named",
        run_dir=str(run_dir),
    )


def make_reporter(run_dir, *, tracker=None, rank=0, start_step=0, total_steps=4, prompts=()):
    config = make_config(run_dir, tracker)
    config = replace(config, train=replace(config.train, sample_prompts=prompts, sample_every=2 if prompts else None))
    return Reporter(run_dir, config, rank=rank, world=2, total_steps=total_steps, progress=RunProgress(step=start_step))


def read_metrics(run_dir):
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(entry.pop("time") > 1.7e9 for entry in entries)
    return entries


def items(entries):
    return {"/".join(i.nested_key) if i.nested_key else i.key: json.loads(i.value_json) for i in entries}


def test_each_step_is_one_line_and_an_evaluation_another(tmp_path, capsys):
    with make_reporter(tmp_path) as reporter:
        reporter.evaluation(0, {"eval_loss": 5.0})
        for step in range(1, 5):
            figures = {"lr": 1e-4, "tokens_per_second": 12345.6, "gathered_bytes": 10, "peak_memory_bytes": 1.23e9}
            reporter.log(step, {"loss": 4.0 / step, **figures})
        reporter.event("saved")
        reporter.evaluation(4, {"eval_loss": 3.0})
        reporter.evaluation(4, {"eval_loss": 3.0})
    entries = read_metrics(tmp_path)
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3, 4, 4]
    assert entries[0] == {"step": 0, "eval_loss": 5.0}
    assert entries[2] == {"step": 2, "loss": 2.0, **figures}
    assert entries[5] == {"step": 4, "eval_loss": 3.0}
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "step 0/4 eval_loss 5.0000"
    assert shown[1] == "step 1/4 loss 4.000 lr 1.0e-04 12,346 tok/s mem 1.23 GB"  # the first step ...
    assert shown[2] == "step 4/4 loss 1.000 lr 1.0e-04 12,346 tok/s mem 1.23 GB"  # ... and the last; no flood
    assert shown[3:] == ["saved", "step 4/4 eval_loss 3.0000"]


@pytest.mark.parametrize(
    ("objective", "line"),
    [
        ({"reward": 0.4125, "frac_reward_zero_std": 0.25, "rewards/failed": 0}, "reward 0.412 equal groups 25%"),
        ({"reward": 0.4125, "rewards/failed": 2}, "reward 0.412 failed 2"),
        ({"rewards/margins": 0.31, "rewards/accuracies": 0.7083}, "margin 0.310 accuracy 71%"),
        ({"rewards/margins": -0.2}, "margin -0.200"),
        ({"labels/accuracies": 0.5}, "accuracy 50%"),
        ({"divergence": 1.25}, "divergence 1.250"),
    ],
)
def test_the_line_of_a_step_shows_the_figures_of_its_objective(tmp_path, capsys, objective, line):
    with make_reporter(tmp_path) as reporter:
        reporter.log(1, {"loss": 0.5, **objective, "lr": 1e-4})
    assert capsys.readouterr().out == f"step 1/4 loss 0.500 {line} lr 1.0e-04\n"


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    with make_reporter(tmp_path, rank=1, tracker="wandb") as reporter:
        reporter.log(1, {"loss": 1.0})
        reporter.evaluation(1, {"eval_loss": 1.0})
        reporter.event("text")
        reporter.summary({"eval_loss": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_killed_run_that_resumes_has_each_step_once(tmp_path):
    killed = make_reporter(tmp_path)
    killed.evaluation(0, {"eval_loss": 5.0})
    for step in (1, 2, 3):
        killed.log(step, {"loss": float(step)})
        killed.evaluation(step, {"eval_loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    with make_reporter(tmp_path, start_step=2) as resumed:
        resumed.evaluation(2, {"eval_loss": 2.0})
        resumed.log(3, {"loss": 3.0})
        resumed.log(4, {"loss": 4.0})
    entries = read_metrics(tmp_path)
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [0, 1, 2]
    assert not (tmp_path / "metrics.jsonl.tmp").exists()


def test_figures_wait_for_a_full_disk_and_none_is_lost(tmp_path, capsys):
    with small_disk(tmp_path / "disk", 16) as run_dir, make_reporter(run_dir) as reporter:
        filler = fill(run_dir)
        for step in range(1, 101):
            reporter.log(step, {"loss": 1 / step})
        reporter.samples(100, [("a", "b")])
        assert capsys.readouterr().out.count("figures cannot be written") == 1
        filler.unlink()
        reporter.log(101, {"loss": 0.0})
        assert [entry["step"] for entry in read_metrics(run_dir)] == [*range(1, 102)]
        reporter.close(0)
        assert json.loads((run_dir / "samples.jsonl").read_text()) == {"step": 100, "prompt": "a", "text": "b"}


def test_offline_wandb_holds_config_history_summary_and_exit(tmp_path, no_key, capfd):
    with make_reporter(tmp_path, tracker="wandb") as reporter:
        reporter.evaluation(0, {"eval_loss": 5.0})
        for step in range(1, 5):
            reporter.log(step, {"loss": 4.0 / step})
        reporter.evaluation(4, {"eval_loss": 3.0})
        reporter.summary({"adapter_bytes": 12})
    run_id = (tmp_path / "wandb" / "run_id.txt").read_text().strip()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert folder.name.endswith(run_id)
    shown = capfd.readouterr()
    assert shown.err == ""  # wandb itself says nothing
    assert shown.out.splitlines()[0] == f"wandb: offline; upload with `wandb sync {folder}`"

    records = read_wandb_log(folder)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.project, run.run_group, run.display_name) == (run_id, "project", "group", tmp_path.name)
    assert list(run.tags) == ["a", "b"]
    config = items(run.config.update)
    assert config["world"] == 2
    assert config["adapter"]["r"] == 16
    history = [items(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    assert [(row["_step"], row.get("loss"), row.get("eval_loss")) for row in history] == [
        (0, None, 5.0),
        (1, 4.0, None),
        (2, 2.0, None),
        (3, 4.0 / 3, None),
        (4, 1.0, 3.0),
    ]
    summary: dict = {}
    for record in records:
        summary.update(items(record.summary.update) if record.WhichOneof("record_type") == "summary" else {})
    assert summary["adapter_bytes"] == 12
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [0]


def newest(run_dir):
    """Return the log that a run began last; of two in one second their names do not tell."""
    return max((run_dir / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime_ns)


def test_a_wandb_that_a_signal_ended_costs_no_step_and_no_figure(tmp_path, no_key, capsys):
    """SLURM sends SIGTERM to every process of a step, wandb's own too."""
    with contextlib.suppress(Stopped), make_reporter(tmp_path, tracker="wandb") as reporter:
        reporter.evaluation(0, {"eval_loss": 5.0})
        reporter.log(1, {"loss": 4.0, "grad_norm": float("inf")})
        (service,) = [child for child in psutil.Process().children() if "wandb" in child.name()]
        service.terminate()
        service.wait()
        reporter.log(2, {"loss": 2.0})
        reporter.summary({"adapter_bytes": 12})
        (service,) = [child for child in psutil.Process().children() if "wandb" in child.name()]
        service.terminate()
        service.wait()
        raise Stopped(signal.SIGTERM)
    assert capsys.readouterr().out.count("it is started again") == 2
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [0, 1, 2]
    records = read_wandb_log(newest(tmp_path))
    history = [items(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    assert [(row["_step"], row.get("loss"), row.get("eval_loss")) for row in history] == [
        (0, None, 5.0),
        (1, 4.0, None),
        (2, 2.0, None),
    ]
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [75]


def test_without_wandb_a_run_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with make_reporter(tmp_path, tracker="wandb") as reporter:
        reporter.log(1, {"loss": 1.0})
    assert capsys.readouterr().out.count("wandb is not installed") == 1
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_an_unusable_key_falls_back_to_offline_and_says_why(tmp_path, no_key, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    with make_reporter(tmp_path, tracker="wandb") as reporter:
        reporter.log(1, {"loss": 1.0})
    shown = capsys.readouterr().out
    assert "cannot log online" in shown
    assert "logging offline" in shown
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


def logged(run_dir):
    """(run, config, [(step, loss)], exit codes, artifacts) of the newest log of a run."""
    records = read_wandb_log(newest(run_dir))
    of = {kind: [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind] for kind in KINDS}
    (run,) = of["run"]
    history = [items(row.item) for row in of["history"]]
    losses = [(row["_step"], row["loss"]) for row in history]
    return run, items(run.config.update), losses, [end.exit_code for end in of["exit"]], of["artifact"]


KINDS = ("run", "history", "exit", "artifact")


def test_runs_of_one_process_each_have_their_own_wandb_run(tmp_path, no_key):
    """Trials of a pack: they begin and end when they like, and share wandb's process."""
    runs = [tmp_path / name for name in "abc"]
    for run in runs:
        run.mkdir()
    first, second = (make_reporter(run, tracker="wandb") for run in runs[:2])
    first.log(1, {"loss": 1.0})
    second.log(1, {"loss": 2.0})
    first.close(0)
    third = make_reporter(runs[2], tracker="wandb")
    for step in (2, 3):
        second.log(step, {"loss": 2.0 * step})
        third.log(step, {"loss": 3.0 * step})
    assert sum("wandb" in child.name() for child in psutil.Process().children()) == 1
    third.close(1)
    second.close(75)
    assert not any("wandb" in child.name() for child in psutil.Process().children())
    found = [logged(run) for run in runs]
    assert [losses for _, _, losses, _, _ in found] == [
        [(1, 1.0)],
        [(1, 2.0), (2, 4.0), (3, 6.0)],
        [(2, 6.0), (3, 9.0)],
    ]
    assert [codes for _, _, _, codes, _ in found] == [[0], [75], [1]]
    assert len({run.run_id for run, *_ in found}) == 3


def test_a_run_has_its_plan_and_by_setting_its_result_as_an_artifact(tmp_path, no_key):
    (tmp_path / "plan.json").write_text(json.dumps({"device": {"peak": 7}, "settings": {"name": "named"}}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for uploads in (False, True):
        config = make_config(tmp_path, "wandb")
        config = replace(config, tracker=replace(config.tracker, artifact=uploads))
        with Reporter(tmp_path, config, rank=0, world=1, total_steps=1, progress=RunProgress()) as reporter:
            reporter.log(1, {"loss": 1.0})
            reporter.result(adapter)
        run, settings, _, codes, artifacts = logged(tmp_path)
        assert settings["planned"] == {"device": {"peak": 7}}
        assert codes == [0]
        assert [artifact.name for artifact in artifacts] == ([f"adapter-{run.run_id}"] if uploads else [])
    assert [entry.path for entry in artifacts[0].manifest.contents] == ["adapter_config.json"]


def test_a_run_of_an_agent_is_the_sweeps_and_is_recorded_as_it_is(tmp_path, no_key, monkeypatch):
    """Wandb itself would put the sweep's values over those of the run: `quant: nf4` in place of the section."""
    values = tmp_path / "values.yaml"
    values.write_text("wandb_version: 1\nadapter.r:\n  value: 16\nquant:\n  value: nf4\noptim.eps:\n  value: 5.0\n")
    for name, value in {"SWEEP_ID": "sweep1", "RUN_ID": "run1", "SWEEP_PARAM_PATH": str(values)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_PROJECT", "the-agents")
    with make_reporter(tmp_path, tracker="wandb") as reporter:
        reporter.log(1, {"loss": 1.0})
    run, config, *_ = logged(tmp_path)
    assert (run.run_id, run.sweep_id, run.project) == ("run1", "sweep1", "the-agents")
    assert (config["quant"]["method"], config["adapter"]["r"], config["adapter.r"]) == ("nf4", 16, 16)
    assert config["optim.eps"] == config["optim"]["eps"] == 1e-8
    for name in ("SWEEP_ID", "RUN_ID", "SWEEP_PARAM_PATH", "PROJECT"):
        monkeypatch.delenv(f"WANDB_{name}")
    with make_reporter(tmp_path, tracker="wandb", start_step=1) as reporter:  # `distlora resume`, by hand
        reporter.log(2, {"loss": 1.0})
    run, config, *_ = logged(tmp_path)
    assert (run.run_id, run.sweep_id, run.project, config["adapter.r"]) == ("run1", "sweep1", "the-agents", 16)


def test_samples_survive_a_resume_whatever_characters_they_hold(tmp_path):
    with make_reporter(tmp_path) as reporter:
        for step in (2, 4):
            reporter.samples(step, [("a prompt", "line\u2028separator\x85next\x0cpage\nline")])
    with make_reporter(tmp_path, start_step=2):
        pass
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().strip().split("\n")]
    assert [line["step"] for line in lines] == [2]
