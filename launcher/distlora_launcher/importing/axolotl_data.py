"""Axolotl's data sets as ours: where the documents are, what they are, what in them is trained."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from distlora_launcher.importing.keys import Keys
from distlora_launcher.importing.recipe import Imported

TEMPLATES = {"llama3": "llama3", "gemma": "gemma", "phi_3": "phi3", "mistral_v2v3": "mistral"}
"""Templates of Axolotl, and those of ours that render user and assistant turns to the same text."""
NEAR_TEMPLATES = {
    "chatml": ("chatml", "begins with the beginning-of-text token where the tokenizer adds one to every text"),
    "phi_35": ("phi3", "begins with the beginning-of-text token where the tokenizer adds one to every text"),
    "alpaca": ("alpaca", "opens with Alpaca's sentence where there is no system message"),
}
TOKENIZERS_OWN = "tokenizer_default"

# Prompt strategies by type. What follows a : or a . chooses another wording of the prompt.
ALPACA_COLUMNS: dict[str, dict[str, str]] = {
    "alpaca": {},
    "alpaca_w_system.load_instruct": {},
    "alpaca_w_system.load_open_orca": {"system": "system_prompt", "instruction": "question", "output": "response"},
    "alpaca_chat.load_qa": {"instruction": "question", "output": "answer"},
    "alpaca_chat.load_camel_ai": {"instruction": "message_1", "output": "message_2"},
}
OWN_WORDING = ("alpaca", "alpaca_w_system.load_instruct")
"""The types whose prompt is Stanford Alpaca's own, as ours is."""

ROLES = {
    "user": ("human", "user"),
    "assistant": ("gpt", "chatgpt", "assistant", "model", "function_call"),
    "system": ("system",),
    "tool": ("tool", "observation"),
}
"""The words for a speaker that distlora reads by itself, by role."""

EVERY_TOKEN = "trains every token of a chat, its system messages and headers of turns too"

FILE_TYPES = ("json", "csv", "parquet", "text")
"""Values of path that name a reader for data_files."""


@dataclass(slots=True)
class _Source:
    """One data set in our terms, with what is chosen once for all of them."""

    settings: dict[str, Any] = field(default_factory=dict)
    format: str = "auto"
    template: str | None = None
    train_on: str = "assistant"


def convert_data(keys: Keys, imported: Imported) -> None:
    data = imported.section("data")
    streams = keys.any("pretraining_dataset")
    entries = _entries(keys.any("datasets"), "datasets") + _entries(streams, "pretraining_dataset")
    inputs_trained = keys.flag("train_on_inputs")
    jinja = keys.text("chat_template_jinja")
    template = keys.text("chat_template") or (jinja and "jinja")
    sources = [source for entry in entries for source in _sources(entry, imported, inputs_trained, template, jinja)]
    if len(sources) == 1:
        data |= sources[0].settings
    elif sources:
        data["sources"] = [source.settings for source in sources]
    if streams or keys.flag("streaming"):
        data["streaming"] = True
    data["template"] = _one(sources, "template", imported)
    data["train_on"] = _one(sources, "train_on", imported) or "assistant"
    if template not in (None, TOKENIZERS_OWN) and not any(_is_chat(source) for source in sources):
        imported.note("idle", f"chat_template={template}", "no data set here is rendered by it")
    data["sequence_length"] = keys.integer("sequence_len") or 512
    data["too_long"] = _too_long(keys, imported, {source.format for source in sources})
    _held_out(keys, imported, inputs_trained, sources)


def _entries(value: Any, name: str) -> list[Keys]:
    items = value if isinstance(value, list) else [] if value is None else [value]
    found = []
    for index, item in enumerate(items):
        entry = {"path": item} if isinstance(item, str) else item if isinstance(item, dict) else {}
        if name == "pretraining_dataset":
            entry = {"type": "pretrain", **entry}
        found.append(Keys({str(key): part for key, part in entry.items()}, place=f"{name}[{index}]."))
    return found


