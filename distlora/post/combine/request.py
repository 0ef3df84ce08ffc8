"""What `distlora combine` is asked to do: the request that the command hands to its worker. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from distlora.config import UserError, nearest, require

RECORD_NAME = "combine.json"
"""In the result's folder: of what it was made, and what that lost."""


@dataclass(frozen=True, slots=True)
class Method:
    """A way to combine, as PEFT's add_weighted_adapter names it."""

    on: Literal["sum", "factors", "weights"]
    """What it works on: the sum as it is; A and B apart; B A of each adapter, dense, a weight at a time."""
    function: str = ""
    """Of peft.utils.merge_utils."""
    what: str = ""

    @property
    def has_density(self) -> bool:
        return self.function not in ("", "task_arithmetic")

    @property
    def elects(self) -> bool:
        """Whether adapters vote on the sign of each element."""
        return self.function.endswith("ties")

    @property
    def draws(self) -> bool:
        return self.function.startswith("dare")

    @property
    def truncates(self) -> bool:
        return self.on == "weights"


METHODS = {
    "cat": Method("sum", what="the exact sum, as a LoRA of all ranks together"),
    "svd": Method("weights", what="the exact sum, then its best approximation of --rank"),
    "linear": Method("factors", "task_arithmetic", "A and B summed apart: what PEFT calls linear, which is no sum"),
    "magnitude_prune": Method("factors", "magnitude_prune", "as linear, the largest of each A and B alone"),
    "ties": Method("factors", "ties", "TIES on A and on B"),
    "dare_linear": Method("factors", "dare_linear", "as linear, a random share of each A and B alone"),
    "dare_ties": Method("factors", "dare_ties", "DARE and TIES on A and on B"),
    "magnitude_prune_svd": Method("weights", "magnitude_prune", "the largest elements of each B A, summed, truncated"),
    "ties_svd": Method("weights", "ties", "TIES on B A, truncated"),
    "dare_linear_svd": Method("weights", "dare_linear", "DARE on B A, summed, truncated"),
    "dare_ties_svd": Method("weights", "dare_ties", "DARE and TIES on B A, truncated"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """An adapter and its weight in the sum."""

    place: str
    """As the user named it."""
    folder: str
    """In PEFT's format, and belonging to the base as its checkpoint has it."""
    weight: float
    base: str | None = None
    """`fingerprint` of its base; None where nothing says which that is."""
    base_folder: str | None = None
    quant: str | None = None
    """How its base was held in training; None where it is no run's."""
    dtype: Literal["bf16", "fp32"] | None = None
    """What its run computed in, which the base's weights that are not in NF4 were rounded to."""
    pissa: bool = False
    """Whether its run trained on the base without PiSSA's start."""

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.weight) and self.weight != 0,
            f"{self.place}={self.weight:g} is no weight: it is a number other than 0, such as {self.place}=0.5; leave "
            "an adapter of weight 0 out",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CombineRequest:
    """One combination. Everything is resolved: folders are absolute, defaults filled in."""

    members: tuple[Member, ...]
    out: str
    """A new folder for the result."""
    method: str = "cat"
    rank: int | None = None
    """Most columns of B, of a method that truncates."""
    density: float | None = None
    majority_sign_method: str = "total"
    seed: int = 0
    base_folder: str | None = None
    """Where the base is; None where nothing of it is needed."""
    quant: Literal["nf4", "none"] = "nf4"
    """And how it is held."""
    held: Literal["bf16", "fp32"] = "fp32"
    """What of it is not in NF4 is rounded to this, as training did; fp32: as it is on disk."""
    onto: Literal["trained", "original"] | None = None
    """Of a merged model in place of an adapter: the form of the base that it is made of."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """And of its weights."""
    command: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(
                f"--method={self.method} is not known{nearest(self.method, METHODS)}; write one of {', '.join(METHODS)}"
            )
        method = METHODS[self.method]
        require(
            self.rank is None or method.truncates,
            f"--rank={self.rank} has no effect with --method {self.method}, which keeps the ranks that it finds; "
            "leave it out, or write --method svd",
        )
        require(self.rank is None or self.rank > 0, f"--rank={self.rank} is no rank; write 1 or more")
        require(
            self.density is None or method.has_density,
            f"--density={self.density} has no effect with --method {self.method}, which keeps every element; leave it "
            "out",
        )
        if method.has_density:
            require(
                self.density is not None and 0 < self.density <= 1,
                f"--method {self.method} keeps a share of the elements: add --density "
                f"{0.1 if method.draws else 0.2} (above 0, at most 1)"
                + ("" if self.density is None else f"; {self.density:g} is none"),
            )
        require(
            self.majority_sign_method in ("total", "frequency"),
            f"--majority-sign-method={self.majority_sign_method} is not known; write total or frequency",
        )

    @property
    def how(self) -> Method:
        return METHODS[self.method]
