"""Conversations in their canonical form: chats, ShareGPT's and Alpaca's records, and pairs of two answers.

A canonical chat is {"messages": [...]} and, where there are any, "tools". A message has "role" (one of ROLES) and
"content": a string, or None where "tool_calls" are there. It may have "tool_calls" ([{"type": "function", "function":
{"name": str, "arguments": dict}}]), "tool_call_id", "name", "reasoning_content" or "thinking" (strings), one of
MASK_KEYS ("train": bool; others: 0 or 1), and whatever else a template reads. A key whose value is null is as good as
absent: Arrow writes those. Imports neither torch nor transformers nor numpy.
"""

import itertools
import json
import os
from collections.abc import Set
from typing import Any

from distlora.config import UserError, nearest

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
MASK_KEYS = ("train", "weight", "loss", "loss_weight", "loss_scale", "training")
"""Keys of a message that say whether it is trained (ours and Axolotl's, OpenAI's, ms-swift's, LLaMA-Factory's); no
template sees them."""
MESSAGE_KEYS = frozenset(("role", "from", "content", "value", "tool_calls", *_STRINGS, *MASK_KEYS))
"""Keys of a message that are read, whatever the template reads besides."""


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

    A turn is {"from", "value"}, or {"role", "content"} as in a chat.
    """
    messages = []
    for index, turn in enumerate(_items(value, "conversations", place, good)):
        where = f"{place}: conversations[{index}]"
        expect(turn, dict, where, good)
        messages.append(turn if "role" in turn and "from" not in turn else _sharegpt_turn(turn, where, good))
    return {"messages": messages, "tools": value.get("tools"), "system": value.get("system")}


def alpaca_document(value: dict[str, Any], place: str, good: str, *, as_chat: bool) -> dict[str, Any]:
    """Return an Alpaca record as a chat, or as a prompt and its completion in the words of Stanford Alpaca.

    In a chat the input follows the instruction on a new line, "history" holds earlier pairs of question and answer
    (trained as the last answer is), as in LLaMA-Factory. In the prompt, "system" replaces the opening sentence.
    """
    texts: dict[str, str] = {}
    for key in ("instruction", "output", "input", "system"):
        default = None if key in ("instruction", "output") else ""
        item = value.get(key)
        texts[key] = expect(default if item is None else item, str, f"{place}: {key!r}", good)
    history = expect(value.get("history") or [], list, f"{place}: 'history'", good)
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


def expect(value: Any, kind: type, what: str, good: str) -> Any:
    """Return a JSON value of a kind: dict, list or str. Raises UserError for another, of which `what` is the name."""
    if not isinstance(value, kind):
        raise UserError(f"{what} is {kind_name(value)}, not {kind_name(kind())}; {good}")
    return value


def listed(value: dict[str, Any]) -> str:
    """Return the keys of an object, as a message lists them."""
    return ", ".join(ascii(key) for key in list(value)[:12]) or "none"


def _items(value: dict[str, Any], key: str, place: str, good: str) -> list[Any]:
    items: list[Any] = expect(value[key], list, f"{place}: {key!r}", good)
    if not items:
        raise UserError(f"{place}: {key!r} is empty; remove the line. {good}")
    return items


def _message(message: Any, where: str, good: str) -> dict[str, Any]:
    expect(message, dict, where, good)
    if "from" in message and "role" not in message:
        raise UserError(
            f"{where} has 'from' and no 'role': this is ShareGPT; set data.format=sharegpt "
            "data.columns={conversations: messages}"
        )
    if "role" not in message:
        raise UserError(f"{where} has no 'role' among its keys: {listed(message)}; {good}")
    role = expect(message["role"], str, f"{where}: 'role'", good)
    if role not in ROLES:
        raise UserError(f"{where} has the role {role!a}{nearest(role, ROLES)}; use one of {', '.join(ROLES)}. {good}")
    kept = {key: item for key, item in message.items() if item is not None}
    check_meaning(kept, where, _MEDIA_KEYS | _MASKS)
    calls = kept.pop("tool_calls", None)
    if calls:
        if role != "assistant":
            raise UserError(f"{where}: 'tool_calls' in a message of the role {role!a}; only the assistant calls tools")
        kept["tool_calls"] = _tool_calls(calls, where)
    kept["content"] = _content(message, where, good, required=not calls)
    for key in _STRINGS:
        expect(kept.get(key, ""), str, f"{where}: {key!r}", good)
    if "train" in kept and not isinstance(kept["train"], bool):
        raise UserError(f"{where}: 'train' is {kind_name(kept['train'])}; write true or false")
    for key in MASK_KEYS:
        if kept.get(key, 0) not in (0, 1):
            raise UserError(f"{where}: {key!r} is {kept[key]!r}; a turn is trained (1) or not (0)")
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
        return "".join(_part(part, where) for part in content)
    text: str = expect(content, str, f"{where}: 'content'", good)
    return text


def _part(part: Any, where: str) -> str:
    """Return the text of a part of a message's content."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") in _TEXT_PARTS:
        text: str = part["text"]
        return text
    found = f"of the type {part.get('type')!r}" if isinstance(part, dict) else kind_name(part)
    raise UserError(
        f"{where}: a part of 'content' is {found}; only text can be trained on: "
        '{"type": "text", "text": "..."}, or a string'
    )


_TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a content's parts that are text, in the words of OpenAI's APIs."""


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects; OpenAI's API writes those as JSON in a string."""
    expect(calls, list, f"{where}: 'tool_calls'", _GOOD_CALL)
    return [_tool_call(call, f"{where}: tool_calls[{index}]") for index, call in enumerate(calls)]


_GOOD_CALL = 'a good call: {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}'


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    expect(call, dict, where, _GOOD_CALL)
    function = call["function"] if call.get("function") is not None else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} has no function with a 'name'; {_GOOD_CALL}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        what = "'arguments' is a string that"
        arguments = parse_string(arguments, where, what, _GOOD_CALL) if arguments.strip() else {}
    arguments = expect({} if arguments is None else arguments, dict, f"{where}: 'arguments'", _GOOD_CALL)
    canonical: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return canonical | ({"id": call["id"]} if call.get("id") is not None else {})


def _tools(tools: Any, place: str) -> list[dict[str, Any]]:
    """Return definitions of tools as {"type": "function", "function": {...}}; a string holds them as JSON."""
    example = 'a good one: {"type": "function", "function": {"name": "weather", "parameters": {...}}}'
    if isinstance(tools, str):
        tools = parse_string(tools, place, "'tools' is a string that", example) if tools.strip() else None
    if tools is None:
        return []
    expect(tools, list, f"{place}: 'tools'", example)
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
    if isinstance(value, list):
        value = "".join(_part(part, where) for part in value)
    expect(value, str, f"{where}: 'value'", good)
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


def check_unicode(value: Any, place: str) -> None:
    """Refuse half a surrogate pair, on which tokenizers raise. Only JSON's escapes can bring one in."""
    waiting = [value]
    while waiting:  # No recursion: json nests deeper than Python's calls may.
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{place}: half a surrogate pair (\\u{ord(item[error.start]):04x}) is not a character; "
                    "write the pair, or the character itself in UTF-8"
                ) from error


