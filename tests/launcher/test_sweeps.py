"""Test sweeps: which worker gets which trial, the records, and what continues after a kill.

Trials are fake (sweep_fake_trial.py), except in the tests of real runs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distlora.config import UserError
from distlora.config.sweep import SweepConfig
from distlora.run_folder.sweep import COMPLETE, FAILED, PRUNED, RUNNING, WAITING, read_results
from distlora.system.stop_signals import Forwarder
from distlora_launcher.cli.main import main
from distlora_launcher.launch.lock import holders, lock_run, worker_place
from distlora_launcher.studies import alone, start
from distlora_launcher.studies.alone import Alone
from distlora_launcher.studies.optuna_draws import importance, judge
from distlora_launcher.studies.placement import PlacedTrial, TrialOutcome
from distlora_launcher.studies.sources import NextAction, make_source
from distlora_launcher.studies.start import parse_sweep
from distlora_launcher.studies.sweep import Dimension, Interval, Sweep, Values, load_sweep, make_sweep
from distlora_launcher.studies.table import TrialTable
from distlora_launcher.studies.worker import Study
from support.launcher_fakes import wait_until

HERE = Path(__file__).parents[1]
RATES = Values("optim.lr", (1e-3, 1e-2))
RANKS = Values("adapter.r", (8, 16))


def sweep_at(folder: Path, *space: Dimension, overrides: tuple[str, ...] = (), **settings: Any) -> Sweep:
    """Return a sweep whose folder is made."""
    sweep = Sweep(
        folder=folder,
        settings=SweepConfig(**settings),
        overrides=overrides,
        space=space or (RATES, RANKS),
        config_dir=None,
        cwd=str(folder.parent),
    )
    make_sweep(sweep)
    return sweep


def table_of(sweep: Sweep) -> TrialTable:
    """Return the table as another worker opens it."""
    return TrialTable(sweep, make_source(sweep))


def asked(table: TrialTable) -> PlacedTrial:
    trial = table.ask()
    assert isinstance(trial, PlacedTrial)
    return trial


def complete(table: TrialTable, trial: PlacedTrial, value: float) -> None:
    table.tell(TrialOutcome(number=trial.number, state=COMPLETE, seconds=1.0, step=3), value, {})


@pytest.fixture
def fake_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "MODULE", "support.sweep_fake_trial")
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)


def test_a_sweep_is_read_as_it_was_written(tmp_path: Path):
    sweep = sweep_at(tmp_path / "s", RATES, Interval("optim.eps", 1e-9, 1e-6, log=True), overrides=("a=b",), trials=3)
    assert load_sweep(tmp_path / "s") == sweep
    with pytest.raises(UserError, match="already holds a sweep"):
        make_sweep(sweep)


def test_workers_share_the_cells_of_a_grid_in_their_order(tmp_path: Path):
    sweep = sweep_at(tmp_path / "s")
    first, second = table_of(sweep), table_of(sweep)
    with worker_place(sweep.folder, "worker_0"):
        trials = [asked(table) for table in (first, second, first, second)]
        assert [first.ask(), second.ask()] == [NextAction.END, NextAction.END]
    assert [trial.values for trial in trials] == [
        {"optim.lr": 1e-3, "adapter.r": 8},
        {"optim.lr": 1e-3, "adapter.r": 16},
        {"optim.lr": 1e-2, "adapter.r": 8},
        {"optim.lr": 1e-2, "adapter.r": 16},
    ]
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert trials[2].overrides[-3:] == ("optim.lr=0.01", "adapter.r=8", f"run_dir={sweep.folder / 'trials/0002'}")


def test_optuna_tries_no_combination_of_a_finite_space_twice(tmp_path: Path):
    sweep = sweep_at(tmp_path / "s", RATES, RANKS, Values("train.seed", (0, 1)), method="optuna", trials=20)
    table, seen = table_of(sweep), []
    while not table.is_over():
        trial = asked(table)
        seen.append(trial.values)
        complete(table, trial, 1.0 + (trial.values["optim.lr"] != 1e-3))
    assert len(seen) == 8
    assert all(values not in seen[:number] for number, values in enumerate(seen))


def test_a_trial_whose_worker_is_gone_is_taken_over_and_one_that_is_trained_is_not(tmp_path: Path):
    sweep = sweep_at(tmp_path / "s")
    with worker_place(sweep.folder, "worker_0"):
        trial = asked(table_of(sweep))
        assert not trial.begun
        assert asked(table_of(sweep)).number == 1
    taken = asked(table_of(sweep))
    assert taken == dataclasses.replace(trial, begun=True)


@pytest.mark.parametrize("damage", [b"}{", b'{"trials": [{"number": 0}]}', b"\xff\xfe"])
def test_a_damaged_record_is_refused_by_name(tmp_path: Path, damage: bytes):
    sweep = sweep_at(tmp_path / "s")
    table_of(sweep).enqueue()
    (sweep.folder / "results.json").write_bytes(damage)
    with pytest.raises(UserError, match=r"results.json is damaged"):
        table_of(sweep).ask()


def test_a_sweep_of_an_earlier_version_goes_on(tmp_path: Path):
    """Its states were kept in Optuna's journal; results.json has the same, but for the worker of a trial."""
    sweep = sweep_at(tmp_path / "s")
    trials = [
        {"number": 0, "state": COMPLETE, "values": {"optim.lr": 1e-3, "adapter.r": 8}, "value": 2.5, "step": 3},
        {"number": 1, "state": RUNNING, "values": {"optim.lr": 1e-3, "adapter.r": 16}, "evaluations": {"1": 2.0}},
    ]
    (sweep.folder / "results.json").write_text(json.dumps({"trials": trials}))
    (sweep.folder / "journal.log").write_text("of another mechanism")
    with worker_place(sweep.folder, "worker_0"):
        begun, new = (asked(TrialTable(sweep, make_source(sweep), place="worker_0")) for _ in range(2))
    assert (begun.number, begun.begun, new.number, new.begun) == (1, True, 2, False)


