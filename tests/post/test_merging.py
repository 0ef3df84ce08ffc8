"""A merged folder, loaded by transformers, computes what the adapted model computes. Its memory does not grow."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distlora.architecture.safetensors_headers import INDEX_NAME, header_bytes, lay_out, read_headers
from distlora.config import UserError
from distlora.loading.tensor_files import new_folder
from distlora.post.load_trained import load_trained
from distlora.post.merge import MergeRequest, Receipt
from distlora.post.merge_worker import merge_to
from distlora.post.trained import Name
from distlora.post.weights import open_base, read_factors
from distlora.system.atomic_io import sha256
from distlora.system.command_worker import to_json
from distlora.training import worker
from distlora.training.publish import publish_result
from distlora.weights.peft_folder import read_peft_adapter
from distlora.weights.reader import Reader
from distlora_kernels.formats import nf4
from support.bitsandbytes_weights import quantize
from support.family_models import SINGLE, config_for, hf_model, load_ours, our_logits, tokens
from support.peft_models import adapted, their_logits
from support.small_models import NEW_TOKENS, make_run, write_model_folder
from support.tiers import ci, diagonal

QWEN25_1_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
"""Qwen2.5-1.5B's config.json: 1.54 B parameters, the largest of them the embedding, 233 M."""


def shapes_of(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return each tensor's name and shape of a qwen2 with a tied LM head, in the model's order."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{prefix}self_attn.{name}_proj.bias", (rows,)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


def write_large_model(folder: Path, config: dict[str, Any], *, shards: int = 2) -> None:
    """Write random bf16 weights of std 0.02."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = dict(shapes_of(config))
    names = list(tensors)
    parts = [names[part * len(names) // shards : (part + 1) * len(names) // shards] for part in range(shards)]
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        _write(folder / file, {name: ("BF16", tensors[name]) for name in part}, std=0.02)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_large_adapter(folder: Path, config: dict[str, Any], *, rank: int = 16) -> None:
    """Write a LoRA on all linears, in fp32."""
    folder.mkdir(parents=True)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes_of(config):
        if name.endswith("_proj.weight"):
            path = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = ("F32", (rank, shape[1]))
            tensors[f"{path}.lora_B.weight"] = ("F32", (shape[0], rank))
    _write(folder / "adapter_model.safetensors", tensors, std=0.01)
    targets = sorted({name.split(".")[-3] for name in tensors})
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(values))


def _write(file: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], *, std: float) -> None:
    table = lay_out(tensors)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2**22, generator=generator) * std  # Drawn once: drawing 1.5 B takes a minute.
    with file.open("wb") as stream:
        stream.write(header_bytes(table, {"format": "pt"}))
        for number, (_, (dtype, shape)) in enumerate(table_rows(table, tensors)):
            left = torch.Size(shape).numel()
            own = block.roll(1009 * number).to(torch.bfloat16 if dtype == "BF16" else torch.float32)
            while left:
                part = own[: min(left, len(own))]
                stream.write(part.view(torch.uint8).numpy().data)
                left -= len(part)


def table_rows(
    table: dict[str, dict[str, Any]], tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Return the tensors in the order of the file."""
    for name in table:
        yield name, tensors[name]


TRAINED: dict[str, Any] = {"train": {"max_steps": 4, "save_every": 2}, "optim": {"lr": 2e-2}}


def quiet(text: str) -> None:
    """Silence progress."""


@pytest.mark.parametrize(
    ("variant", "quant"),
    [
        *diagonal(["llama3-tied", "qwen2", "gemma3", "phi3", "mixtral", "qwen3-moe", "gpt-oss"], ["nf4", "none"]),
        *(("qwen3_5", "nf4"), ("glm4_moe", "nf4")),
        *(ci(name, "nf4") for name in ("qwen3_next", "gemma4_text@shared", "lfm2", "granite@scaled", "mistral3")),
    ],
)
def test_the_merged_model_computes_what_the_adapted_one_does(variant: str, quant: str, tmp_path: Path) -> None:
    model, trained = adapted(tmp_path, variant, quant={"method": quant, "cache": False})
    out = tmp_path / "merged"
    receipt = merge_to(trained, out, onto="trained", dtype=torch.float32, say=quiet)
    ids = tokens(2, 24)
    ours = our_logits(model, ids)
    theirs = their_logits(out, ids, model.architecture)
    assert (ours - theirs).abs().max() <= 1e-4
    assert Receipt.read(out) == receipt
    before, after = read_headers(tmp_path / "base"), read_headers(out)
    assert {name: segment.shape for name, segment in before.items()} == {
        name: segment.shape for name, segment in after.items()
    }
    trained_names = {name for names in model.architecture.on_disk(before).values() for name in names}
    with Reader() as reader:
        for name in before.keys() - trained_names:  # Stored buffers, and all of a vision tower.
            was, now = (reader.read([where[name]], 0, where[name].numel) for where in (before, after))
            assert torch.equal(was, now), name
    assert before.keys() - trained_names or not model.architecture.composite


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"adapter": {"use_dora": True}}),
    "pissa": ("qwen3", {"adapter": {"init": "pissa", "use_rslora": True}}),
    "loftq": ("llama", {"adapter": {"init": "loftq"}}),
    "rows": ("llama-tied", {"adapter": {"trainable_token_indices": [3, 700]}}),
    "new-tokens": ("llama", {"new_tokens": NEW_TOKENS}),
    "modules": ("llama-tied", {"adapter": {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": "qv"}}),
}
"""name -> (base, what is otherwise in its config)."""


@pytest.mark.parametrize("name", [name if name == "rows" else ci(name) for name in RUNS])
def test_the_merge_of_a_run_and_of_its_checkpoint_computes_what_they_do(
    name: str, folders: Path, tmp_path: Path
) -> None:
    model_name, sections = RUNS[name]
    run = tmp_path / "run"
    make_run(run, folders, model_name, **sections | TRAINED)
    worker.run(run, SINGLE)
    ids = tokens(2, 24)
    for checkpoint in (None, "step_2"):
        trained = Name(place=str(run), checkpoint=checkpoint).read()
        model, _ = load_trained(trained, SINGLE)
        if model.vocabulary.new:
            ids[:, :3] = torch.tensor(sorted(model.vocabulary.new.values()))
        ours = our_logits(model, ids)
        for onto in ("trained", "original"):
            if name == "loftq" and onto == "original":
                continue
            out = tmp_path / f"{checkpoint}-{onto}"
            merge_to(trained, out, onto=onto, dtype=torch.float32, say=quiet)
            difference = float((ours - their_logits(out, ids, model.architecture)).abs().max())
            assert difference <= 1e-4 if onto == "trained" else difference > 1e-3, (checkpoint, onto)


def test_a_base_in_nf4_on_disk_becomes_dense(folders: Path, tmp_path: Path) -> None:
    base, merged = tmp_path / "packed", tmp_path / "merged"
    write_model_folder(tmp_path / "dense", "llama", hidden_size=128, intermediate_size=320, head_dim=32)
    quantize(tmp_path / "dense", base, bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["lm_head", "k_proj"])
    model, backend = load_ours(base)
    publish_result(tmp_path / "adapter", model, config_for(base).spec, None, backend)
    trained = Name(place=str(tmp_path / "adapter"), base=str(base)).read()
    merge_to(trained, merged, onto="trained", dtype=torch.float32, say=quiet)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    ids = tokens(2, 24)
    assert (our_logits(model, ids) - their_logits(merged, ids, model.architecture)).abs().max() <= 1e-4
    with pytest.raises(UserError, match=r"--onto=original: .* is quantized on disk"):
        merge_to(trained, tmp_path / "never", onto="original", dtype=torch.float32, say=quiet)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("onto", ["trained", "original"])
def test_the_receipt_counts_what_each_type_keeps(onto: str, tmp_path: Path) -> None:
    """Against whole matrices, in fp64."""
    _, trained = adapted(tmp_path, "llama-biases")
    receipt = merge_to(trained, tmp_path / "merged", onto=onto, dtype=torch.bfloat16, say=quiet)  # type: ignore[arg-type]
    base, adapter = open_base(trained.spec, trained.initial_adapter_dir), read_peft_adapter(tmp_path / "adapter")
    assert receipt.weights.keys() == {f"{path}.weight" for path in adapter.paths}
    lost, delta_square = dict.fromkeys(("bf16", "fp16", "nf4"), 0.0), 0.0
    with Reader() as reader:
        for path in adapter.paths:
            weight = base.weights[f"{path}.weight"].whole(reader, original=onto == "original")
            delta = read_factors(adapter, path, reader).delta()
            merged = weight + delta
            again = nf4.NF4.dequantize(nf4.nf4_quantize(merged), shape=tuple(merged.shape), dtype=torch.float32)
            forms = {"bf16": merged.bfloat16(), "fp16": merged.half(), "nf4": again}
            found = receipt.weights[f"{path}.weight"]
            assert found["ratio"] == pytest.approx(float(delta.double().norm() / weight.double().norm()), rel=1e-5)
            for name, form in forms.items():
                left = (merged.double() - form.double()).norm()
                assert found["kept"][name] == pytest.approx(float(1 - left / delta.double().norm()), abs=1e-4), name
                lost[name] += float(left) ** 2
            delta_square += float(delta.double().norm()) ** 2
    for name, square in lost.items():
        assert receipt.total["kept"][name] == pytest.approx(1 - (square / delta_square) ** 0.5, abs=1e-4)
    for name, expected in receipt.files.items():
        assert sha256(tmp_path / "merged" / name) == expected
    assert receipt.base["files"] == {"model.safetensors": sha256(tmp_path / "base" / "model.safetensors")}


def test_shards_names_and_other_tensors_stay_those_of_the_base(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    hf_model("gemma3").save_pretrained(base, max_shard_size="200KB")
    model, backend = load_ours(base)
    publish_result(tmp_path / "adapter", model, config_for(base).spec, None, backend)
    trained = Name(place=str(tmp_path / "adapter"), base=str(base)).read()
    merge_to(trained, out, onto="trained", dtype=torch.bfloat16, say=quiet)
    before, after = read_headers(base), read_headers(out)
    assert len({segment.file for segment in before.values()}) > 3
    assert {(name, segment.file.name, segment.shape) for name, segment in before.items()} == {
        (name, segment.file.name, segment.shape) for name, segment in after.items()
    }
    vision = [name for name in before if "vision" in name]
    assert vision
    with Reader() as reader:
        for name in vision:
            was, now = (reader.read([where[name]], 0, where[name].numel) for where in (before, after))
            assert torch.equal(was, now)
    assert {after[name].dtype for name in after if name not in vision and "projector" not in name} == {"BF16"}


def test_a_number_beyond_fp16_and_a_full_disk_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, trained = adapted(tmp_path, "llama3-tied")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"the merged model takes .* and the disk there has"):
        merge_to(trained, tmp_path / "merged", onto="trained", dtype=torch.float32, say=quiet)
    monkeypatch.undo()
    weights = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"][3] = 2**20  # Which bf16, that a run computes in, holds.
    safetensors.torch.save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"fp16 ends at 65,504, and model.norm.weight has 1,048,576"):
        merge_to(trained, tmp_path / "merged", onto="trained", dtype=torch.float16, say=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_one_process_writes_a_folder_and_none_takes_anothers_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out.tmp" / "left").mkdir(parents=True)
    with new_folder(out) as place:
        assert list(place.iterdir()) == [], "what a killed process left is gone"
        with pytest.raises(UserError, match="another process is writing"), new_folder(out):
            pass
        (place / "file").write_text("ours")
    assert (out / "file").read_text() == "ours"
    with pytest.raises(UserError, match="was created meanwhile"), new_folder(out) as place:
        (place / "file").write_text("another's")
    assert (out / "file").read_text() == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_head_on_disk_that_the_base_ties_stays_its_embedding(folders: Path, tmp_path: Path) -> None:
    """Transformers unties two that differ: both get the trained rows."""
    base, out = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(folders / "llama-tied", base)
    weights = safetensors.torch.load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folders / "text.jsonl", tmp_path)
    adapter = {"trainable_token_indices": [3, 700], "target_modules": "qv"}
    make_run(tmp_path / "run", tmp_path, "base", adapter=adapter, **TRAINED)
    worker.run(tmp_path / "run", SINGLE)
    trained = Name(place=str(tmp_path / "run")).read()
    merge_to(trained, out, onto="trained", dtype=torch.float32, say=quiet)
    merged = safetensors.torch.load_file(out / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    changed = (merged["lm_head.weight"] != weights["lm_head.weight"]).any(dim=1).nonzero().flatten().tolist()
    assert changed == [3, 700]
    ids = tokens(2, 24)
    ids[0, :2] = torch.tensor([3, 700])
    model, _ = load_trained(trained, SINGLE)
    assert (our_logits(model, ids) - their_logits(out, ids, model.architecture)).abs().max() <= 1e-4


SMALL = QWEN25_1_5B | {
    "hidden_size": 1024,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 32000,
}
"""90 M parameters: 180 MB on disk, 360 MB merged."""

CHILD = """
import re, sys
from pathlib import Path
from distlora.post.merge_worker import run
from distlora.post.merge import MergeRequest
from distlora.system.command_worker import from_json

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

from transformers import Qwen2ForCausalLM
before = peak()
run(from_json(MergeRequest, sys.argv[1]))
print("peak", before, peak())
"""


def peaks(tmp_path: Path, config: dict[str, object]) -> tuple[int, int, int]:
    """(bytes of the process after its imports, at most, of the largest tensor)."""
    write_large_model(tmp_path / "base", config)
    write_large_adapter(tmp_path / "adapter", config)
    name = Name(place=str(tmp_path / "adapter"), base=str(tmp_path / "base"))
    request = MergeRequest(run="", name=name, out=str(tmp_path / "merged"))
    finished = subprocess.run(
        [sys.executable, "-c", CHILD, to_json(request)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    _, before, after = finished.stdout.splitlines()[-1].split()
    files = json.loads((tmp_path / "merged" / "merge.json").read_text())["files"]
    assert len(files) >= 3
    largest = max(segment.num_bytes for segment in read_headers(tmp_path / "base").values())
    return int(before), int(after), largest


@pytest.mark.ci
def test_a_merge_takes_a_few_pieces_of_memory(tmp_path: Path) -> None:
    before, after, _ = peaks(tmp_path, SMALL)
    # Four tensors at once, of each some pieces of 4 MiB, and what the allocator keeps.
    assert after - before < 200e6, f"{(after - before) / 1e6:.0f} MB"


@pytest.mark.slow
def test_a_model_of_1_5b_stays_within_the_bound(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("needs 10 GB of disk: base, adapter, and the merged model in fp32")
    _, after, largest = peaks(tmp_path, QWEN25_1_5B)
    assert after <= 3 * largest + 300e6, f"{after / 1e6:.0f} MB"
