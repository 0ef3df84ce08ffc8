"""Translate requests of the Tinker SDK 0.38 into operations, and results into its responses.

What a request may hold is checked here: types, names, shapes, finite values. Whatever is wrong is a UserError, which
the caller gets. Letters: T tokens of a sequence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from distlora.config import UserError, require
from distlora.serving import protobuf
from distlora.serving.operations import (
    Adapter,
    ForwardBackward,
    ForwardBackwardResult,
    OptimStep,
    Row,
    Sample,
    SampleResult,
)

JSON, PROTOBUF = "application/json", "application/x-protobuf"

_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 2: np.dtype("<i8"), 3: np.dtype("<i4")}
"""Of the wire's enum DType; 4 is bfloat16, which the SDK never sends."""
_INPUTS: dict[str, np.dtype[Any]] = {
    "target_tokens": np.dtype(np.int64),
    "weights": np.dtype(np.float32),
    "logprobs": np.dtype(np.float32),
    "advantages": np.dtype(np.float32),
}
"""Inputs of the losses, by the SDK's names, with their dtypes."""
_SHORT_MAX = 1 << 31


class Body:
    """A JSON object of a request, whose fields are read by type. Raises UserError for any other JSON."""

    def __init__(self, data: bytes) -> None:
        try:
            value = json.loads(data, parse_constant=_refuse_constant)
            if rb"\ud" in data.lower():
                json.dumps(value, ensure_ascii=False).encode()  # Half of a surrogate pair is no text.
        except (ValueError, RecursionError) as error:
            raise UserError(f"the body is not JSON: {error}") from error
        require(isinstance(value, dict), "the body is not a JSON object")
        self.values: dict[str, Any] = value

    def text(self, name: str) -> str:
        """Return a text that must be there."""
        value = self.optional_text(name)
        if value is None:
            raise UserError(f"{name} is missing")
        return value

    def optional_text(self, name: str) -> str | None:
        """Return a text of at most 1,024 characters, or None."""
        value = self.values.get(name)
        require(value is None or (isinstance(value, str) and len(value) <= 1024), f"{name} is not a text")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an integer that fits in 63 bits. Without a default it must be there."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >> 63:
            raise UserError(f"{name}={value!r:.40} is not an integer")
        return value

    def number(self, name: str, default: float) -> float:
        """Return a finite number."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
            raise UserError(f"{name}={value!r:.40} is not a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UserError(f"{name}={value!r:.40} is not true or false")
        return value

    def object(self, name: str) -> Body:
        """Return the object of a field, which is empty if it is missing."""
        value = self.values.get(name)
        require(value is None or isinstance(value, dict), f"{name} is not an object")
        inner = Body.__new__(Body)
        inner.values = value or {}
        return inner


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def adapter_of(body: Body) -> Adapter:
    """Return the LoRA of create_model. Raises UserError for full fine-tuning, which this server does not do."""
    require(body.values.get("lora_config") is not None, "lora_config is missing; this server trains LoRA adapters")
    optimizer = body.object("optimizer_config").optional_text("type")
    require(optimizer in (None, "adamw"), f"optimizer_config.type={optimizer} is not supported; use adamw")
    lora = body.object("lora_config")
    seed = lora.integer("seed", -1)
    adapter = Adapter(
        rank=lora.integer("rank"),
        seed=None if lora.values.get("seed") is None else seed,
        attention=lora.flag("train_attn", True),
        mlp=lora.flag("train_mlp", True),
        unembed=lora.flag("train_unembed", True),
    )
    require(adapter.rank > 0, f"lora_config.rank={adapter.rank} is not a rank; use 1 or more")
    require(adapter.seed is None or adapter.seed >= 0, f"lora_config.seed={adapter.seed} is negative; use 0 or more")
    require(adapter.attention or adapter.mlp or adapter.unembed, "lora_config trains nothing; set train_mlp=true")
    return adapter


def optim_step(body: Body) -> OptimStep:
    """Return the optimizer step of a request. Raises UserError for another optimizer than AdamW."""
    require("optimizer_params" not in body.values, "optimizer_params is not supported; send adam_params")
    adam = body.object("adam_params")
    step = OptimStep(
        model_id=body.text("model_id"),
        **{name: adam.number(name, getattr(OptimStep("", 0), name)) for name in _ADAM[1:]},
        learning_rate=adam.number("learning_rate", 1e-4),
    )
    for name in _ADAM:
        value, below = getattr(step, name), 1.0 if name.startswith("beta") else math.inf
        require(0 <= value < below, f"adam_params.{name}={value:g} is out of range; use 0 or more, betas below 1")
    return step


_ADAM = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")


def forward_backward(data: bytes) -> tuple[ForwardBackward, int]:
    """Return the operation of a protobuf ForwardBackwardRequest, and its seq_id."""
    fields = protobuf.read_fields(memoryview(data))
    config = {}
    for entry in protobuf.all_bytes(fields, 7):
        pair = protobuf.read_fields(entry)
        value = protobuf.read_fields(protobuf.last_bytes(pair, 2))
        name = protobuf.last_text(pair, 1)
        require(2 not in value, f"loss_fn_config.{name[:40]} is a text; the losses of this server take numbers")
        config[name] = protobuf.last_double(value, 1)
        require(math.isfinite(config[name]), f"loss_fn_config.{name[:40]} is not a finite number")
    rows = [_row(datum, index) for index, datum in enumerate(protobuf.all_bytes(fields, 3))]
    require(len(rows) > 0, "the request has no data")
    operation = ForwardBackward(
        model_id=protobuf.last_text(fields, 1),
        rows=rows,
        loss=protobuf.last_text(fields, 4),
        loss_config=config,
        backward=not protobuf.last_int(fields, 6),
    )
    return operation, protobuf.last_int(fields, 2)


def _row(data: memoryview, index: int) -> Row:
    fields = protobuf.read_fields(data)
    chunks = [protobuf.read_fields(chunk) for chunk in protobuf.all_bytes(fields, 1)]
    for chunk in chunks:
        require(set(chunk) == {1}, f"datum {index} has an image or audio; this server takes tokens only")
    parts = [protobuf.last_bytes(protobuf.read_fields(protobuf.last_bytes(chunk, 1)), 1) for chunk in chunks]
    tokens = np.concatenate([_array(part, _DTYPES[3], f"datum {index}") for part in parts] or [np.zeros(0, np.int32)])
    require(tokens.size > 0, f"datum {index} has no tokens")
    inputs = {}
    for entry in protobuf.all_bytes(fields, 2):
        pair = protobuf.read_fields(entry)
        name = protobuf.last_text(pair, 1)
        where = f"loss_fn_inputs.{name[:40]} of datum {index}"
        require(name in _INPUTS, f"{where} is not supported; use {', '.join(_INPUTS)}")
        values = _tensor(protobuf.read_fields(protobuf.last_bytes(pair, 2)), where)
        require(
            values.shape in ((tokens.size,), (tokens.size, 1)),
            f"{where} has shape {list(values.shape)}, and the model input {tokens.size} tokens; send one value a token",
        )
        integers = _INPUTS[name].kind == "i"
        require(not integers or values.dtype.kind == "i", f"{where} is not of integers")
        require(integers or bool(np.isfinite(values).all()), f"{where} has values that are not finite")
        inputs[name] = values.reshape(-1).astype(_INPUTS[name])
    return Row(tokens.astype(np.int64), inputs)


def _tensor(fields: dict[int, list[protobuf.Value]], where: str) -> np.ndarray:
    """Return the dense tensor of a wire's Tensor, in its own dtype."""
    require(2 not in fields, f"{where} is sparse; send one value a token")
    dtype = _DTYPES.get(protobuf.last_int(fields, 3))
    if dtype is None:
        raise UserError(f"{where} has an unknown dtype; send float32 or int64")
    values = _array(protobuf.last_bytes(fields, 1), dtype, where)
    shape = protobuf.packed_ints(fields, 4) or [values.size]
    require(len(shape) <= 4 and math.prod(shape) == values.size, f"{where} has {values.size} values for shape {shape}")
    return values.reshape(shape)


