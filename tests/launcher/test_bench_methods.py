"""`distlora bench methods`: its grid composes, its search ends, its check can fail, and it goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distlora.run_folder import error_file
from distlora.run_folder.layout import read_record
from distlora.training.trial import NonFiniteError
from distlora_launcher.cli.bench import methods
from distlora_launcher.cli.bench.methods import (
    METHODS,
    BaseDiffersError,
    Planned,
    Setup,
    best_rate,
    check_base,
    figures,
    next_rate,
    next_round,
    reading,
    table,
)
from distlora_launcher.cli.main import main
from support.small_models import write_model_folder

BY_NAME = {method.name: method for method in METHODS}
SETUP = Setup(model="base/model", data="base/pairs.jsonl", eval_data=None, steps=4, ranks=1, seeds=3, search=True)


def chat(number: int) -> dict[str, Any]:
    turns = [("user", f"What is {number}?"), ("assistant", f"The number {number}, after {number - 1}.")]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Create a small model and its data."""
    write_model_folder(tmp_path / "base" / "model", "llama")
    for name, numbers in (("pairs", range(40)), ("held_out", range(40, 50))):
        lines = [json.dumps(chat(number)) + "\n" for number in numbers]
        (tmp_path / "base" / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("valley", "tried", "best"),
    [
        (4e-3, [2e-3, 4e-3, 8e-3], 4e-3),
        (9e-3, [2e-3, 4e-3, 8e-3, 16e-3], 8e-3),
        (1.1e-3, [1e-3, 2e-3, 4e-3, 8e-3, 0.5e-3], 1e-3),
        (1.0, [2e-3, 4e-3, 8e-3, 16e-3, 32e-3], 32e-3),
    ],
)
def test_a_search_ends_with_the_best_rate_between_two_others_or_after_five(
    valley: float, tried: list[float], best: float
) -> None:
    method = BY_NAME["rsLoRA r=16"]
    losses: dict[Planned, float] = {}
    while (rate := next_rate(method, losses)) is not None:
        losses[Planned(method, rate, 0)] = abs(rate - valley)
    assert sorted(run.rate for run in losses) == pytest.approx(sorted(tried))
    assert best_rate(method, losses) == pytest.approx(best)


def test_a_rate_that_diverges_is_worse_than_all_others_and_has_no_seeds() -> None:
    method = BY_NAME["full"]
    losses = {Planned(method, rate, 0): loss for rate, loss in ((5e-4, 4.3), (1e-3, math.inf), (2.5e-4, 4.4))}
    assert (next_rate(method, losses), best_rate(method, losses)) == (None, 5e-4)
    everywhere = dict.fromkeys(losses, math.inf)
    assert next_rate(method, everywhere) == 1.25e-4
    everywhere |= {Planned(method, rate, 0): math.inf for rate in (1.25e-4, 0.625e-4)}
    assert (next_rate(method, everywhere), best_rate(method, everywhere)) == (None, None)
    assert next_round(SETUP, everywhere, [method]) == []


def test_rounds_hold_back_methods_that_are_ahead_and_end_with_seeds_at_the_best_rate() -> None:
    two = METHODS[:2]
    losses: dict[Planned, float] = {Planned(two[0], two[0].rate, 0): 1.0}
    assert next_round(SETUP, losses, two) == [Planned(two[1], two[1].rate, 0)]
    rounds = 0
    while due := next_round(SETUP, losses, two):
        rounds += 1
        losses |= {planned: 1.0 + abs(planned.rate - planned.method.rate) for planned in due}
    assert rounds == 1 + 2 + 2
    for method in two:
        assert {(run.rate, run.seed) for run in losses if run.method == method and run.seed} == {
            (method.rate, 1),
            (method.rate, 2),
        }
    quick = dataclasses.replace(SETUP, seeds=1, search=False)
    assert next_round(quick, {}, two) == [Planned(method, method.rate, 0) for method in two]
    assert next_round(quick, {Planned(method, method.rate, 0): 1.0 for method in two}, two) == []


def summary(**values: float) -> dict[str, float]:
    return {
        "base_eval_loss": 5.0,
        "eval_loss": 4.5,
        "trainable_parameters": 1000,
        "peak_memory_bytes": 600 * 2**20,
        "train_seconds": 20.0,
        "gathered_bytes_per_step": 2**20,
        "reduced_bytes_per_step": 4000,
    } | values


def all_runs() -> dict[Planned, dict[str, float]]:
    """One run of each method, two seeds of the middle one."""
    runs = {Planned(method, method.rate, 0): summary() for method in METHODS}
    runs[Planned(BY_NAME["QLoRA r=16"], 4e-3, 0)] = summary(base_eval_loss=5.02, bits_per_parameter=4.127)
    runs[Planned(METHODS[0], METHODS[0].rate, 0)] = summary(eval_loss=4.3)
    runs[Planned(BY_NAME["rsLoRA r=16"], 4e-3, 1)] = summary(eval_loss=4.6)
    return runs


