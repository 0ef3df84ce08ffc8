"""Which checkpoint a start goes on from: found, checked and tidied up by one rank, the same on all."""

from __future__ import annotations

from pathlib import Path

from distlora.config import UserError
from distlora.parallel import Ranks, from_rank_0
from distlora.run_folder.checkpoints import (
    newest,
    set_aside,
    step_folder,
    step_of,
    steps,
    tidy,
)
from distlora.run_folder.layout import BEST_NAME, CHECKPOINT_PATTERN, PUBLISHED

_NONE, _NONE_WHOLE = -1, -2


def choose(checkpoints: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None where nothing was saved; and on rank 0 a line for each newer one, which is
    set aside.

    Rank 0 alone reads them, every byte, and the others wait for its choice: a run of 64 ranks would otherwise read
    hundreds of GB 64 times. It also removes what a killed writer left. Every rank must call it alike.

    Raises UserError, on every rank, where there are checkpoints and none is whole: a folder that cannot be read now may
    be readable tomorrow, and a run that began anew would remove it.
    """
    step = _NONE
    damaged: list[str] = []
    if ranks.rank == 0:
        tidy(checkpoints, CHECKPOINT_PATTERN)
        for name in (BEST_NAME, *PUBLISHED.values()):
            tidy(checkpoints.parent, name)
        folder, damaged = newest(checkpoints)
        if folder is not None:
            step = step_of(folder)
            newer = reversed([path for path in steps(checkpoints) if step_of(path) > step])
            damaged = [f"{line}; it is now {set_aside(path)}" for line, path in zip(damaged, newer, strict=True)]
        elif damaged:
            step = _NONE_WHOLE
    step = from_rank_0(step, ranks)
    if step == _NONE_WHOLE:
        named = "; ".join(damaged) or "rank 0 names what is wrong with each"
        raise UserError(
            f"no checkpoint in {checkpoints} is whole: {named}. Make that folder readable or put whole copies back; to "
            "begin anew, move it out of the run folder"
        )
    return (None if step == _NONE else step_folder(checkpoints, step)), damaged
