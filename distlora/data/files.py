"""Records of local files: jsonl, json, csv, tsv, txt (each also compressed) and parquet, which it also writes.

Our own readers, and not those of `datasets`: a broken line is refused by file and line, a csv's cells stay the strings
that they are (pandas makes 7 of "007" and nothing of "NA"), a tool's arguments may differ from row to row (Arrow
cannot hold that), and nothing is copied into another cache first. Memory holds a record, or a parquet batch, at a time;
and the text of a .json file. Imports the standard library alone until a file needs pyarrow.
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from distlora.config import UserError
from distlora.data.formats import SourceRecord
from distlora.data.json_values import check_unicode, kind_name, shown

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_CHUNK = 1 << 20
"""Bytes of a zstandard file that are read at a time."""
_BLANK_LINES_WITHIN = 64 << 20
"""Bytes of a text file in which a blank line decides that its documents are paragraphs."""
_ROWS_AT_ONCE = 1000


def read_file(path: Path, good: str, sample_by: str) -> Iterator[SourceRecord]:
    """Yield the records of one file in order, by the kind that its name says.

    `good` ends messages about a broken line: what a good one is (`formats.good`). `sample_by` says what a record of a
    .txt file is. Raises UserError for a kind that is not known, and where the file breaks.
    """
    if path.stat().st_size == 0:
        return
    try:
        yield from _readers(sample_by)[_kind(path)](path, good)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        # A decompressor's OSError has no number; the system's have one and are no fault of the content.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{path} is damaged or is not in the format of its name ({error}); compress it again"
        ) from error
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


def _readers(sample_by: str) -> dict[str, Callable[[Path, str], Iterator[SourceRecord]]]:
    return {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".csv": lambda path, good: _csv(path, ","),
        ".tsv": lambda path, good: _csv(path, "\t"),
        ".txt": lambda path, good: _txt(path, sample_by),
        ".parquet": lambda path, good: _parquet(path),
    }


def _suffix(path: Path) -> str:
    name = path.with_suffix("") if is_compressed(path) else path
    return name.suffix.lower()


def _kind(path: Path) -> str:
    suffix, known = _suffix(path), _readers("auto")
    if suffix not in known:
        raise UserError(
            f"{path}: the file name must give the format, and {suffix or 'a name without an ending'} is none of "
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


def _jsonl(path: Path, good: str) -> Iterator[SourceRecord]:
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
            value = _parse_json(text, place, good)
            if b"\\ud" in content or b"\\uD" in content:
                # The only way in for half a surrogate pair.
                check_unicode(value, place)
            yield SourceRecord(place, len(raw), value)


def _parse_json(text: str, place: str, good: str) -> Any:
    """Parse a JSON value. Raises UserError with the column where it breaks, or for one that Python cannot hold."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: not valid JSON, column {error.colno}: {error.msg} ({shown(text)}); {good}"
        ) from error
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits; brackets nested without end.
        raise UserError(f"{place}: JSON that cannot be read: {error} ({shown(text)}); {good}") from error


def _json(path: Path, good: str) -> Iterator[SourceRecord]:
    """Yield the objects of a list, of a list under "data", of a single document, or of JSON lines."""
    with _open(path) as file:
        text = file.read().decode("utf-8-sig")
    if text.lstrip().startswith("["):
        yield from _json_list(text, path, good)
        return
    first, _, others = text.lstrip().partition("\n")
    if others.strip() and _is_object(first):
        yield from _jsonl(path, good)
        return
    if not text.strip():
        return
    value = _parse_json(text, str(path), good)
    check_unicode(value, str(path))
    rows = value["data"] if isinstance(value, dict) and isinstance(value.get("data"), list) else [value]
    for number, row in enumerate(rows, start=1):
        yield SourceRecord(f"{path} row {number}", len(text) // len(rows), row)


_SPACE = re.compile(r"[ \t\r\n]*")


def _json_list(text: str, path: Path, good: str) -> Iterator[SourceRecord]:
    """Yield every object with its number and the line that it begins on. The text begins with `[`."""
    decoder, position, number, line = json.JSONDecoder(), text.index("[") + 1, 0, 1
    line += text.count("\n", 0, position)

    def skip_space(start: int) -> int:
        nonlocal line
        end = _SPACE.match(text, start).end()  # type: ignore[union-attr]
        line += text.count("\n", start, end)
        return end

    def refused(reason: str, at: int) -> UserError:
        place, near = f"{path} row {number} (line {line})", shown(text[at : at + 80])
        return UserError(f"{place}: not valid JSON: {reason}, at {near}; {good}")

    position = skip_space(position)
    while text[position : position + 1] != "]":
        if number > 0:
            if text[position : position + 1] != ",":
                raise refused("a comma or ] belongs here, between the objects of a list", position)
            position = skip_space(position + 1)
        number += 1
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise refused(error.msg, error.pos) from error
        except (ValueError, RecursionError) as error:
            raise refused(str(error), position) from error
        place = f"{path} row {number} (line {line})"
        if not isinstance(value, dict):
            raise UserError(f"{place}: {kind_name(value)} where an object belongs; {good}")
        source = text[position:end]
        if "\\ud" in source or "\\uD" in source:
            check_unicode(value, place)
        yield SourceRecord(place, len(source), value)
        line += source.count("\n")
        position = skip_space(end)
    if text[position + 1 :].strip():
        raise refused("something follows the end of the list", position + 1)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _csv(path: Path, delimiter: str) -> Iterator[SourceRecord]:
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
                    yield SourceRecord(f"{path}:{line}", size, dict(zip(header, row, strict=True)))
                line = rows.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{line}: not a {path.suffix[1:]} row: {error}; quote its cells") from error


def _txt(path: Path, sample_by: str) -> Iterator[SourceRecord]:
    """Plain text, {"text": ...}: lines, paragraphs (what blank lines separate) or the file."""
    if sample_by == "auto":
        sample_by = "paragraph" if _has_blank_lines(path) else "line"

    def record(line: int, text: str) -> SourceRecord:
        return SourceRecord(f"{path}:{line}", len(text), {"text": text})

    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        if sample_by == "document":
            whole = text.read()
            if whole.strip():
                yield record(1, whole)
            return
        # With newline="" Python also ends lines at a lone \r, as old Mac files do.
        lines = ((number, line.rstrip("\r\n")) for number, line in enumerate(text, start=1))
        for is_text, group in itertools.groupby(lines, key=lambda line: bool(line[1].strip())):
            if is_text and sample_by == "line":
                yield from itertools.starmap(record, group)
            elif is_text:
                numbers, contents = zip(*group, strict=True)
                yield record(numbers[0], "\n".join(contents))


def _has_blank_lines(path: Path) -> bool:
    """Return whether a blank line separates two others near the start of the file."""
    with _open(path) as file:
        return re.search(rb"\S[^\S\n]*\n[^\S\n]*\n\s*\S", file.read(_BLANK_LINES_WITHIN)) is not None


def _parquet(path: Path) -> Iterator[SourceRecord]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                size = batch.nbytes // max(1, batch.num_rows)
                for value in batch.to_pylist():
                    row += 1
                    yield SourceRecord(f"{path} row {row}", size, without_nulls(value))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a parquet file that can be read: {error}; write it again") from error


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of equal lengths (lists or arrays) to a parquet file, NaN as null. Raises OSError."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({name: pyarrow.array(values, from_pandas=True) for name, values in columns.items()})
    pyarrow.parquet.write_table(table, path, compression="zstd")


def without_nulls(value: Any) -> Any:
    """Remove the nulls from the objects of an Arrow value: Arrow gives every object all keys of its column."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
