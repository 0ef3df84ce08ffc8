"""Check user mistakes: each ends with exit code 2 and one message that helps, before any process starts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distlora.config import Config, DataConfig, ModelConfig
from distlora_launcher.cli.main import main
from distlora_launcher.launch import local
from distlora_launcher.launch.local import create_run
from support.launcher_fakes import MODEL_CONFIG, every_nth, write_data, write_model
from support.small_disks import fill, small_disk

DISTLORA = str(Path(sys.executable).parent / "distlora")


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input must be refused before anything starts."""

    def refuse(*arguments: object, **_: object) -> int:
        pytest.fail(f"started a process with {arguments}")

    monkeypatch.setattr(local, "prepare", refuse)
    monkeypatch.setattr(local, "run_workers", refuse)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working folder with a model of two shards and good data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_model(tmp_path / "model", shards=2)
    write_data(tmp_path / "data.jsonl")
    return tmp_path


def shard(place: Path) -> Path:
    return place / "model" / "model-00002-of-00002.safetensors"


def edit_model_config(place: Path, **changes: object) -> None:
    (place / "model" / "config.json").write_text(json.dumps(MODEL_CONFIG | changes))


def append_broken_line(place: Path) -> None:
    with (place / "data.jsonl").open("a") as file:
        file.write('{"text": "half a li\n')


def hold_another_run(place: Path) -> None:
    (place / "run").mkdir()
    (place / "run" / "config.yaml").write_text("model: {path: x}\n")


def nothing(place: Path) -> None:
    del place


CASES: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    # case: (what is broken, the overrides, what the message says)
    "mistyped setting": (nothing, ["adapter.rr=8"], ["adapter.rr", "did you mean 'adapter.r'?"]),
    "mistyped option": (nothing, ["adapter=fulll"], ["full, lora", "did you mean 'full'?"]),
    "dashed setting": (nothing, ["--train.seed=1"], ["settings have no dashes: train.seed=1"]),
    "unknown flag": (nothing, ["--verbos"], ["there is no option --verbos"]),
    "rank of zero": (nothing, ["adapter.r=0"], ["adapter.r=0", "adapter.r=1"]),
    "missing model": (nothing, ["model.path=modle"], ["modle does not exist", "did you mean 'model'?"]),
    "a path too deep for a hub name": (
        nothing,
        ["model.path=hub/meta-llama/Llama"],
        ["does not exist", "model.path=org/name"],
    ),
    "no config.json": (lambda p: (p / "model/config.json").unlink(), [], ["holds no config.json"]),
    "unknown type": (
        lambda p: edit_model_config(p, model_type="lama"),
        [],
        ["'lama' is not a model of transformers", "did you mean 'llama'?"],
    ),
    "quantized": (lambda p: edit_model_config(p, quantization_config={}), [], ["quantization_config", "16-bit"]),
    "more layers than tensors": (
        lambda p: edit_model_config(p, num_hidden_layers=3),
        [],
        ["model.layers.2.", "9 tensors"],
    ),
    "no tokenizer": (lambda p: (p / "model/tokenizer.json").unlink(), [], ["no tokenizer"]),
    "missing shard": (lambda p: shard(p).unlink(), [], [shard(Path()).name, "is missing"]),
    "no weights": (lambda p: [f.unlink() for f in (p / "model").glob("*.safetensors*")], [], ["model.safetensors"]),
    "a cache without room": (nothing, ["quant.cache_gb=0"], ["quant.cache_gb=0", "set quant.cache_gb=200, null"]),
    "a cache folder where a file is": (nothing, ["data.cache_dir=data.jsonl/x"], ["data.cache_dir=", "is a file"]),
    "a bare module name": (nothing, ["adapter.target_modules=q_prj"], ["did you mean '[q_proj]'?"]),
    "targets that match nothing": (
        nothing,
        ["adapter.target_modules=[q_prj]"],
        ["'q_prj'", "did you mean 'q_proj'?", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"],
    ),
    "too long": (nothing, ["data.sequence_length=65"], ["65", "64 positions", "data.sequence_length=64"]),
    "missing data": (nothing, ["data.path=date.jsonl"], ["date.jsonl does not exist"]),
    "empty data": (lambda p: (p / "data.jsonl").write_text(""), [], ["data.jsonl holds no document"]),
    "broken line": (append_broken_line, [], ["data.jsonl:6"]),
    "run folder under a file": (nothing, ["run_dir=data.jsonl/run"], ["is a file"]),
    "full with quantization": (nothing, ["adapter=full"], ["add quant=none"]),
    "another module whole": (
        nothing,
        ["adapter.modules_to_save=[lm_haed]"],
        ["did you mean 'lm_head'?", "adapter=full trains everything"],
    ),
    "a module whole and its rows": (
        nothing,
        ["adapter.modules_to_save=[embed_tokens]", "adapter.trainable_token_indices=[3]"],
        ["leave it out of one of them"],
    ),
    "paged moments on a CPU": (nothing, ["optim=paged_adamw_8bit"], ["has no GPU", "optim.name=adamw_8bit"]),
    "more resident blocks than there are": (
        nothing,
        ["parallel.resident_blocks=33", "cluster.gpus_per_node=2"],
        ["is more than the", "blocks of this model; set parallel.resident_blocks="],
    ),
    "more dense layers than there are": (
        nothing,
        ["quant.dense_layers=33"],
        ["is more than the", "layers of this model; set quant.dense_layers="],
    ),
    "resident blocks where nothing is gathered": (
        nothing,
        ["parallel.resident_blocks=auto"],
        ["has no effect with one process", "with cluster.gpus_per_node=2"],
    ),
    "a tile longer than a row": (nothing, ["train.mlp_tile=64"], ["cuts no row of data.sequence_length=64 tokens"]),
    "two places": (nothing, ["data.sources=[{path: data.jsonl}]"], ["exclude each other"]),
    "mistyped key of a source": (
        nothing,
        ["data.path=null", "data.sources=[{path: data.jsonl, wieght: 1}]"],
        ["data.sources[0].wieght", "did you mean 'weight'?"],
    ),
    "a new token twice": (nothing, ['model.new_tokens=["<a>","<a>"]'], ["names <a> twice"]),
    "a token's row that is not there": (
        nothing,
        ["adapter.trainable_token_indices=[5,32]"],
        ["has 32, and the model has 32 tokens", "ids from 0 to 31"],
    ),
    "rows of another matrix": (
        nothing,
        ["adapter.trainable_token_indices={embed: [5]}"],
        ["'embed' is not one of embed_tokens, lm_head"],
    ),
    "rows beside everything": (
        nothing,
        ["adapter=full", "quant=none", "+adapter.trainable_token_indices=[5]"],
        ["has no effect with adapter=full"],
    ),
    "a GPU that is too small": (
        nothing,
        ["gpu.memory_gib=0.6001"],
        ["does not fit a GPU of 0.6001 GiB by calculation: needs", "; plan.refuse=false starts it all the same"],
    ),
    "a GPU that is too small for what is chosen": (
        nothing,
        ["gpu.memory_gib=0.60003", "plan=auto", "quant=auto"],
        ["does not fit a GPU of 0.60003 GiB", "at the least", "plan.refuse=false"],
    ),
    "several nodes": (nothing, ["cluster.nodes=2"], ["set cluster=slurm, or cluster=torchrun"]),
    "a sweep's second job": (nothing, ["-m", "adapter.r=4,0"], ["adapter.r=0"]),
    "two modes": (nothing, ["-m", "--cfg", "job"], ["exclude each other"]),
    "other settings": (nothing, ["--config-name", "mine"], ["--config-dir"]),
}


