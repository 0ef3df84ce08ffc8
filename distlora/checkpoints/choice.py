"""Which checkpoint a start goes on from: found, checked and tidied up by one rank, the same on all."""

from __future__ import annotations

from pathlib import Path

from distlora.checkpoints.folder import newest, step_folder, step_of, tidy
from distlora.parallel import Ranks, from_rank_0
from distlora.run_folder import BEST_NAME, CHECKPOINT_PATTERN, PUBLISHED


def choose(checkpoints: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None; and on rank 0 a line for each newer one that is damaged.

    Rank 0 alone reads them, every byte, and the others wait for its choice: a run of 64 ranks would otherwise read
    hundreds of GB 64 times. It also removes what a killed writer left. Every rank must call it alike.
    """
    step = -1
    damaged: list[str] = []
    if ranks.rank == 0:
        tidy(checkpoints, CHECKPOINT_PATTERN)
        for name in (BEST_NAME, *PUBLISHED.values()):
            tidy(checkpoints.parent, name)
        folder, damaged = newest(checkpoints)
        step = -1 if folder is None else step_of(folder)
    step = from_rank_0(step, ranks)
    return (None if step < 0 else step_folder(checkpoints, step)), damaged
