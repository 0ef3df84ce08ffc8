"""Check that real clients load exports and compute what was trained, and that no wrong file stays behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import safetensors.torch
import torch
import transformers

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.config_checks import read_config
from distlora.architecture.low_bit_headers import in_nf4
from distlora.architecture.spec import architecture_of
from distlora.config import AdapterConfig, UserError
from distlora.config.file import load_config
from distlora.post.export import bnb_folder, client_check, gguf_model, hf_folder, worker
from distlora.post.export.formats import FORMATS, ExportRequest, refuse
from distlora.post.trained import Name
from distlora.post.weights import open_base, read_factors
from distlora.training.setup import start_run_model
from distlora.weights.peft_folder import read_peft_adapter, with_layout
from distlora.weights.reader import Reader
from distlora_launcher.cli.export import checked
from distlora_launcher.cli.main import main
from support.bitsandbytes_weights import quantize
from support.converters import patched_converter  # noqa: F401  (a fixture)
from support.exports import (
    EVEN,
    FULL,
    RUNS,
    SINGLE,
    export,
    exported,
    in_process,  # noqa: F401  (a fixture)
    run,
    trained_runs,  # noqa: F401  (a fixture)
)
from support.family_models import hf_config, write_family_folder
from support.small_models import make_run, tokenizer, write_model_folder, write_text_file
from support.tiers import ci

CELLS = [("peft", "dora"), ("bnb", "lora")]
IN_CI = [(form, name) for form in ("peft", "bnb", "hf") for name in RUNS if (form, name) not in CELLS]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("form", "name"), [*CELLS, *(ci(*cell) for cell in IN_CI)])
def test_the_real_client_computes_what_was_trained(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, name: str
) -> None:
    """PEFT, bitsandbytes and transformers: 1e-4 in fp32, a thousandth of what the adapter does."""
    record = exported(place, name, form, tmp_path / "out", "fp32" if form == "hf" else None)
    readings = record["check"]["readings"]
    logits = [reading for reading in readings if reading["bound"] == 1e-4]
    assert len(logits) == 1
    assert logits[0]["difference"] <= 1e-4
    assert logits[0]["same_top"] == 1
    if name != "dora":
        assert record["check"]["moved"] > 0.1
    printed = capsys.readouterr().out
    assert "bound 1.0e-04: met" in printed
    assert printed.endswith(f"wrote {tmp_path / 'out'}\n")
    if form == "bnb":  # Also what a new run would train on: the very weights.
        assert readings[0]["what"] == "our own loader: weights"
        assert readings[0]["difference"] == 0
    if form == "peft" and name != "loftq-bf16":  # What NF4 took of the base is more than that.
        assert readings[1]["difference"] > 1e-3


@pytest.mark.ci
@pytest.mark.usefixtures("in_process")
def test_pissa_in_bitsandbytes_form_is_the_adapter_of_its_own_rank(place: Path, tmp_path: Path) -> None:
    """Compare a saved step and the published result: W less the start in NF4, and A and B as trained."""
    exported(place, "pissa", "bnb", tmp_path / "published")
    step = sorted((place / "pissa" / "checkpoints").iterdir())[-1]
    exported(place, "pissa", "bnb", tmp_path / "saved", checkpoint=step.name)
    trained = safetensors.torch.load_file(step / "adapter_model.safetensors")
    for out in ("published", "saved"):
        settings = json.loads((tmp_path / out / "adapter" / "adapter_config.json").read_text())
        assert (settings["r"], settings["init_lora_weights"]) == (4, True)
        tensors = safetensors.torch.load_file(tmp_path / out / "adapter" / "adapter_model.safetensors")
        assert tensors.keys() == trained.keys()
        assert all(torch.equal(tensors[name], trained[name]) for name in trained)


def test_a_weight_in_bitsandbytes_form_is_ours_byte_for_byte(place: Path, tmp_path: Path) -> None:
    """Parts, sizes and quant_state are those of bitsandbytes' own QuantState; what it would add is nothing."""
    import bitsandbytes.functional as bnb

    named = Name(place=str(place / "lora"))
    request = ExportRequest(run="", name=named, format="bnb", out=str(tmp_path / "out"), dtype="bf16", no_check=True)
    assert worker.run(request) == 0
    assert json.loads((tmp_path / "out" / "export.json").read_text())["check"] is None
    tensors: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = next(w for w in open_base(named.read().spec).weights.values() if w.name == name)
    source = safetensors.torch.load_file(place / "llama" / "model.safetensors")[name]
    codes, state = bnb.quantize_4bit(source, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()} | {name: codes}
    ours = {key: tensor for key, tensor in tensors.items() if key.startswith(name)}
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if "quant_state" not in key:
            assert (ours[key].shape, ours[key].dtype) == (tensor.shape, tensor.dtype), key
    assert torch.equal(ours[name], codes)
    mine, their = (json.loads(bytes(of[f"{name}.quant_state.bitsandbytes__nf4"].tolist())) for of in (ours, theirs))
    assert mine.keys() == their.keys()
    assert mine["dtype"] == "bfloat16"
    assert list(weight.shape) == mine["shape"] == their["shape"]
    dense = [key for key in tensors if key.endswith("norm.weight") or "embed" in key or key == "lm_head.weight"]
    stored = safetensors.torch.load_file(place / "llama" / "model.safetensors")
    assert dense
    assert all(torch.equal(tensors[key], stored[key]) and tensors[key].dtype == stored[key].dtype for key in dense)
    # The quantized-weights cache has the same tensors but the dense ones.
    config = load_config(place / "lora")
    config = replace(config, quant=replace(config.quant, cache=True, cache_dir=str(tmp_path / "cache")))
    start_run_model(config, SINGLE)
    cached: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "cache").glob("*/*.safetensors"):
        cached |= safetensors.torch.load_file(file)
    assert tensors.keys() - cached.keys() == set(dense)
    assert all(torch.equal(tensors[key], tensor) for key, tensor in cached.items())


