"""Save in the background: content, retention, and failures of the disk or of the writer."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from distlora.checkpoint import saver as saver_module
from distlora.checkpoint.saver import SaveError, Saver, Snapshot, choose
from distlora.checkpoint.state import Identity, RunProgress, TrainState, load_state
from distlora.config import UserError
from distlora.parallel import Backend, Ranks, Shards
from distlora.run_folder import layout as folders_on_disk
from distlora.run_folder.layout import TRAINER_NAME, fault, newest, step_folder, steps
from distlora.system import atomic_io
from support.small_disks import fill, small_disk
from support.worlds import World

SINGLE = Ranks(0, 1, torch.device("cpu"), None)
WEIGHTS = "adapter_model.safetensors"


class State:
    """The state of a run: two files of tensors, which the training thread changes."""

    def __init__(self, elements: int = 1000) -> None:
        self.weights = {"a": torch.zeros(elements), "b": torch.zeros(3, 5)}
        self.moments = {"exp_avg/a": torch.zeros(elements), "step/a": torch.tensor(0.0)}

    def train(self, step: int) -> RunProgress:
        for tensor in (*self.weights.values(), *self.moments.values()):
            tensor.fill_(step)
        return RunProgress(step=step)

    def files(self) -> dict[str, Any]:
        return {WEIGHTS: self.weights, TRAINER_NAME: self.moments}


def make_saver(run_dir: Path, state: State, said: list[str] | None = None, **options: Any) -> Saver:
    return Saver(
        run_dir / "checkpoints",
        state.files,
        backend=Backend(ranks := options.pop("ranks", SINGLE), Shards.over(ranks)),
        state_of=lambda progress: TrainState(
            progress=progress,
            identity=Identity(base_fingerprint="base", data_digest="data", settings={}),
            environment={},
        ),
        say=(lambda line: None) if said is None else said.append,
        **{"keep": 2, "in_background": True} | options,
    )


def saved(run_dir: Path, step: int) -> set[float]:
    """Return the numbers in the checkpoint of a step."""
    path = step_folder(run_dir / "checkpoints", step)
    assert fault(path) is None
    assert load_state(path).progress.step == step
    files = [safetensors.torch.load_file(path / name) for name in (WEIGHTS, TRAINER_NAME)]
    return {value for tensors in files for tensor in tensors.values() for value in tensor.flatten().tolist()}


def names(run_dir: Path) -> list[int]:
    return [folders_on_disk.step_of(path) for path in steps(run_dir / "checkpoints")]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_save_in_background_holds_the_state_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, writing = threading.Event(), threading.Event()
    write_files = saver_module.write_files

    def held(*arguments: Any, **options: Any) -> dict[str, str]:
        writing.set()
        assert may_write.wait(20)
        return write_files(*arguments, **options)

    monkeypatch.setattr(saver_module, "write_files", held)
    state, said = State(), []
    with make_saver(tmp_path, state, said) as saver:
        saver.save(state.train(1))
        assert writing.wait(20)
        progress = state.train(2)
        assert steps(tmp_path / "checkpoints") == []
        threading.Timer(1.2, may_write.set).start()
        saver.save(progress)  # One at a time: this waits for the save of step 1, and says so.
        state.train(3)
        saver.wait()
        assert saver.saved_step == 2
    assert saved(tmp_path, 1) == {1.0}
    assert saved(tmp_path, 2) == {2.0}
    assert len(said) == 1
    assert "for the save after step 1" in said[0]


Break = Callable[[Path], Callable[[], object]]
"""Breaks the place of a run's checkpoints; returns what mends it."""


def full(run_dir: Path) -> Callable[[], object]:
    return fill(run_dir).unlink


def read_only(run_dir: Path) -> Callable[[], object]:
    subprocess.run(["mount", "-o", "remount,ro", str(run_dir)], check=True)
    return lambda: subprocess.run(["mount", "-o", "remount,rw", str(run_dir)], check=True)