def parse_string(text: str, place: str, what: str, advice: str) -> Any:
    """Parse JSON in a string, as OpenAI's API writes arguments. `what` is the string's role in a message.

    Raises UserError for what is not JSON, which ends with `advice`, and for half a surrogate pair.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {what} is not JSON ({error}); {advice}") from error
    if "\\ud" in text or "\\uD" in text:
        check_unicode(value, place)
    return value


VERDICT_KEYS = ("label", "kto_tag")
"""Keys of a record that say whether its answer is good (TRL and Axolotl; LLaMA-Factory)."""
_MASKS = frozenset(("mask", "loss_mask", "response_mask", "completion_mask", "assistant_masks", "train_detail"))
NOT_TRAINED = {
    **dict.fromkeys(VERDICT_KEYS, "says whether its answer is good, which only train.objective=kto trains on"),
    **dict.fromkeys(("score", "scores", "reward", "rewards"), "rates it, which only reward models are trained on"),
    **dict.fromkeys(
        (*MASK_KEYS, *_MASKS, "sample_weight"), "masks or weights a loss, for which only messages have a key"
    ),
    **dict.fromkeys(("image", "images"), "holds pictures, which only vision models read"),
    **dict.fromkeys(("video", "videos", "audio", "audios"), "holds media that no text model reads"),
}
"""Keys of a record that mean other training than of its text, and the reason."""
_MEDIA_KEYS = frozenset(("image", "images", "video", "videos", "audio", "audios"))


def check_meaning(value: dict[str, Any], place: str, names: Set[str] = NOT_TRAINED.keys()) -> None:
    """Raise UserError if one of `names`, which would change what a record means, has a value in it."""
    if names.isdisjoint(value):
        return
    for key in names & value.keys():
        item = value[key]
        if isinstance(item, dict):  # Arrow writes an absent image as {"bytes": null, "path": null}.
            item = [part for part in item.values() if part is not None]
        if item is not None and item not in ("", []):
            missing = "" if key in VERDICT_KEYS else "; that is not supported yet"
            raise UserError(
                f"{place}: {key!r} {NOT_TRAINED[key]}{missing}. To train on the text alone, every record alike, set "
                f"data.ignore_columns=[{key}]"
            )


_VERDICTS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""Values of VERDICT_KEYS in lower case, as JSON, parquet and csv have them."""


def judged_answer(
    document: dict[str, Any], value: dict[str, Any], place: str, good: str, *, whole: bool
) -> dict[str, Any]:
    """Return {"answer": document, "good": bool} of a canonical document of the record `value`.

    The answer of a chat is its last turn; the assistant's earlier turns are not trained. `whole`: the turns that are
    trained are the answer. Raises UserError for a record without a verdict, or one that ends with another's turn.
    """
    verdicts = {key: value[key] for key in VERDICT_KEYS if value.get(key) is not None}
    if not verdicts:
        raise UserError(
            f"{place}: no 'label' (or 'kto_tag') says whether its answer is good; name its column with "
            f"data.columns={{label: NAME}}. {good}"
        )
    (key, verdict), *others = verdicts.items()
    is_good = _VERDICTS.get(str(verdict).lower())
    if is_good is None or any(_VERDICTS.get(str(other).lower()) != is_good for _, other in others):
        raise UserError(
            f"{place}: {key!r} is {json.dumps(verdict, default=str)}"
            + (f" and {others[0][0]!r} is {json.dumps(others[0][1], default=str)}" if others else "")
            + f", where true (a good answer) or false (a bad one) belongs; {good}"
        )
    if "messages" in document:
        *before, last = document["messages"]
        if last["role"] != "assistant":
            raise UserError(
                f"{place}: the last message is the {last['role']}'s, so there is no answer to judge; {good}"
            )
        if not whole:
            before = [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in before]
        document = document | {"messages": [*before, last]}
    return {"answer": document, "good": is_good}


def labelled_steps(value: dict[str, Any], place: str, good: str) -> dict[str, Any]:
    """Return {"prompt": text, "completions": steps, "labels": [bool, ...]} of an answer in steps.

    Raises UserError for empty steps, and for another number of labels, which are true or false, or 1 or 0.
    """
    prompt = expect(value["prompt"], str, f"{place}: 'prompt'", good)
    steps = expect(value["completions"], list, f"{place}: 'completions'", good)
    labels = expect(value["labels"], list, f"{place}: 'labels'", good)
    for step in steps:
        expect(step, str, f"{place}: a step of 'completions'", good)
    wrong = next((label for label in labels if label not in (True, False)), None)
    if wrong is not None or len(labels) != len(steps) or not all(steps):
        found = f"a label is {wrong!r}" if wrong is not None else f"{len(steps)} steps have {len(labels)} labels"
        raise UserError(
            f"{place}: {found if all(steps) else 'a step is empty'}; each step needs a text and one label, true or "
            f"false; {good}"
        )
    return {"prompt": prompt, "completions": steps, "labels": list(map(bool, labels))}


