"""Conversations in canonical form: checked chats, and ShareGPT and Alpaca records turned into them.

Canonical: {"messages": [...]} and, where there are any, "tools". A message has "role" (one of ROLES) and "content": a
string, or None where "tool_calls" are there. It may have "tool_calls" ([{"type": "function", "function": {"name": str,
"arguments": dict}}]), "tool_call_id", "name", "reasoning_content" or "thinking" (strings), "train" (bool) or "weight"
(0 or 1), and whatever else a template reads. A key whose value is null is as good as absent: Arrow writes those.
"""

from __future__ import annotations

import json
from typing import Any

from distlora.config import UserError, nearest
from distlora.data.json_text import parse_string

ROLES = ("system", "developer", "user", "assistant", "tool")

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""Roles by the word under "from" (LLaMA-Factory's and FastChat's words), and the role that it is."""

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The prompts of github.com/tatsu-lab/stanford_alpaca, with the newline at the end that LLaMA-Factory has."""

_STRINGS = ("tool_call_id", "name", "reasoning_content", "thinking")


def check_chat(value: dict[str, Any], place: str, good: str) -> dict[str, Any]:
    """Return a canonical chat out of a record with "messages" and perhaps "tools".

    Raises UserError, which names the message by `place` and ends with the example `good`.
    """
    messages = _items(value, "messages", place, good)
    chat: dict[str, Any] = {
        "messages": [_message(message, f"{place}: messages[{index}]", good) for index, message in enumerate(messages)]
    }
    tools = _tools(value.get("tools"), place)
    return chat | {"tools": tools} if tools else chat


def sharegpt_messages(value: dict[str, Any], place: str, good: str) -> dict[str, Any]:
    """Return a ShareGPT record as {"messages", "tools"}, still to be checked.

    A turn is {"from", "value"}, or {"role", "content"} as in a chat. "system" becomes the first message unless the
    conversation has a system turn of its own there.
    """
    messages = []
    for index, turn in enumerate(_items(value, "conversations", place, good)):
        where = f"{place}: conversations[{index}]"
        if not isinstance(turn, dict):
            raise UserError(f"{where} is {kind_name(turn)}, not an object; {good}")
        messages.append(turn if "role" in turn and "from" not in turn else _sharegpt_turn(turn, where, good))
    system = value.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError(f"{place}: 'system' is {kind_name(system)}, not a string; {good}")
    if system and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages, "tools": value.get("tools")}


def alpaca_document(value: dict[str, Any], place: str, good: str, *, as_chat: bool) -> dict[str, Any]:
    """Return an Alpaca record as a chat, or as a prompt and its completion in the words of Stanford Alpaca.

    In a chat the input follows the instruction on a new line, "history" holds earlier pairs of question and answer
    (trained as the last answer is), as in LLaMA-Factory. In the prompt, "system" replaces the opening sentence.
    """
    texts: dict[str, str] = {}
    for key in ("instruction", "output", "input", "system"):
        item = value.get(key)
        if not isinstance(item, str) and (item is not None or key in ("instruction", "output")):
            raise UserError(f"{place}: {key!r} is {kind_name(item)}, not a string; {good}")
        texts[key] = item or ""
    history = value.get("history") or []
    if not isinstance(history, list):
        raise UserError(f"{place}: 'history' is {kind_name(history)}, not a list of [question, answer]; {good}")
    for index, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise UserError(f"{place}: history[{index}] is not a list of two strings, [question, answer]; {good}")
    if not as_chat:
        if history:
            raise UserError(
                f"{place}: 'history' is a conversation, and the tokenizer has no chat template to render one; "
                "set data.template=chatml, or remove the key"
            )
        prompt = ALPACA_WITH_INPUT if texts["input"] else ALPACA_WITHOUT_INPUT
        if texts["system"]:
            prompt = "{system}\n\n" + prompt[prompt.index("### Instruction") :]
        return {"prompt": prompt.format(**texts), "completion": texts["output"]}
    messages = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    question = texts["instruction"] + ("\n" + texts["input"] if texts["input"] else "")
    for user, assistant in [*history, (question, texts["output"])]:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages}


