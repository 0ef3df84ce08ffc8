"""Formats of documents: the canonical form of each, and a message that names every broken record."""

import json
import math
import re
from pathlib import Path

import pytest

from distlora.config import UserError
from distlora.data.answers import reads, to_answers
from distlora.data.formats import (
    ALPACA_WITH_INPUT,
    ALPACA_WITHOUT_INPUT,
    FORMATS,
    ReadOptions,
    SourceRecord,
    resolve_format,
    to_document,
)
from distlora.data.sources import head_with_key
from support.data_folders import chat

DATA_PAGE = Path(__file__).parents[2] / "docs" / "data.md"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "days": None}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def record(value):
    return SourceRecord("data.jsonl:3", 10, value)


def canonical(value, format, *, columns=None, has_template=True):
    """Return the document's value."""
    reading = ReadOptions(columns or {})
    convert = to_answers if reads(format, reading) else to_document
    document = convert(record(value), format, has_template, reading)
    assert (document.place, document.num_bytes) == ("data.jsonl:3", 10)
    return document.value


def message(role="user", content="Hi", **more):
    return {"messages": [{"role": role, "content": content, **more}]}


BROKEN = [
    ("text", ["a"], "a list where an object belongs"),
    ("text", {"text": 3}, "'text' is a number, not a string"),
    ("text", {"text": None}, "'text' is null, not a string"),
    ("text", {"txt": "a"}, "no 'text' among its keys: 'txt';"),
    ("prompt_completion", {"prompt": "a"}, "no 'completion' among its keys: 'prompt'"),
    (
        "prompt_completion",
        {"prompt": [{}], "completion": "b"},
        "'prompt' is a list, not a string (write a conversation",
    ),
    ("chat", {"messages": {}}, "'messages' is an object, not a list"),
    ("chat", {"messages": []}, "'messages' is empty"),
    ("chat", {"messages": ["Hi"]}, "messages[0] is a string, not an object"),
    ("chat", {"messages": [{"role": "user"}]}, "messages[0] has no 'content' among its keys: 'role'"),
    ("chat", {"messages": [{"content": "a"}]}, "messages[0] has no 'role' among its keys: 'content'"),
    ("chat", {"messages": [{"from": "human", "value": "a"}]}, "set data.format=sharegpt data.columns="),
    ("chat", message(role=1), "messages[0]: 'role' is a number, not a string"),
    ("chat", message(role="asistant"), "'asistant' (did you mean 'assistant'?)"),
    ("chat", message(content=None), "'content' is null, not a string, and there are no 'tool_calls'"),
    ("chat", message(content=[1]), "a part of 'content' is a number; only texts"),
    ("chat", message(content=[{"type": "image_url"}]), "messages[0]: a part of 'content' is an image; set data.images"),
    ("chat", message(tool_calls=[CALL]), "only the assistant calls tools"),
    ("chat", message("assistant", tool_calls={}) | {"tools": 3}, "'tools' is a number, not a list"),
    ("chat", message("assistant", tool_calls=CALL), "'tool_calls' is an object, not a list"),
    ("chat", message("assistant", tool_calls=[{"id": "1"}]), "tool_calls[0] has no function with a 'name'"),
    ("chat", message("assistant", tool_calls=[{"name": "f", "arguments": "{"}]), "a string that is not JSON"),
    ("chat", message("assistant", tool_calls=[{"name": "f", "arguments": "[1]"}]), "'arguments' is a list, not an obj"),
    ("chat", message(reasoning_content=["a"]), "'reasoning_content' is a list, not a string"),
    ("chat", message(weight=0.5), "'weight' is 0.5; a turn is trained (1) or not (0)"),
    ("chat", message(loss_weight=0.5), "'loss_weight' is 0.5; a turn is trained (1) or not (0)"),
    ("chat", message("assistant", weight=math.nan), "'weight' is nan; a turn is trained (1) or not (0)"),
    ("text", {"text": math.nan}, "'text' is a number, not a string"),
    ("chat", message(loss="no"), "'loss' is 'no'; a turn is trained (1) or not (0)"),
    ("chat", message(train_detail=[{"begin_offset": 0}]), "'train_detail' masks or weights a loss"),
    ("chat", message() | {"chat_template_kwargs": {"thinking": False}}, "'chat_template_kwargs' holds arguments"),
    ("chat", message() | {"loss_mask": [0, 1]}, "'loss_mask' masks or weights a loss"),
    ("text", {"text": "a", "weight": 0.5}, "data.ignore_columns=[weight]"),
    ("chat", message(train="no"), "'train' is a string; write true or false"),
    ("chat", message(images=["a.png"]), "messages[0]: 'images' holds images"),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "tools": [TOOL]},
        "'tools' belongs to a chat, and data.format=alpaca",
    ),
    ("chat", message() | {"tools": [{"parameters": {}}]}, "tools[0] has no function with a 'name'"),
    ("chat", message() | {"tools": "{"}, "'tools' is a string that is not JSON"),
    ("sharegpt", {"conversations": []}, "'conversations' is empty"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "conversations[0] has no 'value' among its keys: 'from'"),
    ("sharegpt", {"conversations": [{"from": "hman", "value": ""}]}, "from 'hman' (did you mean 'human'?)"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": None}]}, "'value' is null, not a string"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "x"}]}, "a function_call that is not JSON"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": ""}], "system": 1}, "'system' is a number"),
    ("alpaca", {"instruction": "a"}, "no 'output' among its keys: 'instruction'"),
    ("alpaca", {"instruction": "a", "output": None}, "'output' is null, not a string"),
    ("alpaca", {"instruction": "a", "output": "b", "input": 1}, "'input' is a number, not a string"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["q"]]}, "history[0] is not a list of two strings"),
]


