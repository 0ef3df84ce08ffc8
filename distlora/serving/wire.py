"""Translate requests of the Tinker SDK 0.38 into operations, and results into its responses.

The SDK's own types read the bodies. Ranges, shapes and tokens are checked where they are used, by the engine
(`losses.check_call`, `sampler.check_sample`). Whatever is wrong is a UserError, which the caller gets.
Letters: T tokens of a sequence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError
from pydantic import BaseModel, ValidationError
from tinker.proto import tinker_public_pb2 as pb
from tinker.types import (
    AdamOptimizerConfig,
    AdamParams,
    CreateModelRequest,
    EncodedTextChunk,
    OptimStepRequest,
    SampleRequest,
)

from distlora.config import UserError, require
from distlora.serving.losses import TARGETS
from distlora.serving.operations import (
    Adapter,
    ForwardBackward,
    ForwardBackwardResult,
    OptimStep,
    Row,
    Sample,
    SampleResult,
)

PROTOBUF = "application/x-protobuf"

_DTYPES: Mapping[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
}
_MOST = (1 << 31) - 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_METADATA_BYTES = 65536

Body = TypeVar("Body", bound=BaseModel)


class WeightsInfoRequest(BaseModel):
    """The body of weights_info, for which the SDK has no type."""

    tinker_path: str


def read(kind: type[Body], data: bytes) -> Body:
    """Return a JSON body as a request of the SDK. Raises UserError for another body."""
    try:
        return kind.model_validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise UserError(f"{place:.160}: {first['msg']:.160}") from error


def counted(name: str, value: int | None) -> int:
    """Return a number that the client counts. Raises UserError if it is missing, or not within 0 and 2^31 - 1."""
    if value is None or not 0 <= value <= _MOST:
        raise UserError(f"{name}={value!r:.40} is not a number within 0 and {_MOST}")
    return value


def metadata(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a client tells of its own thing. Raises UserError if it is large, or no JSON."""
    try:
        size = len(json.dumps(values, allow_nan=False))
    except ValueError as error:
        raise UserError("user_metadata has NaN or Infinity, which JSON does not have") from error
    require(size <= _METADATA_BYTES, f"user_metadata has more than {_METADATA_BYTES:,} bytes; send less")
    return dict(values or {})


def checkpoint_name(path: str | None) -> str | None:
    """Return the name that a client gave to a checkpoint. It is a name in the store, never a path."""
    require(
        path is None or _NAME.fullmatch(path) is not None,
        f"path={path!r:.80} is not a name for a checkpoint; use letters, digits, '.', '_' and '-'",
    )
    return path


def adapter_of(request: CreateModelRequest) -> Adapter:
    """Return the LoRA of create_model. Raises UserError for full fine-tuning, which this server does not do."""
    lora = request.lora_config
    if lora is None:
        raise UserError("lora_config is missing; this server trains LoRA adapters")
    check_optimizer(request.optimizer_config)
    return Adapter(lora.rank, lora.seed, lora.train_attn, lora.train_mlp, lora.train_unembed)


def check_optimizer(optimizer: Any) -> None:
    """Raise UserError for another optimizer_config than AdamW's."""
    known = optimizer is None or isinstance(optimizer, AdamOptimizerConfig)
    require(known, f"optimizer_config.type={getattr(optimizer, 'type', ''):.40} is not supported; use adamw")


def optim_step(request: OptimStepRequest) -> OptimStep:
    """Return the optimizer step of a request. Raises UserError for another optimizer than AdamW."""
    adam = request.optim_params
    if not isinstance(adam, AdamParams):
        raise UserError(f"optimizer_params.type={adam.type:.40} is not supported; send adam_params")
    return OptimStep(request.model_id, **adam.model_dump())


def forward_backward(data: bytes) -> tuple[ForwardBackward, int]:
    """Return the operation of a protobuf ForwardBackwardRequest, and its seq_id."""
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise UserError("the body is not a ForwardBackwardRequest of protobuf; send what tinker 0.38 sends") from error
    for name, value in message.loss_fn_config_v2.items():
        text = value.HasField("text")
        require(not text, f"loss_fn_config.{name:.40} is a text; the losses of this server take numbers")
    operation = ForwardBackward(
        model_id=message.model_id,
        rows=[_row(datum, f"data[{index}]") for index, datum in enumerate(message.data)],
        loss=message.loss_fn[:40],
        loss_config={name: value.number for name, value in message.loss_fn_config_v2.items()},
        backward=not message.forward_only,
    )
    return operation, message.seq_id