def test_a_trial_that_somebody_goes_on_with_by_hand_is_left_to_him(tmp_path: Path):
    sweep = sweep_at(tmp_path / "s", Values("optim.lr", (1e-3, 1e-2)))
    trial = asked(TrialTable(sweep, make_source(sweep), place="worker_9"))
    trial.run_dir.mkdir(parents=True)
    (trial.run_dir / "config.yaml").write_text("")
    table = TrialTable(sweep, make_source(sweep), place="worker_0")
    with worker_place(sweep.folder, "worker_0"):
        with lock_run(trial.run_dir):
            assert asked(table).number == 1
            assert table.ask() is NextAction.WAIT
        assert asked(table).number == 0


@pytest.mark.usefixtures("fake_trials")
def test_a_machine_on_which_nothing_starts_does_not_use_up_the_trials(tmp_path: Path):
    sweep = sweep_at(tmp_path / "s", Values("train.seed", tuple(range(4))))
    let_go(sweep)
    (tmp_path / "broken_machine").touch()
    assert work(sweep) == 1
    states = [trial.state for trial in read_results(sweep.folder)]
    assert states == [FAILED, FAILED, RUNNING, WAITING]
    (tmp_path / "broken_machine").unlink()
    assert work(sweep) == 0
    assert [trial.state for trial in read_results(sweep.folder)] == [FAILED, FAILED, *[COMPLETE] * 2]


@pytest.mark.ci
@pytest.mark.parametrize("cancels", [True, False])
def test_a_trial_that_is_cancelled_alone_is_pruned_and_one_whose_machine_is_taken_away_goes_on(
    tmp_path: Path, cancels: bool
):
    sweep = sweep_at(tmp_path / "s", Values("name", ("waits", "fine")))
    worker = start_worker(sweep)
    run_dir = sweep.run_dir(0)
    wait_until(lambda: (run_dir / "metrics.jsonl").is_file() and "2," in (run_dir / "metrics.jsonl").read_text())
    if cancels:
        (run_dir / "cancelled").touch()  # As `distlora cancel` does before its signal.
    (pid,) = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    os.kill(int(pid), signal.SIGTERM)
    assert worker.wait(60) == (0 if cancels else 75)
    first, second = read_results(sweep.folder)
    assert (first.state, second.state) == ((PRUNED, COMPLETE) if cancels else (RUNNING, WAITING))
    assert first.reason == ("it was cancelled (`distlora cancel`)" if cancels else None)