@pytest.mark.parametrize(("format", "value", "complaint"), BROKEN, ids=[case[2] for case in BROKEN])
def test_a_broken_record_is_named_with_the_reason(format, value, complaint):
    with pytest.raises(UserError) as error:
        canonical(value, format)
    assert str(error.value).startswith("data.jsonl:3: ")
    assert complaint in str(error.value)
    assert str(error.value).isascii()


@pytest.mark.parametrize("format", FORMATS)
def test_the_example_in_every_message_is_a_good_record_of_its_format(format):
    value = json.loads(FORMATS[format].example)
    assert resolve_format(record(value), "auto") == format
    assert canonical(value, format)


def test_a_chat_keeps_what_templates_read_and_drops_nulls():
    value = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
            {"role": "assistant", "content": "c", "reasoning_content": "hm", "train": False, "tool_calls": None},
            {"role": "user", "content": "d"},
            {"role": "assistant", "content": "e", "weight": 0, "tool_calls": []},
        ],
        "tools": None,
    }
    assert canonical(value, "chat") == {
        "messages": [
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "c", "reasoning_content": "hm", "train": False},
            {"role": "user", "content": "d"},
            {"role": "assistant", "content": "e", "weight": 0},
        ]
    }


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": {"name": "weather", "arguments": json.dumps(CALL["function"]["arguments"])}},
        {"name": "weather", "arguments": CALL["function"]["arguments"]},
    ],
)
@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], json.dumps([TOOL])])
def test_tool_calls_have_one_form_however_they_were_written(call, tools):
    value = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call | {"id": "7"}]},
            {"role": "tool", "content": "sunny", "tool_call_id": "7", "name": "weather"},
        ],
        "tools": tools,
    }
    chat = canonical(value, "chat")
    assert chat["tools"] == [TOOL]
    assert chat["messages"][1] == {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": "7"}]}
    assert chat["messages"][2] == value["messages"][2]


def test_sharegpt_becomes_a_chat():
    value = {
        "system": "Be brief.",
        "tools": json.dumps([TOOL["function"]]),
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris", "days": null}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "Sunny.", "weight": 0},
        ],
    }
    expected = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "Sunny.", "weight": 0},
        ],
        "tools": [TOOL],
    }
    assert canonical(value, "sharegpt") == expected
    value["conversations"].insert(0, {"from": "system", "value": "Be kind."})
    assert canonical(value, "sharegpt")["messages"][0] == {"role": "system", "content": "Be kind."}
    assert canonical({"conversations": chat("Hi", "Yes")["messages"]}, "sharegpt") == chat("Hi", "Yes")


