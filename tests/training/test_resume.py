"""A run that was stopped, at a save or by kill -9, and then resumed is the run that was never stopped."""

from __future__ import annotations

import functools
import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch

from distlora.config import UserError
from distlora.data.prepare import prepare_run
from distlora.parallel import Ranks
from distlora.run_folder.layout import compiled_before, step_of, steps
from distlora.training import worker
from distlora_kernels import native
from distlora_launcher.launch.local import is_prepared
from support.closeness import adapter_of, assert_adapters_close, assert_losses_close, assert_same_run, figures_of
from support.runs import SINGLE, run_until
from support.small_disks import fill, small_disk
from support.small_models import make_run, read_metrics, write_model_folder, write_text_file
from support.tiers import ci
from support.worlds import World

SETTINGS = {"max_steps": 9, "save_every": 2, "eval_every": 3, "log_every": 1, "keep": 3, "global_batch": 6}
SETTINGS |= {"micro_batch": 6}


def run_compiled_until(ranks: Ranks, *, cxx: str, run_dir: Path, stop_before: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", cxx)
        run_until(ranks, run_dir=run_dir, stop_before=stop_before)


class Whole(NamedTuple):
    """The run that was never stopped."""

    folder: Path
    rows: dict[int, list[int]]
    """Of each step."""


@pytest.fixture(scope="module")
def whole(world: World, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Whole]:
    """Return the run that was never stopped on some ranks, made at the first use."""

    @functools.cache
    def make(size: int) -> Whole:
        folder = tmp_path_factory.mktemp("whole") / "run"
        make_run(folder, folders, train=SETTINGS)
        return Whole(folder, world.run(size, run_until, run_dir=folder, stop_before=None)[0])

    return make


@pytest.fixture(scope="module")
def stopped(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on one rank that was stopped after step 5, and saved after step 4."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    make_run(run_dir, folders, train=SETTINGS)
    run_until(SINGLE, run_dir=run_dir, stop_before=5)
    return run_dir


@pytest.mark.parametrize(("size", "stop_before"), [ci(1, 1), (2, 6), pytest.param(2, 5, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    world: World, folders: Path, tmp_path: Path, whole: Callable[[int], Whole], size: int, stop_before: int
) -> None:
    make_run(tmp_path / "stopped", folders, train=SETTINGS)
    world.run(size, run_until, run_dir=tmp_path / "stopped", stop_before=stop_before)
    assert not (tmp_path / "stopped" / "adapter").exists()
    world.run(size, run_until, run_dir=tmp_path / "stopped", stop_before=None)
    assert_same_run(tmp_path / "stopped", whole(size).folder)


KINDS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "hybrid experts": ("qwen3_next", {}),
    "muon": ("llama", {"optim": {"name": "muon"}, "adapter": {"r": 8, "use_dora": True}}),
    "dropout and noise": ("llama", {"adapter": {"lora_dropout": 0.3}, "train": {"neftune_alpha": 5.0}}),
}
"""Models, and settings beside SETTINGS."""


@pytest.mark.parametrize("kind", ["dropout and noise", *map(ci, ("hybrid experts", "muon"))])
def test_a_run_of_each_kind_resumes_bit_for_bit_on_two_ranks(
    world: World, folders: Path, tmp_path: Path, kind: str
) -> None:
    model, sections = KINDS[kind]
    train = SETTINGS | {"max_steps": 5} | sections.get("train", {})
    for name, stops in (("whole", [None]), ("stopped", [3, None])):
        make_run(tmp_path / name, folders, model, **sections | {"train": train})
        for stop in stops:
            world.run(2, run_until, run_dir=tmp_path / name, stop_before=stop)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.ci
@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(native.compiler() is None, reason="there is no C++ compiler")
def test_a_compiled_run_on_two_ranks_resumes_bit_for_bit(world: World, folders: Path, tmp_path: Path) -> None:
    """On ranks that lose their compiler, it goes on with train.compile=false, as the error says."""
    cxx = shlex.join(native.compiler() or [])
    for name, stops in (("whole", [None]), ("stopped", [3, None])):
        make_run(tmp_path / name, folders, train=SETTINGS | {"max_steps": 5})
        for stop in stops:
            world.run(2, run_compiled_until, cxx=cxx, run_dir=tmp_path / name, stop_before=stop)
            if stop is not None:
                shutil.copytree(tmp_path / name, tmp_path / "moved")
    assert compiled_before(tmp_path / "stopped") is compiled_before(tmp_path / "whole") is True
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    moved, config = tmp_path / "moved", tmp_path / "moved" / "config.yaml"
    text = config.read_text()
    assert text.count("compile: auto\n") == 1
    config.write_text(text.replace("compile: auto\n", "compile: false\n").replace("/stopped", "/moved"))
    run_until(SINGLE, run_dir=moved, stop_before=None)
    assert [line["step"] for line in read_metrics(moved) if "loss" in line] == [1, 2, 3, 4, 5]


@pytest.mark.ci
def test_three_ranks_then_two_then_four_see_the_rows_of_one_in_its_order(
    world: World, folders: Path, tmp_path: Path, whole: Callable[[int], Whole]
) -> None:
    moved = tmp_path / "moved"
    make_run(moved, folders, train=SETTINGS)
    made: dict[int, list[int]] = {}
    for size, stop_before, first in ((3, 5, 0), (2, 7, 4), (4, None, 6)):
        parts = world.run(size, run_until, run_dir=moved, stop_before=stop_before)
        assert all(part == parts[0] and min(part) == first for part in parts)
        made |= parts[0]
    assert made == whole(1).rows
    losses = [[v for _, name, v in figures_of(run) if "loss" in name] for run in (moved, whole(1).folder)]
    assert_losses_close(*losses)
    assert_adapters_close(adapter_of(moved), adapter_of(whole(1).folder))


@pytest.mark.ci
def test_part_of_an_epoch_with_a_warm_up_in_steps_resumes_bit_for_bit(folders: Path, tmp_path: Path) -> None:
    settings = {"max_steps": None, "epochs": 1.4, "global_batch": 8, "eval_every": "auto", "evals_per_epoch": 2}
    settings |= {"saves_per_epoch": 2, "keep": 9, "log_every": 1}
    runs = [tmp_path / "whole", tmp_path / "stopped"]
    write_text_file(tmp_path / "text.jsonl", 24)
    data = {"path": str(tmp_path / "text.jsonl")}
    for run in runs:
        make_run(run, folders, train=settings, optim={"warmup_steps": 3}, data=data)
    rows = json.loads((runs[0] / "data.json").read_text())["splits"]["train"]["rows"]
    epoch = -(-rows // 8)
    total = math.ceil(epoch * 7 / 5)
    order = run_until(SINGLE, run_dir=runs[0], stop_before=None)
    assert list(order) == list(range(total))
    assert sorted(row for step in range(epoch) for row in order[step]) == list(range(rows))
    due = sorted({math.ceil(number * epoch / 2) for number in (1, 2, 3)} & {*range(total + 1)} | {total})
    assert [step_of(folder) for folder in steps(runs[0] / "checkpoints")] == due
    lines = read_metrics(runs[0])
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, *due]
    assert [line["lr"] for line in lines if "lr" in line][:3] == pytest.approx([2e-3 / 3, 4e-3 / 3, 2e-3])
    run_until(SINGLE, run_dir=runs[1], stop_before=epoch + 1)
    run_until(SINGLE, run_dir=runs[1], stop_before=None)
    assert_same_run(runs[1], runs[0])


@pytest.mark.ci
def test_a_mixture_over_several_epochs_goes_on_in_the_middle_of_one(folders: Path, tmp_path: Path) -> None:
    documents = (folders / "text.jsonl").read_text().splitlines()
    sources = []
    for name, weight, part in (("a", 0.7, documents[10:16]), ("b", 0.3, documents[16:20])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
        sources.append({"path": str(tmp_path / f"{name}.jsonl"), "weight": weight})
    settings = SETTINGS | {"max_steps": None, "epochs": 2, "global_batch": 5, "micro_batch": 5}
    (tmp_path / "held_out.jsonl").write_text(documents[20])
    data = {"path": None, "sources": sources, "eval_fraction": 0.0, "eval_path": str(tmp_path / "held_out.jsonl")}
    for name in ("whole", "stopped"):
        make_run(tmp_path / name, folders, data=data, train=settings)
    order = run_until(SINGLE, run_dir=tmp_path / "whole", stop_before=None)
    epoch = len(order) // 2
    assert epoch > 3
    first, second = ([row for step in range(start, start + epoch) for row in order[step]] for start in (0, epoch))
    assert sorted(first) == sorted(second)
    assert first != second
    made = run_until(SINGLE, run_dir=tmp_path / "stopped", stop_before=epoch + 3)
    rest = run_until(SINGLE, run_dir=tmp_path / "stopped", stop_before=None)
    assert epoch < min(rest) < 2 * epoch
    assert made | rest == order
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_disk_that_is_full_for_a_while_changes_nothing_of_a_run(
    folders: Path,
    tmp_path: Path,
    whole: Callable[[int], Whole],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A save and the best fail in between."""
    with small_disk(tmp_path / "disk", 8192) as disk:
        make_run(disk / "run", folders, train=SETTINGS)
        train_step = worker.Trainer._train_step

        def with_troubles(self: worker.Trainer) -> None:
            step = self.trial.done
            if step in (5, 7):
                self.trial.hooks.save.__self__._finish()  # type: ignore[attr-defined]
            if step == 5:
                fill(disk)
            if step == 7:
                assert [step_of(path) for path in steps(disk / "run" / "checkpoints")] == [2, 4]
                (disk / "filler").unlink()
            train_step(self)

        monkeypatch.setattr(worker.Trainer, "_train_step", with_troubles)
        worker.run(disk / "run", SINGLE)
        assert_same_run(disk / "run", whole(1).folder)
        assert [step_of(path) for path in steps(disk / "run" / "checkpoints")] == [4, 8, 9]
    said = capsys.readouterr().out
    for what in ("after step 6 could not be saved", "after step 6, could not be written"):
        assert said.count(what) == 1


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, whole: Callable[[int], Whole], stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, tmp_path / "damaged")
    folder = steps(tmp_path / "damaged" / "checkpoints")[-1]
    assert folder.name == "step_00000004"
    content = bytearray((folder / "trainer.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "trainer.safetensors").write_bytes(content)
    run_until(SINGLE, run_dir=tmp_path / "damaged", stop_before=None)
    printed = capsys.readouterr().out
    assert "step_00000004 is damaged" in printed
    assert "continuing from step_00000002" in printed
    assert_same_run(tmp_path / "damaged", whole(1).folder)


def test_a_checkpoint_of_another_base_or_other_data_is_refused(folders: Path, tmp_path: Path) -> None:
    write_model_folder(tmp_path / "models" / "llama", "llama")
    (tmp_path / "models" / "text.jsonl").write_bytes((folders / "text.jsonl").read_bytes())
    make_run(tmp_path / "run", tmp_path / "models", train=SETTINGS)
    run_until(SINGLE, run_dir=tmp_path / "run", stop_before=5)
    config = tmp_path / "run" / "config.yaml"
    written = config.read_text()
    config.write_text(written.replace("  r: 8\n", "  r: 4\n").replace("  seed: 0\n", "  seed: 1\n"))
    with pytest.raises(UserError, match=r"made with adapter.r=8, train.seed=0, .* has adapter.r=4, train.seed=1"):
        run_until(SINGLE, run_dir=tmp_path / "run", stop_before=None)
    config.write_text(written)
    data = tmp_path / "run" / "data.json"
    original = data.read_text()
    data.write_text(json.dumps(json.loads(original) | {"cache": str(folders / "cache" / "other")}))
    with pytest.raises((UserError, FileNotFoundError), match="other"):
        run_until(SINGLE, run_dir=tmp_path / "run", stop_before=None)
    data.write_text(json.dumps(json.loads(original) | {"content": "0" * 64}))
    with pytest.raises(UserError, match="was trained on other data"):
        run_until(SINGLE, run_dir=tmp_path / "run", stop_before=None)
    data.write_text(original)
    weights = tmp_path / "models" / "llama" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, weights)
    with pytest.raises(UserError, match="another base model"):
        run_until(SINGLE, run_dir=tmp_path / "run", stop_before=None)


def test_a_run_of_one_step_is_warned_of(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"max_steps": None, "global_batch": 400, "micro_batch": 12}
    make_run(tmp_path / "run", folders, train=settings)
    run_until(SINGLE, run_dir=tmp_path / "run", stop_before=0)
    assert "WARNING: the whole run is one step, of " in capsys.readouterr().out


def resume(run_dir: Path) -> None:
    """Prepare and train as `distlora resume` does."""
    if not is_prepared(run_dir):
        prepare_run(run_dir)
    run_until(SINGLE, run_dir=run_dir, stop_before=None)


@pytest.mark.parametrize("edited", [ci(False), True])
def test_data_that_changes_before_a_resume_is_not_trained_on(
    folders: Path, tmp_path: Path, whole: Callable[[int], Whole], edited: bool
) -> None:
    """Neither with the cache, which holds the data as it was, nor without, when a resume waits for that data."""
    shutil.copytree(folders / "llama", tmp_path / "llama")
    data, original = tmp_path / "text.jsonl", (folders / "text.jsonl").read_bytes()
    data.write_bytes(original)
    run_dir = tmp_path / "run"
    make_run(run_dir, tmp_path, train=SETTINGS)
    run_until(SINGLE, run_dir=run_dir, stop_before=5)
    shutil.copytree(run_dir, tmp_path / "without")
    cleared = tmp_path / "without" / "config.yaml"
    cleared.write_text(cleared.read_text().replace(str(run_dir), str(tmp_path / "without")))

    first, rest = original.split(b"\n", 1)
    data.write_bytes(first.replace(b" the ", b" THE ") + b"\n" + rest if edited else original + b'{"text": "More."}\n')
    assert data.read_bytes() != original
    resume(run_dir)
    assert_same_run(run_dir, whole(1).folder)

    shutil.rmtree(tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(UserError, match=r"step_00000004 was trained on other data .* data.path have changed"):
            resume(tmp_path / "without")
    data.write_bytes(original)
    resume(tmp_path / "without")
    assert_same_run(tmp_path / "without", whole(1).folder)


def test_checkpoints_hold_adapter_state_alone_and_old_ones_go(whole: Callable[[int], Whole]) -> None:
    kept = steps(whole(1).folder / "checkpoints")
    assert [step_of(folder) for folder in kept] == [6, 8, 9]
    files = {path.name for path in kept[-1].iterdir()}
    assert files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "trainer.safetensors",
        "state.json",
        "manifest.json",
    }
    adapter_bytes = sum(tensor.nbytes for tensor in adapter_of(whole(1).folder).values())
    # fp32 weights and two Adam moments, and a few kilobytes of names and settings.
    assert sum(path.stat().st_size for path in kept[-1].iterdir()) < 3 * adapter_bytes + 64_000


def test_resuming_after_the_last_step_publishes_the_result_and_keeps_the_figures(
    tmp_path: Path, whole: Callable[[int], Whole]
) -> None:
    shutil.copytree(whole(1).folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    run_until(SINGLE, run_dir=tmp_path / "run", stop_before=None)
    assert_same_run(tmp_path / "run", whole(1).folder)
    before, after = (
        json.loads((folder / "summary.json").read_text()) for folder in (whole(1).folder, tmp_path / "run")
    )
    resident = "resident_memory_bytes"
    assert {**after, resident: 0} == {**before, resident: 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_fine_tuning_publishes_in_the_dtype_of_its_base(folders: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "models" / "llama"
    shutil.copytree(folders / "llama", source)
    AutoModelForCausalLM.from_pretrained(folders / "llama", dtype=dtype).save_pretrained(source)
    shutil.copy(folders / "text.jsonl", tmp_path / "models")
    sections = {"adapter": {"method": "full"}, "quant": {"method": "none"}, "train": {"max_steps": 2}}
    make_run(tmp_path / "run", tmp_path / "models", **sections)
    run_until(SINGLE, run_dir=tmp_path / "run", stop_before=None)
    tensors = safetensors.torch.load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
