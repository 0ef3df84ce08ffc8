"""Runs of packs of trials."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from distlora.parallel import Ranks
from distlora.training.multi_trial import trainer


def run_pack(ranks: Ranks, *, pack: Path) -> dict[str, Tensor]:
    """Run a pack on this rank. Return the rank's bits of every adapter as its trial left its slot."""
    kept: dict[str, Tensor] = {}
    end = trainer.MultiTrialTrainer._end

    def keep(self: trainer.MultiTrialTrainer, entry: trainer.SlotTrial) -> None:
        kept.update({f"{entry.number}/{name}": p.detach().clone() for name, p in entry.trained.items()})
        end(self, entry)

    trainer.MultiTrialTrainer._end = keep  # type: ignore[method-assign]
    try:
        trainer.run_group(pack, ranks)
    finally:
        trainer.MultiTrialTrainer._end = end  # type: ignore[method-assign]
    return kept
