"""Damage models, adapters and run folders: refused in one line with the cure, or harmless."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import yaml

from distlora.architecture.safetensors_headers import read_header
from distlora.config import AdapterConfig, Config, UserError
from distlora.config.file import as_mapping, build, load_config
from distlora.data.prompts import read_prompts
from distlora.planner import plan_of
from distlora.planner.model import model_in
from distlora.planner.report import page
from distlora.run_folder.layout import read_result
from distlora.training.model_card import model_card, read_metadata
from distlora.weights.initial_adapter_file import InitialAdapterRecord, digest_of, require_initial_adapter
from distlora.weights.peft_folder import PeftAdapter, read_peft_adapter
from distlora.weights.quantized_cache_folder import entries
from distlora_launcher.cli.cache import line_of
from distlora_launcher.compose.checks import check_model
from distlora_launcher.importing.settings_file import with_file
from support.damage import (
    YAML_TRICKS,
    Reader,
    any_json,
    any_lines,
    any_tensors,
    any_yaml,
    check_line,
    damaged,
    holds,
    holds_without,
    split_tensors,
    state_of,
    with_header,
)
from support.launcher_fakes import HIDDEN, INNER, block_shapes, model_shapes, write_data, write_model, write_safetensors
from support.plan_inputs import cpu_machine


def config_of(folder: Path, *, model: str = "model", **adapter: Any) -> Config:
    values: dict[str, Any] = {
        "model": {"path": str(folder / model)},
        "data": {"path": str(folder / "data.jsonl"), "sequence_length": 64},
        "adapter": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 4}, **adapter},
        "train": {"max_steps": 2, "sample_every": 1, "sample_prompts": ["a"]},
        "run_dir": str(folder / "run"),
    }
    return build(Config, values)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a folder with an undamaged file of each type: models, an adapter, data, a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield make_place(tmp_path_factory.mktemp("fuzz"))


def make_place(folder: Path) -> Path:
    write_model(folder / "model", shards=2)
    write_model(folder / "single")
    write_model(folder / "bare")
    (folder / "bare" / "model.safetensors").unlink()
    write_packed_model(folder / "packed")
    write_data(folder / "data.jsonl")
    write_adapter(folder / "adapter")
    write_run(folder)
    write_cache(folder / "cache")
    write_start(folder / "run" / "initial_adapter.safetensors")
    (folder / "card.md").write_text("---\nlicense: mit\nlicense_name: x\n---\n\n# A model\n")
    return folder


def write_packed_model(folder: Path) -> None:
    """Write a model with a weight quantized by bitsandbytes, as far as headers and quant_states tell."""
    write_model(folder)
    values = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [INNER, HIDDEN]}
    name = "model.layers.0.mlp.up_proj.weight"
    text = json.dumps(state).encode()
    dense = {key: shape for key, shape in model_shapes().items() if key != name}
    parts = {f"{name}.quant_map": (16,), f"{name}.absmax": (INNER * HIDDEN // 64,)}
    write_safetensors(folder / "model.safetensors", dense | parts)
    header, data = split_tensors((folder / "model.safetensors").read_bytes())
    for key, content in ((name, bytes(INNER * HIDDEN // 2)), (f"{name}.quant_state.bitsandbytes__nf4", text)):
        shape = [len(content), 1] if key == name else [len(content)]
        header[key] = {"dtype": "U8", "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    (folder / "model.safetensors").write_bytes(with_header(header, data))


def write_adapter(folder: Path) -> None:
    folder.mkdir()
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "trainable_token_indices": {"embed_tokens": [3, 5]},
        "modules_to_save": ["lm_head"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(values))
    shapes: dict[str, tuple[int, ...]] = {}
    for path, shape in block_shapes(0).items():
        rank = {"q_proj": 4, "up_proj": 2}.get(path.split(".")[-2])
        if rank is not None:
            stem = f"base_model.model.{path.removesuffix('.weight')}"
            shapes |= {f"{stem}.lora_A.weight": (rank, shape[1]), f"{stem}.lora_B.weight": (shape[0], rank)}
    shapes["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = (2, HIDDEN)
    shapes["base_model.model.lm_head.weight"] = (32, HIDDEN)
    write_safetensors(folder / "adapter_model.safetensors", shapes)


def write_run(folder: Path) -> None:
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(as_mapping(config_of(folder)), sort_keys=False))
    (run / "mine.yaml").write_text("model: {path: m}\ndata: {path: a.jsonl}\noptim: {lr: 3e-4}\nadapter: {r: 8}\n")
    lines = [{"step": step, "loss": 2.5, "eval_loss": 2.0 if step == 2 else None} for step in range(4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = {"best_step": 2, "train_seconds": 1.5, "tokens_per_second": 100.0, "peak_memory_bytes": 2**30}
    (run / "summary.json").write_text(json.dumps({**figures, "bits_per_parameter": 4.1, "trainable_parameters": 5}))
    source = {"path": "org/data", "revision": None, "commit": "abc", "name": None, "split": "train", "share": 1.0}
    counts = {"rows": 3, "documents": 5, "targets": 100, "tokens": 192, "sources": [source]}
    data = {"cache": "/nowhere", "settings": {"date": "2026-11-25"}, "chat_template": None, "content": "0" * 64}
    (run / "data.json").write_text(json.dumps(data | {"splits": {"train": counts}}))
    step = run / "checkpoints" / "step_00000002"
    step.mkdir(parents=True)
    (step / "state.json").write_text(json.dumps({"environment": {"ranks": 2, "device": "AVX2", "torch": "2.13"}}))
    write_adapter(run / "adapter")
    (run / "prompts.jsonl").write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')


def write_start(path: Path) -> None:
    """Write the initial adapter of a PiSSA run, whose header has the digest of its tensors."""
    write_safetensors(path, {"x.lora_A.weight": (4, 8), "x.lora_B.weight": (8, 4)})
    header, data = split_tensors(path.read_bytes())
    tensors = [(name, tuple(of["shape"]), data[slice(*of["data_offsets"])]) for name, of in sorted(header.items())]
    record = InitialAdapterRecord(method="pissa", base="0" * 64, digest=digest_of(tensors))
    path.write_bytes(with_header({"__metadata__": record.metadata(), **header}, data))


def is_config(config: Config) -> None:
    assert build(Config, as_mapping(config)) == config


def has_settings(initial: Any) -> None:
    AdapterConfig(**initial.settings)


def tensors_that_safetensors_has(file: Path) -> None:
    """Check that safetensors accepts what distlora's header reader accepts, with the same tensors."""
    ours = read_header(file)
    with safetensors.safe_open(file, framework="numpy") as theirs:
        assert {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.keys()} == {  # noqa: SIM118
            name: segment.shape for name, segment in ours.items()
        }


