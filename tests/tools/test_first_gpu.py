"""first_gpu.py: dry runs without the packages that a GPU machine lacks; parts fail, wait and go on alone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import first_gpu
import pytest
from first_gpu import DONE, FAILED, LEFT, Figures, Part, Session, TimeUpError

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


@pytest.mark.slow
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
    wanted = {name: record for name, record in records.items() if not name.startswith("save")}
    shutil.rmtree(tmp_path / "work")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "train.json").write_text(json.dumps(wanted))
    fresh = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert fresh.returncode == DONE, fresh.stdout + fresh.stderr
    assert fresh.stdout.count("done before") == len(wanted) == len(parts) - 1


def test_a_call_without_a_command_begins_with_what_matters_most() -> None:
    names = [part.name for part in first_gpu.all_parts(dry=False)]
    assert tuple(names[: len(first_gpu.FIRST)]) == first_gpu.FIRST
    assert len(set(names)) == len(names), "parts of the commands share a name"


@pytest.mark.ci
def test_a_dry_step_runs_at_real_sizes_on_the_pretended_gpu(tmp_path: Path) -> None:
    folders = (tmp_path, *(SCRIPT.parents[2] / name for name in ("tests", ".", "kernels", "launcher")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    session = dataclasses.replace(session_of(tmp_path, 600), dry=True, environment=environment)
    cell = {"checkpointing": "block", "fused": "own", "deterministic": "true", "tokens": first_gpu.SHORT}
    row = first_gpu.traced_step(session, **cell)["row"]
    assert float(row["Triton launches per layer"]) > 50, "the kernels are not used"


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


def test_a_program_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    with pytest.raises(TimeUpError, match="stopped after 1 s"):
        session.run("-c", "import time; time.sleep(60)", seconds=1.0)
    with pytest.raises(first_gpu.PartFailedError, match=r"exit code 3: .*no such kernel"):
        session.run("-c", "import sys; print('no such kernel'); sys.exit(3)")
