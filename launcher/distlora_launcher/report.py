"""`distlora report`."""

from __future__ import annotations

from distlora.config import UserError


def main(arguments: list[str]) -> int:
    """Write the report of a run or a sweep. Returns the exit code."""
    raise UserError("distlora report is being built")