@pytest.mark.parametrize("case", every_nth(CASES, 3))
def test_bad_input_is_refused_with_a_reason(case: str, place: Path, capsys: pytest.CaptureFixture[str]):
    break_it, overrides, expected = CASES[case]
    break_it(place)
    before = sorted(place.rglob("*"))
    code = main(["train", "model.path=model", "data.path=data.jsonl", "data.sequence_length=64", *overrides])
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.startswith("error: ")
    assert "Traceback" not in message
    for words in expected:
        assert words in message
    assert sorted(place.rglob("*")) == before, "a refused run leaves nothing behind"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "did you mean 'train'?"),
        (["preview", "data.path=data.jsonl"], "write distlora data preview"),
        (["generate", "run/adapter"], "run/adapter is the adapter of run; write distlora generate run"),
        (["train"], "model.path is not set"),
        (["train", "model.path=model"], "data.path is not set"),
        (["resume"], "distlora resume RUN"),
        (["resume", "nowhere"], "holds no run"),
        (["resume", "run", "other"], "takes exactly one run folder"),
    ],
)
def test_a_bad_command_is_refused(words: list[str], expected: str, place: Path, capsys: pytest.CaptureFixture[str]):
    hold_another_run(place)
    (place / "run" / "adapter").mkdir()
    (place / "run" / "adapter" / "adapter_config.json").touch()
    assert main(words) == 2
    assert expected in capsys.readouterr().err


def test_a_full_disk_leaves_no_part_of_a_run(tmp_path: Path):
    config = Config(model=ModelConfig(path="m"), data=DataConfig(path="d"), run_dir="run")
    with small_disk(tmp_path / "disk", 16) as disk:
        (disk / "run").mkdir()
        filler = fill(disk)
        with pytest.raises(OSError, match="No space left on device"):
            create_run(disk / "run", config)
        assert [*(disk / "run").iterdir()] == []
        filler.unlink()
        create_run(disk / "run", config)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match="Read-only file system"):
            create_run(disk / "other", config)


def test_the_installed_command_refuses_and_leaves_nothing(place: Path):
    command = [sys.executable, "-X", "importtime", DISTLORA, "train", "model.path=model", "data.path=data.jsonl"]
    command.append("adapter.rr=8")
    ended = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "did you mean 'adapter.r'?" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    assert not re.search(r"\| +torch$", ended.stderr, re.MULTILINE), "a second of CPU time for a mistyped setting"
    assert not (place / "runs").exists()
    assert not (place / "outputs").exists()
