"""The objects of one JSON list, decoded one at a time while the text comes in: a list may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from distlora.config import UserError
from distlora.data.conversations import kind_name
from distlora.data.formats import Record, good, shown
from distlora.data.json_text import check_unicode

_READ_AHEAD = 1 << 20
"""Characters that are asked for at a time."""
_UNDECIDED = 16
"""An error this close to the end of what was read may be a number, a word or an escape that is cut in two."""


class ListReader:
    """Reads `chunks`, the text of a file whose first character that is no white space is `[`."""

    def __init__(self, path: Path, format: str, chunks: Iterator[str]) -> None:
        self._path = path
        self._format = format
        self._chunks = chunks
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._position = 0
        self._ended = False
        self._line = 1
        self._line_position = 0
        self._number = 0

    def records(self) -> Iterator[Record]:
        """Every object with its number and the line that it begins on. Raises UserError where the text breaks."""
        assert self._next_sign() == "["
        self._position += 1
        while self._next_sign() != "]":
            if self._number > 0:
                if self._next_sign() != ",":
                    raise self._refused("a comma or ] belongs here, between the objects of a list")
                self._position += 1
                self._next_sign()
            self._number += 1
            yield self._object()
        self._position += 1
        if self._next_sign():
            raise self._refused("something follows the end of the list")

    def _object(self) -> Record:
        place = self._place()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
                break
            except json.JSONDecodeError as error:
                undecided = error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - _UNDECIDED
                if self._ended or not undecided:
                    self._position = error.pos
                    raise self._refused(error.msg, place) from error
            except (ValueError, RecursionError) as error:
                raise self._refused(str(error), place) from error
            self._more(max(_READ_AHEAD, len(self._buffer)))
        source = self._buffer[self._position : end]
        self._position = end
        if not isinstance(value, dict):
            raise UserError(f"{place}: {kind_name(value)} where an object belongs; {good(self._format)}")
        if "\\ud" in source or "\\uD" in source:
            check_unicode(value, place)
        return Record(place, len(source), value)

    def _place(self) -> str:
        self._line += self._buffer.count("\n", self._line_position, self._position)
        self._line_position = self._position
        return f"{self._path} row {self._number} (line {self._line})"

    def _next_sign(self) -> str:
        """The next character that is no white space, or "" at the end of the file."""
        while True:
            while self._position < len(self._buffer) and self._buffer[self._position] in " \t\r\n":
                self._position += 1
            if self._position < len(self._buffer) or self._ended:
                return self._buffer[self._position : self._position + 1]
            self._more(_READ_AHEAD)

    def _more(self, wanted: int) -> None:
        """Let go of what was decoded, and read on."""
        self._place()
        parts = [self._buffer[self._position :]]
        while not self._ended and wanted > 0:
            part = next(self._chunks, "")
            self._ended = part == ""
            parts.append(part)
            wanted -= len(part)
        self._buffer, self._position, self._line_position = "".join(parts), 0, 0

    def _refused(self, reason: str, place: str | None = None) -> UserError:
        place = place or self._place()
        near = shown(self._buffer[self._position : self._position + 80])
        return UserError(f"{place}: not valid JSON: {reason}, at {near}; {good(self._format)}")