def read_model(folder: Path) -> None:
    check_model(config_of(folder))


def read_single(folder: Path) -> None:
    check_model(config_of(folder, model="single"))
    tensors_that_safetensors_has(folder / "single" / "model.safetensors")


def read_packed(folder: Path) -> None:
    check_model(config_of(folder, model="packed"))


def read_adapter(folder: Path) -> PeftAdapter:
    return read_peft_adapter(folder / "adapter")


def read_run(folder: Path) -> str:
    """Read a run as `distlora push` does."""
    result = read_result(folder / "run")
    return model_card(result, repository="me/it", base=None, license_of_base=read_metadata(folder / "card.md"))


def read_initial_record(folder: Path) -> InitialAdapterRecord:
    return require_initial_adapter(folder / "run", AdapterConfig(init="pissa"), None)


def write_cache(folder: Path) -> None:
    """Write the record of an entry of the quantized-weights cache."""
    (folder / CACHE_KEY).mkdir(parents=True)
    (folder / CACHE_KEY / "entry.json").write_text(json.dumps({"base": "org/name", "format": 3, "checksums": {"w": 4}}))


def read_cache(folder: Path) -> list[str]:
    """Read the cache as `distlora cache list` does."""
    return [line_of(entry) for entry in entries(folder / "cache")]


def read_planned(folder: Path) -> None:
    """Plan and print as `distlora plan` does."""
    config = config_of(folder, model="bare")
    plan = plan_of(config, model_in(folder / "bare"), cpu_machine(2))
    page(plan)
    plan.as_json()


CACHE_KEY = "5" * 64
STEP = "run/checkpoints/step_00000002"
PACKED = ("packed", "model.layers.0.mlp.up_proj.weight")
READERS = {
    "settings": Reader("run/config.yaml", any_yaml, lambda at: load_config(at / "run"), check=is_config, examples=60),
    "model": Reader("model/config.json", any_json, read_model, ("config.json", "model"), examples=50),
    "index": Reader(
        "model/model.safetensors.index.json", any_json, read_model, ("index.json", "model-0", "in its safetensors")
    ),
    "shard": Reader("model/model-00002-of-00002.safetensors", any_tensors, read_model, ("model",)),
    "weights": Reader("single/model.safetensors", any_tensors, read_single, ("single",), examples=50),
    "packed weights": Reader("packed/model.safetensors", any_tensors, read_packed, PACKED, examples=30),
    "a planned model's config.json alone": Reader(
        "bare/config.json", any_json, read_planned, ("config.json", "bare"), examples=60
    ),
    "adapter's settings": Reader(
        "adapter/adapter_config.json", any_json, read_adapter, ("adapter",), has_settings, examples=50
    ),
    "adapter": Reader(
        "adapter/adapter_model.safetensors", any_tensors, read_adapter, ("adapter",), has_settings, examples=40
    ),
    "start": Reader("run/initial_adapter.safetensors", any_tensors, read_initial_record, examples=30),
    "entry": Reader(f"cache/{CACHE_KEY}/entry.json", any_json, read_cache),
    "a settings file": Reader(
        "run/mine.yaml", any_yaml, lambda at: with_file([str(at / "run/mine.yaml")], "distlora train"), examples=40
    ),
    "metrics": Reader("run/metrics.jsonl", any_lines, read_run),
    "summary": Reader("run/summary.json", any_json, read_run),
    "data": Reader("run/data.json", any_json, read_run),
    "state": Reader(f"{STEP}/state.json", any_json, read_run),
    "published": Reader("run/adapter/adapter_config.json", any_json, read_run),
    "prompts": Reader("run/prompts.jsonl", any_lines, lambda at: read_prompts(at / "run/prompts.jsonl")),
}


