"""Reading jsonl: what is accepted, and that every broken line is named."""

import json
import subprocess
import sys

import pytest

from data_folders import chat, write_lines
from distlora.config import UserError
from distlora.data.formats import EXAMPLES, check_head, read_documents, resolve_format

GOOD = {
    "chat": chat("Hi", "Hello!"),
    "prompt_completion": {"prompt": "2+2=", "completion": "4"},
    "text": {"text": "Once"},
}

BROKEN = [
    ("text", b'{"text": "a"', "not valid JSON"),
    ("text", b'["a"]', "a list where an object belongs"),
    ("text", b'{"text": 3}', "'text' is a number, not a string"),
    ("text", b'{"text": null}', "'text' is null, not a string"),
    ("text", b'{"txt": "a"}', "no 'text' among its keys: 'txt';"),
    ("text", b'{"text": "caf\xe9"}', "byte 14 (0xe9) is not UTF-8"),
    ("text", b'{"text": "a\\ud83d"}', "half a surrogate pair (\\ud83d)"),
    ("text", b"[" * 100_000, "JSON that cannot be read"),
    ("prompt_completion", b'{"prompt": "a"}', "no 'completion' among its keys: 'prompt'"),
    ("prompt_completion", b'{"prompt": "a", "completion": ["b"]}', "'completion' is a list, not a string"),
    ("chat", b'{"messages": {}}', "'messages' is an object, not a list"),
    ("chat", b'{"messages": []}', "'messages' is empty"),
    ("chat", b'{"messages": ["Hi"]}', "messages[0] is a string, not an object"),
    ("chat", b'{"messages": [{"role": "user"}]}', "messages[0] has no 'content' among its keys: 'role'"),
    ("chat", b'{"messages": [{"role": 1, "content": "a"}]}', "messages[0]: 'role' is a number, not a string"),
    ("chat", b'{"messages": [{"role": "user", "content": [1]}]}', "messages[0]: 'content' is a list, not a string"),
    ("chat", b'{"messages": [{"role": "asistant", "content": ""}]}', "'asistant' (did you mean 'assistant'?)"),
    ("chat", b'{"messages": [{"role": "user", "content": "\\uDC00"}]}', "half a surrogate pair"),
    ("chat", b'{"messages": [{"role": "user", "content": ""}], "tools": [{}]}', "'tools' are not supported"),
]


@pytest.mark.parametrize(("format", "line", "complaint"), BROKEN, ids=[str(case[2]) for case in BROKEN])
def test_a_broken_line_is_named_with_the_reason(tmp_path, format, line, complaint):
    path = write_lines(tmp_path / "data.jsonl", [GOOD[format], b"", line, GOOD[format]])
    with pytest.raises(UserError) as error:
        list(read_documents(path, format))
    assert str(error.value).startswith(f"{path}:3: ")
    assert complaint in str(error.value)
    assert str(error.value).isascii()


@pytest.mark.parametrize("format", GOOD)
def test_the_example_in_every_message_is_a_good_line(tmp_path, format):
    path = write_lines(tmp_path / "data.jsonl", [EXAMPLES[format].encode()])
    assert [document.value for document in read_documents(path, format)] == [json.loads(EXAMPLES[format])]


@pytest.mark.parametrize("format", GOOD)
def test_auto_is_the_format_of_the_first_line_that_is_not_blank(tmp_path, format):
    path = write_lines(tmp_path / "data.jsonl", [b"", b"  ", GOOD[format]])
    assert resolve_format(path, "auto") == format
    assert check_head(path) == format


def test_a_first_line_that_fits_two_formats_asks_for_a_choice(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [GOOD["chat"] | GOOD["text"]])
    with pytest.raises(UserError, match=r":1: .*fits the formats chat and text; choose one with data\.format=chat"):
        resolve_format(path)
    assert check_head(path, "text") == "text"


def test_a_first_line_that_fits_no_format_lists_its_keys_and_good_lines(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(UserError, match="'instruction', 'output', which fits no format") as error:
        resolve_format(path)
    assert all(example in str(error.value) for example in EXAMPLES.values())


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_a_document_is_refused(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="holds no document"):
        check_head(path)


def test_a_path_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        check_head(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="is not a file"):
        check_head(tmp_path)


def test_lines_end_at_newlines_alone_and_a_byte_order_mark_is_no_content(tmp_path):
    text = "a\u2028b\x0bc"
    line = b"\xef\xbb\xbf" + json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r"
    path = write_lines(tmp_path / "data.jsonl", [line, {"text": "\U0001f600"}])
    assert [document.value["text"] for document in read_documents(path, "text")] == [text, "\U0001f600"]


def test_documents_know_their_line_and_their_size(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [b'{"text": "a"}', b"", b'{"text": "bc"}'])
    assert [(item.line, item.num_bytes) for item in read_documents(path, "text")] == [(1, 14), (3, 15)]


def test_the_head_is_checked_up_to_its_limit_and_no_further(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [GOOD["text"]] * 20 + [b"{"])
    assert check_head(path, limit=20) == "text"
    with pytest.raises(UserError, match=r"data\.jsonl:21: "):
        check_head(path, limit=21)


def test_the_check_imports_neither_torch_nor_transformers_nor_numpy(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [GOOD["chat"]] * 1000)
    code = (
        "import sys; from distlora.data.formats import check_head; check_head(sys.argv[1]);"
        "print([name for name in ('torch', 'transformers', 'numpy', 'jinja2') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
