"""Compute the losses of the service's rows from the log-probabilities of their targets.

Names, inputs and formulas are those of https://tinker-docs.thinkingmachines.ai/losses. All tensors are (N, T) fp32: N
rows, T tokens. A loss is the sum over tokens; nothing is divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distlora.config import UserError, nearest
from distlora.serving.operations import ForwardBackward, Row

TARGETS = "target_tokens"
WEIGHTS, OLD, ADVANTAGES = "weights", "logprobs", "advantages"

LossFunction = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, float]], Tensor]
"""(log-probabilities, inputs, settings) -> loss of each token."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss by its inputs and settings."""

    function: LossFunction
    required: frozenset[str]
    """Inputs of each row beside the targets."""
    settings: Mapping[str, float]
    """Names and defaults of `loss_config`."""
    optional: frozenset[str] = frozenset({WEIGHTS})
    """`weights` of a policy gradient multiply each token's loss."""


def _cross_entropy(logps: Tensor, inputs: Mapping[str, Tensor], _: Mapping[str, float]) -> Tensor:
    return -logps * inputs[WEIGHTS]


def _importance_sampling(logps: Tensor, inputs: Mapping[str, Tensor], _: Mapping[str, float]) -> Tensor:
    return -((logps - inputs[OLD]).exp() * inputs[ADVANTAGES])


def _ppo(logps: Tensor, inputs: Mapping[str, Tensor], settings: Mapping[str, float]) -> Tensor:
    ratio, advantages = (logps - inputs[OLD]).exp(), inputs[ADVANTAGES]
    clipped = ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])
    return -torch.minimum(ratio * advantages, clipped * advantages)


def _cispo(logps: Tensor, inputs: Mapping[str, Tensor], settings: Mapping[str, float]) -> Tensor:
    ratio = (logps.detach() - inputs[OLD]).exp()
    clipped = ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])
    return -(clipped * logps * inputs[ADVANTAGES])


def _dro(logps: Tensor, inputs: Mapping[str, Tensor], settings: Mapping[str, float]) -> Tensor:
    squared = (logps - inputs[OLD]).square()
    return -(logps * inputs[ADVANTAGES] - 0.5 * settings["beta"] * squared)


_OF_POLICY = frozenset({OLD, ADVANTAGES})
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(_cross_entropy, frozenset({WEIGHTS}), {}),
    "importance_sampling": Loss(_importance_sampling, _OF_POLICY, {}),
    "ppo": Loss(_ppo, _OF_POLICY, _CLIP),
    "cispo": Loss(_cispo, _OF_POLICY, _CLIP),
    "dro": Loss(_dro, _OF_POLICY, {"beta": 0.05}),
}


def token_losses(logps: Tensor, inputs: Mapping[str, Tensor], call: ForwardBackward) -> Tensor:
    """Return the loss of each token (N, T) of a call's rows."""
    loss = LOSSES[call.loss]
    losses = loss.function(logps, inputs, {**loss.settings, **call.loss_config})
    return losses if WEIGHTS in loss.required or WEIGHTS not in inputs else losses * inputs[WEIGHTS]


def check_call(call: ForwardBackward, *, vocabulary: int, context: int) -> None:
    """Raise UserError for a loss, setting or row that cannot be computed, before anything runs."""
    loss = LOSSES.get(call.loss)
    if loss is None:
        raise UserError(
            f"loss_fn={call.loss}: the losses of this server are {', '.join(LOSSES)}{nearest(call.loss, LOSSES)}; "
            "forward_backward_custom computes any other"
        )
    for name, value in call.loss_config.items():
        if name not in loss.settings:
            known = ", ".join(loss.settings) or "none"
            raise UserError(f"loss_fn_config: {call.loss} has no {name}; its settings are: {known}")
        if not math.isfinite(value):
            raise UserError(f"loss_fn_config: {name}={value} is not a finite number")
    if not call.rows:
        raise UserError("forward_backward without data; send one Datum at least")
    for number, row in enumerate(call.rows):
        if row.inputs.keys() != call.rows[0].inputs.keys():
            raise UserError(f"data[{number}].loss_fn_inputs has other inputs than data[0]; give all the same")
        _check_row(row, loss, f"data[{number}]", vocabulary, context)


def _check_row(row: Row, loss: Loss, place: str, vocabulary: int, context: int) -> None:
    length = len(row.tokens)
    if not 0 < length <= context:
        raise UserError(f"{place} has {length:,} tokens, and the model has positions for 1 to {context:,}")
    for name in (TARGETS, *sorted(loss.required)):
        if name not in row.inputs:
            raise UserError(f"{place}.loss_fn_inputs lacks {name}")
    for name, values in row.inputs.items():
        if name != TARGETS and name not in loss.required | loss.optional:
            raise UserError(f"{place}.loss_fn_inputs.{name} is not an input of this loss; leave it out")
        if values.shape != (length,):
            raise UserError(
                f"{place}.loss_fn_inputs.{name} has shape {list(values.shape)}, and model_input has {length:,} tokens"
            )
        if name != TARGETS and not np.isfinite(values).all():
            raise UserError(f"{place}.loss_fn_inputs.{name} holds NaN or Inf")
    for name, ids in (("model_input", row.tokens), (f"loss_fn_inputs.{TARGETS}", row.inputs[TARGETS])):
        check_tokens(ids, f"{place}.{name}", vocabulary)


def check_tokens(ids: np.ndarray, place: str, vocabulary: int) -> None:
    """Raise UserError for a token id outside of the vocabulary."""
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if len(outside):
        raise UserError(f"{place} holds token {int(outside[0])}, and the vocabulary has ids 0 to {vocabulary - 1:,}")