def _row(datum: pb.Datum, place: str) -> Row:
    for chunk in datum.model_input:
        is_text = chunk.HasField("encoded_text")
        require(is_text, f"{place} has an image or audio; this server takes tokens only")
    tokens = b"".join(chunk.encoded_text.tokens for chunk in datum.model_input)
    inputs = {
        name: _values(tensor, f"{place}.loss_fn_inputs.{name:.40}", integers=name == TARGETS)
        for name, tensor in datum.loss_fn_inputs.items()
    }
    return Row(_array(tokens, _DTYPES[pb.DTYPE_INT32], place).astype(np.int64), inputs)


def _values(tensor: pb.Tensor, place: str, *, integers: bool) -> np.ndarray:
    """Return the values (T,) of a tensor (T,) or (T, 1), in int64 or fp32."""
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None or (integers and dtype.kind != "i"):
        raise UserError(f"{place} has a dtype that is not supported; send {'int64' if integers else 'float32'}")
    require(not tensor.HasField("sparse_csr"), f"{place} is sparse; send one value a token")
    values, shape = _array(tensor.dense, dtype, place), list(tensor.shape)
    require(
        shape in ([], [values.size], [values.size, 1]),
        f"{place} has {values.size} values for shape {shape!r:.40}; send one value a token",
    )
    return values.astype(np.int64 if integers else np.float32)


def _array(data: bytes, dtype: np.dtype[Any], place: str) -> np.ndarray:
    require(len(data) % dtype.itemsize == 0, f"{place}: {len(data)} bytes are not a number of {dtype.itemsize} each")
    return np.frombuffer(data, dtype)


def sample(request: SampleRequest) -> tuple[Sample, int | None]:
    """Return the operation of a request, without its weights, and how many tokens at the prompt's end to score."""
    names = ("target_prompt_logprobs", "prompt_alt_tokens_k", "record_stability_info")
    for name in (*names, "topk_prompt_logprobs", "topk_sample_logprobs"):
        require(not getattr(request, name), f"{name} is not supported; leave it out")
    tokens: list[int] = []
    for chunk in request.prompt.chunks:
        if not isinstance(chunk, EncodedTextChunk):
            raise UserError("prompt.chunks has an image or audio; this server takes tokens only")
        tokens += chunk.tokens
    require(
        all(0 <= token <= _MOST for token in tokens), "the prompt has a token that is not a number of the vocabulary"
    )
    params = request.sampling_params
    stops = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
    texts = tuple(stop for stop in stops if isinstance(stop, str))
    require(len(stops) <= 64, "sampling_params.stop has more than 64 stops")
    require(all(0 < len(text) <= 256 for text in texts), "sampling_params.stop has a text of 0 or above 256 characters")
    scored = request.prompt_logprobs_last_n
    require(
        scored is None or 1 <= scored < max(len(tokens), 2),
        f"prompt_logprobs_last_n={scored!r:.40} is not within 1 and {len(tokens) - 1}",
    )
    operation = Sample(
        tokens=tokens,
        num_samples=counted("num_samples", request.num_samples),
        max_tokens=None if params.max_tokens is None else counted("sampling_params.max_tokens", params.max_tokens),
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=params.seed,
        stop_tokens=None if params.stop is None else tuple(stop for stop in stops if isinstance(stop, int)),
        stop_texts=texts,
        prompt_logprobs=bool(request.prompt_logprobs),
    )
    return operation, scored


def forward_backward_output(result: ForwardBackwardResult) -> bytes:
    """Return a result as a protobuf ForwardBackwardOutput: arrays of all rows end to end, with their offsets."""
    record = pb.ArrayRecord(type_tag="ArrayRecord", num_datums=len(result.logprobs))
    for name, arrays in (("logprobs", result.logprobs), ("elementwise_loss", result.losses)):
        tensor, values = record.fields[name], [np.ascontiguousarray(array, "<f4") for array in arrays]
        tensor.data = b"".join(array.tobytes() for array in values)
        tensor.offsets = np.cumsum([0, *(array.nbytes for array in values)], dtype="<i8").tobytes()
        tensor.dtype = pb.DTYPE_FLOAT32
    output = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", loss_fn_outputs=[record])
    output.metrics.update(result.metrics)
    return output.SerializeToString()


def sample_response(result: SampleResult, scored: int | None = None) -> bytes:
    """Return a result as a protobuf SampleResponse. scored: tokens at the prompt's end with log-probabilities."""
    output = pb.SampleResponse()
    for sequence in result.sequences:
        output.sequences.add(
            stop_reason=pb.STOP_REASON_LENGTH if sequence.stop_reason == "length" else pb.STOP_REASON_STOP,
            tokens=np.asarray(sequence.tokens, "<i4").tobytes(),
            logprobs=np.asarray(sequence.logprobs, "<f4").tobytes(),
        )
    if result.prompt_logprobs is not None:
        values = np.asarray([math.nan if value is None else value for value in result.prompt_logprobs], "<f4")
        values[: 0 if scored is None else len(values) - scored] = math.nan
        output.prompt_logprobs = values.tobytes()
    return output.SerializeToString()
