"""The rules by which each quant_method of a config.json names, shapes and encodes its weights. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.architecture.low_bit_headers import (
    ACTIVATIONS,
    DOWNLOAD_AGAIN,
    PARTS,
    QUANT_STATE,
    USE_16_BIT,
    LowBitTensor,
    Parts,
    as_tiles,
    check_bnb,
    check_fields,
    check_value,
    find_bnb,
    is_block,
    scale_shape,
    trimmed,
    weight_shape,
)
from distlora.architecture.low_bit_headers import BNB_NF4 as BNB_NF4
from distlora.architecture.safetensors_headers import SOURCE_DTYPES, Segment
from distlora.config import UserError, require
from distlora.config.errors import short


def quantization_config(config: Mapping[str, Any]) -> Any:
    """Return a config.json's quantization_config, which some composite models have in text_config; or None."""
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, Mapping) else None
    return config.get("quantization_config", inner)


def quantization_method(config: Mapping[str, Any], place: Path | str) -> str | None:
    """Return how a checkpoint is quantized by its config.json: None, NF4, or a method that is read here.

    Raises UserError with the field's name for an unsupported method, and for unknown settings of one, which may change
    what the weights mean.
    """
    quantization = quantization_config(config)
    if quantization is None:
        return None
    where = f"{place}: quantization_config"
    require(isinstance(quantization, Mapping), f"{where} is not a JSON object; download the file again")
    method = _name_of(quantization)
    if not isinstance(method, str) or method not in _METHODS:
        raise UserError(
            f"{where}.quant_method={short(method)} is not supported, only {', '.join(_METHODS)}; {USE_16_BIT}"
        )
    _METHODS[method].check(quantization, where)
    return BNB_NF4 if method == "bitsandbytes" and not quantization.get("load_in_8bit") else method


def _name_of(quantization: Mapping[str, Any]) -> Any:
    """Return quant_method. Early bitsandbytes checkpoints have none; transformers knows them by two flags."""
    flags = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    return quantization.get("quant_method", "bitsandbytes" if flags else None)


def with_low_bit(stored: Mapping[str, Segment], folder: Path, config: Mapping[str, Any]) -> Mapping[str, Segment]:
    """Return a checkpoint's tensors with each quantized weight as one `LowBitSegment` under its ordinary name.

    Of weights that bitsandbytes stored in NF4 a few hundred bytes are read (quant_state). Raises UserError with the
    tensor's name for parts that are missing, of another dtype or shape than the weight needs, and for parts that
    belong to no weight.
    """
    method, quantization = quantization_method(config, folder / "config.json"), quantization_config(config)
    if method is None:
        states = [match[1] for match in map(QUANT_STATE.fullmatch, stored) if match]
        if states:
            raise UserError(
                f"{folder}: {min(states)} is quantized by bitsandbytes, but config.json has no quantization_config; "
                f"the folder is put together from two checkpoints: download it again, or {USE_16_BIT}"
            )
        return stored
    parts = Parts(dict(stored))
    for tensor in _METHODS[_name_of(quantization)].find(parts, quantization):
        parts.weights[tensor.name] = tensor.segment
    if not parts.weights:
        raise UserError(
            f"{folder / 'config.json'} has a quantization_config, but no weight in {folder} is quantized; "
            "remove quantization_config from config.json if the weights are dense (quant=nf4 then quantizes them)"
        )
    for name, segment in list(parts.left.items()):
        if name.endswith(ACTIVATIONS):
            del parts.left[name]
        elif name.endswith(PARTS) or name in parts.weights:
            raise UserError(
                f"{segment.file}: {name} belongs to no quantized weight of a supported kind; {USE_16_BIT}, or download "
                "it again if it is damaged"
            )
    return parts.left | parts.weights


_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"
"""Pattern of the end of a component in a module's path."""
Expected = dict[str, tuple[str, tuple[int, ...]]]
"""(Dtype, shape) of tensors by name."""


