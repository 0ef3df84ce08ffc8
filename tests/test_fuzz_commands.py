"""Run commands on damaged files: exit code, one line on stderr, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from damage import NO_FILES, check_line, damaged, split_tensors, state_of, with_header
from distlora_launcher.cli.main import main
from distlora_launcher.launch import local
from test_fuzz import make_place

DISTLORA = str(Path(sys.executable).parent / "distlora")
TRAIN = ["train", "model.path=model", "data.path=data.jsonl", "data.sequence_length=64", "run_dir=new"]
RESUME, STATUS, PUSH = ["resume", "run"], ["status", "run"], ["push", "run", "me/it", "--dry-run"]
PREVIEW = ["data", "preview", "model.path=model", "data.path=data.jsonl", "data.sequence_length=64"]
BOMB = "".join(
    f"{name}: &{name} [{', '.join([f'*{of}'] * 9)}]\n" for of, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def noise(content: bytes) -> bytes:
    return content[:9] + b"\xff" * 30 + content[39:]


def overlapping(content: bytes) -> bytes:
    header, data = split_tensors(content)
    first, *_, last = (entry for name, entry in header.items() if name != "__metadata__")
    last["data_offsets"] = first["data_offsets"]
    return with_header(header, data)


def without(*keys: str) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({k: v for k, v in json.loads(content).items() if k not in keys}).encode()


def having(**values: object) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | values).encode()


CASES: dict[str, tuple[list[str], str, Callable[[bytes], bytes] | str, str]] = {
    # case: (the command, the file, what becomes of it, what the line says)
    "a cut config.json": (TRAIN, "model/config.json", cut, "config.json is damaged: it is not JSON"),
    "a layer's size of another type": (TRAIN, "model/config.json", having(hidden_size="8"), "hidden_size is '8'"),
    "a number of layers without end": (
        TRAIN,
        "model/config.json",
        having(num_hidden_layers=2**62),
        "tensors are missing",
    ),
    "an index of files elsewhere": (
        TRAIN,
        "model/model.safetensors.index.json",
        lambda content: content.replace(b"model-00001", b"../../model"),
        "which is not a file in its folder",
    ),
    "a shard whose tensors overlap": (TRAIN, "model/model-00002-of-00002.safetensors", overlapping, "is damaged"),
    "a shard that is a pipe": (TRAIN, "model/model-00001-of-00002.safetensors", "pipe", "is missing"),
    "data that ends within a line": (TRAIN, "data.jsonl", cut, "data.jsonl:3: not valid JSON"),
    "data that is a device": (TRAIN, "data.jsonl", "endless", "neither a file nor a folder"),
    "data that is a loop of links": (TRAIN, "data.jsonl", "loop", "data.jsonl"),
    "data of bytes": (PREVIEW, "data.jsonl", noise, "is not UTF-8"),
    "an adapter of another kind": (
        [*TRAIN, "adapter.init_from=adapter"],
        "adapter/adapter_config.json",
        having(peft_type=["LORA"]),
        "is not supported, only LORA is",
    ),
    "an adapter with half a header": (
        [*TRAIN, "adapter.init_from=adapter"],
        "adapter/adapter_model.safetensors",
        cut,
        "adapter_model",
    ),
    "settings cut off": (RESUME, "run/config.yaml", lambda content: content[:400], "config.yaml"),
    "settings that refer to themselves": (
        RESUME,
        "run/config.yaml",
        lambda content: b"a: &a [x, x, x]\n" + BOMB.encode() + b"model: *i\n",
        "config.yaml",
    ),
    "settings that are code": (
        RESUME,
        "run/config.yaml",
        lambda content: b"model: !!python/object/apply:os.system ['touch owned']\n",
        "could not determine a constructor",
    ),
    "settings of another type": (
        STATUS,
        "run/config.yaml",
        lambda content: content.replace(b"seed: 0", b"seed: zero"),
        "train.seed='zero' must be of type int",
    ),
    "figures of another type": (
        PUSH,
        "run/summary.json",
        having(tokens_per_second="fast"),
        "tokens_per_second is 'fast'",
    ),
    "figures cut in the middle": (PUSH, "run/metrics.jsonl", noise, "metrics.jsonl is damaged"),
    "a record of the data without counts": (
        PUSH,
        "run/data.json",
        having(splits={"train": {}}),
        "it has no splits.train",
    ),
    "a published adapter without its rank": (PUSH, "run/adapter/adapter_config.json", without("r"), "it has no r"),
    "prompts of another type": (
        ["generate", "run", "--prompts", "run/prompts.jsonl"],
        "run/prompts.jsonl",
        lambda content: b'{"prompt": 5}\n',
        "'prompt' is a number, not a string",
    ),
    "another tool's file that is none": (
        ["import", "axolotl", "axolotl.yaml"],
        "axolotl.yaml",
        lambda content: b"a: !!timestamp x\n",
        "axolotl.yaml is not YAML",
    ),
}

AS_PROCESSES = (
    *("a shard whose tensors overlap", "data that is a device", "an adapter with half a header"),
    *("settings that refer to themselves", "settings of another type", "figures of another type"),
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in the folder of test_fuzz.py; nothing may be started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return make_place(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_command_refuses_damage(
    case: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("prepare", "run_workers"):
        monkeypatch.setattr(local, name, lambda *arguments, **_: pytest.fail(f"started a process with {arguments}"))
    words, file, damage, expected = CASES[case]
    whole = (place / file).read_bytes()
    with damaged(place / file, damage if isinstance(damage, str) else damage(whole)):
        before = state_of(place)
        assert main(words) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines(keepends=True)
        check_line(lines[-1])
        assert expected in lines[-1]
        assert all(line.startswith(("warning: ", "note: ")) for line in lines[:-1]), captured.err
        assert state_of(place) == before, "a refused command leaves nothing behind"
    assert set(NO_FILES) >= {damage for _, _, damage, _ in CASES.values() if isinstance(damage, str)}


@pytest.mark.ci
def test_installed_command_refuses_damage(place: Path) -> None:
    """Run several processes at once, whose messages at exit are visible here."""
    for number, case in enumerate(AS_PROCESSES):
        words, file, damage, expected = CASES[case]
        folder = place / str(number)
        folder.mkdir()
        make_place(folder)
        with damaged(folder / file, damage if isinstance(damage, str) else damage((folder / file).read_bytes())):
            ended = subprocess.run([DISTLORA, *words], cwd=folder, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 2, ended.stderr
        assert "Traceback" not in ended.stderr
        lines = ended.stderr.splitlines(keepends=True)
        check_line(lines[-1])
        assert expected in lines[-1]
