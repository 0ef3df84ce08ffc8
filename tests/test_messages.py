"""docs/messages.md has every message of an error, and what docs/troubleshooting.md quotes is in the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import messages

TROUBLESHOOTING = messages.ROOT / "docs" / "troubleshooting.md"
QUOTE = re.compile(r"\*\*`([^`]+)`\*\*(?: \(([^)]+)\))?")
"""A message that the page explains, and whose it is where it is not ours."""
FEWEST = 12
"""Characters that a text must have in common with a quote."""


@pytest.fixture(scope="module")
def said() -> set[str]:
    return messages.all_texts() | {messages.one_line(text) for text in _templates()}


def _templates() -> list[str]:
    return [path.read_text() for path in sorted((messages.ROOT / "slurm").glob("*.jinja"))]


def test_the_index_of_messages_is_that_of_the_source() -> None:
    assert messages.PAGE.read_text() == messages.page(), "print it again: make messages"


def test_what_the_page_on_troubles_quotes_is_said_by_the_source(said: set[str]) -> None:
    quotes = [text for text, whose in QUOTE.findall(TROUBLESHOOTING.read_text()) if not whose]
    assert len(quotes) > 60
    absent = [quote for quote in quotes if not _is_said(messages.one_line(quote).split(messages.HOLE), said)]
    assert not absent, "\n".join(absent)


def _is_said(pieces: list[str], said: set[str]) -> bool:
    """Whether texts have the pieces, in their order: one text all of them, or one the first and others the rest, as a
    sentence and its reason are put together. Each gives some words of its own."""
    pieces = [piece for piece in pieces if piece.strip(" .,;:()")]
    return any(
        sum(map(len, pieces[:count])) >= FEWEST
        and any(_has(pieces[:count], text) for text in said)
        and (count == len(pieces) or _is_said(pieces[count:], said))
        for count in range(len(pieces), 0, -1)
    )


def _has(pieces: list[str], text: str) -> bool:
    at = 0
    for piece in pieces:
        found = text.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return True


def test_a_message_is_found_in_whatever_form_the_code_has_it(tmp_path: Path) -> None:
    """A format, a sum of texts, one of two, a name, what a function returns; and a value that the source knows."""
    code = """
def check(value, which):
    reason = f"{value} is no number of things"
    raise UserError(reason if which else _why(value))

def _why(value):
    return f"{NAME}={value} means" + " nothing at all"

def other(value):
    require(value > 0, "one of several reasons" if value else f"another of the reasons, {value!r}")
"""
    source = messages.Source("m", ast.parse(code), {"NAME": "the.setting"})
    assert messages.errors(source) == {
        "... is no number of things",
        "the.setting=... means nothing at all",
        "one of several reasons",
        "another of the reasons, ...",
    }


def test_methods_of_one_name_lose_no_message() -> None:
    code = """
class One:
    def __post_init__(self):
        require(self.a, "the first has no a of its own")

class Other:
    def __post_init__(self):
        require(self.b, "the second has no b of its own")
"""
    source = messages.Source("m", ast.parse(code), {})
    assert messages.errors(source) == {"the first has no a of its own", "the second has no b of its own"}