def is_converted(config: Mapping[str, Any], place: Path | str) -> Callable[[str], bool]:
    """Return a function that tells by the lists of a quantization_config whether a linear is in low bits.

    Names are compared as transformers does for modules_to_not_convert: whole components, from the start or at the end,
    as a regular expression. Raises UserError for a list that is not one of such names.
    """
    settings, patterns = quantization_config(config), list[str]()
    for key in ("modules_to_not_convert", "ignored_layers", "ignore"):
        for name in settings.get(key) or ():
            pattern = str(name).removeprefix("re:")
            patterns.append(
                pattern if str(name).startswith("re:") else rf"(?:{pattern}){_BOUNDARY}|.*{re.escape(pattern)}$"
            )
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"{place}: quantization_config.{key} has {short(name)}: {error}; {USE_16_BIT}"
                ) from error
    left_out = re.compile("|".join(f"(?:{each})" for each in patterns) or r"(?!)")
    return lambda module: left_out.match(module) is None


def expected_parts(config: Mapping[str, Any], name: str, shape: tuple[int, ...], place: Path | str) -> Expected:
    """Return the tensors of a quantized weight by the settings of its method alone. Raises UserError if they differ."""
    settings = quantization_config(config)
    method = _name_of(settings)
    expect = _METHODS[method].expect
    parts = None if expect is None else expect(settings, name, shape)
    if parts is None:
        raise UserError(
            f"{place}: the formats of {method} are read from the weights, which are not here; "
            "download them and set {model.path} to their folder, or set quant=nf4"
        )
    return parts


def _check_fp8(settings: Mapping[str, Any], where: str) -> None:
    known = "activation_scheme weight_block_size dequantize modules_to_not_convert modules_to_convert fmt scale_fmt"
    check_fields(settings, where, f"{known} expert_dtype ignored_layers activation_scale_ub")
    block = settings.get("weight_block_size")
    if block is not None and not is_block(block):
        raise UserError(f"{where}.weight_block_size={short(block)} is not a pair of sizes; download the file again")
    check_value(settings, where, "fmt", "e4m3", "float8_e4m3fn", None)
    check_value(settings, where, "expert_dtype", "fp8", None)


def _find_fp8(parts: Parts, settings: Mapping[str, Any]) -> Iterator[LowBitTensor]:
    """Yield weights of transformers' FP8: X, and its scales in X_scale_inv (fbgemm: X_scale), which multiply."""
    suffix = "_scale" if settings["quant_method"] == "fbgemm_fp8" else "_scale_inv"
    for name, codes in parts.ending("", "F8_E4M3"):
        shape = weight_shape(name, codes)
        size = settings.get("weight_block_size")
        blocks = [(shape[-2], shape[-1]), (1, shape[-1])] if size is None else [(size[0], size[1])]
        yield _scaled(parts, name, shape, suffix, blocks)


