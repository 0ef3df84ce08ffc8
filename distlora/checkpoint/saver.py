"""Save checkpoints in a background thread, tolerate disks that refuse a write, and choose one to resume from."""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib.metadata
import math
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distlora import __version__
from distlora.checkpoint.state import RunProgress, TrainState
from distlora.config import ModelSpec, UserError
from distlora.loading.peft_format import weight_files
from distlora.loading.tensor_files import DeferredTensor, Files, atomic_folder, write_files
from distlora.model.adapters import DEFAULT_ADAPTER
from distlora.model.build import CausalLM
from distlora.parallel import Backend, Ranks, from_rank_0, watch
from distlora.parallel.ranks import HostRows
from distlora.run_folder.layout import (
    BEST_NAME,
    CHECKPOINT_PATTERN,
    CHECKPOINTS,
    MANIFEST_NAME,
    PUBLISHED,
    STATE_NAME,
    TRAINER_NAME,
    fault,
    newest,
    set_aside,
    step_folder,
    step_of,
    steps,
    temporary_folder,
    tidy,
)
from distlora.run_folder.stages import end_stages_at
from distlora.system import atomic_io, host_memory
from distlora.system.stop_signals import STOPPED_NAME, Stopped, name_of, write_stopped
from distlora_kernels import native, processor

_NONE, _NONE_WHOLE = -1, -2


