"""first_gpu.py: dry runs without the packages that a GPU machine lacks; parts fail, wait and go on alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import first_gpu
import first_gpu_workers
import gpu_packages
import pytest
from first_gpu import DONE, FAILED, LEFT, Figures, Part, PartFailedError, Session, TimeUpError

SCRIPT = Path(first_gpu.__file__)
MISSING = (
    *("bitsandbytes", "datasets", "deepspeed", "gguf", "liger_kernel", "lm_eval", "mlflow", "optuna", "tensorboard"),
    *("trackio", "wandb"),
)
BLOCKER = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda _, name, *rest, **named: None if name.partition(".")[0] in {MISSING} else find(name, *rest, **named)
)
"""


@pytest.mark.ci
@pytest.mark.parametrize("command", ["train", "check", "compare"])
def test_every_part_of_a_dry_run_is_done_without_optional_packages(command: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    words = [sys.executable, SCRIPT, command, "--dry", "--out", tmp_path / "out", "--seconds", "1500"]
    words += ["--work", tmp_path / "work", "--packages", tmp_path / "none"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert finished.returncode == DONE, finished.stdout + finished.stderr
    records = json.loads((tmp_path / "out" / f"{command}.json").read_text())
    parts = [part.name for part in first_gpu.COMMANDS[command](True)]
    assert {name: record["status"] for name, record in records.items()} == dict.fromkeys(parts, "done")
    report = (tmp_path / "out" / f"{command}.md").read_text()
    expected = {"train": "| peak |", "check": "ours, fused", "compare": "distlora, NF4"}
    assert expected[command] in report
    again = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert again.stdout.count("done before") == len(parts)
    if command != "train":
        return
    # On a fresh machine only the records of the first call are left, beside the wheels.
    wanted = {name: record for name, record in records.items() if not name.startswith(("save", "profile"))}
    shutil.rmtree(tmp_path / "work")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "train.json").write_text(json.dumps(wanted))
    fresh = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert fresh.returncode == DONE, fresh.stdout + fresh.stderr
    assert fresh.stdout.count("done before") == len(wanted) == len(parts) - 2


def session_of(folder: Path, seconds: float = 60.0) -> Session:
    until = time.monotonic() + seconds
    return Session(command="check", out=folder, work=folder, dry=False, until=until, environment=os.environ)


def call_parts(folder: Path, parts: Sequence[Part], seconds: float) -> int:
    """Run the parts as a call of the command, which reads what earlier calls recorded."""
    path = folder / "check.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    return first_gpu.run_parts(session_of(folder, seconds), parts, records)


def test_a_part_that_fails_or_has_no_time_does_not_end_the_command(tmp_path: Path) -> None:
    heals = iter([ValueError("its weight is wrong"), TimeUpError("stopped after 9 s"), None])

    def mends(_: Session) -> Figures:
        if (fault := next(heals)) is not None:
            raise fault
        return {"row": {"tokens": 64}}

    parts = [Part(name="mends", run=mends), Part(name="good", run=lambda _: {"losses": [1.0]}, least=60)]

    def call(seconds: float) -> int:
        return call_parts(tmp_path, parts, seconds)

    assert call(100) == FAILED
    records = json.loads((tmp_path / "check.json").read_text())
    assert [records[part.name]["status"] for part in parts] == ["failed", "done"]
    assert "its weight is wrong" in (tmp_path / "check.md").read_text()
    assert call(30) == LEFT  # The time is up within the first part; the second is done.
    assert call(10) == LEFT  # Too little time to begin.
    assert call(100) == DONE
    assert "| tokens |" in (tmp_path / "check.md").read_text()


def test_parts_that_never_end_in_their_time_keep_no_other_from_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    now = [0.0]
    monkeypatch.setattr(first_gpu.time, "monotonic", lambda: now[0])

    def endless(session: Session, name: str) -> Figures:
        tried.append(name)
        now[0] = session.until
        raise subprocess.TimeoutExpired("endless", 1.0)

    def good(_: Session) -> Figures:
        tried.append("good")
        return {}

    def bad(_: Session) -> Figures:
        tried.append("bad")
        raise ValueError

    parts = [
        *(Part(name=name, run=partial(endless, name=name)) for name in ("first", "second")),
        Part(name="bad", run=bad),
        Part(name="good", run=good),
    ]
    codes = [call_parts(tmp_path, parts, 30.0) for _ in range(5)]
    # Those never tried; then the one whose time was up the fewest times; the failed one has its turn after these.
    assert tried == ["first", "second", "bad", "good", "first", "second", "first"]
    assert codes == [LEFT, LEFT, FAILED, FAILED, FAILED]


def test_without_compute_sanitizer_its_parts_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(first_gpu.shutil, "which", lambda _: None)
    parts = [part for part in first_gpu.check_parts(False) if part.name.startswith(("memcheck", "racecheck"))]
    assert call_parts(tmp_path, parts, 60.0) == DONE
    assert capsys.readouterr().out.splitlines()[-1].startswith("check: 8 skipped of 8 parts;")
    assert json.loads((tmp_path / "check.json").read_text())["memcheck, linear"]["status"] == "skipped"


def test_compute_sanitizer_watches_our_kernels_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(first_gpu.shutil, "which", lambda _: str(program))
    first_gpu.sanitizer(session_of(tmp_path), "racecheck", "linear")
    said = (tmp_path / "check.log").read_text()
    named = {word.removeprefix("kns=") for word in said.split() if word.startswith("kns=")}
    assert {"_linear_kernel", "_dx_kernel", "down_kernel", "add_partials", "_dequantize_kernel"} < named
    assert "philox" not in named  # A function within kernels, as torch has one.


def test_what_a_lost_work_folder_held_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def worker(_: Session, name: str, *, folder: str, **values: object) -> Figures:
        made.append(f"{name} {values['layers']}")
        Path(folder).mkdir()
        return {}

    monkeypatch.setattr(Session, "worker", worker)
    session = session_of(tmp_path)
    for _ in range(2):
        words = first_gpu.settings(session, first_gpu.FEW_LAYERS, tmp_path / "run", steps=1, length=8)
        assert f"model.path={tmp_path / 'llama-8'}" in words
    assert made == ["checkpoint 8"]

    def first_run(_: Session) -> Figures:
        raise PartFailedError("trains again")

    monkeypatch.setattr(first_gpu, "first_run", first_run)
    metrics = tmp_path / "runs" / "first" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(first_gpu.FIRST_STEPS[False])]
    metrics.write_text("".join(lines)[:-1])  # The last line is half written.
    assert len(first_gpu.losses(metrics.parent)) == len(lines) - 1
    with pytest.raises(PartFailedError, match="trains again"):
        first_gpu.resumed_run(session)