def test_a_run_that_starts_from_another_loss_is_named() -> None:
    runs = all_runs()
    assert check_base(runs) == {"unquantized": 5.0, "nf4": 5.02}
    for name, loss in (("DoRA r=16", 5.0001), ("full", 5.00002), ("rsLoRA r=64", 4.9)):
        wrong = Planned(BY_NAME[name], BY_NAME[name].rate, 0)
        with pytest.raises(BaseDiffersError, match=name.replace(" ", "-").replace("=", "")):
            check_base(runs | {wrong: summary(base_eval_loss=loss)})
    other_seed = Planned(BY_NAME["QLoRA r=16"], 4e-3, 1)
    with pytest.raises(BaseDiffersError, match="nf4 base"):
        check_base(runs | {other_seed: summary(base_eval_loss=5.0, bits_per_parameter=4.127)})


def test_the_table_holds_what_the_runs_say() -> None:
    rows = figures(all_runs(), base_weights=10_000, quantizable=6_000)
    assert [row["method"] for row in rows] == [method.name for method in METHODS]
    middle = next(row for row in rows if row["method"] == "rsLoRA r=16")
    assert middle["eval_loss"] == pytest.approx(4.55)
    assert middle["spread"] == pytest.approx(0.1 / 2**0.5)
    assert middle["state_bytes"] == 2 * 10_000 + 16 * 1000
    text = table(rows, "heading").markdown()
    assert "| rsLoRA r=16 | 1,000 | 4.550 ± 0.071 | 0.450 | 0.004* |" in text
    sentences = list(reading(rows))
    assert "training everything in place of rsLoRA r=16: -0.250 nats (one seed)" in sentences


def diverges(planned: Planned) -> bool:
    """Return whether the fake run diverges: the double of a best rate, and one seed."""
    return (planned.method.name, planned.rate, planned.seed) in {("full", 1e-3, 0), ("DoRA r=16", 4e-3, 1)}


@pytest.fixture
def fake(base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Replace training by a fake summary, or a fake divergence; returns the folders of the started runs."""
    started: list[str] = []

    def train(planned: Planned, setup: Setup, out: Path) -> int:
        started.append(planned.folder)
        folder = out / "runs" / planned.folder
        folder.mkdir(parents=True)
        if diverges(planned):
            (folder / "logs").mkdir()
            error_file.write(
                folder / "logs" / "rank_0.error.json", NonFiniteError("step 3: the gradient is not finite")
            )
            return 1
        loss = {} if "quant=nf4" not in planned.method.settings else {"base_eval_loss": 5.02, "bits_per_parameter": 4.2}
        values = summary(eval_loss=4.5 + abs(planned.rate - 4e-3) + planned.seed / 100, **loss)
        (folder / "summary.json").write_text(json.dumps(values))
        return 0

    monkeypatch.setattr(methods, "train", train)

    def command(*words: str, code: int = 0) -> list[str]:
        started.clear()
        assert main(["bench", "methods", f"{base}/model", f"{base}/pairs.jsonl", *words]) == code
        return list(started)

    return command


@pytest.mark.ci
def test_finished_runs_are_skipped_and_a_wrong_base_fails(
    fake: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", str(tmp_path / "out"), "--steps", "4", "--ranks", "1", "--seeds", "2"]
    first = fake(*words)
    assert len(first) == len(set(first)) == 4 * len(METHODS), "three rates, and another seed at the best"
    shown = capsys.readouterr().out
    rows = read_record(tmp_path / "out" / "methods.json")["rows"]
    assert [row["method"] for row in rows] == [method.name for method in METHODS]
    assert {row["method"]: len(row["eval_losses"]) for row in rows if len(row["eval_losses"]) != 2} == {"DoRA r=16": 1}
    assert rows[0]["rates"] == {"0.00025": pytest.approx(4.50375), "0.0005": pytest.approx(4.5035), "0.001": None}
    for sentence in (
        "full, lr 0.001, seed 0 diverged",
        "DoRA r=16, lr 0.004, seed 1 diverged; its row has the other",
    ):
        assert sentence in shown
    assert shown.count("  diverged: its loss or gradient is not finite") == 2
    assert (tmp_path / "out" / "methods.png").read_bytes().startswith(b"\x89PNG")
    assert "DoRA r=16" in shown
    assert "5.0000 on the unquantized base, 5.0200 on the nf4 base" in shown
    assert fake(*words) == []
    assert len(fake(*words[:-1], "3")) == len(METHODS)
    assert (tmp_path / "out" / "methods.md").read_text().count("| rsLoRA r=16 |") == 1
    gone = tmp_path / "out" / "runs" / first[3]
    (gone / "summary.json").unlink()
    gone.rmdir()
    assert fake(*words) == [first[3]]
    (gone / "summary.json").write_text(json.dumps(summary(base_eval_loss=4.0)))
    capsys.readouterr()
    fake(*words, code=1)
    assert f"{first[3]} starts from a held-out loss of 4.0" in capsys.readouterr().err
    capsys.readouterr()
    fake(*words[:2], "--steps", "5", code=2)
    assert "holds runs with steps=4, and this would be steps=5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--step", "4"], "did you mean '--steps'?"),
        (["--steps", "0"], "--steps=0"),
        (["--seeds", "many"], "--seeds"),
        (["--quick", "--seeds", "2"], "leave out --seeds"),
        (["--eval-data", "held.jsonl"], "--eval-data=held.jsonl is not a file"),
    ],
)
def test_mistakes_are_named(words: list[str], said: str, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "methods", f"{base}/model", f"{base}/pairs.jsonl", *words]) == 2
    assert said in capsys.readouterr().err