def choose(checkpoints: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint (None if nothing was saved), and on rank 0 one line per newer, damaged one.

    Rank 0 alone reads the checkpoints, every byte, and broadcasts its choice; 64 ranks would otherwise read hundreds of
    GB each. It sets damaged newer checkpoints aside and removes what a killed writer left. Every rank must call it
    alike.

    Raises UserError on every rank if there are checkpoints and none is whole: the folder may be readable again later,
    and a run that began anew would remove it.
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
            end_stages_at(checkpoints.parent, step)
        elif damaged:
            step = _NONE_WHOLE
    step = from_rank_0(step, ranks)
    if step == _NONE_WHOLE:
        named = "; ".join(damaged) or "rank 0 reports the damage of each"
        raise UserError(
            f"no checkpoint in {checkpoints} is complete: {named}. Make that folder readable or restore complete "
            "copies; to start over, move it out of the run folder"
        )
    return (None if step == _NONE else step_folder(checkpoints, step)), damaged


def environment(world: int, device: torch.device, *, compiles: bool = False) -> dict[str, Any]:
    """Return the versions and hardware that the bits of a step depend on, beside the data and the settings.

    A resume with equal values continues bit for bit. `compiles`: train.compile, whose bits depend on compiler and CPU.
    """
    is_cuda = device.type == "cuda"
    return {
        "ranks": world,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if is_cuda else torch.backends.cpu.get_cpu_capability(),
        "distlora": __version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        **({"compiler": native.compiler_version(), "processor": processor.name()} if compiles else {}),
        # A name with a dot, so that checkpoints without it do not differ.
        **({} if is_cuda else {"cpu.path": processor.path()}),
    }


class States(Protocol):
    """The states of an optimizer (`training/optimizers.py`)."""

    per_element: tuple[str, ...]
    """States with the shape of their parameter."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the states by `<state>/<parameter>`."""


def checkpoint_files(
    model: CausalLM,
    spec: ModelSpec,
    optimizer: States,
    trained: Mapping[str, nn.Parameter],
    backend: Backend,
    adapter: str = DEFAULT_ADAPTER,
) -> dict[str, Any]:
    """Return the files of a checkpoint: trained weights, and optimizer states sharded like their parameters.

    `trained`: the parameters by name.
    """
    states = optimizer.state_tensors()
    for path, state in states.items():
        key, _, name = path.partition("/")
        if key in optimizer.per_element:
            states[path] = backend.spread(state, trained[name])
    return {**weight_files(model, spec, adapter), TRAINER_NAME: states}


class Snapshot:
    """Host memory for one copy of this rank's state, allocated at the first save and reused by later ones.

    Fresh pages cost five times as much as copying into old ones, and pinned memory far more.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._memory: dict[tuple[str, str], Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def has_room(self, files: Files) -> bool:
        """Return whether the node has memory for the copies of its ranks; the same on every rank.

        Every rank must call it.
        """
        needed = 0
        if not self._memory:
            mine = [self._local(tensor)[0] for _, tensor in _tensors_of(files) if self._is_copied(tensor)]
            needed = host_memory.bytes_like(mine)
        return not self._backend.lacks_host_memory(needed)

    def take(self, files: Files) -> Files:
        """Return `files` with copies of the tensors that this rank saves: whole ones, or its rows of sharded ones.

        Other tensors stay as they are. From a GPU the copies are queued behind its work so far: the caller may continue
        at once, and a reader calls `wait` first. The previous call's copies are overwritten.
        """
        parts = {key: self._local(tensor) for key, tensor in _tensors_of(files) if self._is_copied(tensor)}
        rows = {key: part for key, (part, _) in parts.items()}
        kinds = {key: (held.shape, held.dtype) for key, held in self._memory.items()}
        missing = {key: row for key, row in rows.items() if kinds.get(key) != (row.shape, row.dtype)}
        self._memory |= zip(missing, host_memory.memory_like(list(missing.values())), strict=True)
        copies = {name: dict(content) for name, content in files.items() if name.endswith(".safetensors")}
        for (name, key), tensor in _tensors_of(files):
            held: Tensor | HostRows = tensor
            if (name, key) in parts:
                held = self._memory[name, key]
                if isinstance(tensor.data, DTensor):
                    held = HostRows(local=held, first_row=parts[name, key][1], shape=tensor.shape)
            copies[name][key] = held
        if rows:
            with torch.no_grad():
                torch._foreach_copy_([self._memory[key] for key in rows], list(rows.values()), non_blocking=True)
        devices = {tensor.device for tensor in rows.values() if tensor.is_cuda}
        assert len(devices) <= 1
        if devices:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(devices.pop()))
        return {**files, **copies}

    def wait(self) -> None:
        """Wait until the copies are complete. From any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _is_copied(self, tensor: Tensor) -> bool:
        return self._backend.writes or (self._backend.shards.replica == 0 and isinstance(tensor.data, DTensor))

    def _local(self, tensor: Tensor) -> tuple[Tensor, int]:
        """Return this rank's part of a tensor, and the index of its first row."""
        return self._backend.local_rows(tensor.detach())


def _tensors_of(files: Files) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Yield ((file, name), tensor) of a checkpoint's files, without those that are made when they are written."""
    for name, content in files.items():
        if name.endswith(".safetensors"):
            for key, tensor in content.items():
                if isinstance(tensor, DeferredTensor):
                    continue
                assert isinstance(tensor, Tensor), f"{key} in {name} is not a tensor"
                yield (name, key), tensor


WORTH_SAYING = 1.0
"""Seconds of waiting for a save that are reported; doubled after each report."""
LONGEST_LEAVING = 30.0
"""Seconds that a failing run waits for the save in progress."""

_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space within your quota there",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.ENOENT: "put the folder back",
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
        state_of: Callable[[RunProgress], TrainState],
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

    def save(self, progress: RunProgress) -> None:
        """Copy the present state and return; it is written while training continues.

        If the disk refuses it, the error is reported and the next save tries again.
        """
        watch.at(progress.step, "saving", long=True)
        self._begin(progress, last=False)

    def _begin(self, progress: RunProgress, *, last: bool) -> None:
        self._finish()
        self._saving, self._failed = progress.step, None
        state = copy.deepcopy(self._state_of(progress))  # Training changes it meanwhile.
        files = self._collect()
        cut = any(isinstance(tensor.data, DTensor) for _, tensor in _tensors_of(files))
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

    def save_last(self, progress: RunProgress) -> None:
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
                    f"waited {waited:.1f} s for the save after step {self._saving}: it took longer than the "
                    "steps since then"
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
            folder, backend = step_folder(self._checkpoints, state.progress.step), self._backend
            with atomic_folder(folder, backend) as temporary:
                sums = write_files(temporary, {**files, STATE_NAME: asdict(state)}, backend, metadata=self._metadata)
                if backend.writes:
                    manifest = {
                        "files": dict(sorted(sums.items())),
                        "base_fingerprint": state.identity.base_fingerprint,
                    }
                    atomic_io.write_json(temporary / MANIFEST_NAME, manifest)
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "check that disk, and that it is writable")
            newest = "no checkpoint" if self.saved_step is None else f"the newest is of step {self.saved_step}"
            self._failed = SaveError(
                f"the state after step {state.progress.step} could not be saved in {self._checkpoints} "
                f"({error.strerror or error}); {remedy}. The older checkpoints are unchanged: {newest}"
            )
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
                try:
                    for line in self._keeper.prune(state.progress.step, state.progress.evaluations):
                        self._say(f"WARNING: {line}")
                except OSError as error:
                    self._say(f"WARNING: old checkpoints could not be removed ({error}); check the disk")


