"""The tutorial, the page for PyPI and the examples from first to last, as a stranger types them, in a new folder.

What a document promises in a block of text stands in the output of the commands before it, line by line and in order.
Figures stand for any of their form, since machines and Pythons differ; `...` stands for anything.
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
from support.document_stage import copy_examples
from support.documents import Block, blocks, commands, commands_of, documents

WARNED_OF = "examples/images/README.md"
"""Example whose model is so small that its run warns of memory that it does not need."""
EXAMPLES = [
    name
    for name in documents()
    if name.startswith("examples/") and name != WARNED_OF and {item.mark for item in commands(name)} == {None}
]
"""Examples whose commands this node can run."""
INSTALLED = re.compile(r"pip install .*|python -m venv .*|source .*/activate")
"""Commands that are done before."""
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
@pytest.mark.parametrize(
    "document",
    ["docs/tutorial.md", "docs/pypi.md", *(pytest.param(name, marks=pytest.mark.examples) for name in EXAMPLES)],
)
def test_every_line_of_a_document_is_as_promised(document: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    if "DISTLORA_BIN" in os.environ:  # Another installation; the clone would hide it.
        environment.pop("PYTHONPATH", None)
    environment["PATH"] = f"{os.environ.get('DISTLORA_BIN', Path(sys.executable).parent)}:{environment['PATH']}"
    environment["DISTLORA_CACHE"] = CALLERS_CACHE or str(tmp_path / "cache")
    copy_examples(tmp_path)
    folder = tmp_path
    output: list[str] = []
    for block in blocks(document):
        if block.info == "text":
            assert_promised(block, output)
            continue
        output = []
        for command in commands_of(block):
            text = command.text
            if INSTALLED.fullmatch(text):
                continue
            if text.startswith("cd "):
                folder /= text.removeprefix("cd ")
                continue
            name, _, value = text.partition("=")
            if re.fullmatch(r"[a-z]+", name):
                text = f"printf %s {value}"
            finished = subprocess.run(
                ["bash", "-c", text],
                cwd=folder,
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
        place = f"{block.document}:{number}: {promised}"
        assert any(wanted.fullmatch(line.strip()) for line in rest), "\n".join([place, "not in", *output])