def _sources(
    entry: Keys, imported: Imported, inputs_trained: bool, template: str | None, jinja: str | None
) -> list[_Source]:
    """The entry as one source, or one a file where it lists files."""
    source = _Source()
    place: dict[str, Any] = {name: entry.text(name) for name in ("name", "split", "revision")}
    place = {name: value for name, value in place.items() if value is not None}
    columns = _format(entry, imported, source, template, jinja)
    if columns:
        place["columns"] = columns
    if inputs_trained and source.format in ("alpaca", "prompt_completion"):
        imported.note(
            "unsupported", "train_on_inputs", f"the prompts of {entry.place}path are not trained, as without it"
        )
    elif inputs_trained and _is_chat(source):
        source.train_on = "all"
        imported.note("differs", "train_on_inputs", f"data.train_on=all {EVERY_TOKEN}")
    path, files = entry.text("path"), entry.words("data_files")
    entry.any("ds_type")  # Read off the file's name here.
    if path is not None and re.match(r"\w+://", path):
        imported.note("unsupported", f"{entry.place}path={path}", "copy it here, and set its path in the recipe")
    if files and path in FILE_TYPES:
        paths = files
    else:
        if files:
            imported.note(
                "unsupported", f"{entry.place}data_files", f"all of {path} is read; download these files and name them"
            )
        paths = [] if path is None else [path]
    for name, value in entry.unread():
        _note_entry_key(entry, name, value, imported)
    base = {"format": source.format, **place}
    return [_Source({"path": one, **base}, source.format, source.template, source.train_on) for one in paths]


def _format(
    entry: Keys, imported: Imported, source: _Source, template: str | None, jinja: str | None
) -> dict[str, Any]:
    """Set the source's format and what belongs to chats; returns the columns."""
    kind = entry.any("type")
    if isinstance(kind, dict):
        return _own_prompt(entry, kind, imported, source)
    name = str(kind or "")
    base = re.split(r"[:.]", name)[0]
    if base in ("chat_template", "sharegpt"):
        source.format = "chat"
        return _chat(entry, imported, source, template, jinja, is_sharegpt=base == "sharegpt")
    if base in ("completion", "pretrain"):
        source.format = "text"
        column = entry.text("field", "text_column") or "text"
        return {} if column == "text" else {"text": column}
    if base in ("alpaca", "alpaca_chat", "alpaca_w_system"):
        source.format = "alpaca"
        if name not in OWN_WORDING:
            reason = "the prompt has Stanford Alpaca's words, not those of this type"
            imported.note("differs", f"{entry.place}type={name}", reason)
        imported.note(
            "differs",
            f"{entry.place}type={name}",
            "where the tokenizer has a chat template, it renders the turns in place of Alpaca's text",
        )
        return dict(ALPACA_COLUMNS.get(name, {}))
    advice = 'lines of {"prompt": ..., "completion": ...} or {"messages": [...]}'
    if base == "input_output":
        advice += '; a segment that is not trained is a prompt, or a message with "train": false'
    imported.note("refused", f"{entry.place}type={name or '(not set)'}", f"has no equal; convert the data to {advice}")
    return {}


def _own_prompt(entry: Keys, kind: dict[str, Any], imported: Imported, source: _Source) -> dict[str, Any]:
    """A prompt format of the user's own: prompt and completion where it is the instruction and nothing more."""
    fields = Keys({str(key): value for key, value in kind.items()}, place=f"{entry.place}type.")
    prompt, output = fields.text("field_instruction") or "instruction", fields.text("field_output") or "output"
    layout = fields.text("format") or "{instruction} {input} "
    without_input = fields.text("no_input_format") or "{instruction} "
    if layout == without_input == "{instruction}" and not any(fields.text("field_system", "system_prompt") or ""):
        source.format = "prompt_completion"
        fields.any("field_input", "system_format")
        for name, _ in fields.unread():
            imported.note("unknown", f"{fields.place}{name}", "Axolotl has no such key")
        return {"prompt": prompt, "completion": output}
    imported.note(
        "refused",
        f"{entry.place}type (a format of its own)",
        f'prompts are not put together from columns; write lines of {{"prompt": ..., "completion": ...}} from '
        f"{prompt!r} and {output!r}",
    )
    return {}


