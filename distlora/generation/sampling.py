"""Choose the next token of each row, and report its log-probability.

A row's random number depends on (seed, position) alone, so its tokens do not depend on the rows beside it. The
log-probability is of the distribution that training recomputes: logits / temperature over the whole vocabulary, before
top_k and top_p; a greedy row's are of the logits as they are. TRL and vLLM ("processed" but for the cuts) report these.

Letters: N rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 256
"""Tokens whose probabilities are summed before the chosen one is looked for among them."""


class Choice(NamedTuple):
    """The way in which a row's next token is chosen."""

    seed: int
    position: int
    """Number of the row's tokens so far, the prompt's included."""
    temperature: float
    """0 for the likeliest token."""
    top_p: float
    """Least sum of the probabilities of the tokens to choose from, the likeliest first; 1 for all."""
    top_k: int
    """Number of likeliest tokens to choose from; 0 for all."""


def uniform(seed: int, position: int) -> float:
    """Return the random number of a position, on [0, 1)."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def choose(logits: Tensor, choices: Sequence[Choice]) -> tuple[Tensor, Tensor]:
    """Return the chosen tokens (N,) int64 and their log-probabilities (N,) fp32, from logits (N, V) fp32."""
    temperatures = [choice.temperature for choice in choices]
    if any(temperature not in (0.0, 1.0) for temperature in temperatures):
        logits = logits / logits.new_tensor([value or 1.0 for value in temperatures])[:, None]
    log_p = logits.log_softmax(-1)
    tokens = log_p.argmax(-1)
    sampled = [row for row, temperature in enumerate(temperatures) if temperature > 0]
    if sampled:
        rows = log_p[sampled] if len(sampled) < len(choices) else log_p
        drawn = _draw(_cut(rows, [choices[row] for row in sampled]), [choices[row] for row in sampled])
        tokens[torch.tensor(sampled, device=tokens.device)] = drawn
    return tokens, log_p.gather(1, tokens[:, None]).squeeze(1)


def _cut(log_p: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Return the probabilities (N, V), zero for tokens that top_k and top_p leave out; their sum may be below 1."""
    p = log_p.exp()
    cut = [row for row, choice in enumerate(choices) if choice.top_p < 1 or choice.top_k > 0]
    if not cut:
        return p
    most = [choices[row].top_k for row in cut]
    count = max(most) if all(most) else p.shape[1]
    ordered, tokens = p[cut].topk(min(count, p.shape[1]), dim=-1)
    at = torch.arange(ordered.shape[1], device=p.device)
    sizes = torch.tensor([size or p.shape[1] for size in most], device=p.device)[:, None]
    ordered = ordered.where(at < sizes, 0.0)
    # top_p is a part of what top_k leaves. A token is in it if those before it are not enough.
    before = ordered.cumsum(-1) - ordered
    parts = p.new_tensor([choices[row].top_p for row in cut])[:, None] * ordered.sum(-1, keepdim=True)
    ordered = ordered.where((before < parts) | (at == 0), 0.0)
    p[cut] = torch.zeros_like(p[cut]).scatter_(1, tokens, ordered)
    return p


def _draw(p: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Return (N,) int64: the first token at which the sum of the probabilities (N, V) exceeds the random number."""
    num_rows, vocabulary = p.shape
    padded = torch.nn.functional.pad(p, (0, -vocabulary % CHUNK)).view(num_rows, -1, CHUNK)
    sums = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    numbers = [uniform(choice.seed, choice.position) for choice in choices]
    target = torch.tensor(numbers, dtype=torch.float64, device=p.device)[:, None] * sums[:, -1:]
    # Rounding must not choose what has no probability: the last chunk with any is the limit.
    chunk = torch.minimum((sums <= target).sum(-1), (sums < sums[:, -1:]).sum(-1))
    rows = torch.arange(num_rows, device=p.device)
    before = torch.where(chunk > 0, sums[rows, (chunk - 1).clamp(min=0)], 0.0)[:, None]
    within = padded[rows, chunk].double().cumsum(-1)
    place = torch.minimum((within <= target - before).sum(-1), (within < within[:, -1:]).sum(-1))
    return chunk * CHUNK + place