def test_alpaca_is_a_chat_where_there_is_a_template():
    value = {
        "instruction": "Translate.",
        "input": "cat",
        "output": "chat",
        "system": "You are a dictionary.",
        "history": [["Hi", "Hello"]],
    }
    messages = canonical(value, "alpaca")["messages"]
    assert [item["role"] for item in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [item["content"] for item in messages][1:] == ["Hi", "Hello", "Translate.\ncat", "chat"]
    assert canonical({"instruction": "Sing.", "output": "La", "input": ""}, "alpaca") == chat("Sing.", "La")


def test_alpaca_is_its_own_prompt_where_there_is_none():
    value = {"instruction": "Write {x}.", "input": "cat {0}", "output": "chat"}
    with_input = canonical(value, "alpaca", has_template=False)
    expected = ALPACA_WITH_INPUT.replace("{instruction}", "Write {x}.").replace("{input}", "cat {0}")
    assert with_input == {"prompt": expected, "completion": "chat"}
    without = canonical(value | {"input": None}, "alpaca", has_template=False)
    assert without["prompt"] == ALPACA_WITHOUT_INPUT.replace("{instruction}", "Write {x}.")
    system = canonical(value | {"system": "Be brief."}, "alpaca", has_template=False)["prompt"]
    assert system.startswith("Be brief.\n\n### Instruction:\nWrite {x}.\n\n### Input:\ncat {0}\n\n### Response:\n")
    with pytest.raises(UserError, match=r"set data\.template=chatml"):
        canonical(value | {"history": [["q", "a"]]}, "alpaca", has_template=False)


def test_auto_refuses_what_fits_two_formats_or_none():
    with pytest.raises(UserError, match=r"fits the formats chat and text; choose one with data\.format=chat"):
        resolve_format(record(chat("Hi", "a") | {"text": "a"}), "auto")
    with pytest.raises(UserError, match="tokenized data is not supported"):
        resolve_format(record({"input_ids": [1], "labels": [1]}), "auto")
    with pytest.raises(UserError, match="it has 'question', 'answer', which fits no format; name the columns") as error:
        resolve_format(record({"question": "a", "answer": "b"}), "auto")
    assert "data.columns={prompt: question, completion: answer}" in str(error.value)
    assert all(f'"{key}"' in str(error.value) for keys in FORMATS.values() for key in keys.required)


def test_columns_rename_the_keys_of_the_data_and_decide_the_format():
    value = {"question": "a", "answer": "b", "text": "not this", "prompt": "nor this"}
    columns = {"prompt": "question", "completion": "answer"}
    assert resolve_format(record(value), "auto", ReadOptions(columns)) == "prompt_completion"
    assert canonical(value, "prompt_completion", columns=columns) == {"prompt": "a", "completion": "b"}
    assert resolve_format(record({"body": "a"}), "auto", ReadOptions({"text": "body"})) == "text"
    with pytest.raises(UserError, match=r"it has 'completion', which fits no format; name the columns of all keys"):
        resolve_format(record({"body": "a"}), "auto", ReadOptions({"completion": "body"}))
    assert resolve_format(record({"body": "a", "n": 1}), "auto", ReadOptions({"prompt": "body"})) == "prompt_only"
    with pytest.raises(UserError, match=r"names 'quest' as 'prompt', but the columns there are 'question', .*mean"):
        resolve_format(record(value), "auto", ReadOptions({"prompt": "quest"}))
    with pytest.raises(UserError, match=r"'promt' is not a key of data\.format=auto .*did you mean 'prompt'"):
        resolve_format(record(value), "auto", ReadOptions({"promt": "question"}))
    with pytest.raises(UserError, match=r"'prompt' is not a key of data\.format=text"):
        resolve_format(record(value), "text", ReadOptions(columns))
    with pytest.raises(UserError, match="no 'completion' among its keys"):
        canonical({"question": "a"}, "prompt_completion", columns=columns)


OTHER_TRAINING = [
    ("chat", chat("Hi", "Hello"), {"label": False}, "train.objective=kto"),
    ("prompt_completion", {"prompt": "a", "completion": "b"}, {"label": 0}, "train.objective=kto"),
    ("alpaca", {"instruction": "a", "output": "b"}, {"kto_tag": True}, "train.objective=kto"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "<image>Hi"}]}, {"images": ["a.png"]}, "vision models"),
    ("chat", chat("Hi", "Hello"), {"audios": ["a.wav"]}, "no text model reads"),
    ("text", {"text": "a"}, {"score": 0.0}, "reward models"),
]


@pytest.mark.parametrize(("format", "value", "more", "reason"), OTHER_TRAINING)
def test_a_key_that_means_other_training_is_refused_until_it_is_ignored(format, value, more, reason):
    (key,) = more
    with pytest.raises(UserError, match=rf"^data\.jsonl:3: '{key}' .*{reason}.*data\.ignore_columns=\[{key}\]"):
        canonical(value | more, format)
    ignoring = ReadOptions(ignore_columns=(key,))
    assert to_document(record(value | more), format, True, ignoring).value == canonical(value, format)
    for nothing in (None, "", [], {}, {"bytes": None, "path": None}):
        assert canonical(value | {key: nothing}, format) == canonical(value, format)


def test_content_may_be_parts_of_text():
    parts = [{"type": "text", "text": "a"}, "b", {"text": "c"}, {"type": "input_text", "text": "d", "image": None}]
    assert canonical(message(content=parts), "chat") == message(content="abcd")
    turns = {"conversations": [{"from": "human", "value": parts}]}
    assert canonical(turns, "sharegpt") == message(content="abcd")


