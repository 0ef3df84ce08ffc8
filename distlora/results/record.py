"""Hold what a command found as values: tables, figures, sentences. Make text, Markdown, PNG and JSON of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.results.figures import Figure, save_png
from distlora.system import atomic_io

REPORT_NAME = "report.md"
_NUMBER = re.compile(r"[-+]?\d")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of values under named columns."""

    heading: str
    columns: Mapping[str, str] | Sequence[str]
    """Names; of a mapping each with the format specification of its numbers (`.4f`)."""
    rows: Sequence[Sequence[str | float | None]]
    """Values; None is shown as a dash."""
    most: int | None = None
    """Number of rows to show; of more, those in the middle are left to the JSON."""

    def cells(self) -> list[list[str]]:
        """Return the names and the rows as text."""
        forms = list(self.columns.values()) if isinstance(self.columns, Mapping) else [""] * len(self.columns)
        rows = [[_cell(value, form) for value, form in zip(row, forms, strict=True)] for row in self.rows]
        if self.most is not None and len(rows) > self.most:
            half = self.most // 2
            left = f"({len(rows) - 2 * half} more in the JSON)"
            rows = [*rows[:half], [left, *[""] * (len(forms) - 1)], *rows[-half:]]
        return [list(self.columns), *rows]

    def markdown(self) -> str:
        """Return a Markdown table with aligned columns, under its heading if it has one."""
        rows = [[cell.replace("|", "\\|") for cell in row] for row in self.cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * max(width, 1) for width in widths])
        lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
        return "\n".join([f"**{self.heading}**\n"] * bool(self.heading) + lines)

    def is_right(self) -> list[bool]:
        """Return for each column but the first whether most of its cells are numbers, which are aligned right."""
        right: list[bool] = []
        for column in zip(*self.cells(), strict=True):
            cells = [cell for cell in column[1:] if cell not in ("", "-")]
            right.append(len(right) > 0 and 2 * sum(map(bool, map(_NUMBER.match, cells))) > len(cells))
        return right

    def text(self) -> str:
        """Return aligned columns."""
        columns = []
        for is_right, column in zip(self.is_right(), zip(*self.cells(), strict=True), strict=True):
            width = max(map(len, column))
            columns.append([cell.rjust(width) if is_right else cell.ljust(width) for cell in column])
        lines = ["  ".join(["", *row]).rstrip() for row in zip(*columns, strict=True)]
        return "\n".join([self.heading] * bool(self.heading) + lines)


def _cell(value: str | float | None, form: str) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, form)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The results of a command."""

    title: str
    made_by: str = ""
    """The command, and what it ran on."""
    findings: Sequence[str] = ()
    """The results that matter most, in sentences."""
    tables: Sequence[Table] = ()
    """The most important first."""
    figures: Sequence[Figure] = ()
    notes: str = ""
    """How it was measured, in Markdown."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Everything, for a program."""

    def text(self) -> str:
        """Return the tables and findings for the terminal."""
        return "\n\n".join(
            [*(table.text() for table in self.tables), *(["\n".join(self.findings)] if self.findings else [])]
        )

    def markdown(self, picture: str | None = None) -> str:
        """Return the whole record; `picture` is the file of its figures."""
        parts = [
            f"# {self.title}",
            self.made_by,
            "\n".join(f"- {finding}" for finding in self.findings),
            "" if picture is None else f"![{', '.join(figure.title for figure in self.figures)}]({picture})",
            *(table.markdown() for table in self.tables),
            self.notes,
        ]
        return "\n\n".join(filter(None, parts)) + "\n"

    def show(self, folder: Path, name: str) -> None:
        """Write report.md and NAME.png into a folder."""
        save_png(self.figures, folder / f"{name}.png", title=self.title)
        atomic_io.write_text(folder / REPORT_NAME, self.markdown(f"{name}.png"))

    def write(self, folder: Path, name: str) -> None:
        """Write report.md, NAME.png and, as the mark of a whole analysis, NAME.json; print the tables."""
        self.show(folder, name)
        atomic_io.write_text(folder / f"{name}.json", json.dumps(self.data, indent=1) + "\n")
        print(self.text())
        print(f"\nwrote {', '.join(str(folder / file) for file in (REPORT_NAME, f'{name}.png', f'{name}.json'))}")
