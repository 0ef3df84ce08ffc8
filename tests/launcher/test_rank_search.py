"""Test the rank search: what it tries next, where it ends, what it recommends, and the bootstrap of a gain."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distlora.config import UserError
from distlora.config.sweep import SweepConfig
from distlora.run_folder.eval_documents import DocumentRecord, read_documents, write_documents
from distlora.run_folder.sweep import COMPLETE, FAILED, RUNNING, TrialRecord, read_results
from distlora_launcher.studies.rank_search import FULL, Comparison, Gain, RankSearch, Size, Tried, gain, ladder
from distlora_launcher.studies.results import CONCLUSION_NAME
from distlora_launcher.studies.sources import NextAction
from distlora_launcher.studies.sweep import Sweep

SETTINGS = SweepConfig(method="rank_search", rank_start=8, rank_most=128, bootstrap=500)
DOCUMENTS = 80


def documents(loss: float, seed: int = 0, count: int = DOCUMENTS) -> DocumentRecord:
    """Return the losses by document of a run, `loss` above the common ones, with noise."""
    hard, own = np.random.default_rng(99), np.random.default_rng(seed)
    units = hard.integers(20, 200, count)
    losses = (hard.normal(3, 1, count) + loss + own.normal(0, 0.01, count)) * units
    return DocumentRecord(step=5, rows="ab", documents=list(range(count)), losses=losses.tolist(), units=units.tolist())


def compare(losses: Mapping[Size, float | None], count: int = DOCUMENTS) -> Comparison:
    """Return the comparison of ended runs with these relative losses; None: failed."""
    tried = {
        size: Tried(reason="out of memory")
        if loss is None
        else Tried(documents=documents(loss, seed, count), figures={"trainable_parameters": 1000 * seed})
        for seed, (size, loss) in enumerate(losses.items())
    }
    return Comparison(settings=SETTINGS, ranks=ladder(8, 128, 500), widest=500, tried=tried)


FALLING = {8: 0.0, 16: -0.1, 32: -0.15, 64: -0.15, FULL: -0.2}


@pytest.mark.parametrize(
    ("losses", "due", "best"),
    [
        ({}, [8, 16], None),
        ({8: 0.0}, [8, 16], 8),
        ({16: 0.0}, [8, 16], 16),
        ({8: 0.0, 16: -0.1}, [8, 16, 32], 16),
        ({8: 0.0, 16: 0.0}, [8, 16], 8),
        ({8: 0.0, 16: 0.1}, [8, 16], 8),
        ({8: 0.0, 16: -0.1, 32: -0.15}, [8, 16, 32, 64], 32),
        (FALLING, [8, 16, 32, 64], 32),
        ({8: 0.0, 16: -0.1, 32: -0.2, 64: -0.3, 128: -0.4}, [8, 16, 32, 64, 128], 128),
        ({8: None, 16: -0.1}, [8, 16], 16),
        ({8: 0.0, 16: -0.1, 32: None}, [8, 16, 32], 16),
        ({8: None, 16: None}, [8, 16], None),
    ],
    ids=str,
)
def test_ranks_are_doubled_while_that_gains_more_than_noise(
    losses: dict[Size, float | None], due: list[int], best: int | None
) -> None:
    found = compare(losses)
    assert (found.ranks_due(), found.recommended()) == (due, best)


def said(losses: dict[Size, float | None], count: int = DOCUMENTS) -> str:
    return " ".join(compare(losses, count).sentences())


@pytest.mark.parametrize(
    ("losses", "parts"),
    [
        (
            FALLING,
            [
                "Recommended: adapter.r=32. From 16 to 32 the held-out loss falls by 0.0",
                "more than its noise; from 32",
                "no more than noise.",
                "Full fine-tuning ends lower than r=32 by 0.0",
            ],
        ),
        ({8: 0.0, 16: 0.1}, ["Recommended: adapter.r=8. From 8 to 16 it rises by 0.", "sweep.rank_start=4"]),
        ({8: 0.0, 16: -0.1, 32: None}, ["the gain of 32 is unknown", "The run with r=32 failed: out of memory"]),
        ({8: None, 16: None}, ["No rank can be recommended", "r=8 failed: out of memory"]),
        ({8: 0.0, 16: -0.1, 32: -0.2, 64: -0.3, 128: -0.4}, ["Recommended: adapter.r=128.", "set it to 256"]),
        ({8: 0.0, 16: 0.0, FULL: 0.3}, ["Full fine-tuning ends higher than r=8 by 0."]),
        ({8: 0.0, 16: 0.0, FULL: 0.0}, ["ends as r=8 within noise"]),
        ({8: 0.0, 16: 0.0, FULL: None}, ["Full fine-tuning failed: out of memory"]),
    ],
    ids=str,
)
def test_the_recommendation_says_its_reason(losses: dict[Size, float | None], parts: list[str]) -> None:
    text = said(losses)
    for part in parts:
        assert part in text, text


def sweep_of(folder: Path, folders: Path, *words: str, **settings: Any) -> Sweep:
    values = {"method": "rank_search", "rank_start": 8, "rank_most": 64, "bootstrap": 500} | settings
    shared = (
        f"model.path={folders / 'llama'}",
        f"data.path={folders / 'text.jsonl'}",
        "data.sequence_length=64",
        "adapter.target_modules=all-linear",
        "tracker=none",
        "optim.lr=2e-3",
    )
    return Sweep(
        folder=folder,
        settings=SweepConfig(**values),
        overrides=(*shared, *words),
        space=(),
        config_dir=None,
        cwd=str(folder),
    )


def ended(sweep: Sweep, losses: Mapping[Size, float | None]) -> list[TrialRecord]:
    """Return trials in the order of `losses`, with the files of their runs."""
    records = []
    for number, (size, loss) in enumerate(losses.items()):
        values = {"adapter": "full", "quant": "none", "optim.lr": 2e-4} if size == FULL else {"adapter.r": size}
        state = FAILED if loss is None else COMPLETE
        record = TrialRecord(
            number=number, state=state, values=values, step=5, reason=None if loss is not None else "no memory"
        )
        records.append(record)
        if loss is not None:
            record.folder(sweep.folder).mkdir(parents=True, exist_ok=True)
            write_documents(record.folder(sweep.folder), documents(loss, number))
    return records


@pytest.fixture
def searched(tmp_path: Path, folders: Path) -> Sweep:
    return sweep_of(tmp_path, folders, full="never")


def test_the_search_is_a_function_of_what_has_ended(searched: Sweep) -> None:
    """Check new searches, as each worker and each resume makes one."""

    def answer(trials: list[TrialRecord]) -> Any:
        return RankSearch(searched).next(trials)

    assert answer([]) == [{"adapter.r": 8}, {"adapter.r": 16}]
    trials = ended(searched, {8: 0.0, 16: -0.1})
    assert answer([trials[0]]) == [{"adapter.r": 16}]
    assert answer([trials[0], dataclasses.replace(trials[1], state=RUNNING)]) is NextAction.WAIT
    assert answer(trials) == [{"adapter.r": 32}]
    assert answer(ended(searched, {8: 0.0, 16: -0.1, 32: -0.1})) is NextAction.END
    assert answer(ended(searched, {8: 0.0, 16: None})) is NextAction.END


def test_full_fine_tuning_is_due_when_no_rank_is(tmp_path: Path, folders: Path) -> None:
    sweep = sweep_of(tmp_path, folders, "adapter.lora_alpha=32", "quant=nf4", "quant.cache=false", full="always")
    search = RankSearch(sweep)
    assert FULL not in [values.get("adapter") for values in search.next([])]  # type: ignore[union-attr]
    trials = [dataclasses.replace(trial, state=RUNNING) for trial in ended(sweep, {8: 0.0, 16: 0.0})]
    (values,) = search.next(trials)  # type: ignore[misc]
    assert values == {"adapter": "full", "quant": "none", "optim.lr": pytest.approx(2e-4)}
    config = sweep.compose(2, values, search.overrides).config
    assert (config.adapter.method, config.quant.method, config.optim.lr) == ("full", "none", pytest.approx(2e-4))
    assert config.train.eval_documents
    assert config.run_dir == str(sweep.run_dir(2))
    assert RankSearch(sweep).next([*trials, *_numbered(2, ended(sweep, {FULL: 0.0}))]) is NextAction.WAIT


def _numbered(number: int, records: list[TrialRecord]) -> list[TrialRecord]:
    return [dataclasses.replace(record, number=number + index) for index, record in enumerate(records)]


def test_the_conclusion_is_a_table_and_a_recommendation(searched: Sweep) -> None:
    trials = ended(searched, {8: 0.0, 16: -0.1, 32: -0.1})
    text = "\n".join(RankSearch(searched).conclusion(trials))
    assert "| 16 " in text
    assert "- Recommended: adapter.r=16 (trial 1)." in text
    assert "- Full fine-tuning was not run: sweep.full=never." in text
    before = "\n".join(RankSearch(searched).conclusion(trials[:2]))
    assert "The search has not ended yet" in before
    assert "Recommended" not in before
    assert RankSearch(searched).figures(trials[:2])["recommended"] is None
    assert RankSearch(searched).conclusion([]) == []
    kept = json.loads(json.dumps(RankSearch(searched).figures(trials), allow_nan=False))
    assert kept["recommended"] == 16
    assert [row["size"] for row in kept["rows"]] == [8, 16, 32]
    assert kept["rows"][1]["low"] < kept["rows"][1]["gain"] < kept["rows"][1]["high"]
    assert any("Recommended" in sentence for sentence in kept["sentences"])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "eval_documents.json").unlink(), "train it with train.eval_documents=true"),
        (lambda folder: (folder / "eval_documents.json").write_text("{"), "is damaged"),
        (lambda folder: write_documents(folder, dataclasses.replace(documents(0.0), step=4)), "json is of step 4"),
        (
            lambda folder: write_documents(folder, dataclasses.replace(documents(0.0), rows="cd")),
            "train.seed and data.sequence_length",
        ),
        (
            lambda folder: write_documents(folder, dataclasses.replace(documents(0.0), losses=[None] * DOCUMENTS)),
            "is not finite",
        ),
    ],
)
def test_a_run_without_figures_to_compare_counts_as_failed(
    searched: Sweep, damage: Callable[[Path], Any], reason: str
) -> None:
    trials = ended(searched, {8: 0.0, 16: -0.1})
    damage(trials[1].folder(searched.folder))
    search = RankSearch(searched)
    assert search.next(trials) is NextAction.END
    assert reason.replace("\\", "") in "\n".join(search.conclusion(trials))


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["adapter.r=8"], {}, r"adapter\.r=8 is what sweep=rank_search searches; .* sweep\.rank_start"),
        (["train.eval_documents=false"], {}, r"train\.eval_documents=false writes no losses by document"),
        (["train.load_best_at_end=true", "train.eval_every=1"], {}, r"train\.load_best_at_end=True makes a run's"),
        (
            ["adapter.target_modules=qv", "adapter.rank_pattern={q_proj:4,v_proj:4}"],
            {},
            r"adapter\.rank_pattern sets the rank of every adapted linear",
        ),
        (["adapter=full", "quant=none"], {}, "adapter=full has no rank to search for"),
        ([], {"rank_most": 15}, r"sweep\.rank_most=15 leaves no doubling of sweep\.rank_start=8; set .*=16"),
        ([], {"metric": "loss"}, r"not sweep\.metric=loss"),
        ([], {"trials": 3}, r"sweep\.trials=3 has no effect"),
        ([], {"pruner": "median"}, r"sweep\.pruner=median would end runs"),
        ([], {"packed": 2, "full": "always"}, r"sweep\.full=always trains the base"),
    ],
)
def test_settings_that_leave_nothing_to_search_are_refused(
    tmp_path: Path, folders: Path, words: list[str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        RankSearch(sweep_of(tmp_path, folders, *words, **settings))


def of(first: list[float], second: list[float], units: list[int], **settings: float) -> Gain:
    values = {"resamples": 4000, "confidence": 0.95, "seed": 0} | settings
    return gain(first, second, units, **values)  # type: ignore[arg-type]


def drawn_documents(count: int, true_gain: float, seed: int) -> tuple[list[float], list[float], list[int]]:
    """Return documents of uneven length whose losses differ by much more than the two runs do."""
    rng = np.random.default_rng(seed)
    units = rng.integers(20, 200, count)
    first = rng.normal(3, 1, count) * units
    second = first - (true_gain + rng.normal(0, 0.05, count)) * units
    return first.tolist(), second.tolist(), units.tolist()


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Check the coverage of 200 experiments with 60 documents.

    The tolerance is 3 standard deviations, and 2 % since percentile intervals of few documents cover less.
    """
    hits = false_gains = 0
    for seed in range(200):
        found = of(*drawn_documents(60, 0.02, seed), resamples=1000, seed=seed)
        hits += found.low <= 0.02 <= found.high
        false_gains += of(*drawn_documents(60, 0.0, seed), resamples=1000, seed=seed).is_more_than_noise
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / 200) - 0.02 < hits / 200 < 1
    assert false_gains <= 12, "2.5 % of 200, and a margin for chance"


