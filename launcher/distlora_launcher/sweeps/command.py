"""`distlora sweep`."""

from __future__ import annotations

from distlora.config import UserError


def main(arguments: list[str]) -> int:
    """What the command line says. Returns the exit code."""
    raise UserError("distlora sweep is being built")
