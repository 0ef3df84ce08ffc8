"""Write the result files of an analysis (Written) or a benchmark (Results), as tables and figures. Imports no torch.

matplotlib is imported lazily. The colors are Okabe and Ito's, distinguishable with color blindness.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def spread(values: Sequence[float]) -> str:
    """Format the median with minimum and maximum, `1.15 (1.14-1.30)`; one value by itself."""
    middle = f"{statistics.median(values):.2f}"
    return f"{middle} ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else middle


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


def draw_bars(title: str, panels: Sequence[tuple[str, Mapping[str, float]]], path: Path) -> None:
    """Draw panels side by side, each a quantity with its unit and one bar per name."""
    most = max(len(values) for _, values in panels)
    figure, axes = new_figure(len(panels), width=2 + 3.5 * len(panels), height=1.2 + 0.32 * most)
    for axis, (label, values) in zip(axes, panels, strict=True):
        places = range(len(values))
        colours = [COLOURS[place % len(COLOURS)] for place in places]
        bars = axis.barh(places, list(values.values()), color=colours, height=0.65)
        axis.bar_label(bars, fmt="{:,.4g}", padding=3, fontsize=8)
        axis.set_yticks(places, list(values) if axis is axes[0] or list(values) != list(panels[0][1]) else [])
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set(xlabel=label)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


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
        csv_text = io.StringIO()
        # The columns are those of all rows in order of first appearance.
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        writer = csv.DictWriter(csv_text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        atomic_io.write_text(out / f"{self.name}.csv", csv_text.getvalue())
        return names


def _wrote(out: Path, names: Iterable[str]) -> str:
    return f"\nwrote {', '.join(str(out / name) for name in names)}"
