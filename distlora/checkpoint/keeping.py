"""Which checkpoints stay: the newest, and the best of those that were saved. Imports no torch."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from distlora.run_folder.checkpoints import (
    fault,
    step_of,
    steps,
    temporary_of,
)

State = tuple[tuple[str, int, int, int], ...]


class Keeper:
    """Removes old checkpoints once enough newer ones are known to be whole.

    A checkpoint's bytes are read once, and again only where a file has another size, inode or time of change: so a save
    costs one reading of what it wrote, wherever it runs.
    """

    def __init__(self, checkpoints: Path, keep: int) -> None:
        self._checkpoints, self._keep = checkpoints, keep
        self._whole: dict[Path, State] = {}
        """The state of the files of each checkpoint when it was found whole."""

    def prune(self, step: int, evaluations: Mapping[int, float]) -> list[str]:
        """Remove all but the newest `keep` whole ones and the whole one of the lowest held-out loss; damaged ones stay
        while they are newer than the oldest of those. Returns a line for each damaged one that was found.

        `step`: of the one that was just written; a later one is not this start's, counts for nothing and stays.
        `evaluations`: held-out loss by step. Nothing is removed before a newer one was read and found whole.
        """
        folders = [folder for folder in steps(self._checkpoints) if step_of(folder) <= step]
        losses = {folder: evaluations.get(step_of(folder), math.nan) for folder in folders}
        losses = {folder: loss for folder, loss in losses.items() if math.isfinite(loss)}
        if len(folders) <= self._keep:
            return []
        damaged: list[str] = []
        kept: set[Path] = set()
        surplus = []
        for folder in reversed(folders):
            if len(kept) == self._keep:
                surplus.append(folder)
            elif (found := self._fault(folder)) is None:
                kept.add(folder)
            else:
                damaged.append(f"checkpoint {folder.name} is damaged ({found}); older ones are kept in its place")
        # Of equal losses the earliest is the best, as in Progress.best_step.
        for best in sorted(losses, key=lambda folder: (losses[folder], step_of(folder))):
            if best in kept:
                break
            if best in surplus and self._fault(best) is None:
                surplus.remove(best)
                break
        for folder in surplus:
            self._whole.pop(folder, None)
            # Under another name first: a name `step_*` stands for a whole checkpoint, also if this dies half-way.
            shutil.rmtree(folder.rename(temporary_of(folder)))
        return damaged

    def _fault(self, folder: Path) -> str | None:
        state = _state(folder)
        if self._whole.get(folder) == state:
            return None
        found = fault(folder)
        if found is None:
            self._whole[folder] = state
        return found


def _state(folder: Path) -> State:
    """Of every file in a folder: name, size, inode, time of the last change in ns."""
    found = []
    for path in sorted(folder.iterdir()):
        status = path.stat()
        found.append((path.name, status.st_size, status.st_ino, status.st_mtime_ns))
    return tuple(found)
