"""Seconds by what they wait for. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Term = Literal[
    "compute",  # operations
    "memory",  # the device's memory
    "launches",  # from one kernel to the next
    "link",  # other GPUs of the machine
    "network",  # other machines
    "host_link",  # the host's memory
    "latency",  # of collectives, before their first byte
]
TERMS: tuple[Term, ...] = get_args(Term)
Seconds = dict[Term, float]


def total(seconds: Mapping[Term, float]) -> float:
    """Return the sum of all terms."""
    return sum(seconds.values())


def plus(*parts: Seconds) -> Seconds:
    """One after the other."""
    found: Seconds = {}
    for part in parts:
        for term, seconds in part.items():
            found[term] = found.get(term, 0.0) + seconds
    return found


def times(seconds: Seconds, number: float) -> Seconds:
    """Return the seconds `number` times."""
    return {term: number * each for term, each in seconds.items()}


def longest(*beside: Seconds) -> Seconds:
    """Side by side: the one that takes longest, whose terms are what is waited for."""
    return max(beside, key=total)