def _chat(
    entry: Keys,
    imported: Imported,
    source: _Source,
    template: str | None,
    jinja: str | None,
    *,
    is_sharegpt: bool,
) -> dict[str, Any]:
    """Columns of a chat, with the template and the trained turns set in `source`."""
    mapping = {str(key): str(value) for key, value in entry.mapping("message_property_mappings").items()}
    role = entry.text("message_field_role") or mapping.pop("role", "from" if is_sharegpt else "role")
    content = entry.text("message_field_content") or mapping.pop("content", "value" if is_sharegpt else "content")
    mapping.pop("role", None)
    mapping.pop("content", None)
    messages = entry.text("field_messages") or ("conversations" if is_sharegpt else "messages")
    columns = {}
    if (role, content) == ("from", "value"):
        source.format = "sharegpt"
        columns = {} if messages == "conversations" else {"conversations": messages}
    else:
        columns = {} if messages == "messages" else {"messages": messages}
        if (role, content) != ("role", "content"):
            imported.note(
                "refused", f"{entry.place}message_property_mappings", f"rename {role} and {content} to role and content"
            )
    for ours, theirs in mapping.items():
        if ours != theirs:
            imported.note("refused", f"{entry.place}message_property_mappings.{ours}", f"rename {theirs} in the data")
    tools = entry.text("field_tools")
    if tools not in (None, "tools"):
        columns["tools"] = tools
    own, own_jinja = entry.text("chat_template"), entry.text("chat_template_jinja")
    source.template = _template(entry.text("conversation") or own or template, own_jinja if own else jinja, imported)
    _trained(entry, imported, source)
    return columns


def _template(name: str | None, jinja: str | None, imported: Imported) -> str | None:
    if name == "jinja" and jinja is not None and jinja.endswith(".jinja") and "\n" not in jinja:
        return jinja
    if name == "jinja":
        imported.note("unsupported", "chat_template_jinja", "save it as FILE.jinja and set data.template=FILE.jinja")
        return None
    if name is None or name == TOKENIZERS_OWN:
        return None
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name in NEAR_TEMPLATES:
        ours, difference = NEAR_TEMPLATES[name]
        note = ("differs", f"chat_template={name}", f"data.template={ours} {difference}")
    else:
        ours = None
        note = (
            "unsupported",
            f"chat_template={name}",
            "the tokenizer's own is used; data.template takes a .jinja file",
        )
    if all((seen.group, seen.key, seen.reason) != note for seen in imported.notes):
        imported.note(*note)  # type: ignore[arg-type]
    return ours


def _trained(entry: Keys, imported: Imported, source: _Source) -> None:
    """roles_to_train, end-of-turn tokens, flags of single turns, names of roles."""
    trained = {_role(word) for word in (entry.words("roles_to_train") or ["assistant"])}
    if {"user", "assistant"} <= trained:
        source.train_on = "all"
        imported.note("differs", f"{entry.place}roles_to_train", f"data.train_on=all {EVERY_TOKEN}")
    elif trained != {"assistant"}:
        imported.note("unsupported", f"{entry.place}roles_to_train", "the assistant's turns are trained, or all tokens")
    for name in ("train_on_eos", "train_on_eot"):
        if entry.text(name) not in (None, "turn"):
            imported.note(
                "unsupported", f"{entry.place}{name}", "the end of each trained turn is trained, and no other"
            )
    flag = entry.text("message_field_training")
    if flag not in (None, "train", "weight"):
        imported.note("refused", f"{entry.place}message_field_training={flag}", "rename it to train in the data")
    for ours, theirs in entry.mapping("roles").items():
        words = theirs if isinstance(theirs, list) else [theirs]
        odd = [str(word) for word in words if _role(str(word)) != ours]
        if odd:
            imported.note("refused", f"{entry.place}roles.{ours}", f"rename {', '.join(odd)} to {ours} in the data")


def _role(word: str) -> str:
    return next((role for role, words in ROLES.items() if word in words), word)


def _is_chat(source: _Source) -> bool:
    return source.format in ("chat", "sharegpt")


def _one(sources: list[_Source], name: str, imported: Imported) -> Any:
    """What all chats have in common; the first one's where they differ."""
    values = list(dict.fromkeys(getattr(source, name) for source in sources if _is_chat(source)))
    if len(values) > 1:
        imported.note("unsupported", f"data.{name}", f"one for all data sets: {values[0]} is written, not {values[1:]}")
    return values[0] if values else None