def test_a_machine_without_room_or_packages_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_packages.tempfile, "gettempdir", lambda: str(tmp_path))
    assert gpu_packages.work_folder("distlora-test", least=1e18) == tmp_path / "distlora-test"
    assert "GB free" in capsys.readouterr().out
    monkeypatch.setattr(gpu_packages, "NEEDED", ("torch", "no_such_module"))
    said = gpu_packages.install(tmp_path / "none", tmp_path / "site")
    assert said is not None
    assert said.startswith("this machine lacks no_such_module, and")
    assert "make gpu-wheels" in said


def test_building_the_wheels_keeps_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(*_: object, **__: object) -> None:
        with zipfile.ZipFile(tmp_path / "bitsandbytes-2.whl", "w") as wheel:
            for name in ("bitsandbytes/nn.py", *gpu_packages.BITSANDBYTES_LIBRARIES, "libbitsandbytes_cuda118.so"):
                wheel.writestr(name, "")

    monkeypatch.setattr(gpu_packages.subprocess, "run", pip)
    monkeypatch.setattr(gpu_packages.importlib.metadata, "version", lambda _: "1")
    (tmp_path / "check.json").write_text("{}")
    (tmp_path / "bitsandbytes-1.whl").touch()
    gpu_packages.make_packages(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"check.json", "bitsandbytes-2.whl"}
    names = zipfile.ZipFile(tmp_path / "bitsandbytes-2.whl").namelist()
    assert names == ["bitsandbytes/nn.py", *gpu_packages.BITSANDBYTES_LIBRARIES]


def test_gaps_and_the_busy_share_are_those_of_overlapping_kernels() -> None:
    found = first_gpu_workers.busy([("a", 0.0, 2.0), ("b", 1.0, 3.0), ("a", 5.0, 6.0)], wall=10.0)
    assert (found["busy"], found["gap_ms"], found["longest_ms"], found["launches"]) == (0.4, 6.0, 2.0, 3)
    assert found["top"] == [("a", 2, 3.0), ("b", 1, 2.0)]


def test_a_program_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    with pytest.raises(TimeUpError, match="stopped after 1 s"):
        session.run("-c", "import time; time.sleep(60)", seconds=1.0)
    with pytest.raises(first_gpu.PartFailedError, match=r"exit code 3: .*no such kernel"):
        session.run("-c", "import sys; print('no such kernel'); sys.exit(3)")