def test_cancel_marks_a_trial_of_a_sweep_and_refuses_one_of_a_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sweep = sweep_at(tmp_path / "s")
    run_dir = sweep.run_dir(0)
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("")
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with lock_run(run_dir):
            assert main(["cancel", str(run_dir)]) == 0
            assert (run_dir / "cancelled").exists()
            (run_dir / "cancelled").unlink()
            with worker_place(sweep.folder, "worker_0"):
                assert main(["cancel", str(run_dir)]) == 2
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert "is trained in a pack with other trials" in capsys.readouterr().err
    assert not (run_dir / "cancelled").exists()


def let_go(sweep: Sweep) -> None:
    """Let no trial wait between its steps from now on."""
    go = sweep.run_dir(0).parent / "go"
    go.parent.mkdir(exist_ok=True)
    go.touch()


def work(sweep: Sweep) -> int:
    with worker_place(sweep.folder, "worker_0"):
        table = table_of(sweep)
        table.enqueue()
        return Study(sweep, table, Alone(sweep)).work(Forwarder())


@pytest.mark.usefixtures("fake_trials")
def test_trials_that_fail_are_recorded_with_their_reason_and_the_others_run(tmp_path: Path):
    names = ("fine", "takes_too_much", "diverges", "refused", "is_killed", "diverges_at_the_end", "again")
    sweep = sweep_at(tmp_path / "s", Values("name", names))
    let_go(sweep)
    assert work(sweep) == 0
    trials = {str(trial.values["name"]): trial for trial in read_results(sweep.folder)}
    assert {name: trial.state for name, trial in trials.items()} == {
        "fine": COMPLETE,
        "takes_too_much": FAILED,
        "diverges": FAILED,
        "refused": FAILED,
        "is_killed": FAILED,
        "diverges_at_the_end": FAILED,
        "again": COMPLETE,
    }
    fine = trials["fine"]
    assert fine.value == 1.0
    assert fine.evaluations == pytest.approx({1: 1.3, 2: 1.2, 3: 1.1, 4: 1.0})
    assert (fine.step, fine.trainable_parameters, fine.peak_memory_bytes) == (4, 12, 34)
    assert "the loss is nan in step 2" in str(trials["diverges"].reason)
    assert "CUDA out of memory" in str(trials["takes_too_much"].reason)
    assert trials["refused"].reason == "adapter.r=0 is not a valid rank; set adapter.r=1"
    assert trials["is_killed"].reason == "its launcher was killed by SIGKILL"
    assert trials["diverges_at_the_end"].reason == "its last eval_loss is not finite"
    assert trials["diverges_at_the_end"].value is None


