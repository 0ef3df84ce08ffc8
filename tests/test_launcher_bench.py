"""`distlora bench`: what it refuses, and which process it becomes."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distlora.bench import load, processes
from distlora.bench.load import Figures
from distlora_launcher.cli import main
from distlora_launcher.cli.bench import BENCHES
from distlora_launcher.launch.workers import ON_CPU


class BecameError(Exception):
    """Stands in for the process that os.execve makes: its module, arguments and environment."""

    def __init__(self, executable: str, command: list[str], environment: dict[str, str]) -> None:
        assert command[:2] == [executable, "-m"]
        self.module, self.arguments, self.environment = command[2], command[3:], environment


@pytest.fixture(autouse=True)
def become(monkeypatch: pytest.MonkeyPatch) -> None:
    def execve(executable: str, command: list[str], environment: dict[str, str]) -> None:
        raise BecameError(executable, command, environment)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main.main(["bench", *words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


def test_offline_compiles_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BecameError) as became:
        main.main(["bench", "kernels", "--offline", "--arch", "90", "100", "--only", "linear M=16", "--json"])
    assert became.value.module == "distlora_kernels.offline"
    assert became.value.arguments == ["--only=linear M=16", "--json", "--arch", "90", "100"]
    assert "TRITON_INTERPRET" not in became.value.environment
    with pytest.raises(BecameError) as became:
        main.main(["bench", "kernels", "--offline"])
    assert became.value.arguments == []


def test_without_a_gpu_there_is_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "kernels")
    assert "this machine shows no GPU" in message
    assert "distlora bench kernels --offline" in message


def test_with_a_gpu_the_benchmark_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(BecameError) as became:
        main.main(["bench", "kernels", "--only", "dequantize"])
    assert (became.value.module, became.value.arguments) == ("distlora_kernels.bench", ["--only", "dequantize"])


def test_the_others_hand_their_options_on() -> None:
    for words, module, arguments in (
        (["checkpoint", "--r", "8,16"], "distlora.bench.checkpoint", ["--r=8,16", "--rounds=4"]),
        (["memory"], "distlora.bench.against_plan", ["--models=10M,100M", "--ranks=1,2"]),
    ):
        with pytest.raises(BecameError) as became:
            main.main(["bench", *words])
        assert became.value.module == module
        assert became.value.arguments[: len(arguments)] == arguments


def test_load_needs_no_gpu_and_has_ours_as_workers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ON_CPU:
        monkeypatch.setenv(name, "the user's")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    default = ["--rounds=3", "--ranks=1,2", '--environment={"OMP_WAIT_POLICY": "PASSIVE"}']
    for words, arguments in (([], ["--layers=14", *default]), (["--layers", "2"], ["--layers=2", *default])):
        with pytest.raises(BecameError) as became:
            main.main(["bench", "load", *words])
        assert (became.value.module, became.value.arguments) == ("distlora.bench.load", arguments)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["load", "--layers", "0"], "--layers=0 is no count; write --layers 1 or more"),
        (["load", "--rounds", "0"], "--rounds=0 is no count"),
        (["checkpoint", "--r", "0"], "--r=0 are no positive numbers"),
        (["checkpoint", "--tokens", "0"], "--tokens=0 is no count"),
        (["load", "--ranks", "two"], "--ranks=two are no positive numbers"),
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


def test_each_subject_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "--help"]) == 0
    subjects = capsys.readouterr().out
    for name in BENCHES:
        assert f"\n  {name} " in subjects
        assert main.main(["bench", name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: distlora bench {name}")
    assert main.main(["bench", "kernels", "--help"]) == 0
    assert "90 (H100, H200)" in capsys.readouterr().out
    assert main.main(["bench"]) == 2


def test_the_command_needs_no_torch() -> None:
    code = (
        "import sys, distlora_launcher.cli.bench as b; [b.main([name, '--help']) for name in b.BENCHES]; "
        "print({'torch', 'triton'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("set()\n")


def test_results_go_to_a_folder_that_can_be_written_to(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(BecameError) as became:
        main.main(["bench", "load", "--out", str(tmp_path / "new"), "--json"])
    assert became.value.arguments[-2:] == ["--json", f"--out={tmp_path / 'new'}"]
    (tmp_path / "file").touch()
    assert "is a file; set another --out" in error_of(capsys, "load", "--out", str(tmp_path / "file"))


def test_only_our_processes_of_load_have_what_workers_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OF_THE_USER", "own")
    monkeypatch.delenv("OF_WORKERS", raising=False)
    given = {"OF_THE_USER": "changed", "OF_WORKERS": "given"}
    found = []

    class Process:
        exitcode = 0

        def __init__(self, target: Callable[..., None], args: tuple[Any, ...]) -> None:
            *_, self.results = args
            self.name = target.__name__

        def start(self) -> None:
            found.append((self.name, os.environ["OF_THE_USER"], os.environ.get("OF_WORKERS")))
            self.results.put((0, Figures(1.0, 1.0, 1, 1, from_cache=len(found) == 3)))

        def is_alive(self) -> bool:
            return False

    context = SimpleNamespace(Queue=queue.Queue, Process=Process)
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda method: context)
    starts = list(load.rounds_of(tmp_path / "model", [1], 1, given))
    assert [start.way for start in starts] == ["cold", "filling", "cached", "peer"]
    assert found == [("ours", "changed", "given")] * 3 + [("transformers_and_bitsandbytes", "own", None)]
    assert (os.environ["OF_THE_USER"], "OF_WORKERS" in os.environ) == ("own", False)
