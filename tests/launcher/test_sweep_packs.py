"""Test a worker that trains several trials at once, with a fake multi-trial process (fake_pack.py)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distlora.config import SweepConfig, UserError
from distlora.config.file import load_config
from distlora.run_folder.layout import PLAN_NAME
from distlora.run_folder.sweep import COMPLETE, FAILED, PRUNED, SAVED
from distlora.system.stop_signals import Forwarder
from distlora.training.multi_trial import protocol
from distlora_launcher.launch.lock import holders, worker_place
from distlora_launcher.studies import alone, multi_trial
from distlora_launcher.studies.multi_trial import Together
from distlora_launcher.studies.placement import PlacedTrial, TrialOutcome
from distlora_launcher.studies.sources import make_source
from distlora_launcher.studies.sweep import Dimension, Sweep, Values, make_sweep
from distlora_launcher.studies.table import TrialTable
from distlora_launcher.studies.worker import Study
from support.launcher_fakes import write_data, write_model

RATES = Values("optim.lr", (1e-4, 2e-4, 3e-4, 4e-4, 5e-4))
Make = Callable[..., Sweep]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a maker of sweeps with fake multi-trial processes and prepared data."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    monkeypatch.setattr(multi_trial, "MODULE", "support.fake_pack")
    monkeypatch.setattr(alone, "RELEASE_SECONDS", 0.5)
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.jsonl")
    words = ("model.path=model", "data.path=data.jsonl", "data.sequence_length=64", "data.eval_fraction=0.5")

    def made(*space: Dimension, fake: dict[str, Any] | None = None, **settings: Any) -> Sweep:
        monkeypatch.setenv("FAKE_PACK", json.dumps(fake or {}))
        sweep = Sweep(
            folder=tmp_path / "sweep",
            settings=SweepConfig(**{"packed": 2, **settings}),
            overrides=(*words, "train.eval_every=2", "train.max_steps=4", "tracker=none"),
            space=space,
            config_dir=None,
            cwd=str(tmp_path),
        )
        make_sweep(sweep)
        for number in range(8):
            sweep.run_dir(number).mkdir(parents=True)
            (sweep.run_dir(number) / "data.json").write_text(json.dumps({"cache": str(tmp_path)}))
        return sweep

    return made


def work(sweep: Sweep) -> TrialTable:
    """Run one worker to its end."""
    table = TrialTable(sweep, make_source(sweep))
    with worker_place(sweep.folder, "worker_0"):
        Study(sweep, table, Together(sweep, 0, Forwarder())).work(Forwarder())
    return table


def asked(sweep: Sweep, number: int, **values: Any) -> PlacedTrial:
    named = {name.replace("__", "."): value for name, value in values.items()}
    words = tuple(sweep.trial_overrides(number, named))
    return PlacedTrial(number=number, values=named, overrides=words, run_dir=sweep.run_dir(number), begun=False)


def until(runner: Together, number: int) -> list[TrialOutcome]:
    """Return the first `number` outcomes."""
    found: list[TrialOutcome] = []
    deadline = time.monotonic() + 60
    while len(found) < number:
        assert time.monotonic() < deadline, found
        found += runner.poll()
        time.sleep(0.02)
    return found


def starts(sweep: Sweep, pack: str = "0") -> list[int]:
    """Return the slots of each start of the process."""
    return [int(line) for line in (sweep.folder / "packs" / pack / "starts.txt").read_text().split()]


def test_a_grid_goes_through_one_process_whose_slots_are_reused(make: Make) -> None:
    sweep = make(RATES, fake={"fails": [1]})
    records = work(sweep).records()
    assert [record.state for record in records] == [COMPLETE, FAILED, COMPLETE, COMPLETE, COMPLETE]
    assert records[1].reason == "step 1: the loss is not finite"
    assert [record.value for record in records if record.state == COMPLETE] == [0.25] * 4
    assert (records[0].step, records[0].seconds) == (4, 0.5)
    assert starts(sweep) == [2]
    plan = json.loads((sweep.run_dir(3) / PLAN_NAME).read_text())
    assert plan["trials"] == 2, "the plan of all trials together"
    assert plan == json.loads((sweep.folder / "packs" / "0" / PLAN_NAME).read_text())
    assert load_config(sweep.run_dir(3)).optim.lr == 4e-4
    assert not holders(sweep.run_dir(3))


@pytest.mark.ci
def test_the_process_waits_for_the_pruner(make: Make) -> None:
    losses = {"0": 1.0, "1": 1.0, "2": 9.0, "3": 1.0, "4": 9.0}
    sweep = make(RATES, fake={"losses": losses}, pruner="median", trials=5)
    records = work(sweep).records()
    assert [record.state for record in records] == [COMPLETE, COMPLETE, PRUNED, COMPLETE, PRUNED]
    assert (records[2].step, dict(records[2].evaluations)) == (2, {2: 4.5})


@pytest.mark.ci
def test_trials_that_cannot_be_trained_together_get_one_process_after_the_other(make: Make) -> None:
    sweep = make(Values("data.sequence_length", (32, 64)), Values("optim.lr", (1e-4, 2e-4)))
    records = work(sweep).records()
    assert [record.state for record in records] == [COMPLETE] * 4
    lengths = [load_config(sweep.folder / "packs" / name).data.sequence_length for name in ("0", "0_1")]
    assert lengths == [32, 64]
    assert sorted(path.name for path in (sweep.folder / "packs" / "0_1" / "inbox").iterdir()) == [
        "0002.json",
        "0003.json",
    ]


def test_a_process_that_dies_restarts_with_half_and_a_trial_that_dies_alone_fails(make: Make) -> None:
    sweep = make(RATES, fake={"most": 2, "kills": [3]}, packed=4)
    records = work(sweep).records()
    assert [record.state for record in records] == [COMPLETE, COMPLETE, COMPLETE, FAILED, COMPLETE]
    assert records[3].reason == "out of memory"
    first, *later = starts(sweep)
    assert first == 4
    assert later[0] in (1, 2), "half of the trials in it: some may have ended before the last one came"
    assert 1 in later


def test_a_stop_saves_every_trial_and_the_next_worker_starts_a_clean_process(make: Make) -> None:
    sweep = make(RATES, fake={"hangs": True})
    runner = Together(sweep, 0, Forwarder())
    for number in range(2):
        runner.begin(asked(sweep, number, optim__lr=1e-4 * (number + 1)))
    deadline = time.monotonic() + 60
    while not all((sweep.run_dir(number) / "metrics.jsonl").exists() for number in range(2)):
        assert time.monotonic() < deadline
        assert runner.poll() == []
        time.sleep(0.02)
    with pytest.raises(UserError, match="is already running on this node"):
        Together(sweep, 1, Forwarder()).begin(asked(sweep, 0, optim__lr=1e-4))
    runner.stop()
    assert {(each.number, each.state) for each in until(runner, 2)} == {(0, SAVED), (1, SAVED)}
    again = Together(sweep, 0, Forwarder())
    again.begin(asked(sweep, 1, optim__lr=2e-4))
    until_put = again.poll()
    assert until_put == []
    inbox = sweep.folder / "packs" / "0" / protocol.INBOX
    assert [path.name for path in inbox.iterdir()] == ["0001.json"], "trial 0 may be another worker's by now"
    again.stop()
    until(again, 1)
