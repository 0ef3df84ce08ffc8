"""The tables of docs/scaling.md are what the planner says today."""

from __future__ import annotations

import re

import pytest

from distlora_launcher import cli
from messages import ROOT

PAGE = (ROOT / "docs" / "scaling.md").read_text()
COMMANDS = re.findall(r"^distlora (plan .*--scaling.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", [each for each in COMMANDS if "--plot" not in each])
def test_a_table_is_what_its_command_prints(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command.split()) == 0
    printed = capsys.readouterr().out.splitlines()
    for line in printed:
        if line.startswith(("|", "- ")):
            assert line in PAGE, f"print docs/scaling.md's figures again: {line}"
    numbers = [line.split("|")[1].strip() for line in printed if re.match(r"\| *\d", line)]
    assert {"2", "8", "64", "512"} <= set(numbers)


def test_the_page_shows_every_assumption_and_a_picture() -> None:
    assert len(COMMANDS) == 3
    assert "![" in PAGE
    assert (ROOT / "docs" / "scaling.png").stat().st_size > 10_000