def prompt_only(value: dict[str, Any], place: str, good: str) -> dict[str, Any]:
    """Return {"prompt": text or messages, "columns": the record's other keys, "tools"} of a record without an answer.

    The answer that verl's records keep for their rewards, reward_model.ground_truth, is also the column `answer`.
    """
    check_meaning(value, place, _MEDIA_KEYS)
    prompt, system = value.get("prompt"), value.get("system")
    columns = {key: item for key, item in value.items() if key not in ("prompt", "system", "tools")}
    model = columns.get("reward_model")
    if isinstance(model, dict) and "ground_truth" in model:
        columns.setdefault("answer", model["ground_truth"])
    if isinstance(prompt, str):
        if prompt.strip() == "":
            raise UserError(f"{place}: 'prompt' is empty; write what is asked. {good}")
        for key in ("system", "tools"):
            if value.get(key):
                raise UserError(f"{place}: {key!r} belongs to messages, and 'prompt' is a text; {good}")
        return {"prompt": prompt, "columns": columns}
    if "prompt" not in value:
        raise UserError(f"{place}: no 'prompt' among its keys: {listed(value)}; {good}")
    chat = check_chat(
        {"messages": expect(prompt, list, f"{place}: 'prompt'", good), "tools": value.get("tools")}, place, good
    )
    messages = chat.pop("messages")
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{place}: the last message of 'prompt' is the assistant's own; end with what it is to answer")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": expect(system, str, f"{place}: 'system'", good)})
    return {"prompt": messages, "columns": columns, **chat}


HH_ANSWER = "\n\nAssistant:"
"""Prefix of each answer in Anthropic's hh-rlhf and data sets derived from it."""
SIDES = ("chosen", "rejected")


PAIR_NAMES = (("chosen_messages", "rejected_messages"), ("chosen_response", "rejected_response"))
"""Other names for the two answers (Axolotl, Argilla)."""
_QUESTIONS = ("instruction", "question", "input")
"""Keys of a preference record that hold its prompt as a question to an assistant (Axolotl, LLaMA-Factory)."""
CONVERSATION_KEYS = {"sharegpt": "conversations", "chat": "messages"}
"""Keys of conversations, by format."""
PREFERENCE_KEYS = (*_QUESTIONS, *CONVERSATION_KEYS.values(), "history", *itertools.chain(*PAIR_NAMES))
"""Other keys that the prompt and the answers of a preference record may have."""


def preference_pair(value: dict[str, Any], place: str, good: str, *, has_template: bool) -> dict[str, Any]:
    """Return {"chosen": document, "rejected": document} of a preference record.

    Both are {"prompt", "completion"}, or both {"messages"} and perhaps "tools", with "train": false in the turns of the
    common prompt. Texts stay texts, conversations are chats; a question to an assistant is what `alpaca_document` makes
    of it. Raises UserError for answers of two kinds, and for two without a prompt.
    """
    prompt, answers = value.get("prompt"), [value[side] for side in SIDES]
    question = next((value[key] for key in _QUESTIONS if value.get(key)), None) if prompt is None else prompt
    system, history = value.get("system"), value.get("history")
    more = value.get("input") if prompt is None and value.get("instruction") else None
    before = next(
        (value[key] for key in CONVERSATION_KEYS.values() if prompt is None and is_prompt(value.get(key))), None
    )
    is_text = before is None and all(isinstance(text, str) for text in answers) and isinstance(question, str | None)
    if history and (question is None or not is_text):
        raise UserError(f"{place}: 'history' needs a question and answers that are texts; write messages alone. {good}")
    if is_text:
        if question is not None and (prompt is None or system or history):
            record = {"instruction": question, "input": more, "system": system, "history": history}
            sides = [alpaca_document(record | {"output": text}, place, good, as_chat=has_template) for text in answers]
            for message in itertools.chain(*(side["messages"][:-1] for side in sides if has_template)):
                if message["role"] == "assistant":
                    message["train"] = False
            return dict(zip(SIDES, sides, strict=True))
        key = next((key for key in CONVERSATION_KEYS.values() if value.get(key)), None)
        if prompt is None and key is not None:
            raise UserError(
                f"{place}: {key!r} ends with an answer, so it is not the prompt of 'chosen' and 'rejected'; remove its "
                f"last turn, or leave the key unread with data.ignore_columns=[{key}]"
            )
        if prompt is None:
            prompt, *answers = _common_text(answers[0], answers[1], place, good)
        return {side: {"prompt": prompt, "completion": text} for side, text in zip(SIDES, answers, strict=True)}
    chats = [
        check_chat(
            {"messages": _turns(answer, side, place, good), "tools": value.get("tools")}, f"{place}, {side}", good
        )
        for side, answer in zip(SIDES, answers, strict=True)
    ]
    if isinstance(question, str) and isinstance(more, str):
        question += "\n" + more
    opening_turns = before if before is not None else question
    opening, replies = _split_opening(opening_turns, [chat["messages"] for chat in chats], place, good)
    if system and opening[0]["role"] != "system":
        opening = [{"role": "system", "content": expect(system, str, f"{place}: 'system'", good)}, *opening]
    # The common opening is not trained, including the assistant's turns in it.
    opening = [message | {"train": False} if message["role"] == "assistant" else message for message in opening]
    return {side: chat | {"messages": opening + reply} for side, chat, reply in zip(SIDES, chats, replies, strict=True)}


