"""Records of local files: jsonl, json, csv, tsv, txt (each also compressed) and parquet.

Our own readers, and not those of `datasets`: a broken line is refused by file and line, a csv's cells stay the strings
that they are (pandas makes 7 of "007" and nothing of "NA"), a tool's arguments may differ from row to row (Arrow
cannot hold that), and nothing is copied into another cache first. Memory holds a record, or a parquet batch, at a time;
a .json file that is one object is read whole. Imports the standard library alone until a file needs pyarrow.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from distlora.config import UserError
from distlora.data.formats import Record, check_unicode, good, kind_name, parse_json, shown

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
        """Return the next character that is not white space, or "" at the end of the file."""
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


COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_CHUNK = 1 << 20
"""Characters of a json list that are read at a time."""
_BLANK_LINES_WITHIN = 64 << 20
"""Bytes of a text file in which a blank line decides that its documents are paragraphs."""
_ROWS_AT_ONCE = 1000


def read_file(path: Path, format: str, sample_by: str) -> Iterator[Record]:
    """Yield the records of one file in order, by the kind that its name says.

    `format` (perhaps `auto`) is only named in complaints; `sample_by` says what a record of a .txt file is. Raises
    UserError for a kind that is not known, and where the file breaks.
    """
    if path.stat().st_size == 0:
        return
    try:
        yield from _readers(sample_by)[_kind(path)](path, format)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        # A decompressor's OSError has no number; the system's have one and are no fault of the content.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} is damaged or not what its name says ({error}); compress it again") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: a byte 0x{error.object[error.start]:02x} is not UTF-8 ({error.reason}); convert it to UTF-8"
        ) from error


def is_data_file(path: Path) -> bool:
    """Return whether the suffix names a readable kind."""
    return _suffix(path) in _readers("auto")


def is_compressed(path: Path) -> bool:
    """Return whether a file's name says that it is compressed."""
    return path.suffix.lower() in COMPRESSIONS


def _readers(sample_by: str) -> dict[str, Callable[[Path, str], Iterator[Record]]]:
    return {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".csv": lambda path, format: _csv(path, ","),
        ".tsv": lambda path, format: _csv(path, "\t"),
        ".txt": lambda path, format: _txt(path, sample_by),
        ".parquet": lambda path, format: _parquet(path),
    }


def _suffix(path: Path) -> str:
    name = path.with_suffix("") if is_compressed(path) else path
    return name.suffix.lower()


def _kind(path: Path) -> str:
    suffix, known = _suffix(path), _readers("auto")
    if suffix not in known:
        raise UserError(
            f"{path}: a file's kind is read off its name, and {suffix or 'a name without an ending'} is none of "
            f"{', '.join(known)} (with {', '.join(COMPRESSIONS)} behind it if compressed); rename or convert it"
        )
    if suffix == ".parquet" and is_compressed(path):
        raise UserError(f"{path}: parquet compresses its own columns; unpack the file")
    return suffix


