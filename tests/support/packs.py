"""Packs for the tests: PACK and its trials' run folders, as the launcher makes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from distlora.config.file import as_mapping
from distlora.parallel import Ranks
from distlora.training.multi_trial import trainer
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


def run_pack(ranks: Ranks, *, pack: Path) -> dict[str, Tensor]:
    """Run a pack on this rank. Return the rank's bits of every adapter as its trial left its slot."""
    kept: dict[str, Tensor] = {}
    end = trainer.MultiTrialTrainer._end

    def keep(self: trainer.MultiTrialTrainer, entry: trainer.SlotTrial) -> None:
        kept.update(
            {f"{entry.number}/{name}": p.detach().clone() for name, p in entry.trial.trained.parameters.items()}
        )
        end(self, entry)

    trainer.MultiTrialTrainer._end = keep  # type: ignore[method-assign]
    try:
        trainer.run_group(pack, ranks)
    finally:
        trainer.MultiTrialTrainer._end = end  # type: ignore[method-assign]
    return kept


def filled(parameters: Mapping[str, nn.Parameter], seed: int) -> None:
    """B as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        if name.endswith(".B"):
            parameter.data.normal_(0, 0.05, generator=generator)
        elif name.endswith("magnitude"):
            parameter.data.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))


def labels_of(rows: Tensor) -> Tensor:
    return rows.roll(-1, dims=1)
