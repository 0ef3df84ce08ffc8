"""Load safetensors into a rank's shard: equal to quantizing the whole tensor, from any layout and source dtype."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.safetensors_headers import read_headers
from distlora.config import UserError
from distlora.loading.load_base import load_base
from distlora.model.frozen_linear import FrozenLinear
from distlora.parallel import Ranks
from distlora.training import worker
from distlora_kernels.formats import nf4
from support.loaded_shards import check_slices, loaded, own_rows
from support.runs import build_run_model, parallelize_run
from support.small_models import make_run, write_model_folder
from support.worlds import World


@pytest.mark.parametrize(
    ("model", "size"),
    [("llama", 3), *(pytest.param("llama-tied", size, marks=pytest.mark.ci) for size in (1, 2, 4))],
)
def test_rank_holds_its_slice_of_the_quantization(world: World, folders: Path, size: int, model: str) -> None:
    check_slices(world.run(size, own_rows, folder=folders / model), folders / model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sharded_checkpoint_loads_like_one_file(folders: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import LlamaForCausalLM

    source = LlamaForCausalLM.from_pretrained(folders / "llama", dtype=dtype)
    source.save_pretrained(tmp_path / "one")
    source.save_pretrained(tmp_path / "many", max_shard_size="300KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (loaded(tmp_path / name)[0].state_dict() for name in ("one", "many"))
    assert one.keys() == many.keys()
    adapters = {name for name in one if ".adapters." in name}
    assert all(torch.equal(one[name], many[name]) for name in one.keys() - adapters)
    model, _ = loaded(tmp_path / "one")
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            weight = source.get_parameter(model.hf_name(f"{name}.weight"))
            assert torch.equal(module.codes, nf4.nf4_quantize(weight)[0])


def test_quant_none_keeps_run_dtype(folders: Path) -> None:
    source = safetensors.torch.load_file(folders / "llama" / "model.safetensors")
    model, _ = loaded(folders / "llama", quant={"method": "none"}, train={"dtype": "bf16"})
    for name, parameter in model.named_parameters():
        if ".adapters." not in name:
            assert torch.equal(parameter, source[model.hf_name(name)].bfloat16()), name


@pytest.mark.parametrize(
    ("tensor", "value", "format"),
    [
        *(("model.layers.1.mlp.up_proj.weight", float("nan"), format) for format in ("nf4", "int8", "fp8_block")),
        ("model.embed_tokens.weight", float("inf"), "nf4"),
    ],
)
def test_non_finite_weights_are_refused(folders: Path, tmp_path: Path, tensor: str, value: float, format: str) -> None:
    shutil.copytree(folders / "llama", tmp_path / "bad")
    tensors = safetensors.torch.load_file(tmp_path / "bad" / "model.safetensors")
    tensors[tensor].view(-1)[777] = value
    safetensors.torch.save_file(tensors, tmp_path / "bad" / "model.safetensors")
    quant = {} if format == "nf4" else {"method": "mixed", "formats": {format: [tensor]}}
    with pytest.raises(UserError, match=f"{tensor} holds NaN or Inf"):
        loaded(tmp_path / "bad", quant=quant)


def test_tensors_of_another_model_are_refused(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "llama", tmp_path / "bad")
    tensors = safetensors.torch.load_file(tmp_path / "bad" / "model.safetensors")
    removed = tensors.pop("model.layers.2.self_attn.o_proj.weight")
    safetensors.torch.save_file(tensors, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor model\.layers\.2\.self_attn\.o_proj\.weight"):
        loaded(tmp_path / "bad")
    tensors["model.layers.2.self_attn.o_proj.weight"] = removed[:50].clone()
    safetensors.torch.save_file(tensors, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(UserError, match=r"shape \[50, 96\] on disk and \[96, 96\]"):
        loaded(tmp_path / "bad")


def test_fingerprint_differs_for_other_weights(folders: Path, tmp_path: Path) -> None:
    write_model_folder(tmp_path / "same", "llama")
    assert CheckpointFiles(tmp_path / "same").fingerprint == CheckpointFiles(folders / "llama").fingerprint
    tensors = safetensors.torch.load_file(tmp_path / "same" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 1e-3
    safetensors.torch.save_file(tensors, tmp_path / "same" / "model.safetensors")
    assert CheckpointFiles(tmp_path / "same").fingerprint != CheckpointFiles(folders / "llama").fingerprint


def test_rank_reads_only_its_bytes(world: World, folders: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", folders)
    read = world.run(3, bytes_read, run_dir=tmp_path / "run")
    expected = [0, 0, 0]
    for name, segment in read_headers(folders / "llama").items():
        packed = name.endswith("_proj.weight")
        rows = nf4.num_groups(segment.numel) if packed else segment.shape[0]
        row_bytes = nf4.GROUP * 4 if packed else segment.num_bytes // segment.shape[0]
        for rank in range(3):
            start, stop = (min(i * -(-rows // 3) * row_bytes, segment.num_bytes) for i in (rank, rank + 1))
            expected[rank] += stop - start
    assert read == expected
    assert sum(read) == sum(segment.num_bytes for segment in read_headers(folders / "llama").values())


def bytes_read(ranks: Ranks, *, run_dir: Path) -> int:
    config = worker.load_config(run_dir)
    model = build_run_model(config)
    return load_base(model, CheckpointFiles(config.model.path), parallelize_run(model, ranks, config)).bytes_read


def test_model_uses_no_torch_generator(folders: Path, tmp_path: Path) -> None:
    """Check attention_dropout in config.json: it would make evaluation random, and recomputation draw another mask."""
    write_model_folder(tmp_path / "dropout", "llama", attention_dropout=0.3)
    model, _ = loaded(tmp_path / "dropout")
    tokens = torch.arange(40)[None]
    assert torch.equal(model(tokens, tokens, tokens), model(tokens, tokens, tokens))