def _array(data: memoryview, dtype: np.dtype[Any], where: str) -> np.ndarray:
    require(len(data) % dtype.itemsize == 0, f"{where}: {len(data)} bytes are not a number of {dtype.itemsize} each")
    return np.frombuffer(data, dtype)


def sample(body: Body, default_stops: Sequence[int]) -> Sample:
    """Return the operation of an asample request, without the weights that it samples from.

    default_stops: tokens that end an answer where the request names no stop.
    """
    for name in ("target_prompt_logprobs", "prompt_alt_tokens_k", "topk_sample_logprobs", "record_stability_info"):
        require(not body.values.get(name), f"{name} is not supported; leave it out")
    params = body.object("sampling_params")
    stop = params.values.get("stop")
    stops: Any = [stop] if isinstance(stop, str) else default_stops if stop is None else stop
    require(
        isinstance(stops, list | tuple) and len(stops) <= 64, "sampling_params.stop is not a list of up to 64 stops"
    )
    texts = [item for item in stops if isinstance(item, str) and 0 < len(item) <= 256]
    tokens = [item for item in stops if _is_token(item)]
    require(len(texts) + len(tokens) == len(stops), "sampling_params.stop is not of texts or of tokens")
    operation = Sample(
        tokens=_prompt(body.object("prompt")),
        num_samples=body.integer("num_samples", 1),
        max_tokens=None if params.values.get("max_tokens") is None else params.integer("max_tokens"),
        temperature=params.number("temperature", 1.0),
        top_p=params.number("top_p", 1.0),
        top_k=params.integer("top_k", -1),
        seed=None if params.values.get("seed") is None else params.integer("seed"),
        stop_tokens=tuple(tokens),
        stop_texts=tuple(texts),
        prompt_logprobs=body.flag("prompt_logprobs", False),
        topk_prompt_logprobs=body.integer("topk_prompt_logprobs", 0),
    )
    require(1 <= operation.num_samples <= 1024, f"num_samples={operation.num_samples} is not within 1 and 1,024")
    require(operation.max_tokens is None or operation.max_tokens > 0, "sampling_params.max_tokens is below 1")
    require(operation.temperature >= 0, "sampling_params.temperature is negative")
    require(0 < operation.top_p <= 1, "sampling_params.top_p is not above 0 and at most 1")
    require(operation.top_k == -1 or operation.top_k > 0, "sampling_params.top_k is not -1 (no limit) or positive")
    require(operation.seed is None or operation.seed >= 0, "sampling_params.seed is negative")
    require(0 <= operation.topk_prompt_logprobs <= 64, "topk_prompt_logprobs is not within 0 and 64")
    return operation


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _SHORT_MAX