def small_files(run_dir: Path) -> Callable[[], object]:
    """Limit the size of the process' files, which needs no root."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def gone(run_dir: Path) -> Callable[[], object]:
    return run_dir.rename(run_dir.with_name("elsewhere")) and (lambda: run_dir.with_name("elsewhere").rename(run_dir))


FAULTS = {
    full: ("No space left on device", "free space there"),
    read_only: ("Read-only file system", "that it is writable"),
    small_files: ("File too large", "ulimit -f"),
    gone: ("No such file or directory", "put the folder back"),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
def test_gpu_copies_hold_the_state_when_queued() -> None:
    device = torch.device("cuda")
    ranks = Ranks(0, 1, device, None)
    copies = Snapshot(Backend(ranks, Shards.over(ranks)))
    tensors = {"large": torch.zeros(2**26, device=device), "small": torch.zeros(3, device=device)}
    for value in (1.0, 2.0):
        for tensor in tensors.values():
            tensor.fill_(value)
        taken = copies.take({WEIGHTS: tensors})[WEIGHTS]
        for tensor in tensors.values():
            tensor.fill_(9.0)
        copies.wait()
        for copied in taken.values():
            assert copied.is_pinned()
            assert torch.equal(copied, torch.full_like(copied, value))


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_failing_disk_costs_no_checkpoint_and_no_run(damage: Break, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with small_disk(run_dir, 256) if damage in (full, read_only) else contextlib.nullcontext(run_dir):
        run_dir.mkdir(exist_ok=True)
        check_saves_around(damage, run_dir)


def check_saves_around(damage: Break, run_dir: Path) -> None:
    state, said = State(elements=8000), []
    with make_saver(run_dir, state, said) as saver:
        saver.save(state.train(1))
        saver.wait()
        mend = damage(run_dir)
        try:
            saver.save(state.train(2))
            with pytest.raises(SaveError, match="after step 2 could not be saved"):
                saver.wait()
            saver.save(state.train(3))
            with pytest.raises(SaveError, match="after step 4 could not be saved"):
                saver.save_last(state.train(4))
            for line, step in zip(said, (2, 3, 4), strict=True):
                reason, remedy = FAULTS[damage]
                for part in (f"after step {step}", str(run_dir / "checkpoints"), reason, remedy):
                    assert part in line
                assert ("Training continues" in line) == (step < 4), "the last one raises"
            if damage is not gone:
                assert saved(run_dir, 1) == {1.0}
        finally:
            mend()
        assert names(run_dir) == [1]
        saver.save_last(state.train(5))
    assert saved(run_dir, 5) == {5.0}
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_00000001", "step_00000005"]


def die_while_writing(run_dir: Path, point: str) -> None:
    """Save once in a child process, then kill it with -9 within the next save."""
    from distlora.loading import tensor_files

    def die(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    state = State()
    saver = make_saver(run_dir, state)
    saver.save(state.train(1))
    saver.wait()
    if point == "in a tensor":
        tensor_files._HashedFile.write_piece = die  # type: ignore[method-assign]
    elif point == "before the manifest":
        write_json = atomic_io.write_json
        atomic_io.write_json = lambda path, value: die() if path.name == "manifest.json" else write_json(path, value)
    elif point == "while syncing":
        atomic_io.sync = die
    else:
        rename, count = Path.rename, 0

        def rename_or_die(self: Path, target: Path) -> Path:
            nonlocal count
            count += 1
            return die() or self if count == 2 else rename(self, target)

        Path.rename = rename_or_die  # type: ignore[method-assign]
    # The same step again: there is an older folder of that name, as after a damaged one was resumed from.
    saver.save(state.train(1 if point == "between two renames" else 2))
    saver.wait()


@pytest.mark.parametrize("point", ["in a tensor", "before the manifest", "while syncing", "between two renames"])
def test_killed_writer_leaves_the_older_checkpoint(tmp_path: Path, point: str) -> None:
    child = multiprocessing.get_context("fork").Process(target=die_while_writing, args=(tmp_path, point))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    expected = {".step_00000001.old", ".step_00000001.tmp"} if "renames" in point else {".step_00000002.tmp"}
    assert left == expected | (set() if "renames" in point else {"step_00000001"})
    found, damaged = choose(tmp_path / "checkpoints", SINGLE)
    assert (found, damaged) == (tmp_path / "checkpoints" / "step_00000001", [])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert saved(tmp_path, 1) == {1.0}


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    state = State()
    losses = {0: 0.5, 1: 4.0, 2: 2.0, 3: 3.0, 5: 2.0, 6: float("nan")}
    with make_saver(tmp_path, state) as saver:
        for step in range(1, 8):
            progress = state.train(step)
            progress.evaluations = {at: loss for at, loss in losses.items() if at <= step}
            saver.save(progress)
        saver.wait()
    assert names(tmp_path) == [2, 6, 7]


def test_damaged_checkpoint_keeps_older_ones(tmp_path: Path) -> None:
    state, said = State(), []
    with make_saver(tmp_path, state, said) as saver:
        for step in (1, 2):
            saver.save(state.train(step))
            saver.wait()
        flip(step_folder(tmp_path / "checkpoints", 2) / TRAINER_NAME)
        saver.save(state.train(3))
        saver.wait()
        assert names(tmp_path) == [1, 2, 3], "two whole ones: 3 and 1"
        assert said == [
            "WARNING: checkpoint step_00000002 is damaged (trainer.safetensors is not what was saved); older ones are "
            "kept instead"
        ]
        saver.save(state.train(4))
        saver.wait()
    assert names(tmp_path) == [3, 4]
    assert newest(tmp_path / "checkpoints") == (step_folder(tmp_path / "checkpoints", 4), [])


def choose_on(ranks: Ranks, *, checkpoints: Path) -> str:
    try:
        found, lines = choose(checkpoints, ranks)
    except UserError as error:
        return str(error)
    return f"{found} {lines}"


def test_start_resumes_from_a_whole_checkpoint_or_is_refused(world: World, tmp_path: Path) -> None:
    state, checkpoints = State(), tmp_path / "checkpoints"
    with make_saver(tmp_path, state) as saver:
        for step in (1, 2):
            saver.save_last(state.train(step))
    whole = step_folder(checkpoints, 2)
    for _ in range(2):
        newer = step_folder(checkpoints, 3)
        newer.mkdir()
        first, second = world.run(2, choose_on, checkpoints=checkpoints)
        assert (second, newer.exists()) == (f"{whole} []", False)
        assert "step_00000003 is damaged (manifest.json is missing) and was not used" in first
    kept = {"step_00000001", "step_00000002", "unused_step_00000003", "unused_step_00000003_2"}
    for step in (1, 2):
        (step_folder(checkpoints, step) / WEIGHTS).rename(tmp_path / f"{step}")
    refused = world.run(2, choose_on, checkpoints=checkpoints)
    assert all("no checkpoint in" in message and "move it out of the run folder" in message for message in refused)
    assert all(f"step_0000000{step} is damaged ({WEIGHTS} is missing)" in refused[0] for step in (1, 2))
    assert {path.name for path in checkpoints.iterdir()} == kept
    (tmp_path / "1").rename(step_folder(checkpoints, 1) / WEIGHTS)
    assert choose(checkpoints, SINGLE)[0] == step_folder(checkpoints, 1)


def test_manifest_that_names_files_elsewhere_is_a_fault(tmp_path: Path) -> None:
    with make_saver(tmp_path, state := State()) as saver:
        saver.save_last(state.train(1))
    (tmp_path / "checkpoints" / "step_00000001" / "manifest.json").write_text('{"files": {"../secret": "00"}}')
    found = fault(tmp_path / "checkpoints" / "step_00000001")
    assert found is not None
    assert "'../secret' is not a file of this folder" in found


ROWS, COLUMNS = 7, 5000
"""Of a tensor that three ranks cut into 3, 3 and 1 rows."""


class CutState(State):
    """A state with a tensor that is sharded over the ranks."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        assert ranks.group is not None
        mesh = DeviceMesh.from_group(ranks.group, "cpu")
        self.whole = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)
        self.local = self.whole.chunk(ranks.world)[ranks.rank].clone()
        self.weights["cut"] = DTensor.from_local(
            self.local, mesh, [Shard(0)], run_check=False, shape=self.whole.shape, stride=self.whole.stride()
        )

    def train(self, step: int) -> RunProgress:
        self.local += 1
        cut = self.weights.pop("cut")
        progress = super().train(step)
        self.weights["cut"] = cut
        return progress