@pytest.mark.usefixtures("fake_trials")
def test_a_sweep_without_a_complete_trial_is_not_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sweep = sweep_at(tmp_path / "s", Values("name", ("refused", "diverges")))
    assert work(sweep) == 0
    capsys.readouterr()
    assert main(["status", str(sweep.folder), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["best"], status["next"]) == ("failed", None, f"distlora report {sweep.folder}")
    assert main(["status", str(sweep.folder)]) == 0
    says = "has ended, and no trial of it was trained to its end"
    assert says in capsys.readouterr().out
    assert main(["report", str(sweep.folder)]) == 0
    assert says in (sweep.folder / "report.html").read_text()


@pytest.mark.usefixtures("fake_trials")
def test_a_trial_that_falls_behind_is_pruned_and_one_that_leads_is_not(tmp_path: Path):
    sweep = sweep_at(tmp_path / "s", Values("optim.lr", (1e-3, 1e-1, 2e-3)), pruner="median", pruner_warmup=1, trials=3)
    assert work(sweep) == 0
    good, bad, second = read_results(sweep.folder)
    assert (good.state, bad.state) == (COMPLETE, PRUNED)
    assert bad.step is not None
    assert bad.step < 4
    assert second.state == PRUNED  # Behind the median of one.


def paths(*folders: Path) -> str:
    """Return PYTHONPATH with these folders first."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def start_worker(sweep: Sweep) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from pathlib import Path; from distlora_launcher.studies import alone, worker; "
        "alone.MODULE = 'support.sweep_fake_trial'; sys.exit(worker.run(Path(sys.argv[1]), 0))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(sweep.folder)], env=os.environ | {"PYTHONPATH": paths(HERE)}
    )


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGTERM, marks=pytest.mark.ci), signal.SIGKILL])
def test_a_worker_that_ends_leaves_its_trial_to_go_on_with(
    tmp_path: Path, signum: signal.Signals, capsys: pytest.CaptureFixture[str]
):
    sweep = sweep_at(tmp_path / "s", Values("name", ("waits", "fine")))
    run_dir = sweep.run_dir(0)
    worker = start_worker(sweep)
    wait_until(lambda: (run_dir / "metrics.jsonl").is_file() and "2," in (run_dir / "metrics.jsonl").read_text())
    assert [process.pid for process in holders(sweep.folder)] == [worker.pid]
    assert main(["status", str(sweep.folder)]) == 0
    assert f"(pid {worker.pid})" in capsys.readouterr().out
    assert main(["resume", str(sweep.folder)]) == 2
    worker.send_signal(signum)
    assert worker.wait(60) == (75 if signum == signal.SIGTERM else -signal.SIGKILL)
    assert [trial.state for trial in read_results(sweep.folder)] == [RUNNING, WAITING]
    assert main(["status", str(sweep.folder), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["state"] == "stopped"
    assert [trial["state"] for trial in status["trials"]] == ["saved", "waiting"]
    assert status["next"].startswith("distlora resume ")

    assert start_worker(sweep).wait(60) == 0
    first, second = read_results(sweep.folder)
    assert (first.state, second.state) == (COMPLETE, COMPLETE)
    assert (run_dir / "starts").read_text().split() == ["train", "resume"]
    # What it measured before its end is not measured again.
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]
    assert (sweep.folder / "results.md").read_text().count("complete") >= 2


def start_sweep(sweep: Sweep, tmp_path: Path) -> subprocess.Popen[bytes]:
    """Start the workers of a sweep as `distlora sweep` does."""
    (tmp_path / "sitecustomize.py").write_text(
        "from distlora_launcher.studies import alone\nalone.MODULE = 'support.sweep_fake_trial'\n"
    )
    code = (
        "import sys; from pathlib import Path; "
        "from distlora_launcher.studies import start, sweep; here = sweep.load_sweep(Path(sys.argv[1])); "
        "sys.exit(start.run_workers_here(here, 1))"
    )
    environment = os.environ | {"PYTHONPATH": paths(HERE, tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "-c", code, str(sweep.folder)], env=environment, start_new_session=True)


@pytest.mark.ci
def test_workers_of_a_sweep_end_together_and_continue_their_trials(tmp_path: Path):
    sweep = sweep_at(tmp_path / "s", RATES, Values("train.seed", (0, 1)), overrides=("name=waits",), workers=2)
    run_dirs = [sweep.run_dir(number) for number in range(4)]
    command = start_sweep(sweep, tmp_path)
    wait_until(lambda: all((run_dir / "starts").is_file() for run_dir in run_dirs[:2]))
    command.kill()
    assert command.wait(60) == -signal.SIGKILL
    wait_until(lambda: not holders(sweep.folder))
    assert [trial.state for trial in read_results(sweep.folder)] == [RUNNING, RUNNING, WAITING, WAITING]
    let_go(sweep)
    assert start_sweep(sweep, tmp_path).wait(60) == 0
    assert [trial.state for trial in read_results(sweep.folder)] == [COMPLETE] * 4
    assert [(run_dir / "starts").read_text().split() for run_dir in run_dirs] == [
        *[["train", "resume"]] * 2,
        *[["train"]] * 2,
    ]


def test_trials_are_told_apart_in_wandb_and_belong_to_no_agent(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    paths = [f"model.path={folders / 'llama'}", f"data.path={folders / 'text.jsonl'}", f"run_dir={tmp_path / 's 1'}"]
    sweep, _ = parse_sweep([*paths, "name=try", "optim.lr=1e-4,2e-4", "tracker.tags=[a]"])
    config = sweep.compose(3, {"optim.lr": 2e-4}).config
    assert (config.name, config.tracker.group, config.tracker.tags) == ("try-0003", "s 1", ("a",))
    assert config.run_dir == str(tmp_path / "s 1" / "trials" / "0003")
    sweep, _ = parse_sweep([*paths, "tracker.group=mine", "name=a,b"])
    config = sweep.compose(0, {"name": "b"}).config
    assert (config.name, config.tracker.group) == ("b", "mine")
    sweep, _ = parse_sweep([*paths, "optim.lr=1e-4,2e-4", "tracker=none"])
    assert sweep.compose(0, {}).config.tracker.group is None
    sweep, _ = parse_sweep([*paths, "adapter.r=4,64", "sweep=optuna", "sweep.trials=2", "train.epochs=2"])
    assert {"optim.lr=0.0002", "train.evals_per_epoch=3"} <= set(sweep.overrides), "alike for every rank; not auto"
    sweep, _ = parse_sweep([*paths, "adapter=lora,dora", "sweep.pruner=median", "train.max_steps=20"])
    assert [word for word in sweep.overrides if "optim" in word or "eval" in word] == ["train.eval_every=4"]
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-agent")
    assert "WANDB_RUN_ID" not in alone.environment()


def test_workers_get_equal_shares_of_the_cards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,2")
    assert start.visible_devices(2, 2) == ["4,5", "6,7"]
    with pytest.raises(UserError, match=r"need 6 GPUs, and this node has 5; set sweep.workers=2"):
        start.visible_devices(3, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert start.visible_devices(2, 1) == [None, None]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optim.lr=1e-4"], "sweep=grid has nothing to search"),
        (
            ["cluster=torchrun", "cluster.nodes=2", "cluster.rdzv_endpoint=localhost:29500", "optim.lr=1,2"],
            "would not keep trials in step",
        ),
        (["sweep.sampler=gp", "optim.lr=1,2"], "sweep.sampler=gp is a setting of sweep=optuna"),
        (["sweep.seed=3", "optim.lr=1,2"], "sweep.seed has no effect with sweep=grid"),
        (["sweep=grid,random", "optim.lr=1,2"], "a sweep has one value of it"),
        (["-m", "optim.lr=1,2"], "distlora sweep runs several without it"),
        (["data.sequence_length=64", "adapter.r=8,0"], "adapter.r=0 is not a valid rank"),
        (["optim.lr=1e-4,2e-4", "data.eval_fraction=0"], "needs held-out documents"),
    ],
)
def test_what_cannot_be_a_sweep_is_refused_before_anything_is_made(
    words: list[str], expected: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    paths = [f"model.path={folders / 'llama'}", f"data.path={folders / 'text.jsonl'}", f"run_dir={tmp_path / 's'}"]
    assert main(["sweep", *paths, *words]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def sweep_command(folders: Path, folder: Path, cache: Path, *words: str) -> list[str]:
    """Return the command of a sweep with short runs of a small model."""
    words = (
        f"model.path={folders / 'llama'}",
        f"data.path={folders / 'text.jsonl'}",
        f"run_dir={folder}",
        "data.sequence_length=64",
        "data.eval_fraction=0.1",
        f"data.cache_dir={cache}",
        "train.global_batch=4",
        "train.dtype=fp32",
        "quant.cache=false",
        "plan.measure=false",
        "tracker=none",
        *words,
    )
    return [sys.executable, "-m", "distlora_launcher.cli.main", "sweep", *words]


@pytest.mark.ci
def test_a_grid_of_real_runs_with_one_that_diverges(folders: Path, tmp_path: Path):
    folder = tmp_path / "s"
    command = sweep_command(folders, folder, tmp_path / "cache", "optim.lr=1e-3,1e30", "train.max_steps=3")
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert finished.returncode == 0, finished.stderr
    good, bad = read_results(folder)
    assert (good.state, bad.state) == (COMPLETE, FAILED)
    assert "finite" in str(bad.reason)
    summary = json.loads((good.folder(folder) / "summary.json").read_text())
    assert good.value == summary["eval_loss"]
    assert good.trainable_parameters == summary["trainable_parameters"]
    assert f"best: trial 0, {folder / 'trials/0000'}" in finished.stdout
    assert (good.folder(folder) / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_grid_of_real_runs_packed_has_the_losses_of_the_same_grid_one_after_the_other(folders: Path, tmp_path: Path):
    words = ("optim.lr=1e-3,2e-3", "adapter.r=4,8", "train.max_steps=4")
    found = {}
    for name, packed in (("alone", "1"), ("packed", "4")):
        command = sweep_command(folders, tmp_path / name, tmp_path / "cache", *words, f"sweep.packed={packed}")
        assert subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == 0
        found[name] = read_results(tmp_path / name)
    alone, packed_ones = found["alone"], found["packed"]
    assert [trial.values for trial in packed_ones] == [trial.values for trial in alone]
    assert [trial.value for trial in packed_ones] == pytest.approx([trial.value for trial in alone], rel=1e-6)
    assert len({trial.value for trial in alone}) == 4


@pytest.mark.parametrize(("method", "pruner"), [("random", "none"), ("tpe", "median"), ("cmaes", "hyperband")], ids=str)
def test_optuna_draws_by_the_records_alone(tmp_path: Path, method: str, pruner: str):
    """Several workers and new processes draw what one does; another seed draws something else."""
    if method == "cmaes":
        pytest.importorskip("cmaes")
    space = (Interval("optim.lr", 1e-6, 1.0, log=True), Interval("optim.eps", 1e-9, 1e-7))
    settings = {"method": "random"} if method == "random" else {"method": "optuna", "sampler": method}
    drawn = []
    for name, restarts, seed in (("whole", False, 7), ("restarted", True, 7), ("other", False, 8)):
        sweep = sweep_at(tmp_path / name, *space, trials=10, pruner=pruner, seed=seed, **settings)
        table = table_of(sweep)
        for _ in range(10):
            table = table_of(sweep) if restarts else table
            trial = asked(table)
            loss = abs(math.log10(trial.values["optim.lr"]) + 3)
            table.report(trial.number, 1, loss)
            complete(table, trial, loss)
        assert table.ask() is NextAction.END
        drawn.append([dict(trial.values) for trial in table.records()])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0]
    assert len({values["optim.lr"] for values in drawn[0]}) == 10
    shares = importance(sweep.settings, space, table.records())
    assert shares["optim.lr"] > shares["optim.eps"]


def test_hyperband_ends_most_trials_of_which_each_is_worse_than_those_before(tmp_path: Path):
    """What it keeps of a trial is in the records: each call is by another process."""
    space = (Interval("optim.lr", 1e-6, 1.0, log=True),)
    sweep = sweep_at(tmp_path / "s", *space, method="random", pruner="hyperband", trials=30)
    states = []
    for number in range(30):
        asked(table_of(sweep))
        for step in (1, 3, 9, 27):
            table_of(sweep).report(number, step, 1.0 + number)
            if ends := table_of(sweep).judge(number, functools.partial(judge, sweep.settings, space)):
                break
        states.append(PRUNED if ends else COMPLETE)
        table_of(sweep).tell(TrialOutcome(number=number, state=states[-1], seconds=1.0, step=step), 1.0 + number, {})
    assert states[0] == COMPLETE
    assert states.count(PRUNED) > 15
