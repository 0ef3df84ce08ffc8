"""The little Markdown that a sweep's conclusion is written in, as HTML: tables, paragraphs, lists, code, bold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from distlora_launcher.report.document import table
from distlora_launcher.report.markup import Html, tag, text

_RULE = re.compile(r"\s*:?-+:?\s*")
_INLINE = re.compile(r"`([^`]+)`|\*\*([^*]+)\*\*")


def markdown(lines: Sequence[str]) -> Html:
    """Lines as they stand in results.md."""
    return text(list(_blocks(lines)))


def _blocks(lines: Sequence[str]) -> Iterator[Html]:
    for kind, group in groupby(lines, key=_kind):
        block = list(group)
        if kind == "table":
            yield _table(block)
        elif kind == "list":
            yield tag("ul", [tag("li", _inline(line.strip()[2:])) for line in block])
        elif kind == "heading":
            yield text([tag("h3", _inline(line.lstrip("# "))) for line in block])
        elif kind == "text":
            yield tag("p", _inline(" ".join(block)), cls="lead")


def _kind(line: str) -> str:
    start = line.strip()
    if not start:
        return "blank"
    return {"|": "table", "#": "heading"}.get(start[0], "list" if start.startswith("- ") else "text")


def _table(lines: Sequence[str]) -> Html:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    has_head = len(rows) > 1 and all(_RULE.fullmatch(cell) for cell in rows[1])
    right = [cell.endswith(":") for cell in rows[1]] if has_head else []
    head, body = (rows[0], rows[2:]) if has_head else ([], rows)

    def cells(name: str, row: Sequence[str]) -> list[Html]:
        return [
            tag(name, _inline(cell), cls="n" if index < len(right) and right[index] else None)
            for index, cell in enumerate(row)
        ]

    return table(cells("th", head), [tag("tr", cells("td", row)) for row in body])


def _inline(line: str) -> Html:
    parts: list[Html | str] = []
    place = 0
    for found in _INLINE.finditer(line):
        parts += [line[place : found.start()], tag("code", found[1]) if found[1] else tag("b", found[2])]
        place = found.end()
    return text([*parts, line[place:]])
