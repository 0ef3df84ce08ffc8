"""Buffers: what a checkpoint holds is loaded, transformers' own code makes the rest, and the others are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from distlora.architecture.safetensors_headers import read_headers
from distlora.config import UserError
from distlora.loading.tensor_files import write_model
from distlora.model.buffers import keep_in_fp32, made_buffers, materialize_buffers, stored_buffers
from distlora.parallel import Ranks
from distlora.post.merge.parameters import parameters_of
from distlora.post.weights import open_base
from support.family_models import SINGLE, VARIANTS, config_for, hf_config, load_ours, tokens
from support.small_models import SHAPES
from support.worlds import World

_MOE = {"num_hidden_layers": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
_STORED: dict[str, dict[str, Any]] = {
    "Glm4Moe": _MOE | {"n_routed_experts": 4, "first_k_dense_replace": 1},
    "Gemma4Text": {"num_hidden_layers": 2, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    "MiniMaxM2": _MOE | {"num_local_experts": 4},
    "Lfm2Moe": _MOE | {"num_experts": 4, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Ernie4_5_Moe": _MOE | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    # Its decoder fills a buffer of each layer.
    "FalconH1": {"num_hidden_layers": 1, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
}
"""transformers' class name without its ending, and settings, of models whose checkpoints hold buffers, or fp32."""


class _Model(nn.Module):
    """The parts of CausalLM that buffers need."""

    def __init__(self, hf_model: Any) -> None:
        super().__init__()
        self.hf_model, self.hf_config = hf_model, hf_model.config
        self.layout = SimpleNamespace(names=set(hf_model.state_dict()))
        self.made_buffers = made_buffers(hf_model)

    def hf_name(self, path: str) -> str:
        return path.removeprefix("hf_model.")


def _class_and_config(name: str) -> tuple[Any, Any]:
    if name in VARIANTS:
        config, stem = hf_config(name), VARIANTS[name][0]
        whole = isinstance(config, transformers.Gemma3Config)
        return getattr(transformers, f"{stem}For{'ConditionalGeneration' if whole else 'CausalLM'}"), config
    settings = SHAPES | {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8} | _STORED[name]
    stem = name.removesuffix("Text")
    return getattr(transformers, f"{stem}ForCausalLM"), getattr(transformers, f"{name}Config")(**settings)


@pytest.mark.parametrize("name", [*VARIANTS, *_STORED])
def test_made_buffers_and_dtypes_equal_those_of_from_pretrained(name: str) -> None:
    hf_class, config = _class_and_config(name)
    start = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            hf_model = hf_class._from_config(config, dtype=dtype)
        # The dtype that bf16 checkpoints of MoEs have; from_pretrained casts each tensor to its own.
        stored = {key: torch.zeros(value.shape, dtype=dtype) for key, value in hf_model.state_dict().items()}
        theirs = hf_class.from_pretrained(None, config=config, state_dict=stored, dtype=dtype)
        torch.set_rng_state(start)
        keep_in_fp32(hf_model, dtype)
        assert {n: t.dtype for n, t in hf_model.state_dict().items()} == {
            n: t.dtype for n, t in theirs.state_dict().items()
        }
        ours: Any = _Model(hf_model)
        hf_model.to_empty(device="cpu")
        kept = {key: buffer.fill_(3.0) for key, buffer in stored_buffers(ours).items()}
        materialize_buffers(ours, torch.device("cpu"))
        assert torch.equal(torch.get_rng_state(), start), "training's random stream moved"
        for path, buffer in theirs.named_buffers():
            actual = ours.hf_model.get_buffer(path)
            assert actual.dtype == buffer.dtype, path
            assert torch.equal(actual, torch.full_like(buffer, 3.0) if path in kept else buffer), path


def test_a_buffer_that_nothing_fills_is_refused_by_name() -> None:
    hf_class, config = _class_and_config("llama")
    with torch.device("meta"):
        hf_model = hf_class._from_config(config)
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
    return model(input_ids, torch.arange(9).expand(2, 9), labels, by_token=True).detach()


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
