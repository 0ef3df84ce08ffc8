"""Damage models, adapters and run folders: refused in one line with the cure, or harmless."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import yaml
from hypothesis import strategies as st

from damage import (
    Reader,
    any_bytes,
    any_json,
    any_lines,
    any_tensors,
    any_yaml,
    damaged,
    holds,
    holds_without,
    other_header,
    other_value,
    split_tensors,
    with_header,
)
from distlora.architecture.safetensors_headers import read_header
from distlora.architecture.shapes import ARCHITECTURES
from distlora.config import AdapterConfig, Config, UserError
from distlora.config.file import as_mapping, build, load_config
from distlora.data.prompts import read_prompts
from distlora.data.sources import pinned_commits
from distlora.planner import Plan, plan_of
from distlora.planner.model import model_in
from distlora.planner.report import page
from distlora.run_folder.layout import read_result
from distlora.training.model_card import model_card, read_metadata
from distlora.weights import file_fingerprints, quantized_cache_format
from distlora.weights.initial_adapter_file import InitialAdapterRecord, digest_of, require_initial_adapter
from distlora.weights.peft_folder import read_peft_adapter
from distlora.weights.quantized_cache_folder import Entry, EntryFigures, figures_of
from distlora.weights.quantized_cache_format import GROUP_BYTES, DamagedPieceError, Extent, header_of, read_piece
from distlora_launcher.cli.cache import line_of
from distlora_launcher.compose.checks import check_model
from distlora_launcher.importing import read_yaml
from distlora_launcher.importing.axolotl import convert
from distlora_launcher.importing.recipe import recipe_text, report
from distlora_launcher.launch.failures import first_failure, read_errors, would_repeat
from distlora_launcher.launch.local import is_prepared
from launcher_fakes import HIDDEN, INNER, block_shapes, model_shapes, write_data, write_model, write_safetensors
from plan_inputs import cpu_machine


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
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with an undamaged file of each type: models, an adapter, data, a run."""
    return make_place(tmp_path_factory.mktemp("fuzz"))


def make_place(folder: Path) -> Path:
    write_model(folder / "model", shards=2)
    write_model(folder / "single")
    write_model(folder / "bare")
    (folder / "bare" / "model.safetensors").unlink()
    (folder / "experts").mkdir()
    (folder / "experts" / "config.json").write_text(json.dumps(ARCHITECTURES["unsloth/gpt-oss-20b-BF16"]))
    write_packed_model(folder / "packed")
    write_data(folder / "data.jsonl")
    write_adapter(folder / "adapter")
    write_run(folder)
    write_cache(folder / "cache")
    write_start(folder / "run" / "initial_adapter.safetensors")
    (folder / "axolotl.yaml").write_text(yaml.safe_dump(AXOLOTL, sort_keys=False))
    (folder / "card.md").write_text("---\nlicense: mit\nlicense_name: x\n---\n\n# A model\n")
    return folder


AXOLOTL = {
    "base_model": "model",
    "load_in_4bit": True,
    "adapter": "qlora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "v_proj"],
    "datasets": [{"path": "data.jsonl", "type": "alpaca"}],
    "sequence_len": 64,
    "sample_packing": True,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_epochs": 1,
    "learning_rate": 0.0002,
    "lr_scheduler": "cosine",
    "optimizer": "paged_adamw_8bit",
    "val_set_size": 0.1,
    "bf16": "auto",
    "special_tokens": {"pad_token": "</s>"},
}


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
    (run / "logs").mkdir()
    error = {"rank": 0, "time": 1.5, "type": "ValueError", "message": "no", "bad_input": False}
    (run / "logs" / "rank_0.error.json").write_text(json.dumps(error))
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


def read_run(folder: Path) -> str:
    """Read a run as `distlora push` does."""
    result = read_result(folder / "run")
    return model_card(result, repository="me/it", base=None, license_of_base=read_metadata(folder / "card.md"))


def read_records(folder: Path) -> None:
    """Read records as `distlora resume` does, which remakes damaged ones."""
    is_prepared(folder / "run")
    assert all(isinstance(commit, str) for commit in pinned_commits(folder / "run").values())


def read_initial_record(folder: Path) -> InitialAdapterRecord:
    return require_initial_adapter(folder / "run", AdapterConfig(init="pissa"), None)


def read_axolotl(folder: Path) -> None:
    source = folder / "axolotl.yaml"
    imported = convert(read_yaml(source), processes=1)
    recipe_text(imported, source=source, processes=1)
    report(imported, source=source, out=None)


