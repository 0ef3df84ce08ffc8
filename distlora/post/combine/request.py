"""Define the request of `distlora combine` and its methods. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from distlora.config import UserError, nearest, require

RECORD_NAME = "combine.json"
"""The record in the result's folder: its members and what truncation lost."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method of PEFT's add_weighted_adapter."""

    on: Literal["sum", "factors", "weights"]
    """Input of the method: the exact sum; A and B separately; B A of each adapter, dense, one weight at a time."""
    function: str = ""
    """Function of peft.utils.merge_utils."""
    what: str = ""

    @property
    def has_density(self) -> bool:
        """Return True if --density applies."""
        return self.function not in ("", "task_arithmetic")

    @property
    def elects(self) -> bool:
        """Return True if adapters vote on the sign of each element."""
        return self.function.endswith("ties")

    @property
    def draws(self) -> bool:
        """Return True if the method draws random numbers (DARE)."""
        return self.function.startswith("dare")

    @property
    def truncates(self) -> bool:
        """Return True if the method works on dense dW and truncates it to --rank."""
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
    """The folder as it was typed."""
    folder: str
    """Absolute folder in PEFT's format, for the base as its checkpoint has it."""
    weight: float
    base: str | None = None
    """`fingerprint` of its base; None if unknown."""
    base_folder: str | None = None
    quant: str | None = None
    """quant.method of its run; None without a run."""
    dtype: Literal["bf16", "fp32"] | None = None
    """train.dtype of its run, which rounded the base's unquantized weights."""
    pissa: bool = False
    """True if its run trained on the base without PiSSA's initial adapter."""

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.weight) and self.weight != 0,
            f"{self.place}={self.weight:g} is no weight: it is a number other than 0, such as {self.place}=0.5; leave "
            "an adapter of weight 0 out",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CombineRequest:
    """The request of `distlora combine`. Folders are absolute, defaults filled in."""

    members: tuple[Member, ...]
    out: str
    """New folder for the result."""
    method: str = "cat"
    rank: int | None = None
    """Largest rank of a method that truncates."""
    density: float | None = None
    majority_sign_method: str = "total"
    seed: int = 0
    base_folder: str | None = None
    """Folder of the base; None if its values are not needed."""
    quant: Literal["nf4", "none"] = "nf4"
    """Quantization of the base."""
    held: Literal["bf16", "fp32"] = "fp32"
    """Dtype that training rounded the base's unquantized weights to; fp32: as stored."""
    onto: Literal["trained", "original"] | None = None
    """Form of the base for a merged model; None to write an adapter."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Storage dtype of a merged model."""
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
        """Return the combination method."""
        return METHODS[self.method]
