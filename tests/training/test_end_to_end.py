"""The commands that a user types, as processes: `distlora train` on chats, requests to stop, kills, and `resume`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distlora.config.file import as_mapping, load_config
from support.planned import assert_disk_as_planned
from support.small_models import read_metrics
from support.wandb_server import read_wandb_log
from tools.chaos import Campaign, Kill, train_command

Ended = subprocess.CompletedProcess[str]


def write_chats(path: Path) -> None:
    """Short conversations, the answer a function of the question."""
    words = ["list", "tuple", "dict", "set", "str", "bytes", "int", "float", "complex", "bool", "range", "slice"]
    with path.open("w") as file:
        for index in range(240):
            word = words[index % len(words)]
            messages = [
                {"role": "user", "content": f"What is {word} number {index}?"},
                {"role": "assistant", "content": f"{word} is a built-in type of Python."},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}


KILLS = (
    Kill("SIGUSR1", "evaluation", delay=0.0, rank=1, manner="to one rank"),
    Kill("-9 of one rank", "step", delay=0.1, rank=1, manner=""),
    Kill("-9 of all", "saving", delay=0.0, rank=0, manner=""),
    Kill("SIGTERM", "step", delay=0.05, rank=0, manner="twice"),
)


def train(run_dir: Path, folders: Path, num_kills: int) -> list[str]:
    """Return the README's line; plan=auto may choose only when layers are recomputed and gathered."""
    data = run_dir.parent / "chats.jsonl"
    write_chats(data)
    command = train_command(run_dir, folders, num_kills, data=data, global_batch=12, tracker="wandb")
    return [*command, "plan=auto", "parallel=fsdp2", "parallel.resident_blocks=0"]


def run_to_the_end(command: list[str], place: Path) -> Ended:
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=place)