def kind_name(value: Any) -> str:
    """Return the kind of a JSON value in JSON's words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def listed(value: dict[str, Any]) -> str:
    """Return the keys of an object, as a message lists them."""
    return ", ".join(ascii(key) for key in list(value)[:12]) or "none"


def _items(value: dict[str, Any], key: str, place: str, good: str) -> list[Any]:
    items = value[key]
    if not isinstance(items, list):
        raise UserError(f"{place}: {key!r} is {kind_name(items)}, not a list; {good}")
    if not items:
        raise UserError(f"{place}: {key!r} is empty; remove the line. {good}")
    return items


def _message(message: Any, where: str, good: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f"{where} is {kind_name(message)}, not an object; {good}")
    if "from" in message and "role" not in message:
        raise UserError(
            f"{where} has 'from' and no 'role': this is ShareGPT; set data.format=sharegpt "
            "data.columns={conversations: messages}"
        )
    if "role" not in message:
        raise UserError(f"{where} has no 'role' among its keys: {listed(message)}; {good}")
    role = message["role"]
    if not isinstance(role, str):
        raise UserError(f"{where}: 'role' is {kind_name(role)}, not a string; {good}")
    if role not in ROLES:
        raise UserError(f"{where} has the role {role!a}{nearest(role, ROLES)}; use one of {', '.join(ROLES)}. {good}")
    kept = {key: item for key, item in message.items() if item is not None}
    calls = kept.pop("tool_calls", None)
    if calls:
        if role != "assistant":
            raise UserError(f"{where}: 'tool_calls' in a message of the role {role!a}; only the assistant calls tools")
        kept["tool_calls"] = _tool_calls(calls, where)
    kept["content"] = _content(message, where, good, required=not calls)
    for key in _STRINGS:
        if not isinstance(kept.get(key, ""), str):
            raise UserError(f"{where}: {key!r} is {kind_name(kept[key])}, not a string; {good}")
    if "train" in kept and not isinstance(kept["train"], bool):
        raise UserError(f"{where}: 'train' is {kind_name(kept['train'])}; write true or false")
    if kept.get("weight", 0) not in (0, 1):
        raise UserError(f"{where}: 'weight' is {kept['weight']!r}; a turn is trained (1) or not (0)")
    return kept


def _content(message: dict[str, Any], where: str, good: str, *, required: bool) -> str | None:
    """Return a message's text; parts of the type "text" are joined. None only where tool calls stand in for it."""
    content = message.get("content")
    if content is None:
        if not required:
            return None
        if "content" not in message:
            raise UserError(f"{where} has no 'content' among its keys: {listed(message)}; {good}")
        raise UserError(f"{where}: 'content' is null, not a string, and there are no 'tool_calls'; {good}")
    if isinstance(content, list):
        texts = []
        for part in content:
            if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
                continue
            found = f"of the type {part.get('type')!r}" if isinstance(part, dict) else kind_name(part)
            raise UserError(
                f"{where}: a part of 'content' is {found}; only text can be trained on: "
                '{"type": "text", "text": "..."}, or a string'
            )
        return "".join(texts)
    if not isinstance(content, str):
        raise UserError(f"{where}: 'content' is {kind_name(content)}, not a string; {good}")
    return content


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects; OpenAI's API writes those as JSON in a string."""
    if not isinstance(calls, list):
        raise UserError(f"{where}: 'tool_calls' is {kind_name(calls)}, not a list; {_GOOD_CALL}")
    return [_tool_call(call, f"{where}: tool_calls[{index}]") for index, call in enumerate(calls)]


_GOOD_CALL = 'a good call: {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}'


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    example = _GOOD_CALL
    if not isinstance(call, dict):
        raise UserError(f"{where} is {kind_name(call)}, not an object; {example}")
    function = call["function"] if call.get("function") is not None else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} has no function with a 'name'; {example}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        what = "'arguments' is a string that"
        arguments = parse_string(arguments, where, what, example) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: 'arguments' is {kind_name(arguments)}, not an object; {example}")
    canonical: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return canonical | ({"id": call["id"]} if call.get("id") is not None else {})


def _tools(tools: Any, place: str) -> list[dict[str, Any]]:
    """Definitions of tools as {"type": "function", "function": {...}}; a string holds them as JSON."""
    example = 'a good one: {"type": "function", "function": {"name": "weather", "parameters": {...}}}'
    if isinstance(tools, str):
        tools = parse_string(tools, place, "'tools' is a string that", example) if tools.strip() else None
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise UserError(f"{place}: 'tools' is {kind_name(tools)}, not a list; {example}")
    canonical = []
    for index, tool in enumerate(tools):
        function = tool.get("function") or tool if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{place}: tools[{index}] has no function with a 'name'; {example}")
        canonical.append({"type": "function", "function": function})
    return canonical


def _sharegpt_turn(turn: dict[str, Any], where: str, good: str) -> dict[str, Any]:
    for key in ("from", "value"):
        if key not in turn:
            raise UserError(f"{where} has no {key!r} among its keys: {listed(turn)}; {good}")
    speaker, value = turn["from"], turn["value"]
    if not isinstance(value, str):
        raise UserError(f"{where}: 'value' is {kind_name(value)}, not a string; {good}")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        words = ", ".join(SHAREGPT_ROLES)
        raise UserError(
            f"{where} is from {speaker!a}{nearest(str(speaker), SHAREGPT_ROLES)}; use one of {words}. {good}"
        )
    message: dict[str, Any] = {key: item for key, item in turn.items() if key not in ("from", "value")}
    message["role"] = SHAREGPT_ROLES[speaker]
    if speaker != "function_call":
        return message | {"content": value}
    calls = parse_string(value, where, "a function_call that", 'write {"name": ..., "arguments": {...}}')
    return message | {"content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}
