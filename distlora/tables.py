"""A table of a report: for the terminal, and as Markdown. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """A heading and rows of cells, the first row being the names of the columns."""

    heading: str
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        head, *rest = (f"| {' | '.join(row)} |" for row in rows)
        return "\n".join([f"**{self.heading}**\n", head, "|---" * len(self.rows[0]) + "|", *rest])

    def text(self) -> str:
        """Aligned columns, the first to the left and numbers to the right."""
        widths = [max(len(row[column]) for row in self.rows) for column in range(len(self.rows[0]))]
        lines = []
        for row in self.rows:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            cells[0] = row[0].ljust(widths[0])
            lines.append("  " + "  ".join(cells).rstrip())
        return "\n".join([self.heading, *lines])
