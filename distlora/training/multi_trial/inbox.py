"""Read and write GROUP's files on behalf of all ranks: rank 0 reads, and all get the same (see protocol.py)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from distlora.config import UserError
from distlora.config.json_files import Shape, check_shape, read_object
from distlora.model.adapters import MOST_SLOTS
from distlora.parallel import Ranks, from_rank_0
from distlora.system import atomic_io
from distlora.training.multi_trial.protocol import (
    CLOSED_NAME,
    INBOX,
    OUTCOMES,
    SETTINGS_NAME,
    SLOTS_NAME,
    inbox_file,
    outcome_file,
    verdict_file,
)

LOOK_SECONDS = 0.2
"""Seconds between reads while nothing trains or a verdict is pending."""

_REMEDY = "the launcher writes it; start the sweep again with `distlora resume`"
_SETTINGS: Shape = {"slots": int, "verdicts?": bool}
_ENTRY: Shape = {"number": int, "run_dir": str}
_VERDICT: Shape = {"prune": bool}


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """Content of GROUP/pack.json."""

    slots: int
    """Number of trials that train at once."""
    verdicts: bool
    """True if every evaluation is followed by a verdict, which the trial waits for."""


def read_settings(folder: Path) -> GroupSettings:
    """Read GROUP/pack.json. Raises UserError if it is missing."""
    path = folder / SETTINGS_NAME
    values = read_object(path, _REMEDY)
    check_shape(values, _SETTINGS, path, _REMEDY)
    if not 1 <= values["slots"] <= MOST_SLOTS:
        raise UserError(
            f"{path}: slots={values['slots']} is not a supported number of trials; set sweep.packed to 1 to "
            f"{MOST_SLOTS}"
        )
    return GroupSettings(values["slots"], values.get("verdicts", False))


class Inbox:
    """Inbox of trials. Every rank makes one and calls it alike; only rank 0 reads and writes."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder, self._ranks = folder, ranks
        self._taken: set[int] = set()

    def next(self) -> int | None:
        """Return the lowest number without an outcome that was not handed out; None if there is none now."""
        waiting = (
            sorted(_numbers(self._folder / INBOX) - _numbers(self._folder / OUTCOMES) - self._taken)
            if self._reads
            else []
        )
        number = from_rank_0(waiting[0] if waiting else -1, self._ranks)
        if number < 0:
            return None
        self._taken.add(number)
        return number

    def run_dir(self, number: int) -> Path:
        """Return the run folder of a trial that was handed out."""

        def read() -> Path:
            if not self._reads:
                return Path()
            path = inbox_file(self._folder, number)
            values = read_object(path, _REMEDY)
            check_shape(values, _ENTRY, path, _REMEDY)
            return Path(values["run_dir"])

        return path_of_rank_0(together(read, self._ranks), self._ranks)

    def is_closed(self) -> bool:
        """Return whether no more trials will come. Call it before `next`, which then sees all earlier trials."""
        return bool(from_rank_0(int(self._reads and (self._folder / CLOSED_NAME).exists()), self._ranks))

    def prunes(self, number: int, step: int) -> bool | None:
        """Return the verdict on a trial's evaluation at `step`; None while there is none."""
        verdict = -1
        if self._reads and (path := verdict_file(self._folder, number, step)).exists():
            values = read_object(path, _REMEDY)
            check_shape(values, _VERDICT, path, _REMEDY)
            verdict = int(values["prune"])
        verdict = from_rank_0(verdict, self._ranks)
        return None if verdict < 0 else bool(verdict)

    def end(self, number: int, state: str, *, reason: str | None, step: int, seconds: float) -> None:
        """Write a trial's outcome."""
        if self._reads:
            path = outcome_file(self._folder, number)
            path.parent.mkdir(exist_ok=True)
            atomic_io.write_json(path, {"state": state, "reason": reason, "step": step, "seconds": round(seconds, 3)})

    def write_slots(self, numbers: Sequence[int]) -> None:
        """Write the numbers of the trials in slots, in the order of entering."""
        if self._reads:
            atomic_io.write_json(self._folder / SLOTS_NAME, {"numbers": list(numbers)})

    @property
    def _reads(self) -> bool:
        return self._ranks.rank == 0


def pause() -> None:
    """Wait between two reads."""
    time.sleep(LOOK_SECONDS)


def _numbers(folder: Path) -> set[int]:
    if not folder.is_dir():
        return set()
    return {int(path.stem) for path in folder.iterdir() if path.suffix == ".json" and path.stem.isdecimal()}


Made = TypeVar("Made")

_LONGEST_PATH = 4096


def path_of_rank_0(path: Path, ranks: Ranks) -> Path:
    """Return rank 0's path on every rank."""
    if ranks.control is None:
        return path
    encoded = os.fsencode(path)
    assert len(encoded) <= _LONGEST_PATH, path
    word = torch.tensor(list(encoded.ljust(_LONGEST_PATH, b"\0")), dtype=torch.uint8)
    dist.broadcast(word, group=ranks.control, group_src=0)
    return Path(os.fsdecode(bytes(word.tolist()).rstrip(b"\0")))


def together(action: Callable[[], Made], ranks: Ranks) -> Made:
    """Return the result of `action`, which must not communicate after a possible failure.

    Raises UserError, on every rank, if it failed on some.
    """
    made: list[Made] = []
    error: UserError | None = None
    try:
        made.append(action())
    except UserError as failure:
        error = failure
    if ranks.control is not None:
        word = torch.tensor(-1 if error is None else ranks.rank, dtype=torch.int64)
        dist.all_reduce(word, dist.ReduceOp.MAX, group=ranks.control)
        if error is None and word >= 0:
            error = UserError(f"rank {int(word)} failed; see its logs/rank_{int(word)}.log")
    if error is not None:
        raise error
    return made[0]