@pytest.fixture(scope="module")
def whole(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Return the folder of a run that nothing stopped, and its command that has ended."""
    place = tmp_path_factory.mktemp("end_to_end")
    return place / "whole", run_to_the_end(train(place / "whole", folders, len(KILLS)), place)


@pytest.mark.ci
def test_the_readme_line_trains_on_chats_and_says_what_it_does(whole: tuple[Path, Ended]) -> None:
    run_dir, finished = whole
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "Traceback" not in finished.stdout + finished.stderr
    assert "Warning" not in finished.stdout + finished.stderr
    # The step whose memory is measured lets go nothing of earlier ones, of which torch would say so, nor does Kineto
    # say that it measures.
    assert not re.search("unknown size|USDT", finished.stdout + finished.stderr)
    (memory,) = [line for line in read_metrics(run_dir) if "memory/peak" in line]
    assert memory["memory/planned"] == pytest.approx(memory["memory/peak"], rel=0.05)
    evaluations = [line["eval_loss"] for line in read_metrics(run_dir) if "eval_loss" in line]
    assert evaluations[-1] < evaluations[0] - 0.5
    chosen = re.findall(r"^chosen: (\S+): ", finished.stdout, re.MULTILINE)
    assert chosen == ["train.accumulate=block", "train.checkpointing=none", "quant.dense_layers=3"]
    config, plan = load_config(run_dir), json.loads((run_dir / "plan.json").read_text())
    assert (config.train.accumulate, config.train.checkpointing) == ("block", "none")
    assert plan["settings"]["train"] == as_mapping(config)["train"]
    assert "\nplan: " in finished.stdout
    produced = {path.name for path in run_dir.iterdir()}
    expected = {
        "config.yaml",
        "plan.json",
        "compiled.json",
        "data.json",
        "metrics.jsonl",
        "summary.json",
        "logs",
        "wandb",
        "checkpoints",
        "adapter",
    }
    assert expected <= produced
    assert not (run_dir.parent / "outputs").exists()
    folders_of_one_user = [run_dir, *(run_dir.parent / "cache").glob("*/..")]
    assert {path.stat().st_mode & 0o777 for path in folders_of_one_user} == {0o700}
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["eval_loss"] == evaluations[-1]
    # Every layer is dense, and so gathered once: what a step gathers is not quantized.
    assert summary["gathered_bytes_per_step"] == summary["gathered_bytes_per_step_bf16"] > 0
    assert wandb_exit_codes(run_dir) == [0]
    assert_disk_as_planned(run_dir, ranks=2)


@pytest.mark.ci
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes by their command lines in /proc")
def test_a_run_that_is_stopped_and_killed_equals_the_uninterrupted_run(
    whole: tuple[Path, Ended], folders: Path
) -> None:
    """A short part of `make chaos`; `Campaign` checks what must hold after each kill and in the end."""
    expected, uninterrupted = whole
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    run_dir = expected.parent / "killed"
    campaign = Campaign(run_dir, expected, train(run_dir, folders, len(KILLS)), KILLS)
    campaign.run()
    assert campaign.problems == []
    assert all(kill.at for kill in KILLS), "the run ended before the last kill"
    assert all(kill.seconds_lost is not None for kill in KILLS)
    assert not (run_dir / "stopped.json").exists()
    assert [kill.ended for kill in KILLS] == ["75", "restarted", "-9", "75"]
    assert [kill.steps_repeated for kill in KILLS if kill.kind.startswith("SIG")] == [0, 0], "a request saves all steps"
    stopped = re.search(r"stopping on SIGUSR1: step (\d+) is saved\n", campaign.output_of_start(1))
    assert stopped is not None, campaign.output_of_start(1)
    newest = f"step_{int(stopped[1]):08d}"
    assert f"continue from {newest} with: distlora resume {run_dir}\n" in campaign.output_of_start(1)
    assert f"continuing from {newest}" in campaign.output_of_start(2)
    assert "SIGKILL" in campaign.output_of_start(2), "the rank that died is named"
    assert "and quantized and cached" in uninterrupted.stdout
    assert "from the quantized-weights cache in" in campaign.output_of_start(2)
    codes = wandb_exit_codes(run_dir)
    assert (codes[0], codes[-2:]) == (75, [75, 0])


def wandb_exit_codes(run_dir: Path) -> list[int]:
    """Return the exit codes of a run's starts from wandb's logs."""
    logs = [read_wandb_log(folder) for folder in sorted((run_dir / "wandb").glob("offline-run-*"))]
    return [record.exit.exit_code for log in logs for record in log if record.WhichOneof("record_type") == "exit"]


@pytest.mark.slow
def test_sigterm_twice_to_every_process_saves_and_ends_with_75(folders: Path, tmp_path: Path) -> None:
    """As SLURM's scancel does: wandb's own process gets it too."""
    run_dir = tmp_path / "run"
    with subprocess.Popen(
        train(run_dir, folders, 50), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    ) as run:
        deadline = time.monotonic() + 120
        while not list(run_dir.glob("checkpoints/step_*")):
            assert time.monotonic() < deadline, "no checkpoint appeared in time"
            assert run.poll() is None, "the run ended before its first checkpoint"
            time.sleep(0.02)
        processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        assert any("wandb" in process.name() for process in processes)
        for _ in range(2):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        output, _ = run.communicate(timeout=120)
    assert run.returncode == 75, output
    assert json.loads((run_dir / "stopped.json").read_text())["signal"] == "SIGTERM"
    assert wandb_exit_codes(run_dir)[-1] == 75


@pytest.mark.ci
def test_the_worker_needs_only_torch_triton_transformers_and_safetensors(folders: Path, tmp_path: Path) -> None:
    """The composed config and the tokenized cache are all that a bare GPU machine needs."""
    from support.small_models import make_run

    make_run(tmp_path / "run", folders, train={"max_steps": 1, "global_batch": 3}, tracker={"wandb": True})
    code = (
        "import sys\n"
        "for name in ('hydra', 'omegaconf', 'datasets', 'wandb', 'deepspeed', 'bitsandbytes', 'peft', 'rich',\n"
        "             'accelerate', 'liger_kernel', 'distlora_launcher'):\n"
        "    sys.modules[name] = None\n"  # What import finds for a package that must not be there.
        "sys.argv = ['train', sys.argv[1]]\n"
        "import runpy; runpy.run_module('distlora.training.worker', run_name='__main__')\n"
    )
    finished = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True, cwd="/")
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert "wandb is not installed" in finished.stdout