def _prompt(body: Body) -> list[int]:
    chunks = body.values.get("chunks")
    require(isinstance(chunks, list), "prompt.chunks is not a list")
    tokens: list[int] = []
    for chunk in chunks or []:
        require(
            isinstance(chunk, dict) and chunk.get("type") == "encoded_text" and isinstance(chunk.get("tokens"), list),
            "prompt.chunks has a chunk that is not of tokens; this server takes tokens only",
        )
        tokens += chunk["tokens"]
    require(len(tokens) > 0, "the prompt has no tokens")
    require(all(map(_is_token, tokens)), "the prompt has a token that is not a number of the vocabulary")
    return tokens


def last_n(body: Body, tokens: int) -> int | None:
    """Return how many tokens at the prompt's end are to be scored; None: all."""
    if body.values.get("prompt_logprobs_last_n") is None:
        return None
    number = body.integer("prompt_logprobs_last_n")
    require(1 <= number < max(tokens, 2), f"prompt_logprobs_last_n={number} is not within 1 and {tokens - 1}")
    return number


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def checkpoint_name(body: Body) -> str | None:
    """Return the name that a client gave to a checkpoint. It is a name in the store, never a path."""
    name = body.optional_text("path")
    require(
        name is None or _NAME.fullmatch(name) is not None,
        f"path={name!r:.80} is not a name for a checkpoint; use letters, digits, '.', '_' and '-'",
    )
    return name


def forward_backward_output(result: ForwardBackwardResult) -> bytes:
    """Return a result as a protobuf ForwardBackwardOutput: arrays of all rows end to end, with their offsets."""
    record = protobuf.field(1, "ArrayRecord") + protobuf.field(3, len(result.logprobs))
    for name, arrays in (("logprobs", result.logprobs), ("elementwise_loss", result.losses)):
        values = [np.ascontiguousarray(array, "<f4") for array in arrays]
        offsets = np.cumsum([0, *(array.nbytes for array in values)], dtype="<i8")
        tensor = protobuf.field(1, b"".join(array.tobytes() for array in values))
        tensor += protobuf.field(2, offsets.tobytes()) + protobuf.field(3, 1)
        record += protobuf.field(2, protobuf.field(1, name) + protobuf.field(2, tensor))
    metrics = [protobuf.field(1, name) + protobuf.field(2, float(value)) for name, value in result.metrics.items()]
    output = protobuf.field(1, "ArrayRecord") + protobuf.field(2, record)
    return output + b"".join(protobuf.field(3, entry) for entry in metrics)


def sample_response(result: SampleResult, scored: int | None = None) -> bytes:
    """Return a result as a protobuf SampleResponse. scored: tokens at the prompt's end with log-probabilities."""
    output = b""
    for sequence in result.sequences:
        output += protobuf.field(
            1,
            protobuf.field(1, int(sequence.stop_reason == "length"))
            + protobuf.field(2, np.asarray(sequence.tokens, "<i4").tobytes())
            + protobuf.field(3, np.asarray(sequence.logprobs, "<f4").tobytes()),
        )
    if result.prompt_logprobs is not None:
        values = np.asarray([math.nan if value is None else value for value in result.prompt_logprobs], "<f4")
        values[: 0 if scored is None else len(values) - scored] = math.nan
        output += protobuf.field(2, values.tobytes())
    if result.topk_prompt_logprobs is not None:
        length, width = (
            len(result.topk_prompt_logprobs),
            max(map(len, filter(None, result.topk_prompt_logprobs)), default=0),
        )
        ids, logprobs = np.zeros((length, width), "<i4"), np.full((length, width), -99999.0, "<f4")
        for index, pairs in enumerate(result.topk_prompt_logprobs):
            if pairs and (scored is None or index >= length - scored):
                ids[index, : len(pairs)], logprobs[index, : len(pairs)] = zip(*pairs, strict=True)
        topk = protobuf.field(1, ids.tobytes()) + protobuf.field(2, logprobs.tobytes())
        output += protobuf.field(3, topk + protobuf.field(3, width) + protobuf.field(4, length))
    return output