@contextlib.contextmanager
def noting_stop(run_dir: Path, ranks: Ranks, say: Callable[[str], None]) -> Iterator[None]:
    """Write RUN/stopped.json if the block ends by a request to stop. Its checkpoint is complete on disk."""
    try:
        yield
    except Stopped as stop:
        if ranks.rank == 0:
            saved = steps(run_dir / CHECKPOINTS)  # The loss watchdog may have left the last step out.
            try:
                write_stopped(run_dir, stop.signum, saved[-1] if saved else None)
            except OSError as error:
                say(f"WARNING: {STOPPED_NAME} could not be written to {run_dir} ({error})")
            state = f"step {step_of(saved[-1])} is saved" if saved else "nothing was trained yet"
            say(f"stopping on {name_of(stop.signum)}: {state}")
        raise


class Keeper:
    """Removes old checkpoints once enough newer ones are known to be whole. Each checkpoint's bytes are read once."""

    def __init__(self, checkpoints: Path, keep: int) -> None:
        self._checkpoints, self._keep = checkpoints, keep
        self._whole: set[tuple[Path, float]] = set()
        """Checkpoints that were found whole, and when they were written."""

    def prune(self, step: int, evaluations: Mapping[int, float]) -> list[str]:
        """Remove all checkpoints but the newest `keep` whole ones and the whole one with the lowest held-out loss.

        Returns a line for each damaged checkpoint; those newer than the oldest kept one stay. `step`: of the checkpoint
        just written; later ones are ignored and stay. `evaluations`: held-out loss by step. Nothing is removed before a
        newer checkpoint was read and found whole.
        """
        folders = [folder for folder in steps(self._checkpoints) if step_of(folder) <= step]
        if len(folders) <= self._keep:
            return []
        lines: list[str] = []
        kept: set[Path] = set()
        surplus = []
        for folder in reversed(folders):
            if len(kept) == self._keep:
                surplus.append(folder)
            elif (reason := self._fault(folder)) is None:
                kept.add(folder)
            else:
                lines.append(f"checkpoint {folder.name} is damaged ({reason}); older ones are kept instead")
        losses = {folder: evaluations.get(step_of(folder), math.nan) for folder in folders}
        # Among equal losses the earliest is the best, as in Progress.best_step.
        for best in sorted(filter(lambda folder: math.isfinite(losses[folder]), folders), key=losses.__getitem__):
            if best in kept:
                break
            if best in surplus and self._fault(best) is None:
                surplus.remove(best)
                break
        for folder in surplus:
            # Renamed first, so that `step_*` never names half a checkpoint if this is killed.
            shutil.rmtree(folder.rename(temporary_folder(folder)))
        return lines

    def _fault(self, folder: Path) -> str | None:
        written = folder, folder.stat().st_mtime
        reason = None if written in self._whole else fault(folder)
        if reason is None:
            self._whole.add(written)
        return reason
