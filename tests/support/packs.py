"""Packs for the tests: PACK and its trials' run folders, as the launcher makes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from distlora.config.file import as_mapping
from distlora.training.multi_trial.protocol import (
    CLOSED_NAME,
    INBOX,
    SETTINGS_NAME,
    VERDICTS,
    inbox_file,
    outcome_file,
    verdict_file,
)
from support.small_models import make_run

Sections = Mapping[str, Mapping[str, Any]]


def make_pack(
    pack: Path,
    folders: Path,
    trials: Sequence[Sections],
    model: str = "llama",
    *,
    slots: int | None = None,
    closed: bool = True,
    **options: Any,
) -> list[Path]:
    """Write a pack with a prepared run folder for each trial. Return the folders."""
    pack.mkdir(parents=True)
    (pack / INBOX).mkdir()
    (pack / VERDICTS).mkdir()
    runs = [pack.parent / "trials" / f"{number:04d}" for number in range(len(trials))]
    for number, (run_dir, sections) in enumerate(zip(runs, trials, strict=True)):
        config = make_run(run_dir, folders, model, **{name: dict(values) for name, values in sections.items()})
        if number == 0:
            shared = as_mapping(replace(config, run_dir=str(pack)))
            (pack / "config.yaml").write_text(yaml.safe_dump(shared))
        inbox_file(pack, number).write_text(json.dumps({"number": number, "run_dir": str(run_dir)}))
    (pack / SETTINGS_NAME).write_text(json.dumps({"slots": slots or len(trials), **options}))
    if closed:
        (pack / CLOSED_NAME).touch()
    return runs


def outcomes(pack: Path, number: int) -> dict[str, Any]:
    """Return the outcome of a trial as the trainer wrote it."""
    values: dict[str, Any] = json.loads(outcome_file(pack, number).read_text())
    return values


def say_verdict(pack: Path, number: int, step: int, *, prune: bool) -> None:
    verdict_file(pack, number, step).write_text(json.dumps({"prune": prune}))
