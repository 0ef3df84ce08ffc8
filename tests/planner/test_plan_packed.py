"""A pack of trials is planned as one run: what each trial has k times, what they share once; how many fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distlora.config import Config
from distlora.planner import Machine, Plan, PlannedModel, plan_of
from distlora.planner.suggest import multi_trial_plan
from distlora.planner.workload import Workload
from distlora_launcher.cli import main
from support.plan_inputs import composed, machine_of, model_of

BASE = ("model.path=none", "data.path=none", "data.sequence_length=512", "train.micro_batch=1", "train.global_batch=4")
WITHOUT_COPIES = 2 / 3
"""Share of the adapters' bytes of a run of one trial that are fp32 masters: beside them it has a bf16 copy."""


def together(trials: Sequence[Config], model: PlannedModel, machine: Machine) -> Plan:
    return plan_of(trials[0], model, machine, trials=[Workload.of(trial) for trial in trials])


def plan(*trials: Config, ranks: int = 1, **machine: Any) -> Plan:
    return together(trials, model_of("8b"), machine_of("h100", ranks=ranks, **machine))


def test_one_trial_is_a_run_alone_and_each_of_several_has_its_own_of_what_is_trained() -> None:
    trial = composed(*BASE, "adapter.r=16", "adapter.target_modules=all-linear")
    alone, pack = plan(trial, ranks=2), plan(*[trial] * 4, ranks=2)
    for kind in ("gradients", "optimizer"):
        assert pack.device.held[kind] == 4 * alone.device.held[kind] > 0
    assert pack.device.held["adapters"] == 4 * alone.device.held["adapters"] * WITHOUT_COPIES
    for kind in ("codes", "scales", "embeddings", "norms"):
        assert pack.device.held[kind] == alone.device.held[kind]
    assert pack.device.moments["block"]["kept"] == 4 * alone.device.moments["block"]["kept"]
    assert pack.device.moments["block"]["gathered"] == alone.device.moments["block"]["gathered"]
    assert pack.traffic.gathered == alone.traffic.gathered > 0
    assert pack.traffic.reduced == 4 * alone.traffic.reduced
    assert (pack.disk.run, pack.disk.cache) == (4 * alone.disk.run, alone.disk.cache)
    # As one token goes through one adapter, as many operations a token are counted.
    assert pack.compute.counted == 4 * alone.compute.counted
    assert alone.time.seconds < pack.time.seconds < 4 * alone.time.seconds
    assert pack.config == trial
    assert [each.adapters for each in pack.work.alone()] == [(trial.adapter,)] * 4


@pytest.mark.parametrize(
    ("gpu", "ranks", "length", "rank", "binds"), [("rtx4090", 1, 4096, 8, "kept"), ("a10", 2, 256, 64, "optimizer")]
)
def test_as_many_fit_as_one_more_does_not(gpu: str, ranks: int, length: int, rank: int, binds: str) -> None:
    words = (f"data.sequence_length={length}", f"adapter.r={rank}", "adapter.target_modules=all-linear")
    trial = composed(*BASE[:2], *words)
    machine, model = machine_of(gpu, ranks=ranks), model_of("8b")
    found = multi_trial_plan(plan_of(trial, model, machine), "auto")
    brute = [n for n in range(1, 40) if together([trial] * n, model, machine).fits]
    assert brute == list(range(1, len(brute) + 1)), "what fits is followed by nothing that does not"
    assert found.most == len(brute) > 1
    assert (found.beyond.fits, found.binds) == (False, binds)
    usable = machine.usable_bytes or 0
    assert (
        found.plan.device.total * 1.05
        <= usable
        < together([trial] * (found.trials + 1), model, machine).device.total * 1.05
    )


def test_the_page_says_how_many_fit_and_why_not_more(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    words = ["plan", "model=llama3_8b", "gpu=rtx4090", "train.global_batch=4", "sweep.packed=4"]
    words.append("adapter.target_modules=attention")
    assert main.main(words) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "packed 4 trials share one base: 8.62 GB per GPU, one alone 6.93 GB; a step takes 3." in page
    assert "28 fit; 29 are " in page
    assert "train.micro_batch=1 train.global_batch=4" in page, "as a trial has them"
    assert main.main([*words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["packed"]["most"] == 28
    assert (values["packed"]["trials"], values["trials"], values["settings"]["train"]["micro_batch"]) == (4, 4, 1)
    assert values["packed"]["one_more"]["total"] > values["machine"]["usable_bytes"]