def save_on(ranks: Ranks, *, run_dir: Path, in_background: bool, cut: bool) -> list[str]:
    """Return the outcomes on a rank of a save, a last save, and one on a disk that has come back."""
    state = CutState(ranks) if cut else State()
    outcomes = []
    with (
        pytest.MonkeyPatch.context() as patch,
        make_saver(run_dir, state, ranks=ranks, in_background=in_background) as saver,
    ):
        patch.setattr("distlora.parallel.ranks.PIECE_BYTES", 4096)  # Of a rank's rows of 60 kB.
        saver.save(state.train(1))
        saver.wait()
        outcomes.append(f"saved {saver.saved_step}")
        saver._backend.barrier()
        if ranks.rank == 0:
            run_dir.rename(run_dir.with_name("elsewhere"))
        saver.save(state.train(2))
        for attempt in (saver.wait, lambda: saver.save_last(state.train(3))):
            try:
                attempt()
            except SaveError as error:
                outcomes.append("failed" if "could not" in str(error) else str(error))
        if ranks.rank == 0:
            run_dir.with_name("elsewhere").rename(run_dir)
        saver.save_last(state.train(4))
        outcomes.append(f"saved {saver.saved_step}")
    return outcomes


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("in_background", [True, False])
def test_all_ranks_know_the_saved_step(world: World, tmp_path: Path, in_background: bool, cut: bool) -> None:
    (tmp_path / "run").mkdir()
    outcomes = world.run(3, save_on, run_dir=tmp_path / "run", in_background=in_background, cut=cut)
    assert outcomes == [["saved 1", "failed", "failed", "saved 4"]] * 3
    tensors = safetensors.torch.load_file(step_folder(tmp_path / "run" / "checkpoints", 4) / WEIGHTS)
    if cut:
        whole = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)
        assert torch.equal(tensors.pop("cut"), whole + 4)
    assert {value for tensor in tensors.values() for value in tensor.flatten().tolist()} == {4.0}