def _too_long(keys: Keys, imported: Imported, formats: set[str]) -> str:
    """Axolotl drops what is longer than a row, unless told to cut it off; plain text it always splits."""
    strategy = keys.text("excess_length_strategy") or "drop"
    if strategy == "raise":
        imported.note(
            "unsupported", "excess_length_strategy=raise", "documents that are too long are dropped, and counted"
        )
        strategy = "drop"
    if formats == {"text"}:
        return "split"
    if "text" in formats:
        if strategy == "drop":
            imported.note(
                "differs", "excess_length_strategy", "one rule for all data: text is split, the rest truncated"
            )
        return "auto"
    return strategy


def _held_out(keys: Keys, imported: Imported, inputs_trained: bool, sources: list[_Source]) -> None:
    data = imported.section("data")
    share = keys.number("val_set_size") or 0.0
    if share >= 1:
        imported.note(
            "unsupported", f"val_set_size={share:g}", "a share is needed; 0.05 is written to data.eval_fraction"
        )
        share = 0.05
    data["eval_fraction"] = share
    tests = _entries(keys.any("test_datasets"), "test_datasets")
    found = [source for entry in tests for source in _sources(entry, imported, inputs_trained, None, None)]
    if not found:
        return
    test = found[0].settings
    data["eval_path"] = test["path"]
    data["eval_split"] = test.get("split", "train")
    if len(found) > 1:
        imported.note("unsupported", "test_datasets", f"one is evaluated on, {test['path']}; join the others to it")
    own = {name: test.get(name) for name in ("format", "columns", "name")}
    if len(sources) != 1:
        data |= {name: value for name, value in own.items() if value is not None}
    elif any(own[name] != sources[0].settings.get(name) for name in ("format", "columns")):
        imported.note("unsupported", "test_datasets", "it is read as the training data is: give both the same columns")


_SHARDS = "the whole data set is read; a part of a hub data set is split=train[:10%]"
_ENTRY_KEYS = {
    "trust_remote_code": ("refused", "code that comes with data is not run; use a data set without it"),
    "shards": ("unsupported", _SHARDS),
    "shards_idx": ("unsupported", _SHARDS),
    "preprocess_shards": ("idle", "documents are tokenized as they are read"),
    "skip": ("unsupported", _SHARDS),
    "drop_system_message": ("unsupported", "system messages stay; remove them from the data"),
    "split_thinking": ("unsupported", "put the reasoning into reasoning_content in the data"),
    "field_thinking": ("unsupported", "the reasoning is read from reasoning_content; rename it in the data"),
    "template_thinking_key": ("unsupported", "templates are given reasoning_content"),
    "message_field_training_detail": ("unsupported", "a turn is trained whole or not at all"),
    "input_transform": ("unsupported", "transform the data before"),
    "field_system": ("idle", "the system message is in the conversation"),
    "input_format": ("idle", "the format is read off the file's name"),
    "field_human": ("idle", "not read by this type"),
    "field_model": ("idle", "not read by this type"),
    "field": ("idle", "not read by this type"),
    "field_messages": ("idle", "not read by this type"),
    "message_field_role": ("idle", "not read by this type"),
    "message_field_content": ("idle", "not read by this type"),
    "message_property_mappings": ("idle", "not read by this type"),
    "roles": ("idle", "not read by this type"),
    "roles_to_train": ("idle", "not read by this type"),
    "train_on_eos": ("idle", "not read by this type"),
    "train_on_eot": ("idle", "not read by this type"),
    "chat_template": ("idle", "not read by this type"),
    "chat_template_jinja": ("idle", "not read by this type"),
    "conversation": ("idle", "not read by this type"),
    "field_tools": ("idle", "not read by this type"),
    "message_field_training": ("idle", "not read by this type"),
    "temperature": ("idle", "belongs to distillation"),
    "logprobs_field": ("idle", "belongs to distillation"),
}


def _note_entry_key(entry: Keys, name: str, value: Any, imported: Imported) -> None:
    from distlora.config import nearest

    if name not in _ENTRY_KEYS:
        known = [*_ENTRY_KEYS, "path", "type", "name", "split", "revision", "data_files", "ds_type"]
        imported.note("unknown", f"{entry.place}{name}", f"Axolotl has no such key{nearest(name, known)}")
    elif value not in (None, False, ""):
        group, reason = _ENTRY_KEYS[name]
        if (name, value) not in (
            ("field_thinking", "reasoning_content"),
            ("template_thinking_key", "reasoning_content"),
        ):
            imported.note(group, f"{entry.place}{name}", reason)  # type: ignore[arg-type]
