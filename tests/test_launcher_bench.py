"""`distlora bench`: the arguments that it refuses, and the worker that it starts with its request."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distlora.bench.requests import CheckpointBench, LoadBench, MemoryBench
from distlora.system.command_worker import encode_call
from distlora_launcher.cli import main
from distlora_launcher.cli.bench import BENCHES
from distlora_launcher.launch.workers import ON_CPU


class BecameError(Exception):
    """Stands in for the process that os.execve starts."""

    def __init__(self, executable: str, command: list[str], environment: dict[str, str]) -> None:
        assert command[:2] == [executable, "-m"]
        self.module, self.arguments, self.environment = command[2], command[3:], environment


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def execve(executable: str, command: list[str], environment: dict[str, str]) -> None:
        raise BecameError(executable, command, environment)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def started(*words: str) -> BecameError:
    with pytest.raises(BecameError) as became:
        main.main(["bench", *words])
    return became.value


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main.main(["bench", *words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


def test_offline_compiles_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    worker = started("kernels", "--offline", "--arch", "90", "100", "--only", "linear M=16", "--json")
    assert worker.module == "distlora_kernels.offline"
    assert worker.arguments == ["--arch", "90", "100", "--only", "linear M=16", "--json"]
    assert "TRITON_INTERPRET" not in worker.environment
    assert started("kernels", "--offline").arguments == []


def test_kernels_need_a_gpu_and_get_their_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = error_of(capsys, "kernels")
    assert "this machine has no GPU" in message
    assert "distlora bench kernels --offline" in message
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    worker = started("kernels", "--only", "dequantize")
    assert (worker.module, worker.arguments) == ("distlora_kernels.bench", ["--only", "dequantize"])


def test_a_worker_gets_the_request_of_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ON_CPU:
        monkeypatch.setenv(name, "the user's")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    environment, out = {"OMP_WAIT_POLICY": "PASSIVE"}, str(tmp_path / "new")
    cases: list[tuple[list[str], object]] = [
        (["checkpoint", "--r", "8,16"], CheckpointBench(r=(8, 16))),
        (["memory", "--ranks=2,1", "--json"], MemoryBench(json=True)),
        (["load", "--layers", "2", "--out", out], LoadBench(layers=2, environment=environment, out=out)),
    ]
    for words, request in cases:
        worker = started(*words)
        assert worker.module == "distlora.system.command_worker"
        assert worker.arguments == [encode_call(f"distlora.bench.{words[0]}:main", request)]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["load", "--layers", "0"], "--layers=0 is not a positive number; write --layers 1 or more"),
        (["checkpoint", "--r", "0"], "--r=0"),
        (["checkpoint", "--tokens", "0"], "--tokens=0 is not a positive number"),
        (["load", "--ranks", "two"], "--ranks=two"),
        (["load", "--out", "/proc/none"], "--out=/proc/none: cannot write"),
        (["memory", "--models=12M"], "--models=12M is not a known size (did you mean '10M'?); write 10M, "),
        (["kernel"], "did you mean 'kernels'"),
        (["kernels", "--offline", "--onyl", "x"], "--only"),
        (["kernels", "--offline", "--arch", "70"], "--arch 70 is not known; known are 80, 89, 90, 100"),
        (["kernels", "--offline", "--arch", "H100"], "--arch"),
        (["kernels", "--ofline"], "--offline"),
    ],
)
def test_mistakes_are_named(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, *words)
    assert named in message
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_every_bench_has_a_usage_that_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "--help"]) == 0
    names = capsys.readouterr().out
    for name in BENCHES:
        assert f"\n  {name} " in names
        assert main.main(["bench", name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: distlora bench {name}")
    assert main.main(["bench", "kernels", "--help"]) == 0
    assert "90 (H100, H200)" in capsys.readouterr().out
    assert main.main(["bench"]) == 2
    code = (
        "import sys, distlora_launcher.cli.bench as b; [b.main([name, '--help']) for name in b.BENCHES]; "
        "print({'torch', 'triton'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("set()\n")
