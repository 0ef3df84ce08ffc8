"""Small checkpoints in the low-bit formats of the hub, written by the libraries that define them, and their values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert import AutoAWQConverter, ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from distlora.architecture.checkpoint_files import CheckpointFiles

Tensors = dict[str, Tensor]
Checkpoint = tuple[Tensors, dict[str, Any], Tensors]
"""(Tensors on disk, quantization_config, values of the weights by the reference library)."""
NAME = "model.layers.0.mlp.down_proj"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def block_fp8(dense: Tensor, scale_dtype: torch.dtype = torch.float32, name: str = f"{NAME}.weight") -> Checkpoint:
    """DeepSeek's: e4m3 and one scale per 128 x 128, ragged at the edges."""
    down, across = (-(-size // 128) for size in dense.shape[-2:])
    padded = torch.nn.functional.pad(dense, (0, across * 128 - dense.shape[-1], 0, down * 128 - dense.shape[-2]))
    tiles = padded.unflatten(-1, (across, 128)).unflatten(-3, (down, 128))
    scales = (tiles.abs().amax(dim=(-3, -1)) / 448).clamp_min(1e-12)
    if scale_dtype == torch.float8_e8m0fnu:
        scales = scales.log2().ceil().exp2()
    scales = scales.to(scale_dtype)
    full = scales.float().repeat_interleave(128, -2).repeat_interleave(128, -1)
    codes = (dense / full[..., : dense.shape[-2], : dense.shape[-1]]).to(torch.float8_e4m3fn)
    value = _dequantize_fp8_weight(codes, scales, [128, 128], torch.float32)
    if not any(size % 128 for size in dense.shape[-2:]):
        assert torch.equal(value, Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32))
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
    return {name: codes, f"{name}_scale_inv": scales}, config, {name: value}


def tensor_fp8(dense: Tensor) -> Checkpoint:
    """Mistral's: one scale for the tensor, and one of the activations, which training does not need."""
    scale = dense.abs().max() / 448
    codes, name = (dense / scale).to(torch.float8_e4m3fn), f"{NAME}.weight"
    tensors = {name: codes, f"{name}_scale_inv": scale, f"{NAME}.activation_scale": torch.ones(())}
    config = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    return tensors, config, {name: _dequantize_fp8_weight(codes, scale, None, torch.float32)}


def mxfp4_of(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return (blocks (E, O, I / 32, 16), scales (E, O, I / 32)) of experts (E, O, I), as OpenAI's downcast rounds."""
    blocks = dense.unflatten(-1, (-1, 32))
    exponents = (blocks.abs().amax(-1).clamp_min(2**-100).log2().floor() - 2).clamp(-127, 127)
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = ((blocks / exponents.exp2()[..., None]).abs()[..., None] - levels).abs().argmin(-1)
    codes = codes.to(torch.uint8) | (blocks < 0).to(torch.uint8) << 3
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def gpt_oss(dense: Tensor, name: str = EXPERTS) -> Checkpoint:
    """gpt-oss' experts, (E, O, I) on disk and (E, I, O) in the model."""
    blocks, scales = mxfp4_of(dense)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return tensors, config, {name: convert_moe_packed_tensors(blocks, scales)}


def compressed(dense: Tensor, format: str, **weights: Any) -> Checkpoint:
    """Return a weight that compressed-tensors has compressed, and decompressed again."""
    activations = {"num_bits": 8, "type": "float"} if format == "float-quantized" else None
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    arguments = scheme.weights
    assert arguments is not None
    size = {"channel": dense.shape[1], "tensor": dense.shape[1]}.get(str(arguments.strategy), arguments.group_size)
    top = {("int", 4): 7, ("int", 8): 127, ("float", 4): 6, ("float", 8): 448}[weights["type"], weights["num_bits"]]
    state: Tensors = {"weight": dense.bfloat16()}
    if arguments.strategy == "block":
        down, across = (-(-size // 128) for size in dense.shape)
        state["weight_scale"] = torch.rand(down, across).bfloat16() / 100 + 0.01
    else:
        groups = dense.unflatten(1, (-1, size))
        scale = groups.abs().amax(-1) / top
        if arguments.strategy == "tensor":
            scale = scale.max().view(1)
        if format == "nvfp4-pack-quantized":
            state["weight_global_scale"] = torch.tensor([6 * 448 / float(dense.abs().max())])
            scale = (scale * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
        if format == "mxfp4-pack-quantized":
            scale = scale.log2().ceil().exp2()
        state["weight_scale"] = scale if format.endswith("fp4-pack-quantized") else scale.bfloat16()
    if not arguments.symmetric:
        state["weight_zero_point"] = torch.randint(-8, 8, state["weight_scale"].shape, dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(state, scheme)
    tensors = {f"{NAME}.{part}": tensor.contiguous() for part, tensor in stored.items() if tensor is not None}
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }
    return tensors, config, {f"{NAME}.weight": compressor.decompress(stored, scheme)["weight"]}


def modelopt_nvfp4(dense: Tensor) -> Checkpoint:
    """ModelOpt's names and its reciprocal global scale; the values by its NVFP4QTensor.dequantize.

    It is e2m1 * (scale in fp32 * double_scale). Within bf16's rounding it agrees with compressed-tensors' converter.
    """
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    theirs, _, _ = compressed(dense, "nvfp4-pack-quantized", **weights)
    tensors = {
        f"{NAME}.weight": theirs[f"{NAME}.weight_packed"],
        f"{NAME}.weight_scale": theirs[f"{NAME}.weight_scale"],
        f"{NAME}.weight_scale_2": 1 / theirs[f"{NAME}.weight_global_scale"],
        f"{NAME}.input_scale": torch.ones(()),
    }
    converted = ModelOptNvfp4Converter(targets=[r"re:.*proj"]).process(dict(tensors))
    state = {name.removeprefix(f"{NAME}."): tensor for name, tensor in converted.items()}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    value = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(state, scheme)["weight"]
    tensors[f"{NAME}.weight_scale_2"] = tensors[f"{NAME}.weight_scale_2"].view(())  # As ModelOpt writes it.
    packed, levels = tensors[f"{NAME}.weight"], torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    scale = tensors[f"{NAME}.weight_scale"].float() * tensors[f"{NAME}.weight_scale_2"]
    theirs_in_fp32 = torch.cat([levels, -levels])[codes.long()].unflatten(1, (-1, 16)) * scale[..., None]
    assert (theirs_in_fp32.flatten(1) - value.float()).abs().max() <= value.float().abs().max() / 128
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []}
    return tensors, config, {f"{NAME}.weight": theirs_in_fp32.flatten(1)}


def modelopt_fp8(dense: Tensor) -> Checkpoint:
    """ModelOpt's FP8: one scale for the tensor, which multiplies."""
    scale = dense.abs().max() / 448
    codes = (dense / scale).to(torch.float8_e4m3fn)
    tensors = {f"{NAME}.weight": codes, f"{NAME}.weight_scale": scale, f"{NAME}.input_scale": torch.ones(())}
    return tensors, {"quant_method": "modelopt", "quant_algo": "FP8"}, {f"{NAME}.weight": codes.float() * scale}


def words(codes: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """Pack integers along the last dimension into int32, lowest bits first; `order` names the integer of each place."""
    places = codes.unflatten(-1, (-1, 32 // bits))
    if order is not None:
        places = places[..., order]
    total = sum(places[..., i].to(torch.int64) << (bits * i) for i in range(32 // bits))
    return (total & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def integers(dense: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random codes (O, I), zero points (G, O) from 1 and scales (G, O) fp16 of about the size of `dense`."""
    rows, width = dense.shape
    groups = -(-width // size)
    codes = torch.randint(0, 1 << bits, (rows, width))
    return codes, torch.randint(1, 1 << bits, (groups, rows)), (torch.rand(groups, rows) / 100 + 1e-3).half()


def awq(dense: Tensor, size: int) -> Checkpoint:
    """AutoAWQ's gemm layout, converted and decompressed by compressed-tensors."""
    actual = dense.shape[1] if size == -1 else size
    codes, zeros, scales = integers(dense, 4, actual)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        f"{NAME}.qweight": words(codes.T.contiguous(), 4, order),
        f"{NAME}.qzeros": words(zeros, 4, order),
        f"{NAME}.scales": scales,
    }
    converted = AutoAWQConverter(group_size=actual, targets=["re:.*"]).process(dict(tensors))
    state = {name.removeprefix(f"{NAME}."): tensor for name, tensor in converted.items()}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": actual, "symmetric": False}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    value = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)["weight"]
    assert torch.equal(
        value, ((codes - zeros.T.repeat_interleave(actual, 1)).half() * scales.T.repeat_interleave(actual, 1))
    )
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    return tensors, config, {f"{NAME}.weight": value}


def gptq(dense: Tensor, size: int, *, bits: int = 4, version: str = "gptq", in_order: bool = True) -> Checkpoint:
    """GPTQ's layout; the values by AutoGPTQ's formula (auto_gptq/nn_modules/qlinear/qlinear_cuda.py, forward).

    It is weights = scales[g_idx] * (weight - zeros[g_idx]) in fp16, where zeros = stored + 1 in the first version.
    """
    width = dense.shape[1]
    actual = width if size == -1 else size
    codes, zeros, scales = integers(dense, bits, actual)
    order = torch.arange(width) // actual
    if not in_order:
        order = order[torch.randperm(width)]
    tensors = {
        f"{NAME}.qweight": words(codes, bits).T.contiguous(),
        f"{NAME}.qzeros": words(zeros - int(version == "gptq"), bits),
        f"{NAME}.scales": scales,
        f"{NAME}.g_idx": order.int(),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": not in_order, "sym": False}
    value = (scales[order] * (codes.T - zeros[order])).T
    return tensors, config | {"checkpoint_format": version}, {f"{NAME}.weight": value}


def bnb_int8(dense: Tensor) -> Checkpoint:
    """Return rows of LLM.int8()."""
    import bitsandbytes.functional as F

    codes, absmax, _ = F.int8_vectorwise_quant(dense.half())
    tensors = {
        f"{NAME}.weight": codes,
        f"{NAME}.SCB": absmax,
        f"{NAME}.weight_format": torch.zeros((), dtype=torch.uint8),
    }
    value = F.int8_vectorwise_dequant(codes, absmax)
    return tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}, {f"{NAME}.weight": value}


def bnb_nf4(dense: Tensor, *, nested: bool) -> Checkpoint:
    """Return a weight in NF4. The values are asked for as rows of one block (tests/kernels/test_nf4.py)."""
    import bitsandbytes.functional as F

    packed, state = F.quantize_4bit(dense, blocksize=64, compress_statistics=nested, quant_type="nf4")
    tensors = {f"{NAME}.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    tensors[f"{NAME}.weight"] = packed
    state.shape = torch.Size((dense.numel() // 64, 64))
    value = F.dequantize_4bit(packed, state).view(dense.shape)
    return tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}, {f"{NAME}.weight": value}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group"}
FP8 = {"num_bits": 8, "type": "float"}
CHECKPOINTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Checkpoint], str | None]] = {
    "fp8": ((256, 384), block_fp8, "fp8_block"),
    "fp8-ragged": ((576, 300), block_fp8, "fp8_block"),
    "fp8-bf16-scales": ((130, 512), lambda w: block_fp8(w, torch.bfloat16), "fp8_block"),
    "fp8-ue8m0": ((64, 200), lambda w: block_fp8(w, torch.float8_e8m0fnu), "fp8_block"),
    "fp8-experts": ((3, 256, 130), block_fp8, "fp8_block"),
    "fp8-ragged-experts": ((3, 200, 130), block_fp8, None),
    "fp8-tensor": ((200, 130), tensor_fp8, "fp8_block"),
    "mxfp4": ((3, 90, 64), gpt_oss, "mxfp4"),
    "ct-int4": ((67, 192), lambda w: compressed(w, "pack-quantized", **INT4, group_size=32), "int4_g32"),
    "ct-int4-128": ((40, 384), lambda w: compressed(w, "pack-quantized", **INT4, group_size=128), "int4_g128"),
    "ct-int4-zeros": (
        (67, 128),
        lambda w: compressed(w, "pack-quantized", **INT4, group_size=64, symmetric=False),
        "int4_g64_zeros",
    ),
    "ct-int4-channel": (
        (33, 96),
        lambda w: compressed(w, "pack-quantized", num_bits=4, type="int", strategy="channel"),
        "int4_g32",
    ),
    "ct-int8-packed": (
        (33, 64),
        lambda w: compressed(w, "pack-quantized", **INT4 | {"num_bits": 8}, group_size=32),
        None,
    ),
    "ct-int8": ((33, 50), lambda w: compressed(w, "int-quantized", num_bits=8, type="int", strategy="channel"), None),
    "ct-fp8-channel": ((33, 50), lambda w: compressed(w, "float-quantized", **FP8, strategy="channel"), None),
    "ct-fp8-tensor": ((33, 50), lambda w: compressed(w, "float-quantized", **FP8, strategy="tensor"), "fp8_block"),
    "ct-fp8-block": (
        (200, 300),
        lambda w: compressed(w, "float-quantized", **FP8, strategy="block", block_structure=[128, 128]),
        "fp8_block",
    ),
    "ct-nvfp4": (
        (33, 48),
        lambda w: compressed(
            w, "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
        ),
        "nvfp4",
    ),
    "ct-mxfp4": (
        (33, 96),
        lambda w: compressed(w, "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        "mxfp4",
    ),
    "modelopt-nvfp4": ((33, 48), modelopt_nvfp4, "nvfp4"),
    "modelopt-fp8": ((33, 50), modelopt_fp8, "fp8_block"),
    "awq-32": ((40, 96), lambda w: awq(w, 32), "int4_g32_fp16_zeros"),
    "awq-128": ((24, 384), lambda w: awq(w, 128), "int4_g128_fp16_zeros"),
    "awq-channel": ((24, 64), lambda w: awq(w, -1), "int4_g64_fp16_zeros"),
    "gptq-128": ((40, 256), lambda w: gptq(w, 128), "int4_g128_fp16_zeros"),
    "gptq-64-order": ((40, 192), lambda w: gptq(w, 64, in_order=False), None),
    "gptq-v2-32": ((40, 96), lambda w: gptq(w, 32, version="gptq_v2"), "int4_g32_fp16_zeros"),
    "gptq-channel": ((40, 96), lambda w: gptq(w, -1), "int4_g32_fp16_zeros"),
    "gptq-ragged": ((40, 200), lambda w: gptq(w, 128), None),
    "gptq-8": ((40, 96), lambda w: gptq(w, 32, bits=8), None),
    "bnb-int8": ((33, 50), bnb_int8, None),
    "bnb-nf4": ((48, 100), lambda w: bnb_nf4(w, nested=True), "nf4"),
    "bnb-nf4-absmax": ((48, 100), lambda w: bnb_nf4(w, nested=False), "nf4_absmax"),
}
"""By name: shape, how it is written, and the format that quant=keep holds it in."""


def checkpoint(name: str, seed: int = 0) -> Checkpoint:
    """Return a checkpoint with one weight."""
    shape, write, _ = CHECKPOINTS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return write(torch.randn(shape) / 8)


def convert_folder(
    source: Path, target: Path, write: Callable[[Tensor], Checkpoint], *, only: tuple[str, ...] = ("_proj",)
) -> None:
    """Write a model's folder with the weights of its layers in low bits, and its other tensors as they are.

    Experts (E, I, O) of gpt-oss are given to `write` as (E, O, I).
    """
    shutil.copytree(source, target)
    tensors: Tensors = {}
    for name, dense in safetensors.torch.load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith(only) or dense.dim() < 2:
            tensors[name] = dense
            continue
        with torch.random.fork_rng():
            torch.manual_seed(len(tensors))
            made, config, _ = write(dense if name != module else dense.mT.contiguous())
        for part, tensor in made.items():
            tensors[module + part.removeprefix(EXPERTS if name == module else NAME)] = tensor
    safetensors.torch.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))


def write(folder: Path, made: Checkpoint) -> CheckpointFiles:
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(made[0], folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": made[1]}))
    return CheckpointFiles(folder)
