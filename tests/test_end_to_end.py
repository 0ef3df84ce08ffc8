"""The commands that a user types, as processes: `distlora train` on chats, a request to stop, kill -9, and `resume`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

from small_models import read_metrics
from wandb_logs import read_wandb_log

DISTLORA = Path(sys.executable).with_name("distlora")


def write_chats(path: Path) -> None:
    """Short conversations, the answer a function of the question."""
    words = ["list", "tuple", "dict", "set", "str", "bytes", "int", "float", "complex", "bool", "range", "slice"]
    with path.open("w") as file:
        for index in range(120):
            word = words[index % len(words)]
            messages = [
                {"role": "user", "content": f"What is {word} number {index}?"},
                {"role": "assistant", "content": f"{word} is a built-in type of Python."},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def train_command(folders: Path, data: Path, run_dir: Path, *extra: str) -> list[str]:
    return [
        str(DISTLORA),
        "train",
        f"model.path={folders / 'llama'}",
        f"data.path={data}",
        "recipe=qlora",
        "cluster.gpus_per_node=2",
        "data.sequence_length=128",
        f"data.cache_dir={run_dir.parent / 'cache'}",
        "optim.lr=1e-2",
        f"run_dir={run_dir}",
        *extra,
    ]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}


def test_the_readme_line_trains_on_chats_and_says_what_it_does(folders: Path, tmp_path: Path) -> None:
    write_chats(tmp_path / "chats.jsonl")
    command = train_command(folders, tmp_path / "chats.jsonl", tmp_path / "run", "train.epochs=4")
    finished = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "Traceback" not in finished.stdout + finished.stderr
    assert "Warning" not in finished.stdout + finished.stderr
    evaluations = [line["eval_loss"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line]
    assert evaluations[-1] < evaluations[0] - 0.5
    produced = {path.name for path in (tmp_path / "run").iterdir()}
    expected = {"config.yaml", "data.json", "metrics.jsonl", "summary.json", "logs", "wandb", "checkpoints", "adapter"}
    assert expected <= produced
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "chats.jsonl", "run"], "no outputs/ folder"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_loss"] == evaluations[-1]
    assert summary["gathered_bytes_per_step"] < summary["gathered_bytes_per_step_bf16"]


@contextlib.contextmanager
def once_saved(command: Sequence[str | Path], run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A started command, as soon as a checkpoint of its own is there."""
    there = set(run_dir.glob("checkpoints/step_*"))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    ) as run:
        deadline = time.monotonic() + 120
        while not set(run_dir.glob("checkpoints/step_*")) - there:
            assert time.monotonic() < deadline, "no checkpoint appeared in time"
            assert run.poll() is None, "the run ended before its first checkpoint"
            time.sleep(0.02)
        yield run


def rank_1_of(run: subprocess.Popen[str]) -> psutil.Process:
    workers = [
        child
        for child in psutil.Process(run.pid).children(recursive=True)
        if any("worker_entry" in part for part in child.cmdline())
    ]
    return next(worker for worker in workers if worker.environ().get("RANK") == "1")


def wandb_exit_codes(run_dir: Path) -> list[int]:
    """How the starts of a run ended, by wandb's own logs."""
    logs = [read_wandb_log(folder) for folder in sorted((run_dir / "wandb").glob("offline-run-*"))]
    return [record.exit.exit_code for log in logs for record in log if record.WhichOneof("record_type") == "exit"]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker by its command line in /proc")
def test_a_run_that_was_asked_to_stop_and_a_worker_of_which_was_killed_is_the_uninterrupted_run(
    folders: Path, tmp_path: Path
) -> None:
    write_chats(tmp_path / "chats.jsonl")
    settings = ("train.max_steps=30", "train.save_every=2")
    whole = train_command(folders, tmp_path / "chats.jsonl", tmp_path / "whole", *settings, "tracker=none")
    assert subprocess.run(whole, capture_output=True, env=environment()).returncode == 0

    run_dir = tmp_path / "stopped"
    with once_saved(train_command(folders, tmp_path / "chats.jsonl", run_dir, *settings), run_dir) as run:
        rank_1_of(run).send_signal(signal.SIGUSR1)
        output, _ = run.communicate(timeout=120)
    assert run.returncode == 75, output
    record = json.loads((run_dir / "stopped.json").read_text())
    step = record["step"]
    assert record["signal"] == "SIGUSR1"
    assert (run_dir / record["checkpoint"] / "manifest.json").is_file()
    assert f"asked to stop by SIGUSR1: step {step} is saved\n" in output
    assert f"continue from step_{step:08d} with: distlora resume {run_dir}\n" in output
    assert not (run_dir / "adapter").exists()
    assert wandb_exit_codes(run_dir) == [75]

    with once_saved([DISTLORA, "resume", run_dir], run_dir) as run:
        rank_1_of(run).send_signal(signal.SIGKILL)
        output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    assert f"continuing from step_{step:08d}" in output
    assert "SIGKILL" in output, "the rank that died is named"
    assert not (run_dir / "stopped.json").exists()
    adapters = [
        safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (tmp_path / "whole", run_dir)
    ]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    losses = [
        [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]
        for folder in (tmp_path / "whole", run_dir)
    ]
    assert losses[0] == losses[1], "each step once, with the same numbers"


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [False, True])
def test_sigterm_to_the_command_or_twice_to_every_process_saves_and_ends_with_75(
    folders: Path, tmp_path: Path, everyone: bool
) -> None:
    """As `kill` does, and as SLURM's scancel: wandb's own process gets it too."""
    write_chats(tmp_path / "chats.jsonl")
    run_dir = tmp_path / "run"
    command = train_command(folders, tmp_path / "chats.jsonl", run_dir, "train.max_steps=200", "train.save_every=2")
    with once_saved(command, run_dir) as run:
        processes = [psutil.Process(run.pid)]
        if everyone:
            processes += processes[0].children(recursive=True)
            assert any("wandb" in process.name() for process in processes)
        for _ in range(1 + everyone):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        output, _ = run.communicate(timeout=120)
    assert run.returncode == 75, output
    assert json.loads((run_dir / "stopped.json").read_text())["signal"] == "SIGTERM"
    assert wandb_exit_codes(run_dir)[-1] == 75


def test_the_worker_starts_where_only_torch_triton_transformers_and_safetensors_are(
    folders: Path, tmp_path: Path
) -> None:
    """The composed config and the tokenized cache are all that a bare GPU machine needs."""
    from small_models import make_run

    make_run(tmp_path / "run", folders, train={"max_steps": 2}, tracker={"name": "wandb"})
    code = (
        "import sys\n"
        "for name in ('hydra', 'omegaconf', 'datasets', 'wandb', 'deepspeed', 'bitsandbytes', 'peft', 'rich',\n"
        "             'accelerate', 'liger_kernel', 'distlora_launcher'):\n"
        "    sys.modules[name] = None\n"  # What import finds for a package that must not be there.
        "sys.argv = ['train', sys.argv[1]]\n"
        "import runpy; runpy.run_module('distlora.train', run_name='__main__')\n"
    )
    finished = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True, cwd="/")
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert "wandb is not installed" in finished.stdout