def _expect_fp8(settings: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Expected:
    size = settings.get("weight_block_size")
    grid = () if size is None else scale_shape(shape, (size[0], size[1]))
    return {name: ("F8_E4M3", shape), f"{name}_scale_inv": ("F32", grid)}


def _scaled(
    parts: Parts, name: str, shape: tuple[int, ...], suffix: str, blocks: Sequence[tuple[int, int]]
) -> LowBitTensor:
    """Take an 8-bit weight whose scales are one per block; `blocks` are the sizes that its settings allow."""
    scales = parts.left.get(name + suffix)
    fitting = [b for b in blocks if scales and trimmed(scales.shape) == trimmed(scale_shape(shape, b))]
    block = (fitting or blocks)[0]
    taken = {"codes": parts.left.pop(name)}
    taken["scales"] = parts.take(name + suffix, name, (*SOURCE_DTYPES, "F8_E8M0", "U8"), scale_shape(shape, block))
    format, reason = None, f"no format stores 8-bit integers with a scale per {block[0]} x {block[1]} weights"
    if taken["codes"].dtype == "F8_E4M3":
        format, reason = as_tiles(shape, block)
    return LowBitTensor(
        name=name, shape=shape, codec="scaled", parts=taken, block=block, bits=8, format=format, reason=reason
    )


def _check_mxfp4(settings: Mapping[str, Any], where: str) -> None:
    check_fields(settings, where, "modules_to_not_convert dequantize")


def _find_mxfp4(parts: Parts, settings: Mapping[str, Any]) -> Iterator[LowBitTensor]:
    """Yield gpt-oss' experts: X_blocks (E, O, I / 32, 16) and exponents X_scales, which the model has as (E, I, O)."""
    for name, codes in parts.ending("_blocks"):
        if len(codes.shape) != 4 or codes.shape[-1] != 16 or not codes.numel:
            raise UserError(
                f"{codes.file}: {name}_blocks has shape {short(list(codes.shape))}, not (experts, out, in / 32, 16); "
                f"{DOWNLOAD_AGAIN}"
            )
        experts, rows, across, _ = codes.shape
        taken = {
            "codes": parts.take(f"{name}_blocks", name, ("U8",)),
            "scales": parts.take(f"{name}_scales", name, ("U8",), codes.shape[:3]),
        }
        shape = (experts, across * 32, rows)
        yield LowBitTensor(
            name=name, shape=shape, codec="mxfp4", parts=taken, block=(1, 32), bits=4, transposed=True, format="mxfp4"
        )


def _expect_mxfp4(settings: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Expected:
    if len(shape) != 3 or shape[1] % 32:  # Of gpt-oss the experts alone are quantized.
        return {name: ("BF16", shape)}
    grid = (shape[0], shape[2], shape[1] // 32)
    return {f"{name}_blocks": ("U8", (*grid, 16)), f"{name}_scales": ("U8", grid)}


_ARGUMENTS = (
    "num_bits type symmetric group_size strategy block_structure dynamic actorder scale_dtype zp_dtype observer "
    "observer_kwargs"
)
_CT_FORMATS = (
    *("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "float-quantized", "int-quantized"),
    *("naive-quantized", "mxfp8-quantized", "mixed-precision", "dense", None),
)


def _check_compressed(settings: Mapping[str, Any], where: str) -> None:
    known = "config_groups format ignore kv_cache_scheme quantization_status global_compression_ratio version"
    known += " sparsity_config transform_config moe_sparsity_config run_compressed dequantize use_optimized_inference"
    check_fields(settings, where, known)
    check_value(settings, where, "format", *_CT_FORMATS)
    check_value(settings, where, "transform_config", {}, None)  # Rotations, which the layers undo.
    check_value(settings, where, "sparsity_config", {}, None, {"format": "dense"})
    _weight_arguments(settings, where)


def _weight_arguments(settings: Mapping[str, Any], where: str = "quantization_config") -> list[Mapping[str, Any]]:
    """Return the settings of the weights of each of compressed-tensors' config_groups, checked."""
    groups, entries = settings.get("config_groups"), list[Mapping[str, Any]]()
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise UserError(f"{where}.config_groups={short(groups)} is not an object of objects; {USE_16_BIT}")
    for name, group in groups.items():
        place = f"{where}.config_groups.{name}"
        check_fields(group, place, "targets weights input_activations output_activations format")
        check_value(group, place, "format", *_CT_FORMATS)
        weights = group.get("weights")
        if weights is None:
            continue
        require(isinstance(weights, Mapping), f"{place}.weights={short(weights)} is not an object; {USE_16_BIT}")
        place, weights = f"{place}.weights", {"num_bits": 8, "type": "int", "symmetric": True, **weights}
        check_fields(weights, place, _ARGUMENTS)
        check_value(weights, place, "num_bits", 4, 8)
        check_value(weights, place, "type", "int", "float")
        check_value(weights, place, "symmetric", *((True, False) if weights["type"] == "int" else (True,)))
        check_value(weights, place, "strategy", "tensor", "channel", "group", "tensor_group", "block", None)
        size, block = weights.get("group_size"), weights.get("block_structure")
        is_size = size is None or (type(size) is int and (size > 0 or size == -1))
        require(is_size, f"{place}.group_size={short(size)} is not a size; {USE_16_BIT}")
        is_pair = block is None or is_block(block)
        require(is_pair, f"{place}.block_structure={short(block)} is not a pair of sizes; {USE_16_BIT}")
        entries.append(weights)
    return entries


def _scale_block(arguments: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns that share a scale by compressed-tensors' settings."""
    size, block = arguments.get("group_size") or -1, arguments.get("block_structure")
    strategy = arguments.get("strategy") or ("group" if size > 0 else "channel" if size == -1 else "tensor")
    if strategy == "block" and block is not None:
        return block[0], block[1]
    if strategy == "tensor":
        return shape[-2], shape[-1]
    return 1, size if size > 0 and strategy in ("group", "tensor_group") else shape[-1]


def _find_compressed(parts: Parts, settings: Mapping[str, Any]) -> Iterator[LowBitTensor]:
    """Yield the weights of compressed-tensors' formats, distinguished by names and dtypes."""
    arguments = _weight_arguments(settings)
    for name, codes in parts.ending("_packed", "U8"):
        yield _fp4(parts, name, weight_shape(name, codes, 2), f"{name}_packed", f"{name}_global_scale")
    for name, codes in parts.ending("_packed", "I32"):
        yield _packed_integers(parts, name, codes, [scheme for scheme in arguments if scheme["type"] == "int"])
    for name, codes in parts.ending("", "F8_E4M3", "I8"):
        shape, wanted = weight_shape(name, codes), "int" if codes.dtype == "I8" else "float"
        fitting = [scheme for scheme in arguments if (scheme["type"], scheme["num_bits"]) == (wanted, 8)]
        blocks = [_scale_block(scheme, shape) for scheme in fitting if scheme["symmetric"]]
        where, has_zeros = f"{codes.file}: {name}", not blocks or f"{name}_zero_point" in parts.left
        require(
            bool(fitting),
            f"{where} is stored as {codes.dtype}, and no config group has {wanted}s of 8 bits; {USE_16_BIT}",
        )
        require(not has_zeros, f"{where} has zero points, which only packed integers may have; {USE_16_BIT}")
        yield _scaled(parts, name, shape, "_scale", blocks)


def _expect_compressed(settings: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Expected | None:
    groups, arguments = settings["config_groups"].values(), _weight_arguments(settings)
    if len(groups) != 1 or not arguments or next(iter(groups)).get("targets") != ["Linear"] or len(shape) != 2:
        return None
    weights, grid = arguments[0], scale_shape(shape, _scale_block(arguments[0], shape))
    bits, kind = weights["num_bits"], weights["type"]
    if (kind, bits) == ("float", 8):
        return {name: ("F8_E4M3", shape), f"{name}_scale": ("BF16", grid)}
    if kind != "int" or settings.get("format") != "pack-quantized" or weights.get("actorder"):
        return None
    parts: Expected = {f"{name}_packed": ("I32", (shape[0], -(-shape[1] * bits // 32)))}
    if not weights.get("symmetric", True):
        parts[f"{name}_zero_point"] = ("I32", (-(-shape[0] * bits // 32), grid[-1]))
    return parts | {f"{name}_scale": ("BF16", grid), f"{name}_shape": ("I64", (2,))}


def _fp4(parts: Parts, name: str, shape: tuple[int, ...], codes: str, global_scale: str) -> LowBitTensor:
    """Take an NVFP4 weight, or MXFP4 if no tensor `global_scale` is there."""
    is_nvfp4 = global_scale in parts.left
    kind, size = ("nvfp4", 16) if is_nvfp4 else ("mxfp4", 32)
    taken = {"codes": parts.take(codes, name, ("U8",))}
    if shape[-1] % size:
        raise UserError(
            f"{taken['codes'].file}: {codes} has rows of {shape[-1]:,}, not of whole blocks; {DOWNLOAD_AGAIN}"
        )
    dtypes = ("F8_E4M3",) if is_nvfp4 else ("U8", "F8_E8M0")
    taken["scales"] = parts.take(f"{name}_scale", name, dtypes, scale_shape(shape, (1, size)))
    if is_nvfp4:
        taken["global_scale"] = parts.take(global_scale, name, ("F32",), ())
    codec = "modelopt_nvfp4" if global_scale.endswith("_scale_2") else kind
    return LowBitTensor(name=name, shape=shape, codec=codec, parts=taken, block=(1, size), bits=4, format=kind)


def _packed_integers(parts: Parts, name: str, codes: Segment, arguments: Sequence[Mapping[str, Any]]) -> LowBitTensor:
    """Take a weight of 4- or 8-bit integers in int32 words along its rows, by the group that fits its parts."""
    packed = weight_shape(f"{name}_packed", codes)
    scales = parts.left.get(f"{name}_scale")
    taken = {"shape": parts.take(f"{name}_shape", name, ("I64", "I32"), (len(packed),))}
    fitting = list[tuple[int, tuple[int, ...], tuple[int, int], bool]]()
    for scheme in arguments:
        bits, size = scheme["num_bits"], scheme.get("group_size") or -1
        is_grouped = size > 0 and scheme.get("strategy") in ("group", None) and scales is not None
        width = scales.shape[-1] * size if is_grouped and scales and scales.shape else packed[-1] * 32 // bits
        shape = (*packed[:-1], width)
        block = _scale_block(scheme, shape)
        fits = scales is not None and block[0] == 1 and trimmed(scales.shape) == trimmed(scale_shape(shape, block))
        if fits and -(-width * bits // 32) == packed[-1]:
            fitting.append((bits, shape, block, scheme["symmetric"]))
    has_zeros = f"{name}_zero_point" in parts.left
    fitting = [fit for fit in fitting if fit[3] != has_zeros] or fitting
    if len({fit[:2] for fit in fitting}) > 1:  # 8 bits, or twice as many weights of 4.
        stored = _integers_of(taken["shape"])
        fitting = [fit for fit in fitting if list(fit[1]) == stored]
    if not fitting:
        have = "no scales" if scales is None else f"scales of shape {short(list(scales.shape))}"
        raise UserError(
            f"{codes.file}: {name}_packed of shape {short(list(packed))} with {have} fits no config group; "
            f"{DOWNLOAD_AGAIN}"
        )
    bits, shape, block, is_symmetric = fitting[0]
    taken["codes"] = parts.take(f"{name}_packed", name, ("I32",))
    taken["scales"] = parts.take(f"{name}_scale", name, SOURCE_DTYPES)
    if not is_symmetric:
        zeros = (*shape[:-2], -(-shape[-2] * bits // 32), scale_shape(shape, block)[-1])
        taken["zeros"] = parts.take(f"{name}_zero_point", name, ("I32",), zeros)
    if f"{name}_g_idx" in parts.left:
        taken["order"] = parts.take(f"{name}_g_idx", name, ("I32",), shape[-1:])
    return _integers(name, shape, "packed", taken, block, bits, in_order="order" not in taken)


def _integers_of(segment: Segment) -> list[int]:
    """Read a small tensor of integers."""
    size, content = segment.num_bytes // segment.numel, segment.content()
    return [int.from_bytes(content[i : i + size], "little", signed=True) for i in range(0, segment.num_bytes, size)]


def _integers(
    name: str,
    shape: tuple[int, ...],
    codec: str,
    taken: dict[str, Segment],
    block: tuple[int, int],
    bits: int,
    *,
    in_order: bool,
) -> LowBitTensor:
    """Return a weight of integers, and the format that holds it: 4 bits with a scale per 32, 64 or 128 of a row."""
    size = next((size for size in (128, 64, 32) if block[1] % size == shape[-1] % size == 0), None)
    reason, suffix = "", {"BF16": "", "F16": "_fp16"}.get(taken["scales"].dtype)
    if bits != 4 or size is None or suffix is None:
        reason = f"{bits}-bit integers with a scale in {taken['scales'].dtype} per {block[1]} of {shape[-1]:,} weights"
        reason = f"no format stores {reason}"
    elif not in_order and block[1] < shape[-1]:
        reason = "no format stores columns in activation order (desc_act, actorder)"
    return LowBitTensor(
        name=name,
        shape=shape,
        codec=codec,
        parts=taken,
        block=block,
        bits=bits,
        format=None if reason else f"int4_g{size}{suffix}{'_zeros' if 'zeros' in taken else ''}",
        reason=reason,
    )


def _check_modelopt(settings: Mapping[str, Any], where: str) -> None:
    known = "quant_algo config_groups ignore producer kv_cache_scheme kv_cache_quant_algo group_size exclude_modules"
    check_fields(settings, where, f"{known} quantized_layers version")
    check_value(settings, where, "quant_algo", "FP8", "NVFP4", "MIXED_PRECISION")


def _find_modelopt(parts: Parts, settings: Mapping[str, Any]) -> Iterator[LowBitTensor]:
    """Yield ModelOpt's weights: FP8 with X_scale, NVFP4 in uint8 with X_scale and X_scale_2, which multiply."""
    for name, codes in parts.ending("", "U8"):
        if f"{name}_scale_2" in parts.left:
            yield _fp4(parts, name, weight_shape(name, codes, 2), name, f"{name}_scale_2")
    for name, codes in parts.ending("", "F8_E4M3"):
        shape = weight_shape(name, codes)
        yield _scaled(parts, name, shape, "_scale", [(shape[-2], shape[-1]), (1, shape[-1])])


def _check_awq(settings: Mapping[str, Any], where: str) -> None:
    check_fields(settings, where, "bits group_size zero_point version modules_to_not_convert backend do_fuse format")
    check_value(settings, where, "bits", 4)
    check_value(settings, where, "version", "gemm", "GEMM", None)
    check_value(settings, where, "format", "gemm", None)
    check_value(settings, where, "zero_point", True)


def _find_awq(parts: Parts, settings: Mapping[str, Any]) -> Iterator[LowBitTensor]:
    """Yield AutoAWQ's weights: X.qweight (I, O / 8), X.qzeros (I / g, O / 8) and X.scales (I / g, O)."""
    for name, codes in parts.ending(".qweight"):
        rows, words = _words_of(name, codes)
        yield _columns(parts, name, "awq", (words * 8, rows), 4, settings)


def _words_of(name: str, codes: Segment) -> tuple[int, int]:
    """Return the shape of AWQ's or GPTQ's codes. Raises UserError if they are not one matrix."""
    shape = weight_shape(f"{name}.qweight", codes)
    if len(shape) != 2:
        raise UserError(
            f"{codes.file}: {name}.qweight has shape {short(list(shape))}, not that of one matrix; {DOWNLOAD_AGAIN}"
        )
    return shape[0], shape[1]


def _columns(
    parts: Parts, name: str, codec: str, shape: tuple[int, int], bits: int, settings: Mapping[str, Any]
) -> LowBitTensor:
    """Take a weight of AWQ's or GPTQ's layout, whose parts have a column per row of the weight."""
    weight, size = f"{name}.weight", settings.get("group_size", 128)
    scales = parts.left.get(f"{name}.scales")
    if settings.get("dynamic") and scales is not None and scales.shape and scales.shape[0]:
        size = -(-shape[1] // scales.shape[0])  # GPTQModel's settings of single modules.
    if type(size) is not int or (size < 1 and size != -1):
        raise UserError(f"quantization_config.group_size={short(size)} is not a size; {USE_16_BIT}")
    size = shape[1] if size == -1 else size
    groups = -(-shape[1] // size)
    taken = {
        "codes": parts.take(f"{name}.qweight", weight, ("I32",)),
        "scales": parts.take(f"{name}.scales", weight, SOURCE_DTYPES, (groups, shape[0])),
        "zeros": parts.take(f"{name}.qzeros", weight, ("I32",), (groups, -(-shape[0] * bits // 32))),
    }
    if f"{name}.g_idx" in parts.left:
        taken["order"] = parts.take(f"{name}.g_idx", weight, ("I32",), (shape[1],))
    return _integers(weight, shape, codec, taken, (1, size), bits, in_order=not settings.get("desc_act"))


_GPTQ_FIELDS = (
    "bits group_size desc_act sym static_groups damp_percent damp_auto_increment true_sequential lm_head "
    "checkpoint_format format meta pack_dtype dynamic mse act_group_aware backend tokenizer dataset model_seqlen "
    "block_name_to_quantize module_name_preceding_first_block batch_size pad_token_id use_exllama exllama_config "
    "max_input_length cache_block_outputs modules_in_block_to_quantize use_cuda_fp16 disable_exllama "
    "model_name_or_path model_file_base_name is_marlin_format modules_to_not_convert version quantizer"
)


def _check_gptq(settings: Mapping[str, Any], where: str) -> None:
    check_fields(settings, where, _GPTQ_FIELDS)
    check_value(settings, where, "bits", 4, 8)
    check_value(settings, where, "checkpoint_format", "gptq", "gptq_v2", None)
    check_value(settings, where, "format", "gptq", "gptq_v2", None)
    check_value(settings, where, "is_marlin_format", False, None)


def _find_gptq(parts: Parts, settings: Mapping[str, Any]) -> Iterator[LowBitTensor]:
    """Yield GPTQ's weights: X.qweight (I * bits / 32, O), X.qzeros (G, O * bits / 32), X.scales (G, O), X.g_idx (I,).

    In the first version of the format zero points are stored less 1. Bits are those of the settings, or (`dynamic`)
    those that the length of g_idx implies.
    """
    version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    for name, codes in parts.ending(".qweight"):
        words, rows = _words_of(name, codes)
        order = parts.left.get(f"{name}.g_idx")
        bits = settings["bits"]
        if order is not None and order.numel:
            bits = next((each for each in (4, 8) if words * 32 == order.numel * each), bits)
        yield _columns(parts, name, version, (rows, words * 32 // bits), bits, settings)


@dataclass(frozen=True, slots=True)
class _Method:
    """The rules of one quant_method."""

    check: Callable[[Mapping[str, Any], str], None]
    """Raises UserError for settings that are not supported; gets them and their place."""
    find: Callable[[Parts, Mapping[str, Any]], Iterator[LowBitTensor]]
    """Takes the parts of quantized weights and yields these."""
    expect: Callable[[Mapping[str, Any], str, tuple[int, ...]], Expected | None] | None = None
    """Returns the parts of a weight of a name and a shape by the settings alone; None if these do not tell."""


_METHODS = {
    "bitsandbytes": _Method(check_bnb, find_bnb),
    "fp8": _Method(_check_fp8, _find_fp8, _expect_fp8),
    "fbgemm_fp8": _Method(_check_fp8, _find_fp8),
    "mxfp4": _Method(_check_mxfp4, _find_mxfp4, _expect_mxfp4),
    "compressed-tensors": _Method(_check_compressed, _find_compressed, _expect_compressed),
    "modelopt": _Method(_check_modelopt, _find_modelopt),
    "awq": _Method(_check_awq, _find_awq),
    "gptq": _Method(_check_gptq, _find_gptq),
}
