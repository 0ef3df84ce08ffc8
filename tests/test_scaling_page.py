"""The tables of docs/scaling.md are what the planner says today."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from distlora_launcher.cli import main
from messages import ROOT

PAGE = (ROOT / "docs" / "scaling.md").read_text()
COMMANDS = re.findall(r"^distlora (plan .*--scaling.*)$", PAGE, re.MULTILINE)


def figures(lines: Iterable[str]) -> set[str]:
    """The rows of tables and the assumptions."""
    return {line for line in lines if line.startswith(("|", "- "))}


def test_the_tables_are_what_their_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    said = set()
    for command in COMMANDS:
        if "--plot" in command:
            continue
        assert main.main(command.split()) == 0
        printed = capsys.readouterr().out.splitlines()
        numbers = [line.split("|")[1].strip() for line in printed if re.match(r"\| *\d", line)]
        assert {"2", "8", "64", "512"} <= set(numbers)
        said |= figures(printed)
    assert figures(PAGE.splitlines()) == said, "print docs/scaling.md's figures again"


def test_the_page_shows_every_assumption_and_a_picture() -> None:
    assert len(COMMANDS) == 3
    assert "![" in PAGE
    assert (ROOT / "docs" / "scaling.png").stat().st_size > 10_000
