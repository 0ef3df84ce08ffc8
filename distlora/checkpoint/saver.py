"""Save a run's checkpoints in a background thread, one at a time, and tolerate disks that refuse a write."""

from __future__ import annotations

import contextlib
import copy
import errno
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import torch

from distlora.checkpoint.files import Files, atomic_folder, write_files
from distlora.checkpoint.snapshot import Snapshot, is_cut
from distlora.checkpoint.state import Progress, TrainState
from distlora.parallel import Backend, watch
from distlora.run_folder.checkpoint_manifest import (
    STATE_NAME,
    fault,
    step_folder,
    step_of,
    steps,
    temporary_folder,
    write_manifest,
)

WORTH_SAYING = 1.0
"""Seconds of waiting for a save that are reported; doubled after each report."""
LONGEST_LEAVING = 30.0
"""Seconds that a failing run waits for the save in progress."""

_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space within your quota there",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENOENT: "put the folder back",
    errno.ENOTDIR: "put the folder back",
    errno.EIO: "check that disk",
}


class SaveError(OSError):
    """A save failed. Older checkpoints are unchanged."""


class Saver:
    """The checkpoints of one run. Every rank makes one and calls it alike; rank 0 writes.

    As a context manager it waits on exit for the save in progress, without communication.
    """

    def __init__(
        self,
        checkpoints: Path,
        collect: Callable[[], Files],
        *,
        backend: Backend,
        state_of: Callable[[Progress], TrainState],
        keep: int,
        in_background: bool,
        say: Callable[[str], None],
        metadata: Mapping[str, str] | None = None,
        saved_step: int | None = None,
    ) -> None:
        """Prepare to save.

        `collect` returns the files of a checkpoint without state.json, with the tensors as they are in training;
        `state_of` returns the content of state.json. `metadata` goes into the safetensors headers. `saved_step` is the
        step of the checkpoint that the run resumes from. `say` may be called from another thread.
        """
        self.saved_step = saved_step
        """Newest step known to be saved; the same on every rank after `wait` or `save_last`."""
        self._checkpoints, self._collect, self._backend = checkpoints, collect, backend
        self._state_of, self._metadata = state_of, metadata
        self._in_background, self._say = in_background, say
        self._keeper = Keeper(checkpoints, keep)
        self._snapshot = Snapshot(backend)
        self._worth_saying = WORTH_SAYING
        self._thread: threading.Thread | None = None
        self._saving: int | None = None
        """Step of the last save that began."""
        self._failed: BaseException | None = None
        """Error of that save, on the writing rank."""

    def save(self, progress: Progress) -> None:
        """Copy the present state and return; it is written while training continues.

        If the disk refuses it, the error is reported and the next save tries again.
        """
        watch.at(progress.step, "saving", long=True)
        self._begin(progress, last=False)

    def _begin(self, progress: Progress, *, last: bool) -> None:
        self._finish()
        self._saving, self._failed = progress.step, None
        state = copy.deepcopy(self._state_of(progress))  # Training changes it meanwhile.
        files = self._collect()
        cut = is_cut(files)
        in_background = self._in_background
        if in_background and cut and not self._snapshot.has_room(files):
            in_background = self._in_background = False
            self._say(
                "WARNING: not enough host memory for a copy of the saved state, so training waits for every save; set "
                "train.save_in_background=false to silence this"
            )
        if not in_background:
            self._write(files, state, last)
            self._backend.barrier()
        elif cut or self._backend.writes:
            files = self._snapshot.take(files)
            self._thread = threading.Thread(target=self._write, args=(files, state, last), name="saver", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Finish the save in progress, on every rank alike. Raises SaveError on every rank if the last save failed."""
        self._finish()
        device = self._backend.ranks.device
        known = -1 if self.saved_step is None else self.saved_step
        outcome = torch.tensor([known, int(self._failed is not None)], dtype=torch.int64, device=device)
        self._backend.broadcast(outcome, 0)
        known, has_failed = outcome.tolist()
        self.saved_step = None if known < 0 else known
        if has_failed:
            assert self._saving is not None
            raise SaveError(
                str(self._failed)
                if self._failed is not None
                else f"rank 0 could not save the state after step {self._saving}"
            )

    def save_last(self, progress: Progress) -> None:
        """Save the final state unless it is saved already, and wait until it is on the disk.

        Raises SaveError on every rank if it cannot be saved.
        """
        watch.at(progress.step, "saving", long=True)
        with contextlib.suppress(SaveError):  # It was reported then, and is tried again here.
            self.wait()
        if self.saved_step != progress.step:
            self._begin(progress, last=True)
            self.wait()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.join(None if error is None else LONGEST_LEAVING)

    def _finish(self) -> None:
        """Wait for the save in progress. Raises errors that are not the disk's."""
        if self._thread is not None:
            began = time.monotonic()
            self._thread.join()
            self._thread = None
            waited = time.monotonic() - began
            if waited >= self._worth_saying:
                self._worth_saying = 2 * waited
                self._say(
                    f"waited {waited:.1f} s for the save after step {self._saving}: it takes longer than the steps "
                    "between two saves; increase train.save_every"
                )
        if self._failed is not None and not isinstance(self._failed, OSError):
            raise self._failed

    def _write(self, files: Files, state: TrainState, last: bool) -> None:
        """Write a checkpoint and remove old ones.

        Report and keep an OSError; keep any other error for the training thread.
        """
        try:
            if (device := self._backend.ranks.device).type == "cuda":
                # A thread starts on the first GPU, where each rank's context would take 0.5 GB.
                torch.cuda.set_device(device)
            self._snapshot.wait()
            self._write_folder(files, state)
        except OSError as error:
            self._failed = SaveError(self._explained(error, state.progress.step))
            # Even for the last save: a full disk takes no error file and no log.
            level, outcome = ("ERROR", "") if last else ("WARNING", ". Training continues; the next save tries again")
            self._say(f"{level}: {self._failed}{outcome}")
        except BaseException as error:
            self._failed = error
            if threading.current_thread() is threading.main_thread():
                raise
        else:
            self.saved_step = state.progress.step
            if self._backend.writes:
                self._prune(state.progress)

    def _write_folder(self, files: Files, state: TrainState) -> None:
        folder, backend = step_folder(self._checkpoints, state.progress.step), self._backend
        with atomic_folder(folder, backend) as temporary:
            sums = write_files(temporary, {**files, STATE_NAME: asdict(state)}, backend, metadata=self._metadata)
            if backend.writes:
                write_manifest(temporary, sums, state.identity.base_fingerprint)

    def _prune(self, progress: Progress) -> None:
        try:
            for line in self._keeper.prune(progress.step, progress.evaluations):
                self._say(f"WARNING: {line}")
        except OSError as error:
            self._say(f"WARNING: old checkpoints in {self._checkpoints} could not be removed ({error}); check the disk")

    def _explained(self, error: OSError, step: int) -> str:
        """Return the message of a failed save: what, where, why, and the cure."""
        remedy = _REMEDIES.get(error.errno or 0, "check the disk")
        newest = "no checkpoint" if self.saved_step is None else f"the newest is of step {self.saved_step}"
        return (
            f"the state after step {step} could not be saved in {self._checkpoints} ({error.strerror or error}); "
            f"{remedy}. The older checkpoints are unchanged: {newest}"
        )


State = tuple[tuple[str, int, int, int], ...]


class Keeper:
    """Removes old checkpoints once enough newer ones are known to be whole.

    A checkpoint's bytes are read once, and again only if a file's size, inode or time of change differs.
    """

    def __init__(self, checkpoints: Path, keep: int) -> None:
        self._checkpoints, self._keep = checkpoints, keep
        self._whole: dict[Path, State] = {}
        """State of the files of each checkpoint when it was found whole."""

    def prune(self, step: int, evaluations: Mapping[int, float]) -> list[str]:
        """Remove all checkpoints but the newest `keep` whole ones and the whole one with the lowest held-out loss.

        Returns a line for each damaged checkpoint; those newer than the oldest kept one stay. `step`: of the checkpoint
        just written; later ones are ignored and stay. `evaluations`: held-out loss by step. Nothing is removed before a
        newer checkpoint was read and found whole.
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
            elif (reason := self._fault(folder)) is None:
                kept.add(folder)
            else:
                damaged.append(f"checkpoint {folder.name} is damaged ({reason}); older ones are kept instead")
        # Among equal losses the earliest is the best, as in Progress.best_step.
        for best in sorted(losses, key=lambda folder: (losses[folder], step_of(folder))):
            if best in kept:
                break
            if best in surplus and self._fault(best) is None:
                surplus.remove(best)
                break
        for folder in surplus:
            self._whole.pop(folder, None)
            # Renamed first, so that `step_*` never names half a checkpoint if this is killed.
            shutil.rmtree(folder.rename(temporary_folder(folder)))
        return damaged

    def _fault(self, folder: Path) -> str | None:
        state = _state(folder)
        if self._whole.get(folder) == state:
            return None
        reason = fault(folder)
        if reason is None:
            self._whole[folder] = state
        return reason


def _state(folder: Path) -> State:
    """Return name, size, inode and time of change (ns) of every file in a folder."""
    states = []
    for path in sorted(folder.iterdir()):
        status = path.stat()
        states.append((path.name, status.st_size, status.st_ino, status.st_mtime_ns))
    return tuple(states)
