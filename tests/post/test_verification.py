"""`distlora verify RUN`: an undamaged run passes, and each kind of damage is reported by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distlora.checkpoint.verify import verify
from distlora.config import UserError
from distlora.parallel import Ranks
from distlora.system import atomic_io
from distlora.system.atomic_io import sha256
from distlora.training import worker
from distlora_launcher.cli.verify import main
from distlora_launcher.launch.lock import lock_run
from support.small_models import make_run
from support.tiers import ci

SINGLE = Ranks(0, 1, torch.device("cpu"), None)
CHECKPOINT = "checkpoints/step_00000004"


@pytest.fixture(scope="module")
def finished(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run with two checkpoints and a best."""
    run_dir = tmp_path_factory.mktemp("verified") / "run"
    settings = {"max_steps": 4, "save_every": 2, "eval_every": 2, "global_batch": 2}
    make_run(run_dir, folders, "llama", train=settings, data={"cache_dir": str(run_dir.parent / "cache")})
    worker.run(run_dir, SINGLE)
    return run_dir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """Copy the run, with its own packed sequences."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    record = json.loads((run_dir / "data.json").read_text())
    cache = shutil.copytree(record["cache"], tmp_path / "cache" / Path(record["cache"]).name)
    (run_dir / "data.json").write_text(json.dumps(record | {"cache": str(cache)}))
    return run_dir


def states(run_dir: Path) -> dict[str, tuple[str, str]]:
    return {item.name: (item.state, item.message) for item in verify(run_dir)}


def test_undamaged_run_is_ok_line_by_line(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(finished)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines), lines
    named = [line.split()[1].rstrip(":") for line in lines]
    assert named == [
        *("config.yaml", "data.json", "checkpoints/step_00000002", CHECKPOINT),
        *("best", "adapter", "metrics.jsonl", "summary.json", "compiled.json"),
    ]


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {"adapter": {"r": 8, "init": "pissa", "target_modules": "qv", "use_rslora": True}}),
    "full": ("llama-tied", {"adapter": {"method": "full"}, "quant": {"method": "none"}}),
    "experts": ("mixtral", {"optim": {"name": "adamw_8bit"}, "adapter": {"rank_pattern": {"q_proj": 4}}}),
    "dora": ("qwen3", {"adapter": {"use_dora": True, "modules_to_save": ["lm_head"]}}),
}


@pytest.mark.parametrize("method", ["pissa", *map(ci, [*METHODS][1:])])
def test_run_of_each_method_is_undamaged(folders: Path, tmp_path: Path, method: str) -> None:
    model, sections = METHODS[method]
    make_run(tmp_path / "run", folders, model, train={"max_steps": 1, "global_batch": 2}, **sections)
    worker.run(tmp_path / "run", SINGLE)
    found = states(tmp_path / "run")
    assert {state for state, _ in found.values()} == {"ok"}, found
    assert ("initial_adapter.safetensors" in found) == (method == "pissa")


def flip(path: Path, place: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def lines_of(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)


def write_state(run_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change state.json of the last checkpoint and its digest in the manifest."""
    folder = run_dir / CHECKPOINT
    for name in ("state.json", "manifest.json"):
        values = json.loads((folder / name).read_text())
        if name == "state.json":
            change(values)
        else:
            values["files"]["state.json"] = sha256(folder / "state.json")
        atomic_io.write_json(folder / name, values)


def not_a_number(run_dir: Path) -> None:
    path = run_dir / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32(np.inf).tobytes()
    path.write_bytes(content)


def another_rank(run_dir: Path) -> None:
    path = run_dir / "best" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 16}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    # The damage, the item that reports it, part of its message.
    "config": (lambda run: (run / "config.yaml").write_text("model: ["), "config.yaml", "is damaged"),
    "data": (lambda run: (run / "data.json").write_text("{"), "data.json", "is not JSON"),
    "rows": (
        lambda run: flip(Path(json.loads((run / "data.json").read_text())["cache"]) / "train_tokens.npy"),
        "data.json",
        "have another SHA-256 than those of this run; delete that folder",
    ),
    "a byte": (
        lambda run: flip(run / CHECKPOINT / "trainer.safetensors"),
        CHECKPOINT,
        "is not what was saved; a resume",
    ),
    "a file": (
        lambda run: (run / CHECKPOINT / "adapter_config.json").unlink(),
        CHECKPOINT,
        "adapter_config.json is missing",
    ),
    "a step": (
        lambda run: write_state(run, lambda state: state["progress"].update(step=3)),
        CHECKPOINT,
        "state.json records step 3",
    ),
    "another base": (
        lambda run: write_state(run, lambda state: state["identity"].update(base_fingerprint="0" * 64)),
        CHECKPOINT,
        "manifest.json and state.json name different bases",
    ),
    "other data": (
        lambda run: write_state(run, lambda state: state["identity"].update(data_digest="0" * 64)),
        CHECKPOINT,
        "was trained on other data",
    ),
    "infinity": (not_a_number, "adapter", "holds NaN or infinities; publish it again"),
    "a header": (lambda run: flip(run / "best" / "adapter_model.safetensors", 9), "best", "publish it again"),
    "a rank": (another_rank, "best", "adapter_config.json has r=16, and config.yaml means 8"),
    "a line": (
        lambda run: (run / "metrics.jsonl").write_text("".join([lines_of(run)[0][:-9] + "\n", *lines_of(run)[1:]])),
        "metrics.jsonl",
        "line 1 is damaged",
    ),
    "a line twice": (
        lambda run: (run / "metrics.jsonl").write_text("".join([*lines_of(run), lines_of(run)[1]])),
        "metrics.jsonl",
        "follows that of step 4; move it",
    ),
    "summary": (lambda run: (run / "summary.json").write_text("[1]"), "summary.json", "not a JSON object"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_reported_by_name_and_nothing_else(copy: Path, kind: str) -> None:
    damage, name, message = DAMAGE[kind]
    damage(copy)
    found = states(copy)
    assert found[name][0] == "damaged", found
    assert message in found[name][1]
    assert [other for other, (state, _) in found.items() if state == "damaged"] == [name]


def test_files_left_by_a_kill_are_notes(copy: Path) -> None:
    (copy / "checkpoints" / ".step_00000006.tmp").mkdir()
    (copy / ".summary.json-0123456789abcdef").write_text("")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    shutil.rmtree(json.loads((copy / "data.json").read_text())["cache"])
    found = states(copy)
    notes = {name for name, (state, _) in found.items() if state == "note"}
    assert notes == {
        *("checkpoints/.step_00000006.tmp", ".summary.json-0123456789abcdef", "metrics.jsonl", "data.json")
    }
    assert all(state != "damaged" for state, _ in found.values())


def test_run_in_progress_is_a_note(copy: Path) -> None:
    with lock_run(copy):
        assert states(copy)["run"] == ("note", "the run is in progress: files being written may look unfinished")
    assert "run" not in states(copy)


def test_command_needs_no_torch_and_exits_with_1_or_2(copy: Path, tmp_path: Path) -> None:
    flip(copy / CHECKPOINT / "adapter_model.safetensors")
    code = (
        "import sys; from distlora_launcher.cli.main import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, "verify", str(copy), "--json"], capture_output=True, text=True
    )
    assert finished.returncode == 1, finished.stderr
    values = json.loads(finished.stdout)
    assert values["damaged"] == 1
    assert [item["name"] for item in values["items"] if item["state"] == "damaged"] == [CHECKPOINT]
    with pytest.raises(UserError, match="holds no run"):
        main([str(tmp_path)])
