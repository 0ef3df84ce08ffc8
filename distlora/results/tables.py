"""Write the result files of an analysis, as tables and figures. Imports no torch.

matplotlib is imported lazily. The colors are Okabe and Ito's, distinguishable with color blindness.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlora.system import atomic_io

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Table:
    """A heading and rows of cells; the first row has the column names."""

    heading: str
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return a Markdown table under its heading."""
        rows = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        head, *rest = (f"| {' | '.join(row)} |" for row in rows)
        return "\n".join([f"**{self.heading}**\n", head, "|---" * len(self.rows[0]) + "|", *rest])

    def text(self) -> str:
        """Return aligned columns: the first left, the others right."""
        widths = [max(len(row[column]) for row in self.rows) for column in range(len(self.rows[0]))]
        lines = []
        for row in self.rows:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            cells[0] = row[0].ljust(widths[0])
            lines.append("  " + "  ".join(cells).rstrip())
        return "\n".join([self.heading, *lines])


def as_markdown(
    heading: str,
    made_by: str,
    sentences: Sequence[str],
    picture: tuple[str, str] | None,
    tables: Iterable[Table],
    notes: str,
) -> str:
    """Return a report: its command, sentences, a picture (caption, file), tables and notes."""
    parts = [
        f"# {heading}",
        made_by,
        "\n".join(f"- {sentence}" for sentence in sentences),
        "" if picture is None else f"![{picture[0]}]({picture[1]})",
        *(table.markdown() for table in tables),
        notes,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_text(tables: Iterable[Table], sentences: Sequence[str]) -> str:
    """Return the tables and sentences for the terminal."""
    return "\n\n".join([*(table.text() for table in tables), "\n".join(sentences)])


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8c8c8c")
DOTS_PER_INCH = 100


def new_figure(columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with `columns` panels side by side, sized in inches. Needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure, panels


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, the same bytes for the same figure."""
    # Leave out matplotlib's version, so that equal figures give equal files.
    figure.savefig(path, metadata={"Software": None})


@dataclass(frozen=True, slots=True)
class Written:
    """The files of one kind of analysis and the module that makes them."""

    result_name: str
    report_name: str
    plot_name: str
    report: Any
    """Module with `markdown(figures)`, `terminal(figures)` and `draw(figures, path)`."""

    def show(self, out: Path, found: Mapping[str, Any]) -> None:
        """Write the report and the plot of the figures so far into the folder `out`."""
        self.report.draw(found, out / self.plot_name)
        atomic_io.write_text(out / self.report_name, self.report.markdown(found))

    def write(self, out: Path, found: Mapping[str, Any]) -> None:
        """Write all three files, the figures last as they mark the analysis as done; print the tables."""
        self.show(out, found)
        atomic_io.write_text(out / self.result_name, json.dumps(found, indent=1) + "\n")
        print(self.report.terminal(found))
        names = (self.report_name, self.plot_name, self.result_name)
        print(f"\nwrote {', '.join(str(out / name) for name in names)}")
