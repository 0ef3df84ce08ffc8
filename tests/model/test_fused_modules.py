"""Fused modules of a GPU in our decoders: the numbers of transformers' own, the same parameters under the same names.

liger-kernel comes with the extra `cuda`. Without a GPU its kernels and the elementwise ones of distlora run in Triton's
interpreter (conftest.py), the adapted linears on the CPU.
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distlora.derive.fusible import fusible
from distlora.model.build import CausalLM
from distlora.model.fused_modules import use_liger, use_own
from distlora.model.mlp import place_mlps
from distlora_kernels import elementwise
from support.accounting import Kept
from support.closeness import relative_error
from support.family_models import hf_model, load_ours, tokens, write_family_folder
from support.fused_model import ONE_EACH, PARTIAL_ROTARY, RANKS, check_kept, run
from support.tiers import ci

needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed (the extra `cuda`)"
)


@pytest.fixture
def interpretable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add what Triton's interpreter lacks for these kernels without a GPU.

    It passes floats as they are, where the compiler makes fp32 scalars with methods of them, and it has none of
    libdevice's functions.
    """
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    def elementwise(function: Any) -> Any:
        return lambda x: tl.tensor(interpreter.TensorHandle(function(x.handle.data), x.handle.dtype), x.type)

    if importlib.util.find_spec("liger_kernel") is None:
        return
    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", elementwise(lambda x: np.float32(1) / np.sqrt(x)))
    monkeypatch.setattr("liger_kernel.ops.geglu.tanh", elementwise(np.tanh))


def fuse(kernels: str, model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(elementwise, "uses_triton", lambda tensor: True)
    if kernels == "liger":
        return use_liger(model.decoder, model.architecture, model.head)
    return use_own(model.decoder, model.architecture, model.head, is_gpu=True)


@pytest.mark.parametrize(
    ("kernels", "name"),
    [
        ("own", "gemma2"),
        *(ci("own", name) for name in (*ONE_EACH, PARTIAL_ROTARY) if name != "gemma2"),
        *(ci("liger", name, marks=[needs_liger]) for name in (*ONE_EACH, PARTIAL_ROTARY)),
    ],
)
def test_a_decoder_with_fused_kernels_computes_what_it_did(
    kernels: str, name: str, tmp_path: Path, interpretable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_family_folder(tmp_path, name)
    # With and without recomputation: the rotary embedding and the MLP's backward overwrite what they are given.
    checkpointing = "block" if name in ("llama-biases", "gemma2") else "none"
    train = {"dtype": "fp32", "checkpointing": checkpointing, "fused_kernels": "none"}
    model, _ = load_ours(tmp_path, RANKS, train=train)
    input_ids = tokens(2, 4).to(RANKS.device)
    expected_losses, expected = run(model, input_ids)
    before = dict(model.named_parameters())
    said = fuse(kernels, model, monkeypatch)

    home = "liger_kernel" if kernels == "liger" else "distlora_kernels"
    attention = model.blocks[0].inner.self_attn.forward
    assert inspect.unwrap(attention).__globals__["apply_rotary_pos_emb"].__module__.startswith(home)
    gated = "GEGLU" if name.startswith("gemma") else "SwiGLU"
    norms = {"gemma2": 13, "gemma3": 19, "gemma3-text": 19, "qwen3": 13}.get(name, 7)
    assert f"RMSNorm ({norms}), {gated} (3), rotary embedding" in said
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[path] is after[path] for path in before)
    losses, gradients = run(model, input_ids)
    assert relative_error(losses, expected_losses) <= 1e-6
    for actual, gradient in zip(gradients, expected, strict=True):
        assert relative_error(actual, gradient) <= 5e-6  # Of all together it is below 1e-6.
    if name in ("gemma2", "phi3"):
        # Norms and MLPs are fused where their half of a block is run in tiles: backward writes over what the tile made
        # anew.
        place_mlps(model.blocks, model.architecture, tile=3)
        losses, gradients = run(model, input_ids)
        assert relative_error(losses, expected_losses) <= 1e-6
        for actual, gradient in zip(gradients, expected, strict=True):
            assert relative_error(actual, gradient) <= 5e-6


def interleaved(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def test_a_rotation_of_neighbours_and_an_unfused_activation_are_not_fusible(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = hf_model("llama").model.bfloat16()
    plain = fusible(decoder, tokens(1, 8))
    assert (plain["gated_mlps"], plain["rotated"]) == (("LlamaMLP",), ("LlamaAttention",))
    assert plain["fusible"] == ("norms", "mlps", "rotary")
    monkeypatch.setattr("transformers.models.llama.modeling_llama.rotate_half", interleaved)
    monkeypatch.setattr(decoder.config, "hidden_act", "relu")
    other = fusible(decoder, tokens(1, 8))
    assert (other["gated_mlps"], other["rotated"], other["fusible"]) == ((), (), ("norms",))


@pytest.mark.parametrize(
    ("name", "used"),
    [
        ci("deepseek_v3", "RMSNorm (9), SwiGLU (2)"),
        ("glm4_moe", "RMSNorm (5), SwiGLU (2), rotary embedding"),
        ci("qwen3-moe", "RMSNorm (13), rotary embedding"),
        ci("mixtral", "RMSNorm (7), rotary embedding"),
        ci("gpt-oss", "cross-entropy"),
        ci("deepseek_v32", "RMSNorm (9), SwiGLU (2)"),
        ("qwen3_next", "RMSNorm (7), SwiGLU (2), rotary embedding"),
        ci("qwen3_5", "RMSNorm (7), SwiGLU (2), rotary embedding"),
        ci("granitemoehybrid", "RMSNorm (5)"),
        ci("lfm2", "RMSNorm (7), rotary embedding"),
        ci("nemotron_h", "cross-entropy"),
        ci("llama4", "RMSNorm (5)"),
        ci("olmo3", "SwiGLU (2)"),
        ci("gemma4", "GEGLU (4)"),
    ],
)
def test_each_part_that_fits_is_fused_beside_experts_and_in_hybrids(
    name: str, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_family_folder(tmp_path, name)
    model, _ = load_ours(tmp_path, RANKS, train={"dtype": "fp32", "checkpointing": "block", "fused_kernels": "none"})
    input_ids = tokens(2, 4).to(RANKS.device)
    expected_losses, expected = run(model, input_ids)
    said = fuse("own", model, monkeypatch)
    assert f"fused kernels: {used}" == said.removesuffix(", cross-entropy")
    losses, gradients = run(model, input_ids)
    assert relative_error(losses, expected_losses) <= 1e-6
    for actual, gradient in zip(gradients, expected, strict=True):
        assert relative_error(actual, gradient) <= 2e-5  # Gemma 4's smallest is 1.3e-5 apart: tanh rounds otherwise.


@pytest.mark.parametrize("kernels", ["own", ci("liger", marks=[needs_liger])])
def test_saved_bytes_of_a_fused_layer_are_those_planned(
    kernels: str, tmp_path: Path, interpretable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_family_folder(tmp_path, "qwen3")
    model, _ = load_ours(tmp_path, RANKS, train={"dtype": "fp32", "checkpointing": "none", "fused_kernels": "none"})
    fuse(kernels, model, monkeypatch)
    check_kept(model, tmp_path, Kept(), remakes=False)
