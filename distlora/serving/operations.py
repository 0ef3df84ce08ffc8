"""Define the operations that the HTTP side hands to the engine, and their results.

Letters: T tokens of a sequence, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA of one model: its rank, the seed of its first values, and which linears have it."""

    rank: int
    seed: int | None = None
    """None: the engine chooses one."""
    attention: bool = True
    mlp: bool = True
    unembed: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One sequence of a call."""

    tokens: np.ndarray
    """(T,) int64: the model's input."""
    inputs: Mapping[str, np.ndarray]
    """(T,) each, by the SDK's names: "target_tokens" int64, which are shifted already, and "weights", "logprobs" and
    "advantages" float32."""


@dataclass(frozen=True, slots=True)
class CreateModel:
    """Add an adapter with its first values and no optimizer states."""

    model_id: str
    adapter: Adapter


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBackward:
    """Compute losses of rows, and with `backward` add their gradients to those that the model has."""

    model_id: str
    rows: Sequence[Row]
    loss: str
    """A name in `losses.LOSSES`."""
    loss_config: Mapping[str, float] = field(default_factory=dict)
    backward: bool = True


@dataclass(frozen=True, slots=True)
class OptimStep:
    """Apply the gradients that the model has by one step of AdamW, and drop them."""

    model_id: str
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    """Maximum norm of all gradients; 0: no limit."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Sample completions of a prompt."""

    tokens: Sequence[int]
    model_id: str | None = None
    """The model as it is now; None: `weights_folder`, or the base alone without one."""
    weights_folder: Path | None = None
    """A folder of `Save`, which is immutable."""
    num_samples: int = 1
    max_tokens: int | None = None
    """None: as many as the context has room for."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1: all tokens."""
    seed: int | None = None
    stop_tokens: Sequence[int] | None = None
    """Tokens that end a completion; None: the model's own end tokens."""
    stop_texts: Sequence[str] = ()
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Save:
    """Write a model's weights, and with `optimizer` also its optimizer states, into a new folder, durably."""

    model_id: str
    folder: Path
    optimizer: bool


@dataclass(frozen=True, slots=True)
class Load:
    """Read what `Save` wrote into a model of the same rank and targets; without `optimizer` its states start anew."""

    model_id: str
    folder: Path
    optimizer: bool


@dataclass(frozen=True, slots=True)
class Unload:
    """Forget a model."""

    model_id: str


Operation = CreateModel | ForwardBackward | OptimStep | Sample | Save | Load | Unload


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBackwardResult:
    """Result of `ForwardBackward`, one array per row."""

    logprobs: list[np.ndarray]
    """(T,) float32 of each row: log-probabilities of its targets."""
    losses: list[np.ndarray]
    """(T,) float32 of each row: loss of each token."""
    metrics: dict[str, float]
    """"loss:sum" over all rows."""


@dataclass(frozen=True, slots=True)
class OptimStepResult:
    """Result of `OptimStep`."""

    metrics: dict[str, float]
    """"optimizer/step": steps that this model has had; "grad_norm": before clipping."""


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """One completion."""

    tokens: list[int]
    logprobs: list[float]
    stop_reason: str
    """"stop" or "length"."""


@dataclass(frozen=True, slots=True)
class SampleResult:
    """Result of `Sample`."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    """Of each token of the prompt but the first, which has None."""


Result = ForwardBackwardResult | OptimStepResult | SampleResult | None
