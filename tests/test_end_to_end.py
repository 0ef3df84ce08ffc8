"""The commands that a user types, as processes: `distlora train` on chats, a worker killed by -9, and `resume`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

from small_models import read_metrics

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


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker by its command line in /proc")
def test_a_worker_killed_with_9_is_named_and_resume_gives_the_uninterrupted_adapter(
    folders: Path, tmp_path: Path
) -> None:
    write_chats(tmp_path / "chats.jsonl")
    settings = ("train.max_steps=30", "train.save_every=2", "tracker=none")
    whole = train_command(folders, tmp_path / "chats.jsonl", tmp_path / "whole", *settings)
    assert subprocess.run(whole, capture_output=True, env=environment()).returncode == 0

    command = train_command(folders, tmp_path / "chats.jsonl", tmp_path / "killed", *settings)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    ) as run:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "killed").glob("checkpoints/step_*")):
            assert time.monotonic() < deadline, "no checkpoint appeared in time"
            assert run.poll() is None, "the run ended before its first checkpoint"
            time.sleep(0.02)
        workers = [
            child
            for child in psutil.Process(run.pid).children(recursive=True)
            if any("worker_entry" in part for part in child.cmdline())
        ]
        rank_1 = next(worker for worker in workers if worker.environ().get("RANK") == "1")
        rank_1.send_signal(signal.SIGKILL)
        assert run.stdout is not None
        output = run.stdout.read()
    assert run.returncode == 1
    assert "rank 1" in output, output
    assert "SIGKILL" in output, output
    assert not (tmp_path / "killed" / "adapter").exists()

    resumed = subprocess.run(
        [DISTLORA, "resume", tmp_path / "killed"], capture_output=True, text=True, env=environment()
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "continuing from step_" in resumed.stdout
    adapters = [
        safetensors.torch.load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "killed")
    ]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


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
