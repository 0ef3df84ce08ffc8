"""Define the request of `distlora analyze spectrum`. Imports no torch."""

from dataclasses import dataclass

from distlora.config import require
from distlora.post.trained import Name

RESULT_NAME, REPORT_NAME, PLOT_NAME = "spectrum.json", "report.md", "spectrum.png"
"""Files in the result's folder."""

TOP, THRESHOLDS, EXACT_UP_TO = 10, (0.3, 0.5, 0.7, 0.9), 4096
"""Shuttleworth et al. take the first 10 and 0.5."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectrumRequest:
    """One analysis. Everything is resolved: folders are absolute, defaults filled in."""

    first: Name
    first_name: str
    """Name of the first run in the report."""
    against: Name | None = None
    against_name: str | None = None
    out: str
    """An existing folder for the results."""
    top: int = TOP
    """Singular vectors of W + dW that are looked at."""
    thresholds: tuple[float, ...] = THRESHOLDS
    """Cosines, rising."""
    exact_up_to: int = EXACT_UP_TO
    """Smaller side of a matrix up to which it is decomposed whole."""

    def __post_init__(self) -> None:
        require(self.top > 0, f"--top={self.top} is not a valid number of singular vectors; write 1 or more")
        require(self.exact_up_to >= 0, f"--exact-up-to={self.exact_up_to} is not a valid size; write 0 or more")
        for value in self.thresholds:
            require(0 < value < 1, f"--threshold={value:g} is not a cosine between 0 and 1; write --threshold 0.5")
        printed = [f"{value:g}" for value in self.thresholds]
        require(
            len(set(printed)) == len(printed),
            f"--threshold={','.join(map(str, self.thresholds))}: two of them are the same in six digits; leave one out",
        )