def test_parts_of_llamafactory_v1_are_what_templates_read():
    call = {"type": "tool_call", "value": json.dumps(CALL["function"])}
    parts = [{"type": "reasoning", "value": "Hm."}, {"type": "text", "value": "Wait.", "text": None}, call, call]
    read = {"role": "assistant", "content": "Wait.", "reasoning_content": "Hm.", "tool_calls": [CALL, CALL]}
    assert canonical(message("assistant", parts), "chat") == {"messages": [read]}
    turns = {"conversations": [{"from": "gpt", "value": parts[:1]}, {"from": "gpt", "value": parts[2:3]}]}
    first, second = canonical(turns, "sharegpt")["messages"]
    assert (first["content"], second["content"]) == ("", None)
    for broken, reason in (
        ([{"type": "tool_call", "value": "rain"}], "a part of the type 'tool_call' that is not JSON"),
        ([{"type": "tool_call", "value": {}}], "a part of the type 'tool_call' is an object, not a string"),
        ([{"type": "reasoning"}], "a part of the type 'reasoning' is null, not a string"),
        ([{"type": "video_url", "value": "a.mp4"}], "a part of 'content' is of the type 'video_url'; only texts"),
    ):
        with pytest.raises(UserError, match=reason):
            canonical(message("assistant", broken), "chat")
    with pytest.raises(UserError, match="'reasoning_content' stands beside a part of the type 'reasoning'"):
        canonical(message("assistant", parts, reasoning_content="Hm."), "chat")


SECTION = DATA_PAGE.read_text().partition("### Data sets of LLaMA-Factory and TRL")[2].partition("## Images")[0]
TABLE = re.findall(r"^\| ([^|`]+) \| `(\{.*\})` \| ([a-z].*) \|$", SECTION, re.MULTILINE)


@pytest.mark.parametrize(("name", "text", "read_as"), TABLE, ids=[name for name, *_ in TABLE])
def test_forms_of_llamafactory_and_trl_are_read_as_the_page_says(name, text, read_as, tmp_path):
    reading = ReadOptions(judged="kto" in read_as)
    value = record(json.loads(text))
    format = resolve_format(value, "auto", reading)
    convert = to_answers if reads(format, reading) else to_document
    if read_as.startswith("refused"):
        with pytest.raises(UserError, match=re.escape(read_as.split("`")[1])):
            convert(value, format, True, reading)
        if "data.images" not in read_as:
            return
        (tmp_path / "a.png").touch()
        reading, read_as = ReadOptions(images=True, image_root=tmp_path), format
    document = convert(value, format, True, reading)
    assert format == read_as.partition(",")[0]
    assert not document.unread, "every key has a meaning"


def test_the_table_has_every_form_of_llamafactory_and_trl():
    assert len(TABLE) == 28


def test_a_wrong_format_names_the_one_that_fits():
    turns = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "tools": "[]"}
    with pytest.raises(
        UserError, match=r"no 'messages' among its keys: .*; set data\.format=sharegpt, which reads them; a good"
    ):
        canonical(turns, "chat")


def test_reasoning_under_another_key_is_reasoning_content_and_can_be_ignored():
    value = chat("Hi", "Hello")
    value["messages"][1]["thoughts"] = "Hm."
    read = to_document(record(value), "chat", True, ReadOptions(reasoning_key="thoughts")).value["messages"][1]
    assert read == {"role": "assistant", "content": "Hello", "reasoning_content": "Hm."}
    assert head_with_key(iter([record(chat("Hi", "Hello")), record(value)]), "thoughts")[1].value is value
    for other in (value, {"text": "a"}):
        with pytest.raises(UserError, match=r"data\.reasoning_key=thought is a key of no message in 2 records"):
            head_with_key(iter([record({"text": "a"}), record(other)]), "thought")
    ignoring = ReadOptions(ignore_columns=("thoughts",))
    assert to_document(record(value), "chat", True, ignoring).value == chat("Hi", "Hello")


def test_a_system_column_opens_the_chat():
    opened = canonical(chat("Hi", "Hello") | {"system": "Be brief."}, "chat")["messages"]
    assert [item["role"] for item in opened] == ["system", "user", "assistant"]


def test_a_prompt_and_a_completion_may_be_messages():
    turns = chat("Hi", "Hello", "Bye", "See you")["messages"]
    both = record({"messages": turns, "completion": "See you"})
    assert resolve_format(both, "prompt_completion") == "prompt_completion", "no chat that ignores the completion"
    for completion in (turns[3:], turns[3]):
        for format in ("auto", "prompt_completion"):
            value = {"prompt": turns[:3], "completion": completion}
            assert resolve_format(record(value), format) == "chat"
            read = canonical(value, "chat")["messages"]
            assert [message.get("train") for message in read] == [None, False, None, None]