IN_MAKE_TEST = ("model", "weights", "adapter", "signed shards")
"""Readers that `make test` damages; `make test-ci` damages all."""


@pytest.mark.parametrize(
    "name", [name if name in IN_MAKE_TEST else pytest.param(name, marks=pytest.mark.ci) for name in READERS]
)
def test_damage_is_refused_or_harmless(name: str, place: Path) -> None:
    holds(READERS[name], place)


@pytest.mark.ci
def test_truncated_settings_are_refused(place: Path) -> None:
    path = place / "run" / "config.yaml"
    whole, config = path.read_bytes(), load_config(place / "run")
    borders = [at for at in range(1, len(whole)) if whole[at - 1 : at] == b"\n"]
    assert len(borders) > 80
    for end in borders:
        with damaged(path, whole[:end]), pytest.raises(UserError, match=r"is truncated|is damaged|must be|is not set"):
            load_config(place / "run")
    assert load_config(place / "run") == config


@pytest.mark.parametrize("name", READERS)
def test_non_files_are_refused_or_missing(name: str, place: Path) -> None:
    holds_without(READERS[name], place)


@pytest.mark.parametrize("name", ["x" * 256, "x" * 100_000, "../x", "/x", "a\0b", ""])
def test_an_index_that_names_no_file_of_its_folder_is_named(place: Path, name: str) -> None:
    path = place / "model" / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    values["weight_map"]["lm_head.weight"] = name
    with (
        damaged(path, json.dumps(values).encode()),
        pytest.raises(UserError, match=r"index.json: lm_head.weight is in"),
    ):
        read_model(place)


def overlapping(content: bytes) -> bytes:
    header, data = split_tensors(content)
    first, *_, last = (entry for name, entry in header.items() if name != "__metadata__")
    last["data_offsets"] = first["data_offsets"]
    return with_header(header, data)


TRAIN = ["train", "model.path=model", "data.path=data.jsonl", "data.sequence_length=64", "run_dir=new"]
COMMANDS: list[tuple[list[str], str, Callable[[bytes], bytes] | str, str]] = [
    # (the command, the file, what becomes of it, what the line says)
    (TRAIN, "model/model-00002-of-00002.safetensors", overlapping, "is damaged"),
    (TRAIN, "data.jsonl", "endless", "neither a file nor a folder"),
    (
        [*TRAIN, "adapter.init_from=adapter"],
        "adapter/adapter_model.safetensors",
        lambda content: content[: len(content) // 2],
        "adapter_model",
    ),
    (["resume", "run"], "run/config.yaml", lambda content: YAML_TRICKS[0], "config.yaml"),
    (
        ["status", "run"],
        "run/config.yaml",
        lambda content: content.replace(b"seed: 0", b"seed: zero"),
        "train.seed='zero' must be of type int",
    ),
    (["push", "run", "me/it", "--dry-run"], "run/summary.json", lambda content: b"{", "summary.json is damaged"),
]


@pytest.mark.ci
def test_commands_refuse_damage_in_one_line_and_leave_nothing(tmp_path: Path) -> None:
    """Run processes, whose messages at exit are visible here."""
    make_place(tmp_path)
    for words, file, damage, expected in COMMANDS:
        changed = damage if isinstance(damage, str) else damage((tmp_path / file).read_bytes())
        with damaged(tmp_path / file, changed):
            before = state_of(tmp_path)
            distlora = Path(sys.executable).with_name("distlora")
            ended = subprocess.run([distlora, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
            assert state_of(tmp_path) == before, "a refused command leaves nothing behind"
        assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
        lines = ended.stderr.splitlines(keepends=True)
        check_line(lines[-1])
        assert expected in lines[-1]
