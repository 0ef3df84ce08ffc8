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

import torch
from torch import Tensor

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


def choose(logits: Tensor, requests: Sequence[Request], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the chosen tokens (N,) int64 and their log-probabilities (N,) fp32, from logits (N, V) fp32.

    `positions`: number of each row's tokens so far, the prompt's included.
    """
    temperatures = [request.temperature for request in requests]
    if any(temperature not in (0.0, 1.0) for temperature in temperatures):
        logits = logits / logits.new_tensor([value or 1.0 for value in temperatures])[:, None]
    log_p = logits.log_softmax(-1)
    tokens = log_p.argmax(-1)
    sampled = [row for row, temperature in enumerate(temperatures) if temperature > 0]
    if sampled:
        rows = log_p[sampled] if len(sampled) < len(requests) else log_p
        numbers = [uniform(requests[row].seed, positions[row]) for row in sampled]
        drawn = _draw(_cut(rows, [requests[row] for row in sampled]), numbers)
        tokens[torch.tensor(sampled, device=tokens.device)] = drawn
    return tokens, log_p.gather(1, tokens[:, None]).squeeze(1)


def _cut(log_p: Tensor, requests: Sequence[Request]) -> Tensor:
    """Return the probabilities (N, V), zero for tokens that top_k and top_p leave out; their sum may be below 1."""
    p = log_p.exp()
    cut = [row for row, request in enumerate(requests) if request.top_p < 1 or request.top_k > 0]
    if not cut:
        return p
    most = [requests[row].top_k for row in cut]
    count = max(most) if all(most) else p.shape[1]
    ordered, tokens = p[cut].topk(min(count, p.shape[1]), dim=-1)
    at = torch.arange(ordered.shape[1], device=p.device)
    sizes = torch.tensor([size or p.shape[1] for size in most], device=p.device)[:, None]
    ordered = ordered.where(at < sizes, 0.0)
    # top_p is a part of what top_k leaves. A token is in it if those before it are not enough.
    before = ordered.cumsum(-1) - ordered
    parts = p.new_tensor([requests[row].top_p for row in cut])[:, None] * ordered.sum(-1, keepdim=True)
    ordered = ordered.where((before < parts) | (at == 0), 0.0)
    p[cut] = torch.zeros_like(p[cut]).scatter_(1, tokens, ordered)
    return p


def _draw(p: Tensor, numbers: Sequence[float]) -> Tensor:
    """Return (N,) int64: the first token at which the sum of the probabilities (N, V) exceeds a random number (N,)."""
    num_rows, vocabulary = p.shape
    padded = torch.nn.functional.pad(p, (0, -vocabulary % CHUNK)).view(num_rows, -1, CHUNK)
    sums = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    target = torch.tensor(numbers, dtype=torch.float64, device=p.device)[:, None] * sums[:, -1:]
    # Rounding must not choose what has no probability: the last chunk with any is the limit.
    chunk = torch.minimum((sums <= target).sum(-1), (sums < sums[:, -1:]).sum(-1))
    rows = torch.arange(num_rows, device=p.device)
    before = torch.where(chunk > 0, sums[rows, (chunk - 1).clamp(min=0)], 0.0)[:, None]
    within = padded[rows, chunk].double().cumsum(-1)
    place = torch.minimum((within <= target - before).sum(-1), (within < within[:, -1:]).sum(-1))
    return chunk * CHUNK + place
