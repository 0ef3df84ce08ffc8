"""Buffers: what a checkpoint holds is loaded, transformers' own code makes the rest, and the others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from distlora.architecture.safetensors_headers import read_headers
from distlora.config import UserError
from distlora.loading.tensor_files import write_model
from distlora.model.build import DTYPES
from distlora.model.hf_model import made_buffers
from distlora.model.lm_head import LossForm
from distlora.parallel import Ranks
from distlora.post.merged_parameters import parameters_of
from distlora.post.weights import open_base
from support.family_models import SINGLE, VARIANTS, FolderOf, architecture, config_for, load_ours, tokens
from support.small_models import SHAPES
from support.tiers import ci
from support.worlds import World

STORED = ("glm4_moe", "gemma4_text", "minimax_m2", "lfm2_moe", "ernie4_5_moe", "falcon_h1")
"""Types whose checkpoints hold buffers, or tensors that stay in fp32; the decoder of the last fills layers' buffers."""


@pytest.mark.parametrize("name", [*map(ci, VARIANTS), *STORED])
def test_buffers_and_dtypes_equal_those_of_from_pretrained(family_folder: FolderOf, name: str) -> None:
    auto = getattr(transformers, architecture(name).auto_class)
    for dtype in ("fp32", "bf16"):
        ours, _ = load_ours(family_folder(name), quant={"method": "none"}, train={"dtype": dtype})
        theirs = auto.from_pretrained(family_folder(name), dtype=DTYPES[dtype])
        inside = f"{ours.architecture.decoder}."
        own = {ours.hf_name(path): buffer for path, buffer in ours.named_buffers()}
        expected = {path: buffer for path, buffer in theirs.named_buffers() if path.startswith(inside)}
        assert own.keys() == expected.keys()
        for path, buffer in expected.items():
            assert own[path].dtype == buffer.dtype, path
            assert torch.equal(own[path], buffer), path
        dtypes = {path: parameter.dtype for path, parameter in theirs.named_parameters()}
        held = {ours.hf_name(path): p.dtype for path, p in ours.named_parameters() if ".adapters." not in path}
        assert {path: dtypes[path] for path in held} == held


def test_a_buffer_that_nothing_fills_is_refused_by_name() -> None:
    with torch.device("meta"):
        hf_model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES))
        hf_model.model.norm.register_buffer("table", torch.empty(3), persistent=False)
    with pytest.raises(UserError, match=r"buffer model\.norm\.table, which transformers does not fill"):
        made_buffers(hf_model)


@pytest.fixture(scope="module")
def apertus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model whose activations keep two buffers in the checkpoint, of values that are not their start."""
    folder = tmp_path_factory.mktemp("apertus")
    torch.manual_seed(0)
    hf_model = transformers.ApertusForCausalLM(transformers.ApertusConfig(**SHAPES))
    for name, buffer in hf_model.named_buffers():
        if name.endswith("act_fn.beta"):
            buffer.fill_(0.3)
    hf_model.save_pretrained(folder)
    return folder


def _load(folder: Path, ranks: Ranks) -> tuple[Any, Any]:
    return load_ours(folder, ranks, quant={"method": "none"}, adapter={"target_modules": ["q_proj"], "r": 2})


def _logits(ranks: Ranks, *, folder: Path) -> torch.Tensor:
    model, _ = _load(folder, ranks)
    for pair in (pair for _, weight in model.adapted_weights() for pair in weight.adapters.values()):
        pair.B.data.zero_()
    input_ids = tokens(2, 9)
    labels = input_ids.roll(-1, 1)
    return model(input_ids, torch.arange(9).expand(2, 9), labels, losses=LossForm(by_token=True)).detach()


def test_stored_buffers_are_loaded_on_one_rank_and_two(world: World, apertus: Path) -> None:
    theirs = transformers.ApertusForCausalLM.from_pretrained(apertus)
    input_ids = tokens(2, 9)
    logits = theirs(input_ids).logits.flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, input_ids.roll(-1, 1).flatten(), reduction="none").view(2, 9)
    torch.testing.assert_close(_logits(SINGLE, folder=apertus), expected.detach(), atol=1e-5, rtol=1e-5)
    for losses in world.run(2, _logits, folder=apertus):
        torch.testing.assert_close(losses, expected.detach(), atol=1e-5, rtol=1e-5)


def test_a_missing_stored_buffer_is_refused(apertus: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(apertus / "model.safetensors")
    del tensors["model.layers.1.mlp.act_fn.beta"]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((apertus / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"no tensor model\.layers\.1\.mlp\.act_fn\.beta"):
        _load(tmp_path, SINGLE)


def test_merging_copies_stored_buffers_byte_for_byte(apertus: Path) -> None:
    names = {name for name in read_headers(apertus) if name.endswith((".beta", ".eps"))}
    assert len(names) == 2 * SHAPES["num_hidden_layers"]  # type: ignore[operator]
    base = open_base(config_for(apertus).spec)
    written = {name for parameter in parameters_of(base, None) for name in parameter.outputs}
    assert base.files.headers.keys() - written == names, "what is not written is copied"


def test_full_fine_tuning_exports_stored_buffers_in_their_dtype(apertus: Path, tmp_path: Path) -> None:
    model, backend = load_ours(apertus, quant={"method": "none"}, adapter={"method": "full"})
    write_model(tmp_path, model.hf_state_dict(), backend, torch.bfloat16)
    written = safetensors.torch.load_file(tmp_path / "model.safetensors")
    stored = safetensors.torch.load_file(apertus / "model.safetensors")
    assert written.keys() == stored.keys()
    for name, tensor in stored.items():
        is_buffer = name.endswith((".beta", ".eps"))
        assert torch.equal(written[name], tensor if is_buffer else tensor.bfloat16()), name