def _open(path: Path) -> BinaryIO:
    """Return the file's content as bytes, decompressed."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        stream: Any = pyarrow.input_stream(str(path), compression="zstd")
        return io.BufferedReader(stream, _CHUNK)
    opened: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return opened[suffix](path) if suffix in opened else path.open("rb")


def _jsonl(path: Path, format: str) -> Iterator[Record]:
    """JSON lines, split at newlines alone; blank ones are skipped. Lines count from 1, as an editor shows them."""
    with _open(path) as file:
        for line, raw in enumerate(file, start=1):
            content = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
            if not content.strip():
                continue
            place = f"{path}:{line}"
            try:
                text = content.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{place}: byte {error.start + 1} (0x{content[error.start]:02x}) is not UTF-8; "
                    "convert the file to UTF-8"
                ) from error
            value = parse_json(text, place, format)
            if b"\\ud" in content or b"\\uD" in content:
                # The only way in for half a surrogate pair.
                check_unicode(value, place)
            yield Record(place, len(raw), value)


def _json(path: Path, format: str) -> Iterator[Record]:
    """Yield the objects of a list, of a list under "data", of a single document, or of JSON lines."""
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        start = text.read(_CHUNK)
        if start.lstrip().startswith("["):
            yield from ListReader(path, format, itertools.chain([start], iter(lambda: text.read(_CHUNK), ""))).records()
            return
    with _open(path) as file:
        first = next((line for line in file if line.strip()), b"")
        is_lines = _is_object(first) and any(line.strip() for line in file)
    if is_lines:
        yield from _jsonl(path, format)
        return
    with _open(path) as file:
        whole = file.read().decode("utf-8-sig")
    if not whole.strip():
        return
    value = parse_json(whole, str(path), format)
    check_unicode(value, str(path))
    rows = value["data"] if isinstance(value, dict) and isinstance(value.get("data"), list) else [value]
    for number, row in enumerate(rows, start=1):
        yield Record(f"{path} row {number}", len(whole) // len(rows), row)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.removeprefix(codecs.BOM_UTF8)), dict)
    except (ValueError, RecursionError):
        return False


def _csv(path: Path, delimiter: str) -> Iterator[Record]:
    """Rows under a header; every cell is a string. A row is named by the line that it begins on."""
    csv.field_size_limit(1 << 30)  # The default, 128 KiB, is less than a long document.
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        line = 1
        try:
            header = next(rows, [])
            if len(set(header)) < len(header):
                raise UserError(f"{path}:1: two columns have the same name in {', '.join(header)}; rename one")
            line = rows.line_num + 1
            for row in rows:
                if row:
                    if len(row) != len(header):
                        raise UserError(
                            f"{path}:{line}: {len(row)} cells in a row, but {len(header)} columns "
                            f"({', '.join(header)}); put cells with a {delimiter!r}, a quote or a newline in quotes"
                        )
                    size = sum(map(len, row)) + len(row)
                    yield Record(f"{path}:{line}", size, dict(zip(header, row, strict=True)))
                line = rows.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{line}: not a {path.suffix[1:]} row: {error}; quote its cells") from error


def _txt(path: Path, sample_by: str) -> Iterator[Record]:
    """Plain text, {"text": ...}: lines, paragraphs (what blank lines separate) or the file."""
    if sample_by == "auto":
        sample_by = "paragraph" if _has_blank_lines(path) else "line"
    paragraph: list[str] = []
    start = 1

    def record(text: str) -> Record:
        return Record(f"{path}:{start}", len(text), {"text": text})

    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        if sample_by == "document":
            whole = text.read()
            if whole.strip():
                yield record(whole)
            return
        for line, content in enumerate(_lines(text), start=1):
            if not content.strip():
                if paragraph:
                    yield record("\n".join(paragraph))
                    paragraph = []
            elif sample_by == "line":
                start = line
                yield record(content)
            else:
                if not paragraph:
                    start = line
                paragraph.append(content)
        if paragraph:
            yield record("\n".join(paragraph))


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    r"""Lines without their ends. With newline="" Python also ends lines at a lone \\r, as old Mac files do."""
    return (line.rstrip("\r\n") for line in text)


def _has_blank_lines(path: Path) -> bool:
    """Return whether a blank line separates two others near the start of the file."""
    seen_text = seen_blank = False
    num_bytes = 0
    with _open(path) as file:
        for line in file:
            if line.strip():
                if seen_blank:
                    return True
                seen_text = True
            else:
                seen_blank = seen_text
            num_bytes += len(line)
            if num_bytes > _BLANK_LINES_WITHIN:
                break
    return False


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                size = batch.nbytes // max(1, batch.num_rows)
                for value in batch.to_pylist():
                    row += 1
                    yield Record(f"{path} row {row}", size, without_nulls(value))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a parquet file that can be read: {error}; write it again") from error


def without_nulls(value: Any) -> Any:
    """Remove the nulls from the objects of an Arrow value: Arrow gives every object all keys of its column."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