@pytest.mark.slow
def test_a_real_search_ends_by_itself(tmp_path: Path, folders: Path) -> None:
    """Run each rank by `distlora train`."""
    sweep = tmp_path / "sweep"
    words = sweep_of(tmp_path, folders).overrides
    settings = ["sweep=rank_search", "sweep.rank_start=2", "sweep.rank_most=4", "sweep.full=never"]
    settings += ["data.eval_fraction=0.3", "train.max_steps=2", "train.global_batch=4", "train.micro_batch=4"]
    settings += ["train.dtype=fp32", "quant.cache=false", f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={sweep}"]
    command = [sys.executable, "-m", "distlora_launcher.cli.main", "sweep", *settings, *words]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    records = read_results(sweep)
    assert [record.state for record in records] == [COMPLETE] * 2, finished.stdout
    assert [dict(record.values) for record in records] == [{"adapter.r": 2}, {"adapter.r": 4}]
    for record in records:
        found = read_documents(record.folder(sweep))
        assert found.loss is not None
        assert record.value is not None
        assert math.isclose(found.loss, record.value, rel_tol=1e-5)
    kept = json.loads((sweep / CONCLUSION_NAME).read_text())
    assert [row["size"] for row in kept["rows"]] == [2, 4]
    assert kept["recommended"] in (2, 4)
    assert all(row["planned_bytes"] and row["peak_bytes"] and row["state_bytes"] for row in kept["rows"])
    assert "Recommended: adapter.r=" in finished.stdout
    assert "Recommended: adapter.r=" in (sweep / "results.md").read_text()
