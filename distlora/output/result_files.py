"""Write the result files of an analysis (Written) or a benchmark (Results) and print them. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from distlora.output.tables import Table, as_markdown, as_text
from distlora.system import atomic_io


class Report(Protocol):
    """The report module of an analysis."""

    def markdown(self, found: Mapping[str, Any], /) -> str:
        """Render the report as Markdown."""
        ...

    def terminal(self, found: Mapping[str, Any], /) -> str:
        """Render the report for the terminal."""
        ...


@dataclass(frozen=True, slots=True)
class Written:
    """The files of one kind of analysis and the functions that make them."""

    result_name: str
    report_name: str
    plot_name: str
    report: Report
    draw: Callable[[Mapping[str, Any], Path], None]

    def show(self, out: Path, found: Mapping[str, Any]) -> None:
        """Write the report and the plot of the figures so far into the folder `out`."""
        self.draw(found, out / self.plot_name)
        atomic_io.write_text(out / self.report_name, self.report.markdown(found))

    def write(self, out: Path, found: Mapping[str, Any]) -> None:
        """Write all three files, the figures last as they mark the analysis as done; print the tables."""
        self.show(out, found)
        atomic_io.write_text(out / self.result_name, json.dumps(found, indent=1) + "\n")
        print(self.report.terminal(found))
        print(_wrote(out, (self.report_name, self.plot_name, self.result_name)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """The results of a benchmark: on stdout as tables or JSON, in a folder as NAME.md, NAME.csv and NAME.png."""

    name: str
    """Name of the benchmark: load."""
    heading: str
    notes: str
    """Date, machine, versions and load that the figures depend on."""
    tables: Sequence[Table]
    rows: Sequence[Mapping[str, Any]]
    """All figures in base units, one flat row per measurement, for the CSV."""
    reading: Sequence[str] = ()
    """Conclusions in sentences."""
    draw: Callable[[Path], None] | None = None
    """Draws the plot."""

    def show(self, *, out: Path | None = None, as_json: bool = False) -> None:
        """Print the results, and write the files if `out` is given."""
        names = [] if out is None else self.write(out)
        if as_json:
            print(json.dumps({"notes": self.notes, "rows": list(self.rows)}, indent=1), flush=True)
            return
        print(as_text(self.tables, [*self.reading, "", self.notes]), flush=True)
        if out is not None:
            print(_wrote(out, names))

    def write(self, out: Path) -> list[str]:
        """Write the files into `out`; return their names."""
        out.mkdir(parents=True, exist_ok=True)
        names, picture = [f"{self.name}.md", f"{self.name}.csv"], None
        if self.draw is not None:
            self.draw(out / f"{self.name}.png")
            names.append(f"{self.name}.png")
            picture = (self.heading, f"{self.name}.png")
        made_by = f"`distlora bench {self.name}`; every figure is in {self.name}.csv."
        text = as_markdown(self.heading, made_by, self.reading, picture, self.tables, self.notes)
        atomic_io.write_text(out / f"{self.name}.md", text)
        atomic_io.write_text(out / f"{self.name}.csv", as_csv(self.rows))
        return names


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return CSV; the columns are those of all rows in order of first appearance."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _wrote(out: Path, names: Iterable[str]) -> str:
    return f"\nwrote {', '.join(str(out / name) for name in names)}"