@pytest.mark.ci
@pytest.mark.usefixtures("in_process")
def test_a_base_that_is_packed_already_is_copied(place: Path, tmp_path: Path) -> None:
    """A run on an export is exported again: the base's files are the same bytes, and the client's check holds."""
    exported(place, "lora", "bnb", tmp_path / "packed")
    shutil.copy(place / "text.jsonl", tmp_path)
    run(tmp_path, "run", "packed", adapter={"r": 4})
    again = exported(tmp_path, "run", "bnb", tmp_path / "again")
    assert again["check"]["readings"][1]["difference"] <= 1e-4
    files = ("model.safetensors", "config.json")
    assert all((tmp_path / "again" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes() for name in files)
    exported(tmp_path, "run", "peft", tmp_path / "adapter")
    exported(tmp_path, "run", "hf", tmp_path / "merged", "fp32")


@pytest.mark.ci
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_a_model_of_images_keeps_its_vision_tower_dense(name: str, tmp_path: Path) -> None:
    config = hf_config(name)
    for key, value in EVEN.items() if name == "gemma3" else [("intermediate_size", 320)]:
        setattr(config.text_config, key, value)
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "gemma")
    tokenizer().save_pretrained(tmp_path / "gemma")
    write_text_file(tmp_path / "text.jsonl")
    run(tmp_path, "run", "gemma", adapter={"r": 4})
    record = exported(tmp_path, "run", "bnb", tmp_path / "out")
    assert record["check"]["readings"][1]["difference"] <= 1e-4
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in settings["llm_int8_skip_modules"]
    assert any("vision_tower" in name or "visual" in name for name in settings["llm_int8_skip_modules"])
    out = tmp_path / "out"
    packed = [name for name, segment in CheckpointFiles(out).headers.items() if in_nf4(segment)]
    assert packed
    assert not any("visi" in name or "visual" in name for name in packed)


