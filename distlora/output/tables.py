"""Format a table for the terminal and as Markdown. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
