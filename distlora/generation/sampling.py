"""Requests for completions, and the choice of the next token of each row with its log-probability.

A row's random number depends on (seed, position) alone, so its tokens do not depend on the rows beside it. The
log-probability is of the distribution that training recomputes: logits / temperature over the whole vocabulary, before
top_k and top_p; a greedy row's are of the logits as they are. TRL and vLLM ("processed" but for the cuts) report these.

Letters: N rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distlora.system.transfer import to_device

CHUNK = 256
"""Tokens whose probabilities are summed before the chosen one is looked for among them."""


@dataclass(frozen=True, slots=True)
class Request:
    """A completion to generate."""

    tokens: list[int]
    """The prompt."""
    seed: int = 0
    """Seed of its random numbers, which depend on (seed, position) alone."""
    max_new_tokens: int = 256
    temperature: float = 1.0
    """0 for the likeliest token each time."""
    top_p: float = 1.0
    """Least sum of the probabilities of the tokens to choose from, the likeliest first; 1 for all."""
    top_k: int = 0
    """Number of likeliest tokens to choose from; 0 for all."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion."""
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end the completion, beside the engine's."""
    slot: int | None = None
    """Slot of the adapter (extension point 3): -1 for none; None for the model's only adapter."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A generated completion."""

    tokens: list[int]
    """All sampled tokens: the end token too, and those that completed a stop string."""
    logprobs: list[float]
    """Log-probability of each under logits / temperature (greedy: the logits), without top_k and top_p."""
    ended: bool
    """True if an end token or a stop string ended it, False if it reached max_new_tokens or the model's positions."""


def uniform(seed: int, position: int) -> float:
    """Return the random number of a position, on [0, 1)."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


class Form(NamedTuple):
    """Operations that the requests of a batch need; the host knows them, so that it need not wait for the device."""

    divides: bool
    """True if a temperature is neither 0 nor 1."""
    draws: bool
    """True if a row is sampled."""
    sorts: int | None
    """Likeliest tokens to sort for top_k and top_p; 0 for the whole vocabulary; None: no request has them."""

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Form:
        """Return the operations that some of the requests need."""
        sampled = [request for request in requests if request.temperature > 0]
        most = [request.top_k for request in sampled if _is_cut(request)]
        return cls(
            divides=any(request.temperature not in (0.0, 1.0) for request in requests),
            draws=bool(sampled),
            sorts=(max(most) if all(most) else 0) if most else None,
        )


def _is_cut(request: Request) -> bool:
    return request.top_p < 1 or request.top_k > 0


NUMBERS = 4
"""Numbers per row that `numbers_of` returns."""


def numbers_of(request: Request, position: int) -> tuple[float, float, float, float]:
    """Return temperature, top_p, top_k and the random number of a row with `position` tokens, the prompt's included."""
    drawn = uniform(request.seed, position) if request.temperature > 0 else 0.0
    return request.temperature, request.top_p, float(request.top_k), drawn


def choose(logits: Tensor, requests: Sequence[Request], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the chosen tokens (N,) int64 and their log-probabilities (N,) fp32, from logits (N, V) fp32.

    `positions`: number of each row's tokens so far, the prompt's included.
    """
    columns = list(zip(*map(numbers_of, requests, positions), strict=True))
    return choose_by(logits, to_device(torch.tensor(columns, dtype=torch.float64), logits.device), Form.of(requests))


def choose_by(logits: Tensor, numbers: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Choose as `choose` does, by the numbers (NUMBERS, N) fp64 of `numbers_of` on the device of the logits.

    The host reads nothing from the device, and shapes depend on `form` alone.
    """
    temperatures, _, _, drawn = numbers
    if form.divides:
        logits = logits / temperatures.where(temperatures > 0, 1.0).to(logits.dtype)[:, None]
    log_p = logits.log_softmax(-1)
    tokens = log_p.argmax(-1)
    if form.draws:
        p = log_p.exp()
        p = p if form.sorts is None else _cut(p, numbers, form.sorts)
        tokens = _draw(p, drawn).where(temperatures > 0, tokens)
    return tokens, log_p.gather(1, tokens[:, None]).squeeze(1)


def _cut(p: Tensor, numbers: Tensor, sorts: int) -> Tensor:
    """Return probabilities (N, V), zero for tokens that top_k and top_p leave out; their sum may be below 1."""
    _, top_p, top_k, _ = numbers[..., None]
    ordered, tokens = p.topk(min(sorts or p.shape[1], p.shape[1]), dim=-1)
    at = torch.arange(ordered.shape[1], device=p.device)
    ordered = ordered.where((at < top_k) | (top_k == 0), 0.0)
    # top_p is a part of what top_k leaves. A token is in it if those before it are not enough.
    before = ordered.cumsum(-1) - ordered
    parts = top_p.to(p.dtype) * ordered.sum(-1, keepdim=True)
    ordered = ordered.where((before < parts) | (at == 0), 0.0)
    is_cut = (top_p < 1) | (top_k > 0)
    return torch.zeros_like(p).scatter_(1, tokens, ordered).where(is_cut, p)


def _draw(p: Tensor, numbers: Tensor) -> Tensor:
    """Return (N,) int64: the first token at which the sum of the probabilities (N, V) exceeds `numbers` (N,) fp64."""
    num_rows, vocabulary = p.shape
    padded = torch.nn.functional.pad(p, (0, -vocabulary % CHUNK)).view(num_rows, -1, CHUNK)
    sums = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    target = numbers[:, None] * sums[:, -1:]
    # Rounding must not choose what has no probability: the last chunk with any is the limit.
    chunk = torch.minimum((sums <= target).sum(-1), (sums < sums[:, -1:]).sum(-1))
    rows = torch.arange(num_rows, device=p.device)
    before = torch.where(chunk > 0, sums[rows, (chunk - 1).clamp(min=0)], 0.0)[:, None]
    within = padded[rows, chunk].double().cumsum(-1)
    place = torch.minimum((within <= target - before).sum(-1), (within < within[:, -1:]).sum(-1))
    return chunk * CHUNK + place