@pytest.mark.ci
@pytest.mark.usefixtures("in_process")
def test_a_merged_folder_in_16_bits_and_one_on_the_base_without_nf4(place: Path, tmp_path: Path) -> None:
    """Without --dtype it is the base's, fp32 here. On the other base it is that model which the client is held to."""
    for dtype in ("bf16", "fp16"):
        rounded, weights, before = exported(place, "dora", "hf", tmp_path / dtype, dtype)["check"]["readings"]
        assert 1e-4 < rounded["difference"] < 0.5
        assert weights["difference"] == 0
        assert before["difference"] <= before["bound"] == 1e-4
    step = sorted((place / "pissa" / "checkpoints").iterdir())[-1].name
    for name in ({}, {"checkpoint": step}):
        record = exported(place, "pissa", "hf", tmp_path / f"original{len(name)}", onto="original", **name)
        assert record["check"]["readings"][0]["bound"] == 1e-4
        assert (record["dtype"], record["onto"]) == ("fp32", "original")
        assert record["adapter"]["folder"] == (step if name else "adapter")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("form", "run"), [("vllm", "lora"), ("sglang", "pissa"), ci("vllm", "pissa")])
def test_a_servers_adapter_is_plain_lora_of_one_scale(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, run: str
) -> None:
    record = exported(place, run, form, tmp_path / "out")
    printed = capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    trained = json.loads((place / run / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["use_rslora"]) == (trained["r"], False)
    assert settings["lora_alpha"] == pytest.approx(trained["lora_alpha"] * trained["r"] ** 0.5)
    assert record["check"] is None
    assert " (limit 1e-06)" in printed
    assert "serve it with: " in printed


def test_a_release_before_the_table_is_written_for_types_that_it_was_run_with(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = Name(place=str(place / "lora"))
    request = ExportRequest(run="", name=name, format="vllm", out=str(tmp_path / "out"), version="0.32")
    refuse(name.read(), request)
    assert worker.run(request) == 0
    assert "vLLM 0.32 was run with adapters of this model type" in capsys.readouterr().err


@pytest.mark.usefixtures("in_process")
def test_an_unfinished_run_of_all_linears_goes_to_earlier_peft_and_to_vllm(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read the experts back in PEFT 0.18's layout: the run names them by all-linear, not by target_parameters."""
    base, data = folders / "mixtral", {"path": str(folders / "text.jsonl")}
    run_dir = run(tmp_path, "run", str(base), adapter={"r": 4}, data=data, train={"save_every": 2})
    shutil.rmtree(run_dir / "adapter")
    record = json.loads((run_dir / "data.json").read_text())
    (run_dir / "data.json").write_text(json.dumps(record | {"chat_template": "{{ messages }}"}))
    name, out = Name(place=str(run_dir)), tmp_path / "early"
    trained = name.read()
    assert (trained.spec.adapter.target_modules, trained.spec.adapter.target_parameters) == ("all-linear", ())
    request = ExportRequest(run="", name=name, format="peft", out=str(out), dtype=None, version="0.18")
    refuse(trained, request)
    assert worker.run(request) == 0
    record = json.loads((out / "export.json").read_text())
    assert (record["check"], record["for_version"]) == (None, "0.18")
    assert json.loads((out / "adapter_config.json").read_text())["peft_version"] == "0.18"
    architecture = architecture_of(read_config(base), base / "config.json")
    ours = read_peft_adapter(run_dir / "checkpoints" / "step_00000003")
    early, experts = with_layout(read_peft_adapter(out), architecture), architecture.experts_by_path
    assert early.transposed == experts.keys()
    assert early.is_early
    with Reader() as reader:
        for path in ours.paths:
            expected, found = (read_factors(file, path, reader, experts=experts.get(path)) for file in (ours, early))
            assert torch.equal(found.delta(), expected.delta()), path
    assert "largest relative error of dW, as PEFT 0.18 computes it: 0e+00 (limit 1e-06)" in capsys.readouterr().out
    out = tmp_path / "vllm"
    for version, is_read in (("0.33", True), ("9.0", False)):
        request = ExportRequest(run="", name=name, format="vllm", out=str(out), dtype=None, version=version)
        refuse(trained, request)
        assert worker.run(request) == 0
        printed = capsys.readouterr()
        assert f" --chat-template {out / 'chat_template.jinja'}\n" in printed.out
        assert ("the layout is that of vLLM 0.33.0; the source of 9.0 was not read" in printed.err) is not is_read
        shutil.rmtree(out)
    pissa = replace(
        trained, spec=replace(trained.spec, adapter=AdapterConfig(r=257, init="pissa", target_modules="attention"))
    )
    with pytest.raises(UserError, match=r"the adapter has rank 514, and vLLM serves at most 512"):
        refuse(pissa, request)


@pytest.mark.ci
@pytest.mark.usefixtures("in_process")
def test_experts_go_to_peft_and_to_a_merged_folder(tmp_path: Path) -> None:
    """Check that bitsandbytes is refused, as it leaves experts in 16 bits."""
    write_family_folder(tmp_path / "qwen3-moe", "qwen3-moe")
    tokenizer().save_pretrained(tmp_path / "qwen3-moe")
    write_text_file(tmp_path / "text.jsonl")
    run(tmp_path, "run", "qwen3-moe", adapter={"r": 4})
    for form in ("peft", "vllm", "sglang"):
        exported(tmp_path, "run", form, tmp_path / form)
    exported(tmp_path, "run", "hf", tmp_path / "merged", "fp32")
    with pytest.raises(UserError, match=r"no linear, which bitsandbytes leaves in 16 bits.*--format hf, or --for peft"):
        exported(tmp_path, "run", "bnb", tmp_path / "bnb")


@pytest.mark.ci
@pytest.mark.usefixtures("in_process")
def test_experts_that_training_left_dense_go_to_bitsandbytes(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "dense", "qwen3_moe", **EVEN, moe_intermediate_size=64)
    quantize(tmp_path / "dense", tmp_path / "packed", bnb_4bit_use_double_quant=True)
    write_text_file(tmp_path / "text.jsonl")
    run(tmp_path, "run", "packed", adapter={"r": 4}, quant={"method": "keep"})
    record = exported(tmp_path, "run", "bnb", tmp_path / "bnb")
    assert [reading["difference"] <= 1e-4 for reading in record["check"]["readings"][:2]] == [True, True]
    assert record["check"]["moved"] > 0.1


@pytest.mark.usefixtures("in_process")
def test_a_damaged_export_is_not_left_behind(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damage a merged model after it was written.

    In fp32 a tensor, which the logits show; in 16 bits one weight by a fiftieth, which they would not show.
    """
    write = hf_folder.write

    def damaged(asked: Any) -> None:
        write(asked)
        file = asked.place / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"][:1, :1] *= 1.02
        if asked.request.dtype == "fp32":
            tensors["model.layers.1.mlp.down_proj.weight"] *= -1
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(hf_folder, "write", damaged)
    name = Name(place=str(place / "lora"))
    for dtype in ("fp32", "bf16"):
        request = ExportRequest(run="", name=name, format="hf", out=str(tmp_path / dtype), dtype=dtype)
        assert worker.run(request) == 1
        said = capsys.readouterr()
        assert "NOT MET" in said.out
        assert "nothing is left" in said.err
        assert [*tmp_path.iterdir()] == []


@pytest.mark.ci
def test_the_command_exports_an_unfinished_run_through_a_real_client(place: Path, tmp_path: Path) -> None:
    """With the processes that a user has: the launcher, the worker, the check."""
    shutil.copytree(place / "pissa", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    command = [sys.executable, "-m", "distlora_launcher.cli.main", "export", "run", "--for", "peft"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "bound 1.0e-04: met" in ended.stdout
    out = tmp_path / "run" / "exports" / "peft"
    assert ended.stdout.endswith(f"wrote {out}\n")
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8


def test_a_gguf_file_is_named_after_its_run_and_dtype(place: Path) -> None:
    def name(run: Path, form: str, **options: Any) -> str:
        options["for_" if FORMATS[form].adapter else "format"] = form
        return Path(checked(ExportRequest(run=str(run), **options))[0].out).relative_to(place).as_posix()

    assert name(place / "lora", "gguf", dtype="q8_0") == "lora/exports/lora-q8_0.gguf"
    assert name(place / "lora", "llama.cpp") == "lora/exports/lora-lora-fp32.gguf"
    assert name(place / "lora", "hf") == "lora/exports/hf"
    with pytest.raises(UserError, match=r"gguf is a file that ends in \.gguf; name it x\.gguf"):
        name(place / "lora", "gguf", out="x")


def test_bad_export_options_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    run_dir = str(place / "lora")
    words: list[tuple[list[str], str]] = [
        (
            [run_dir],
            "write --format (hf, bnb, gguf) for a whole model, or --for (peft, vllm, sglang",
        ),
        (
            [run_dir, "--format", "ggud"],
            "--format=ggud is not known (did you mean 'gguf'?); write one of hf, bnb",
        ),
        ([run_dir, "--for", "vlm"], "--for=vlm is not known (did you mean 'vllm'?); write one of peft, vllm"),
        ([run_dir, "--format", "gguf-lora"], "named by their consumer; write --for llama.cpp"),
        ([run_dir, "--for", "peft", "--dtype", "bf16"], "peft keeps the dtypes that there are; leave --dtype out"),
        ([run_dir, "--for", "vllm", "--version", "0.9.1"], "the layout is known from vLLM 0.33.0 on"),
        ([run_dir, "--for", "vllm", "--version", "0.31"], "the layout is known from vLLM 0.33.0 on"),
        ([run_dir, "--for", "peft", "--version", "0.16"], "the layout is known from PEFT 0.17 on; update PEFT"),
        ([run_dir, "--for", "sglang", "--version", "new"], "--version=new is not a release"),
        ([run_dir, "--for", "llama.cpp", "--version", "1"], "llama.cpp has one layout; leave --version out"),
        ([str(place / "dora"), "--for", "vllm"], "--for=vllm: the adapter has use_dora=true, and the server adds B A"),
        ([str(place / "loftq-bf16"), "--for", "sglang"], "the adapter has LoftQ's correction of NF4"),
        ([run_dir, "--format", "bnb", "--onto", "original"], "bnb holds no merged weights"),
        ([run_dir, "--format", "bnb", "--out", "there"], "--out=there exists already"),
        ([run_dir, "--for", "peft", "--adapter", "base"], "the base alone has nothing trained"),
        ([run_dir, "--for", "peft", "--adapter", f"{run_dir}/adapter"], "is an adapter in PEFT's format already"),
        (["nowhere", "--for", "peft"], "nowhere"),
    ]
    for arguments, says in words:
        assert main(["export", *arguments]) == 2, arguments
        assert says in capsys.readouterr().err, arguments
    monkeypatch.setattr("distlora_launcher.cli.export.available_bytes", lambda: 10**8)
    assert main(["export", run_dir, "--format", "hf"]) == 2
    assert "about 1.0 GB, the model in fp32, and 0.1 GB are available; add --no-check" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", run_dir, "--format", "bnb"]) == 2
    cure = "`pip install 'distlora[demo]'`, or add --no-check"
    assert f"the check of --format=bnb needs peft, which is not installed; {cure}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (FULL, "has no adapter; .*/model is a Hugging"),
        ({"quant": {"method": "none"}}, "a base of quant=none, and in NF4 that is another"),
    ],
)
def test_runs_that_bitsandbytes_cannot_hold_are_refused(
    place: Path, tmp_path: Path, sections: dict[str, Any], says: str
) -> None:
    make_run(tmp_path / "run", place, "llama", **sections)
    (tmp_path / "run" / ("model" if "adapter" in sections else "adapter")).mkdir()
    name = Name(place=str(tmp_path / "run"))
    request = ExportRequest(run="", name=name, format="bnb", out="out", dtype="bf16")
    with pytest.raises(UserError, match=says):
        refuse(name.read(), request)


def test_rows_that_bitsandbytes_gets_wrong_on_a_cpu_are_not_checked(folders: Path, tmp_path: Path) -> None:
    run(tmp_path, "run", str(folders / "llama"), adapter={"r": 4}, data={"path": str(folders / "text.jsonl")})
    name = Name(place=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"rows of 96 weights: of 32, 96, 160.*add --no-check"):
        worker.run(ExportRequest(run="", name=name, format="bnb", out=str(tmp_path / "out"), dtype="fp32"))
    assert (
        worker.run(
            ExportRequest(run="", name=name, format="bnb", out=str(tmp_path / "out"), dtype="fp32", no_check=True)
        )
        == 0
    )
    assert bnb_folder.taken_back(name.read(), tmp_path / "out").difference == 0


@pytest.mark.ci
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("run", "form", "dtype", "name"),
    [
        ("dora", "gguf", None, {}),
        ("dora", "gguf", "q8_0", {}),
        ("pissa", "llama.cpp", None, {"checkpoint": "step_2"}),
        ("pissa", "llama.cpp", "fp16", {}),
        ("pissa", "gguf", "fp16", {"adapter": "base"}),
        ("pissa", "gguf", "bf16", {"onto": "original"}),
        ("full", "gguf", None, {}),
    ],
)
def test_what_was_trained_is_in_the_gguf_file(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    converter: Path,
    run: str,
    form: str,
    dtype: str | None,
    name: dict[str, Any],
) -> None:
    """By logits to 1e-4 before anything is rounded, and by weights to what rounding may move each."""
    assert export(place, run, form, tmp_path / "out.gguf", dtype, converter=converter, **name) == 0
    assert [*tmp_path.iterdir()] == [tmp_path / "out.gguf"]
    printed = capsys.readouterr().out
    assert ("every number that was trained" if form == "llama.cpp" else "bound 1.0e-04: met") in printed
    assert (form == "gguf") == ("may move each" in printed)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["general.type"].contents() == ("adapter" if form == "llama.cpp" else "model")
    if form == "gguf":
        assert ("kettle" in fields["tokenizer.ggml.tokens"].contents()) == (run == "dora")


@pytest.mark.ci
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("dtype", ["bf16", "q8_0"])
def test_a_file_without_the_adapter_is_not_left_behind(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converter: Path, dtype: str
) -> None:
    """Whatever the rounding of the type may hide of logits."""
    write = gguf_model.write

    def without_adapter(asked: Any) -> None:
        write(replace(asked, trained=Name(place=str(place / "pissa"), adapter="base").read()))

    monkeypatch.setattr(gguf_model, "write", without_adapter)
    assert export(place, "pissa", "gguf", tmp_path / "out.gguf", dtype, converter=converter) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ci
@pytest.mark.usefixtures("in_process")
def test_experts_and_their_adapters_go_to_llama_cpp(tmp_path: Path, converter: Path) -> None:
    """Each expert's matrices are apart on disk; the file has them in one tensor."""
    write_family_folder(tmp_path / "qwen3-moe", "qwen3-moe")
    tokenizer().save_pretrained(tmp_path / "qwen3-moe")
    write_text_file(tmp_path / "text.jsonl")
    run(tmp_path, "run", "qwen3-moe", adapter={"r": 4})
    assert export(tmp_path, "run", "gguf", tmp_path / "out.gguf", "fp32", converter=converter) == 0
    assert export(tmp_path, "run", "llama.cpp", tmp_path / "adapter.gguf", "fp32", converter=converter) == 0
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    assert {"blk.0.ffn_up_exps.weight.lora_a", "blk.0.attn_q.weight.lora_b"} <= names


@pytest.mark.llama_cpp
@pytest.mark.usefixtures("in_process")
@pytest.mark.skipif(not gguf_model.has_llama_cpp(), reason="llama-cpp-python is not installed; `make test-llama-cpp`")
def test_llama_cpp_computes_what_was_trained(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], converter: Path
) -> None:
    monkeypatch.setattr(gguf_model, "has_llama_cpp", lambda: True)
    assert export(place, "lora", "gguf", tmp_path / "out.gguf", "fp32", converter=converter) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  llama.cpp"))
    assert "(bound 1.0e-04: met)" in line
    base, adapter = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    assert export(place, "lora", "gguf", base, "fp32", converter=converter, adapter="base") == 0
    assert export(place, "lora", "llama.cpp", adapter, "fp32", converter=converter) == 0
    ours = client_check.our_logits(Name(place=str(place / "lora")).read())
    client = gguf_model.LlamaCpp(base, adapter, context=ours.tokens.shape[1])
    assert (client.logits(ours.tokens) - ours.logits).abs().max() < 1e-4
