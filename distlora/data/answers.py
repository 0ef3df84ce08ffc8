"""Records that compare or judge answers, or have none, to documents: what objectives other than sft train on.

The forms of their values: {"chosen": answer, "rejected": answer, "margin": any} (a pair), {"answer": answer, "good":
bool} (judged), {"prompt": str, "completions": [str, ...], "labels": [bool, ...]} (steps) and {"prompt": str or
messages, "columns": {...}} with an optional "tools" (a prompt alone). An answer is a chat, or a prompt and its
completion. Imports neither torch nor transformers nor numpy, as formats.py.
"""

import itertools
import json
import os
from typing import Any

from distlora.config import UserError
from distlora.config.objectives import OBJECTIVES, PAIRS, PROMPTS, STEPS, objectives_of, takes_format
from distlora.data.formats import (
    AS_WRITTEN,
    CONVERSATION_KEYS,
    FORMATS,
    GOOD_VERDICT,
    MEDIA_KEYS,
    NOT_TRAINED,
    PAIR_NAMES,
    SIDES,
    VERDICT_KEYS,
    Document,
    ReadOptions,
    SourceRecord,
    alpaca_document,
    check_chat,
    check_meaning,
    document_of,
    form_of,
    good,
    is_prompt,
    opened,
    read_record,
    renamed,
    sharegpt_messages,
    untrained,
)
from distlora.data.image_records import refuse_images
from distlora.data.json_values import expect, kind_name, listed

HH_ANSWER = "\n\nAssistant:"
"""Prefix of each answer in Anthropic's hh-rlhf and data sets derived from it."""
_QUESTIONS = ("instruction", "question", "input")
"""Keys of a preference record that hold its prompt as a question to an assistant (Axolotl, LLaMA-Factory)."""
_PREFERENCE_KEYS = (*_QUESTIONS, *CONVERSATION_KEYS.values(), "history", *itertools.chain(*PAIR_NAMES))
"""Other keys that the prompt and the answers of a preference record may have."""
_VERDICTS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""Values of VERDICT_KEYS in lower case, as JSON, parquet and csv have them."""


def check_objective(format: str, objective: str, label: str) -> None:
    """Refuse a source, named `label`, whose resolved format is not what train.objective trains on."""
    if takes_format(objective, format):
        return
    others = " or ".join(objectives_of(format))
    if format in PAIRS:
        raise UserError(
            f"{label} holds preference data (chosen and rejected answers), which train.objective={objective} does not "
            f"train on; set train.objective={others}, or fine-tune on the chosen answers with data.columns="
            "{completion: chosen} (where they answer 'prompt'), {messages: chosen} (conversations) or {text: chosen} "
            "(whole texts)"
        )
    needs = OBJECTIVES[objective]
    if needs.data == "prompts":
        raise UserError(
            f"{label} is {format}, and train.objective={objective} {needs.summary}; set "
            f"data.format=prompt_only to take its prompts: {good('prompt_only')}"
        )
    use = {
        "pairs": f"use such data: {good('preference')}",
        "steps": f"use such data: {good('steps')}",
        "judged": f"use data with answers that are judged: {GOOD_VERDICT}",
    }.get(needs.data, "give each prompt its answer")
    raise UserError(
        f"{label} is {format}, and train.objective={objective} {needs.summary}; set train.objective={others}, or {use}"
    )


def reads(format: str, reading: ReadOptions) -> bool:
    """Return whether records of this (resolved) format become documents here, and not in formats.py."""
    return reading.judged or format in (*PAIRS, *PROMPTS, *STEPS)


def to_answers(record: SourceRecord, format: str, has_template: bool, reading: ReadOptions = AS_WRITTEN) -> Document:
    """Return a record as one of the forms above. Raises UserError, by place, for one that is not of this format."""
    place = record.place
    if format in PROMPTS:
        value = renamed(record, format, reading, joins=False)
        return document_of(record, prompt_only(value, place, good(format)), value, value.keys(), reading)
    is_judged = reading.judged and format not in PAIRS
    refused = NOT_TRAINED.keys() - VERDICT_KEYS if is_judged else NOT_TRAINED.keys()
    value = read_record(record, format, reading, refused)
    known = {*FORMATS[format].keys, *VERDICT_KEYS, *(_PREFERENCE_KEYS if format in PAIRS else ())}
    if format in PAIRS:
        form = preference_pair(value, place, good(format), has_template=has_template)
        form |= {} if value.get("margin") is None else {"margin": value["margin"]}  # Checked where it is read.
    elif format in STEPS:
        form = labelled_steps(value, place, good(format))
    else:
        form = form_of(value, format, place, has_template=has_template)
    if is_judged:
        # In TRL's conversational form, all turns behind the prompt are the answer.
        is_joined = format == "chat" and reading.columns.get("messages", "messages") not in record.value
        form = judged_answer(form, value, place, GOOD_VERDICT, whole=is_joined)
    return document_of(record, form, value, known, reading)


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
        document = document | {"messages": [*(before if whole else untrained(before)), last]}
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
        problem = f"a label is {wrong!r}" if wrong is not None else f"{len(steps)} steps have {len(labels)} labels"
        raise UserError(
            f"{place}: {problem if all(steps) else 'a step is empty'}; each step needs a text and one label, true or "
            f"false; {good}"
        )
    return {"prompt": prompt, "completions": steps, "labels": list(map(bool, labels))}


def prompt_only(value: dict[str, Any], place: str, good: str) -> dict[str, Any]:
    """Return {"prompt": text or messages, "columns": the record's other keys, "tools"} of a record without an answer.

    The answer that verl's records keep for their rewards, reward_model.ground_truth, is also the column `answer`.
    """
    check_meaning(value, place, MEDIA_KEYS | {"chat_template_kwargs"})
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
    refuse_images(messages, place, "prompts for sampled answers are texts; leave the record out")
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{place}: the last message of 'prompt' is the assistant's own; end with what it is to answer")
    return {"prompt": opened(messages, system, place, good), "columns": columns, **chat}


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
            if has_template:
                sides = [{"messages": untrained(side["messages"][:-1]) + side["messages"][-1:]} for side in sides]
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
    opening = untrained(opened(opening, system, place, good))
    return {side: chat | {"messages": opening + reply} for side, chat, reply in zip(SIDES, chats, replies, strict=True)}


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
    common = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (characters are what is meant)
    marked = common.rfind(HH_ANSWER)
    end = marked + len(HH_ANSWER) if marked >= 0 else max(common.rfind(" "), common.rfind("\n"))
    if end <= 0:
        raise UserError(
            f"{place}: 'chosen' and 'rejected' do not begin with the same words and there is no 'prompt', so the "
            f"prompt is unknown; name its column with data.columns={{prompt: NAME}}. {good}"
        )
    return common[:end], chosen[end:], rejected[end:]


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