def is_prompt(conversation: Any) -> bool:
    """Return whether a conversation waits for an answer: its last turn is not the assistant's."""
    if not isinstance(conversation, list) or not conversation or not isinstance(conversation[-1], dict):
        return isinstance(conversation, str) and conversation != ""
    role = conversation[-1].get("role", conversation[-1].get("from"))
    return not isinstance(role, str) or SHAREGPT_ROLES.get(role) != "assistant"


def _split_opening(prompt: Any, answers: list[list[Any]], place: str, good: str) -> tuple[list[Any], list[list[Any]]]:
    """Return the messages of the prompt, and those of each answer behind it.

    A prompt beside whole conversations is one that these begin with, or, as a string, only a copy of one's text.
    """
    if isinstance(prompt, (list, dict)) or (prompt and all(answer[0]["role"] == "assistant" for answer in answers)):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        opening = check_chat({"messages": _turns(messages, "prompt", place, good)}, f"{place}, prompt", good)[
            "messages"
        ]
        if not all(answer[: len(opening)] == opening for answer in answers):
            return opening, answers
    elif prompt is not None and not isinstance(prompt, str):
        raise UserError(f"{place}: 'prompt' is {kind_name(prompt)}, neither a string nor a list of messages; {good}")
    else:
        same = itertools.takewhile(lambda both: both[0] == both[1], zip(*answers, strict=False))
        opening = [first for first, _ in same]
    if not opening:
        raise UserError(
            f"{place}: the two conversations have no message in common and there is no 'prompt', so the prompt is "
            f"unknown; name its column with data.columns={{prompt: NAME}}. {good}"
        )
    return opening, [answer[len(opening) :] for answer in answers]


def _common_text(chosen: str, rejected: str, place: str, good: str) -> tuple[str, str, str]:
    """Return (prompt, chosen, rejected) of two texts that begin alike.

    The prompt ends behind the last answer mark of hh-rlhf that both have, else with the last word that both have. Where
    it ends is no matter for the loss: what is alike in both has the same probability in both, and cancels.
    """
    common = common_prefix(chosen, rejected)
    marked = common.rfind(HH_ANSWER)
    end = marked + len(HH_ANSWER) if marked >= 0 else max(common.rfind(" "), common.rfind("\n"))
    if end <= 0:
        raise UserError(
            f"{place}: 'chosen' and 'rejected' do not begin with the same words and there is no 'prompt', so the "
            f"prompt is unknown; name its column with data.columns={{prompt: NAME}}. {good}"
        )
    return common[:end], chosen[end:], rejected[end:]


def common_prefix(first: str, second: str) -> str:
    """Return the characters with which both texts begin."""
    return os.path.commonprefix([first, second])  # noqa: RUF071 (characters are what is meant)


def _turns(answer: Any, side: str, place: str, good: str) -> list[Any]:
    """Return the messages of an answer: a list of them, a single one, or the assistant's text."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    messages = [answer] if isinstance(answer, dict) else answer
    if not isinstance(messages, list):
        raise UserError(f"{place}: {side!r} is {kind_name(answer)}, neither a string nor a list of messages; {good}")
    if any(isinstance(message, dict) and "from" in message and "role" not in message for message in messages):
        return sharegpt_messages({"conversations": messages}, f"{place}, {side}", good)["messages"]
    return messages
