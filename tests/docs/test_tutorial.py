"""The tutorial from its first command to its last, as a stranger types it, in an empty folder.

What it promises in a block of text stands in the output of the commands before it, line by line and in order. Figures
stand for any of their form, since machines and Pythons differ; `...` stands for anything.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import CALLERS_CACHE
from support.documents import Block, blocks, commands_of

TUTORIAL = "docs/tutorial.md"
INSTALLED = "source .venv/bin/activate"
"""Command that is done before."""
SECONDS = 900
_FIGURE = r"\d[\d,.:]*"


def pattern(promised: str) -> str:
    """Return the pattern of a promised line: figures and `...` match others."""
    parts = re.split(rf"(\.\.\.| +|{_FIGURE})", promised.strip())

    def stands_for(part: str) -> str:
        if part == "...":
            return ".*"
        if part and not part.strip():
            return r"\s+"
        return _FIGURE if re.fullmatch(_FIGURE, part) else re.escape(part)

    return "".join(map(stands_for, parts))


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_every_line_of_the_tutorial_is_as_promised(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["DISTLORA_CACHE"] = CALLERS_CACHE or str(tmp_path / "cache")
    (tmp_path / "hour").mkdir()
    output: list[str] = []
    for block in blocks(TUTORIAL):
        if block.info == "text":
            assert_promised(block, output)
            continue
        output = []
        for command in commands_of(block):
            text = command.text
            if text == INSTALLED:
                continue
            name, _, value = text.partition("=")
            if re.fullmatch(r"[a-z]+", name):
                text = f"printf %s {value}"
            finished = subprocess.run(
                ["bash", "-c", text],
                cwd=tmp_path / "hour",
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if text.startswith("printf") else subprocess.STDOUT,
                text=True,
                timeout=SECONDS,
            )
            assert finished.returncode == 0, f"{command.place}\n{finished.stdout}"
            assert not re.search("(?i)traceback|warning", finished.stdout), f"{command.place}\n{finished.stdout}"
            if text.startswith("printf"):
                environment[name] = shlex.split(finished.stdout)[0]
            else:
                output += re.split(r"[\n\r]+", finished.stdout)


def assert_promised(block: Block, output: list[str]) -> None:
    """Check that each line of a block of text is in the output, after the line before it."""
    rest = iter(output)
    for number, promised in enumerate(block.lines, start=block.line):
        wanted = re.compile(pattern(promised))
        said = "\n".join(output)
        assert any(wanted.fullmatch(line.strip()) for line in rest), f"{TUTORIAL}:{number}: {promised}\nnot in\n{said}"
