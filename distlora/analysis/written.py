"""What an analysis leaves in its folder: figures as JSON, a report, a plot. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from distlora import durable


class Report(Protocol):
    """An analysis' report.py."""

    def markdown(self, found: Mapping[str, Any], /) -> str: ...

    def terminal(self, found: Mapping[str, Any], /) -> str: ...


@dataclass(frozen=True, slots=True)
class Written:
    """The files of one kind of analysis, and what makes them of its figures."""

    result_name: str
    report_name: str
    plot_name: str
    report: Report
    draw: Callable[[Mapping[str, Any], Path], None]

    def show(self, out: Path, found: Mapping[str, Any]) -> None:
        """The report and the plot of what is known so far, in the folder `out`."""
        self.draw(found, out / self.plot_name)
        durable.write_text(out / self.report_name, self.report.markdown(found))

    def write(self, out: Path, found: Mapping[str, Any]) -> None:
        """All three files, the figures last: they say that the analysis is done. The tables go to stdout."""
        self.show(out, found)
        durable.write_text(out / self.result_name, json.dumps(found, indent=1) + "\n")
        print(self.report.terminal(found))
        print(f"\nwrote {', '.join(str(out / name) for name in (self.report_name, self.plot_name, self.result_name))}")