def read_failure(folder: Path) -> None:
    logs = folder / "run" / "logs"
    first_failure(logs, {}, [error for _, error in read_errors(logs)])
    would_repeat(logs)


def write_cache(folder: Path) -> None:
    """Write a quantized-weights cache with an entry of one piece, half of the base, and a recorded fingerprint."""
    entry = Entry(folder / CACHE_KEY)
    entry.begin({"base": "org/name", "format": 1, "weights": {"w": 4, "v": 2}})
    extents = {"w": Extent(0, 2, 0.5, {}), "v": Extent(1, 2, 0.25, {})}
    path = entry.path_of(0, 0, 1, {name: range(of.first, of.stop) for name, of in extents.items()})
    path.write_bytes(header_of(CACHE_KEY, extents) + bytes(3 * GROUP_BYTES))
    path.rename(folder / CACHE_KEY / CACHE_PIECE)
    weights = folder.parent / "single" / "model.safetensors"
    file_fingerprints.remember(folder / "sources", weights, file_fingerprints.state_of(weights), "tree:0", began=2e9)
    (record,) = (folder / "sources").iterdir()
    record.rename(folder / "sources" / "record.json")


@st.composite
def any_signed_piece(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a piece with other content and a matching digest, as another version would write it."""
    changed = draw(other_header(content) | st.just(content))
    header, data = split_tensors(changed)
    said, entry = json.loads(split_tensors(content)[0]["__metadata__"]["distlora_piece"]), CACHE_KEY
    odd = [0.5, -1, True, 2**70, None, [], "0x1p99999", "nan", "-inf", "", {}]
    changes: list[Callable[[], Any]] = [
        lambda: said,
        lambda: draw(other_value(said)),
        lambda: said | {"weights": said["weights"] | {"w": [draw(st.sampled_from(odd)), "0x1p-1"]}},
        lambda: said | {"weights": said["weights"] | {"w": [0, draw(st.sampled_from(odd))]}},
        lambda: (
            said | {"weights": draw(st.sampled_from([[], [entry], None, {"w": []}, {"w": [0]}, {"x": [0, "0x1p0"]}]))}
        ),
    ]
    text = draw(st.sampled_from(["[" * 100_000, "1" * 5000, "NaN"]) | st.just(""))
    text = text or json.dumps(draw(st.sampled_from(changes))())
    if isinstance(header, dict):
        places = {
            n: [e.get("dtype"), e.get("shape"), e.get("data_offsets")] for n, e in header.items() if n[:2] != "__"
        }
        header["__metadata__"] = {"distlora_piece": text, "digest": quantized_cache_format._digest(text, places)}
    return with_header(header, data)


def read_shards(folder: Path) -> EntryFigures:
    """Read the cache as a start and `distlora cache list` do."""
    with contextlib.suppress(DamagedPieceError):
        for extent in read_piece(folder / "cache" / CACHE_KEY / CACHE_PIECE, CACHE_KEY)[0].extents.values():
            assert extent.first in (0, 1)
    figures = figures_of(Entry(folder / "cache" / CACHE_KEY))
    line_of(figures)
    return figures


def read_any_shards(folder: Path) -> EntryFigures:
    with contextlib.suppress(DamagedPieceError):
        for extent in read_piece(folder / "cache" / CACHE_KEY / CACHE_PIECE, CACHE_KEY)[0].extents.values():
            assert range(extent.first, extent.stop) is not None
            assert math.isfinite(extent.offset)
    return figures_of(Entry(folder / "cache" / CACHE_KEY))


def read_source(folder: Path) -> str | None:
    """Read a recorded fingerprint as a start does."""
    return file_fingerprints.digest_in(folder / "cache/sources/record.json", folder / "single/model.safetensors")


def read_planned(folder: Path, model: str = "model") -> Plan:
    """Plan and print as `distlora plan` does."""
    config = config_of(folder, model=model)
    plan = plan_of(config, model_in(folder / model), cpu_machine(2))
    page(plan)
    plan.as_json()
    return plan


CACHE_KEY, CACHE_PIECE = "5" * 64, "00000-0of1-0123456789abcdef.safetensors"
STEP = "run/checkpoints/step_00000002"
READERS = {
    "settings": Reader(
        file="run/config.yaml",
        damages=any_yaml,
        read=lambda folder: load_config(folder / "run"),
        check=is_config,
        examples=60,
    ),
    "model": Reader(
        file="model/config.json", damages=any_json, read=read_model, names=("config.json", "model"), examples=50
    ),
    "index": Reader(
        file="model/model.safetensors.index.json",
        damages=any_json,
        read=read_model,
        names=("index.json", "model-0", "in its safetensors"),
        examples=30,
    ),
    "shard": Reader(
        file="model/model-00002-of-00002.safetensors", damages=any_tensors, read=read_model, names=("model",)
    ),
    "weights": Reader(
        file="single/model.safetensors", damages=any_tensors, read=read_single, names=("single",), examples=50
    ),
    "packed weights": Reader(
        file="packed/model.safetensors",
        damages=any_tensors,
        read=lambda folder: check_model(config_of(folder, model="packed")),
        names=("packed", "model.layers.0.mlp.up_proj.weight"),
        examples=30,
    ),
    "packed model": Reader(
        file="packed/config.json",
        damages=any_json,
        read=lambda folder: check_model(config_of(folder, model="packed")),
        names=("config.json", "packed"),
    ),
    "planned model": Reader(
        file="model/config.json", damages=any_json, read=read_planned, names=("config.json", "model"), examples=30
    ),
    "a planned model's config.json alone": Reader(
        file="bare/config.json",
        damages=any_json,
        read=lambda folder: read_planned(folder, model="bare"),
        names=("config.json", "bare"),
        examples=60,
    ),
    "a planned mixture's": Reader(
        file="experts/config.json",
        damages=any_json,
        read=lambda folder: read_planned(folder, model="experts"),
        names=("config.json", "experts"),
        examples=30,
    ),
    "adapter's settings": Reader(
        file="adapter/adapter_config.json",
        damages=any_json,
        read=lambda folder: read_peft_adapter(folder / "adapter"),
        names=("adapter",),
        check=has_settings,
        examples=50,
    ),
    "adapter": Reader(
        file="adapter/adapter_model.safetensors",
        damages=any_tensors,
        read=lambda folder: read_peft_adapter(folder / "adapter"),
        names=("adapter",),
        check=has_settings,
        examples=40,
    ),
    "start": Reader(file="run/initial_adapter.safetensors", damages=any_tensors, read=read_initial_record, examples=30),
    "shards": Reader(
        file=f"cache/{CACHE_KEY}/{CACHE_PIECE}",
        damages=any_tensors,
        read=read_shards,
        check=lambda figures: figures.share in (0.0, 0.5),
        examples=40,
    ),
    "signed shards": Reader(
        file=f"cache/{CACHE_KEY}/{CACHE_PIECE}",
        damages=any_signed_piece,
        read=read_any_shards,
        check=lambda figures: 0.0 <= figures.share <= 1.0,
        examples=60,
    ),
    "entry": Reader(file=f"cache/{CACHE_KEY}/entry.json", damages=any_json, read=read_shards),
    "source": Reader(
        file="cache/sources/record.json",
        damages=any_json,
        read=read_source,
        check=lambda digest: isinstance(digest, str | None),
    ),
    "metrics": Reader(file="run/metrics.jsonl", damages=any_lines, read=read_run),
    "summary": Reader(file="run/summary.json", damages=any_json, read=read_run),
    "data": Reader(file="run/data.json", damages=any_json, read=read_run),
    "data again": Reader(file="run/data.json", damages=any_json, read=read_records),
    "state": Reader(file=f"{STEP}/state.json", damages=any_json, read=read_run),
    "published": Reader(file="run/adapter/adapter_config.json", damages=any_json, read=read_run),
    "card": Reader(file="card.md", damages=any_bytes, read=read_run),
    "error": Reader(file="run/logs/rank_0.error.json", damages=any_json, read=read_failure),
    "prompts": Reader(
        file="run/prompts.jsonl", damages=any_lines, read=lambda folder: read_prompts(folder / "run/prompts.jsonl")
    ),
    "axolotl": Reader(file="axolotl.yaml", damages=any_yaml, read=read_axolotl, names=("",), examples=40),
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
        with damaged(path, whole[:end]), pytest.raises(UserError, match=r"is cut off|is damaged|must be|is not set"):
            load_config(place / "run")
    assert load_config(place / "run") == config


@pytest.mark.parametrize("name", READERS)
def test_non_files_are_refused_or_missing(name: str, place: Path) -> None:
    holds_without(READERS[name], place)
