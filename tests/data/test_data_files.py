"""Readers of local files: what each kind holds, where a record is said to be, and what is refused."""

import bz2
import gzip
import json
import lzma
import math

import pytest

from distlora.config import SourceConfig, UserError
from distlora.data.files import read_file
from distlora.data.formats import good
from distlora.data.sources import find_source
from support.data_folders import write_lines

ROWS = [{"text": 'a [1] {} \u00e9\n"b"', "n": 1.5}, {"text": "", "n": None, "deep": {"x": [1, {}]}}, {"text": "c"}]


def records(path, format="auto", sample_by="auto"):
    return list(read_file(path, good(format), sample_by))


def values(path, **settings):
    return [record.value for record in records(path, **settings)]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zstandard(content):
    import pyarrow

    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(content)
    return buffer.getvalue().to_pybytes()


def test_lines_end_at_newlines_alone_and_a_byte_order_mark_is_no_content(tmp_path):
    text = "a\u2028b\x0bc"
    line = b"\xef\xbb\xbf" + json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r"
    path = write_lines(tmp_path / "data.jsonl", [line, {"text": "\U0001f600"}])
    assert [value["text"] for value in values(path)] == [text, "\U0001f600"]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\ufeff\n " + json.dumps(ROWS) + "\n",
        json.dumps({"data": ROWS, "version": 1}, indent=1),
        json.dumps({"data": ROWS}),
        "".join(json.dumps(row) + "\n" for row in ROWS),
    ],
)
def test_a_json_file_is_a_list_or_holds_one_or_is_json_lines_after_all(tmp_path, content):
    assert values(write(tmp_path / "data.json", content)) == ROWS
    assert values(write(tmp_path / "data.json.gz", gzip.compress(content.encode()))) == ROWS


def test_a_json_file_that_is_one_object_is_one_record(tmp_path):
    assert values(write(tmp_path / "data.json", json.dumps(ROWS[0], indent=2))) == ROWS[:1]
    assert values(write(tmp_path / "data.json", "[]")) == []
    assert values(write(tmp_path / "data.json", " \n ")) == []


def test_the_cells_of_a_csv_stay_the_strings_that_they_are(tmp_path):
    path = write(tmp_path / "data.csv", 'prompt,completion\r\n007,NA\r\n"a, ""b""\nc",\r\n\r\nnull,1e3\r\n')
    assert [(r.place.removeprefix(f"{path}:"), *r.value.values()) for r in records(path)] == [
        ("2", "007", "NA"),
        ("3", 'a, "b"\nc', ""),
        ("6", "null", "1e3"),
    ]
    assert values(write(tmp_path / "data.tsv", "text\tid\na, b\t1\n")) == [{"text": "a, b", "id": "1"}]
    long = "x" * 200_000
    assert values(write(tmp_path / "long.csv", f"text\n{long}\n")) == [{"text": long}]


def test_a_text_file_is_cut_at_blank_lines_or_at_every_line(tmp_path):
    path = write(tmp_path / "data.txt", "\n\none\r\ntwo\n \n\nthree\n\n")
    found = [(r.place.removeprefix(f"{path}:"), r.value["text"]) for r in records(path)]
    assert found == [("3", "one\ntwo"), ("7", "three")]
    assert values(path, sample_by="line") == [{"text": "one"}, {"text": "two"}, {"text": "three"}]
    assert values(path, sample_by="document") == [{"text": path.read_bytes().decode()}]
    lines = write(tmp_path / "lines.txt", "\none\ntwo\n\n")
    assert [r.place.removeprefix(f"{lines}:") for r in records(lines)] == ["2", "3"], "no blank line between two"
    assert values(write(tmp_path / "blank.txt", " \n\n"), sample_by="document") == []


