"""Requests for completions and what answers them. Imports no torch."""

from dataclasses import dataclass


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
    top_k: int = 0
    """0 for no limit."""
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