def test_parquet_rows_lose_the_nulls_that_arrow_fills_in(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"city": "Paris"}}]}]},
        {"messages": [{"role": "assistant", "content": "x"}, {"tool_calls": [{"arguments": {"days": 3}}]}]},
    ]
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert values(path) == rows
    assert [r.place for r in records(path)] == [f"{path} row 1", f"{path} row 2"]
    with pytest.raises(UserError, match="is not a parquet file that can be read"):
        records(write(tmp_path / "broken.parquet", b"PAR1 and more"))


def test_numbers_of_parquet_that_are_not_finite_stay_and_are_refused_where_they_are_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [math.nan, 1.0], "n": [math.inf, None]}), path)
    assert str(values(path)[0]) == "{'text': nan, 'n': inf}"
    with pytest.raises(UserError, match=r"data.parquet row 1: 'text' is a number, not a string"):
        list(find_source(SourceConfig(path=str(path))).open(has_template=True)[1])


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstandard)],
)
def test_compressed_files_are_what_they_hold(tmp_path, suffix, compress):
    content = "".join(json.dumps(row) + "\n" for row in ROWS * 100).encode()
    path = write(tmp_path / f"data.jsonl{suffix}", compress(content))
    assert values(path) == ROWS * 100
    assert records(path)[-1].place == f"{path}:300"
    write(path, compress(content)[:-20])
    with pytest.raises(UserError, match="damaged or is not in the format of its name"):
        records(path)
    write(path, content)
    with pytest.raises(UserError, match="damaged or is not in the format of its name"):
        records(path)


REFUSED = [
    # (the file, its content, what the message says behind its name)
    *[
        ("data.jsonl", b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n', f":3: {complaint}")
        for line, complaint in (
            (b'{"text": "a"', "not valid JSON, column 13: Expecting ',' delimiter"),
            (b'{"text": "caf\xe9"}', "byte 14 (0xe9) is not UTF-8"),
            (b'{"text": "a\\ud83d"}', "half a surrogate pair (\\ud83d)"),
            (b'{"messages": [{"role": "user", "content": "\\uDC00"}]}', "half a surrogate pair"),
            (b"[" * 100_000, "JSON that cannot be read"),
            (b"9" * 5_000, "JSON that cannot be read"),
        )
    ],
    ("data.json", '[{"text": "a"},\n\n {"text": b}]', "row 2 (line 3): not valid JSON: Expecting value, at 'b}]'"),
    ("data.json", '[{"text": "a"},\n {"text": "b"', "row 2 (line 2): not valid JSON: Expecting ',' delimiter, at ''"),
    ("data.json", '[{"text": "a"},\n "b"]', "row 2 (line 2): a string where an object belongs"),
    ("data.json", '[{"text": "a"} {"text": "b"}]', "a comma or ] belongs here"),
    ("data.json", '[{"text": "a"},]', "row 2 (line 1): not valid JSON: Expecting value, at ']'"),
    ("data.json", '[{"text": "a"}] x', "something follows the end of the list"),
    ("data.json", '[{"text": "\\ud800"}]', "row 1 (line 1): half a surrogate pair"),
    ("data.json", '{"text": "a"', """delimiter ('{"text": "a"'); good lines are {"""),
    ("data.json", b'[{"text": "\xff"}]', "a byte 0xff is not UTF-8"),
    ("data.csv", "a,b\n1,2\n3\n", ":3: 1 cells in a row, but 2 columns (a, b)"),
    ("data.csv", 'a,b\n1,"2\n3,4\n', ":2: not a csv row: unexpected end of data"),
    ("data.csv", "a,a\n1,2\n", ":1: two columns have the same name"),
    ("data.docx", "x", ".docx is none of .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet"),
    ("data", "x", "a name without an ending is none of"),
    ("data.parquet.gz", "x", "parquet compresses its own columns"),
]


@pytest.mark.parametrize(("name", "content", "complaint"), REFUSED, ids=[case[2] for case in REFUSED])
def test_a_broken_file_is_named_with_the_place(tmp_path, name, content, complaint):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        records(path)
    assert str(path) in str(error.value)
    assert complaint in str(error.value)
    assert str(error.value).isascii()
