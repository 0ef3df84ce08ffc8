"""Axolotl's data sets as ours: where the documents are, what they are, what in them is trained."""

import re
from dataclasses import dataclass, field, replace
from typing import Any

from distlora.config import UserError
from distlora.config.objectives import OBJECTIVES
from distlora.data.chat_template import template_choice
from distlora.data.formats import MASK_KEYS
from distlora_launcher.importing.recipe import NOTES, Imported, Keys, note_entry_key

TOKENIZERS_OWN = "tokenizer_default"


def template_of(name: str | None, jinja: str | None, imported: Imported) -> str | None:
    """data.template for chat_template=`name`; `jinja` is chat_template_jinja."""
    if name == "jinja" and jinja is not None and jinja.endswith(".jinja") and "\n" not in jinja:
        return jinja
    if name == "jinja":
        imported.tell("chat_template_jinja")
        return None
    if name is None or name == TOKENIZERS_OWN:
        return None
    try:
        written = template_choice(name).replacement
    except UserError:
        imported.tell("chat_template={name}", name=name)
        return None
    if written is None:
        imported.tell("chat_template={name} | copy", name=name)
    elif f"chat_template={name} | near" in NOTES:
        imported.tell(f"chat_template={name} | near")
    return name


@dataclass(frozen=True, slots=True)
class _Shared:
    """Keys beside the data sets, which hold for all of them."""

    trains_inputs: bool
    template: str | None
    jinja: str | None

    def template_for(self, entry: Keys, imported: Imported, name: str | None = None) -> str | None:
        """Return data.template of a data set: `name`, its own or else the shared one."""
        own, own_jinja = entry.text("chat_template"), entry.text("chat_template_jinja")
        return template_of(name or own or self.template, own_jinja if own else self.jinja, imported)


AS_THEY_ARE = ("", "passthrough", "user_defined.default")
"""Types whose texts go to the tokenizer as the data has them, unless a format is set."""


PREFERENCES: dict[str, dict[str, tuple[str, float | None]]] = {
    "dpo": {
        "beta": ("rl_beta dpo_beta", 0.1),
        "label_smoothing": ("dpo_label_smoothing", None),
        "sft_weight": ("rpo_alpha", None),
    },
    "ipo": {"beta": ("rl_beta dpo_beta", 0.1), "sft_weight": ("rpo_alpha", None)},
    "orpo": {"beta": ("rl_beta orpo_alpha", 0.1)},
    "simpo": {"beta": ("rl_beta", 0.1), "target_margin": ("simpo_gamma", 0.5), "sft_weight": ("cpo_alpha", 1.0)},
    "kto": {
        "beta": ("rl_beta", 0.1),
        "desirable_weight": ("kto_desirable_weight", None),
        "undesirable_weight": ("kto_undesirable_weight", None),
    },
    "grpo": {"beta": ("rl_beta", None)},
    "reward": {"center_rewards": ("center_rewards_coefficient", None)},
    "process_reward": {},
}
"""Our settings of each objective: their keys in Axolotl, and the value that TRL's trainer takes without one."""
SCORES = {"reward_model": "reward", "process_reward_model": "process_reward"}
"""Our objective by the key that asks for it."""


def convert_objective(keys: Keys, imported: Imported) -> None:
    """Set train.objective and its settings. Raises UserError for what is trained by another one."""
    scores, name = [name for name in SCORES if keys.flag(name)], keys.text("rl")
    if name is None and not scores:
        return
    if len(given := [f"rl={name}"] * (name is not None) + [f"{score}=true" for score in scores]) > 1:
        raise UserError(f"{' and '.join(given)}: a run has one objective; leave {len(given) - 1} of them out")
    key = f"{scores[0]}=true" if scores else f"rl={name}"
    kind = SCORES[scores[0]] if scores else {"gdpo": "grpo"}.get(str(name), name)
    if kind not in PREFERENCES:
        known = ", ".join([*(name for name in PREFERENCES if name not in SCORES.values()), "gdpo"])
        raise UserError(
            f"{key}: distlora imports rl: {known}; set one of these, or remove the key to import the supervised "
            "fine-tuning"
        )
    if (OBJECTIVES[kind].reference or scores) and keys.text("adapter") is None:
        does = "trains all of the model" if scores else "keeps a second model as the reference"
        ours = "trains an adapter and the score" if scores else "takes the base under the adapter"
        raise UserError(f"{key} without an adapter: Axolotl {does}, and distlora {ours}; set adapter: qlora")
    train = imported.section("train")
    train["objective"] = kind
    for setting, (theirs, default) in PREFERENCES[kind].items():
        value = keys.number(*theirs.split())
        if (value := default if value is None else value) is not None:
            train[setting] = value
    if scores:
        imported.tell("{name}=true", name=scores[0])
    if kind in ("orpo", "kto"):
        imported.tell(f"rl={kind}")
    elif train.get("sft_weight"):
        key = PREFERENCES[kind]["sft_weight"][0]
        imported.tell("{key}={weight:g} | sft_weight", key=key, weight=train["sft_weight"])


CHOICES = {
    "loss_type": ("dapo", "grpo", "dr_grpo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
}
"""Keys of trl that are settings of rollout with these values, the default first."""
SCALES = {"true": "group", "false": "none"}
"""Values of scale_rewards as booleans."""
WHOLE = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
"""Keys of trl that sampling has not, with the value that changes nothing."""


def _rollout(keys: Keys, imported: Imported) -> None:
    """Convert how answers are sampled, and their rewards."""
    trl, data = Keys(keys.mapping("trl"), place="trl."), imported.section("data")
    rewards, weights = trl.words("reward_funcs") or [], trl.words("reward_weights")
    data |= {"rewards": rewards, "reward_weights": [float(weight) for weight in weights or ()]}
    longest = trl.integer("max_completion_length")
    if longest is None:
        imported.tell("trl.max_completion_length (not set)")
    longest = longest or 256
    data["sequence_length"] += longest
    imported.tell("sequence_len | prompts", longest=longest)
    given: dict[str, Any] = {name: _choice(trl, name, imported) for name in CHOICES}
    flags = ("mask_truncated_completions", "use_bias_correction_kl")
    given |= {name: trl.flag(name) for name in flags if trl.any(name) is not None}
    given |= {name: trl.integer(name) for name in ("num_generations", "num_iterations")}
    given |= {name: trl.number(name) for name in ("temperature", "epsilon", "epsilon_high")}
    rollout = imported.section("rollout")
    rollout |= {"max_new_tokens": longest} | {name: value for name, value in given.items() if value is not None}
    if (beta := trl.number("beta")) is not None:
        imported.section("train")["beta"] = beta
    by_itself = trl.text("multi_objective_aggregation") == "normalize_then_sum" or keys.text("rl") == "gdpo"
    if by_itself and len(rewards) > 1:
        imported.tell("trl.multi_objective_aggregation=normalize_then_sum")
    for name, neutral in WHOLE.items():
        if (value := trl.number(name)) not in (None, neutral):
            imported.tell("trl.{name}={value:g}", name=name, value=value)
    if trl.flag("use_vllm"):
        imported.tell("trl.use_vllm")
    for name, value in [("vllm", keys.any("vllm")), *trl.unread()]:
        if value not in (None, False):
            imported.tell("trl.{name}" + " | shown" * name.startswith(("vllm", "log_", "num_completions")), name=name)


def _choice(trl: Keys, name: str, imported: Imported) -> str | None:
    """Return a value of CHOICES, or None if it is unset; the default replaces a value that is not supported."""
    if name == "scale_rewards" and (scale := SCALES.get(str(trl.any(name)).lower())) is not None:
        return scale
    value, known = trl.text(name), CHOICES[name]
    if value is None or value in known:
        return value
    imported.tell("trl.{name}={value} | word", name=name, value=value, known=", ".join(known), written=known[0])
    return known[0]


def preference_columns(entry: Keys, imported: Imported, shared: _Shared) -> tuple[dict[str, Any], bool, str | None]:
    """Return (data.columns, whether a chat template renders it, data.template) of a data set of pairs."""
    name = str(entry.any("type") or "")
    base, _, form = name.partition(".")
    if base == "chat_template" and form in ("", "default", "argilla_chat", "argilla"):
        _check_roles(entry, imported)
        prompt = {} if form.startswith("argilla") else {"prompt": entry.text("field_messages") or "messages"}
        return _renamed(prompt | _answers(entry)), True, shared.template_for(entry, imported)
    if name == "bradley_terry.chat_template":  # Texts, with their question in `input` and perhaps `system`.
        return {}, True, shared.template_for(entry, imported)
    if base in ("chatml", "llama3") and form in ("ultra", "argilla_chat"):  # Both answers are lists of messages.
        return _renamed(_answers(entry)), True, template_of(base, None, imported)
    if name in AS_THEY_ARE:
        return _renamed({"prompt": entry.text("field_prompt") or "prompt", **_answers(entry)}), False, None
    imported.tell("{place}type | pairs", place=entry.place)
    return {}, False, None


def _answers(entry: Keys) -> dict[str, str]:
    return {side: entry.text(f"field_{side}") or side for side in ("chosen", "rejected")}


def _renamed(columns: dict[str, str]) -> dict[str, Any]:
    """Return the columns whose name differs from the key."""
    return {key: column for key, column in columns.items() if key != column}


def _check_roles(entry: Keys, imported: Imported) -> None:
    """Messages are read with role and content, or with from and value."""
    mapping = {str(key): str(value) for key, value in entry.mapping("message_property_mappings").items()}
    names = tuple(entry.text(f"message_field_{ours}") or mapping.get(ours, ours) for ours in ("role", "content"))
    if names not in (("role", "content"), ("from", "value")):
        imported.tell("{place}message_property_mappings", place=entry.place, role=names[0], content=names[1])
    for ours, words in _words_by_role(entry):
        odd = [word for word in words if word != ours]
        if odd and names[0] == "role":
            imported.tell("{place}roles.{ours}", place=entry.place, ours=ours, odd=", ".join(odd))


def _words_by_role(entry: Keys) -> list[tuple[str, list[str]]]:
    """Return (role, the data's words for it) of an entry's `roles`."""
    roles = entry.mapping("roles").items()
    return [
        (ours, [str(word) for word in (theirs if isinstance(theirs, list) else [theirs])]) for ours, theirs in roles
    ]


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

FILE_TYPES = {"json": (".json", ".jsonl"), "csv": (".csv",), "parquet": (".parquet",), "text": (".txt",)}
"""Values of path that name a reader for data_files, and of ds_type: the files that we read so, by their endings."""


@dataclass(slots=True)
class _Source:
    """A data set in distlora's terms, with the choices that all data sets share."""

    settings: dict[str, Any] = field(default_factory=dict)
    format: str = "auto"
    template: str | None = None
    train_on: str = "assistant"
    is_chat: bool = False
    """True if a chat template renders it."""


def convert_data(keys: Keys, imported: Imported) -> None:
    """Convert data sets, held-out data and templates."""
    data = imported.section("data")
    streams = keys.any("pretraining_dataset")
    entries = _entries(keys.any("datasets"), "datasets") + _entries(streams, "pretraining_dataset")
    jinja = keys.text("chat_template_jinja")
    template = keys.text("chat_template") or (jinja and "jinja")
    shared = _Shared(keys.flag("train_on_inputs"), template, jinja)
    sources = [source for entry in entries for source in _sources(entry, imported, shared)]
    if len(sources) == 1:
        data |= sources[0].settings
    elif sources:
        data["sources"] = [source.settings for source in sources]
    if streams or keys.flag("streaming"):
        data["streaming"] = True
    data["template"] = _one(sources, "template", imported)
    data["train_on"] = _one(sources, "train_on", imported) or "assistant"
    is_chat = any(source.is_chat for source in sources)
    if template not in (None, TOKENIZERS_OWN) and not is_chat:
        imported.tell("chat_template={template} | unused", template=template)
    if turns := keys.words("eot_tokens"):
        if is_chat and not keys.flag("tokenizer_use_mistral_common"):
            data["eot_tokens"] = turns
        else:
            imported.tell("eot_tokens=[{turns}]", turns=", ".join(turns))
    if keys.flag("dataset_exact_deduplication"):
        data["deduplicate"] = True
    _images(keys, imported)
    data["sequence_length"] = keys.integer("sequence_len") or 512
    if any(source.format == "preference" for source in sources):
        data["sequence_length"] *= 2
        imported.tell("sequence_len")
    data["too_long"] = _too_long(keys, imported, {source.format for source in sources})
    if imported.section("train").get("objective") == "grpo":
        _rollout(keys, imported)
    _held_out(keys, imported, shared, sources)


OF_AUDIO = ("VoxtralProcessor", "Qwen2AudioProcessor", "GraniteSpeechProcessor", "WhisperProcessor")
"""Values of processor_type for models of speech."""
TOWERS = r"vis(ion|ual)|projector|connector|aligner|merger"
"""Names of modules outside of a text model, in a regular expression of targets."""


def _images(keys: Keys, imported: Imported) -> None:
    """Convert the processor of a model that takes images, and the bound of their size."""
    kind, data = keys.text("processor_type"), imported.section("data")
    if kind is None:
        return
    if kind in OF_AUDIO or imported.options["adapter"] == "full":
        imported.tell("processor_type={kind} | " + ("audio" if kind in OF_AUDIO else "full"), kind=kind)
        return
    data["images"] = True
    adapters_beside_images(imported)
    if (size := keys.integer("image_size")) is not None:
        data["image_max_pixels"] = size * size
        imported.tell("image_size={size}", size=size)
    if (algorithm := keys.text("image_resize_algorithm")) is not None:
        imported.tell("image_resize_algorithm={algorithm}", algorithm=algorithm)


def adapters_beside_images(imported: Imported) -> None:
    """Note adapters on a vision tower, and leave out trained modules, which a run with images does not have."""
    adapter = imported.section("adapter")
    targets = adapter.get("target_modules")
    if isinstance(targets, str) and re.search(TOWERS, targets):
        imported.tell("lora_target_modules={targets} | tower", targets=targets)
    if saved := adapter.pop("modules_to_save", None):
        imported.tell("lora_modules_to_save={names} | images", names=f"[{', '.join(saved)}]")


def _entries(value: Any, name: str) -> list[Keys]:
    items = value if isinstance(value, list) else [] if value is None else [value]
    entries = []
    for index, item in enumerate(items):
        entry = {"path": item} if isinstance(item, str) else item if isinstance(item, dict) else {}
        if name == "pretraining_dataset":
            entry = {"type": "pretrain", **entry}
        entries.append(Keys({str(key): part for key, part in entry.items()}, place=f"{name}[{index}]."))
    return entries


def _sources(entry: Keys, imported: Imported, shared: _Shared) -> list[_Source]:
    """Return the entry as one source, or one a file where it lists files."""
    source = _Source()
    place: dict[str, Any] = {name: entry.text(name) for name in ("name", "split", "revision")}
    columns = _format(entry, imported, source, shared)
    place |= {"reasoning_key": _reasoning(entry, imported), "columns": columns or None}
    place = {name: value for name, value in place.items() if value is not None}
    if shared.trains_inputs and source.format == "alpaca":
        imported.tell("train_on_inputs | prompts", place=entry.place)
    elif shared.trains_inputs and source.is_chat and source.format != "preference":
        source.train_on = "all"
        imported.tell("train_on_inputs")
    path, files = entry.text("path"), entry.words("data_files")
    reader = entry.text("ds_type")
    if reader is not None and not any((path or "").endswith(suffix) for suffix in FILE_TYPES.get(reader, ())):
        imported.tell("{place}ds_type={reader}", place=entry.place, reader=reader)
    if path is not None and re.match(r"\w+://", path):
        imported.tell("{place}path={path}", place=entry.place, path=path)
    if files and path in FILE_TYPES:
        paths = files
    else:
        if files:
            imported.tell("{place}data_files", place=entry.place, path=path)
        paths = [] if path is None else [path]
    for name, value in entry.unread():
        note_entry_key(entry, name, value, imported)
    base = {"format": source.format, **place}
    return [replace(source, settings={"path": file, **base}) for file in paths]


def _format(entry: Keys, imported: Imported, source: _Source, shared: _Shared) -> dict[str, Any]:
    """Set the source's format and what belongs to chats; returns the columns."""
    form = OBJECTIVES[imported.section("train").get("objective", "sft")].data
    if form == "judged":
        return judged_columns(entry, imported, source)
    if form == "prompts":
        source.format, source.is_chat, source.template = "prompt_only", True, shared.template_for(entry, imported)
        if entry.any("type"):
            imported.tell("{place}type | prompts", place=entry.place)
        return {}
    if form == "steps":
        source.format, kind = "steps", entry.text("type")
        if (separator := entry.any("step_separator")) is not None:
            imported.section("data")["step_separator"] = str(separator)
        if kind != "stepwise_supervised":
            imported.tell("{place}type={name}", place=entry.place, name=kind or "(not set)")
        return {}
    if form == "pairs":
        source.format = "preference"
        columns, source.is_chat, source.template = preference_columns(entry, imported, shared)
        return columns
    kind = entry.any("type")
    if isinstance(kind, dict):
        imported.tell("{place}type (a custom format)", place=entry.place)
        return {}
    name = str(kind or "")
    base = re.split(r"[:.]", name)[0]
    if base in ("chat_template", "sharegpt"):
        source.format, source.is_chat = "chat", True
        return _chat(entry, imported, source, shared, is_sharegpt=base == "sharegpt")
    if base in ("completion", "pretrain"):
        source.format = "text"
        column = entry.text("field", "text_column") or "text"
        return {} if column == "text" else {"text": column}
    if base in ("alpaca", "alpaca_chat", "alpaca_w_system"):
        source.format = "alpaca"
        if name not in OWN_WORDING:
            imported.tell("{place}type={name} | words", place=entry.place, name=name)
        imported.tell("{place}type={name} | template", place=entry.place, name=name)
        return dict(ALPACA_COLUMNS.get(name, {}))
    which = " | segments" if base == "input_output" else ""
    imported.tell("{place}type={name}" + which, place=entry.place, name=name or "(not set)")
    return {}


JUDGED_QUESTIONS = {"argilla": "instruction", "intel": "question", "prompt_pairs": "prompt", "ultra": "prompt"}
"""Columns of a question that the chat template renders, by the form of KTO's types chatml.FORM and llama3.FORM."""


def judged_columns(entry: Keys, imported: Imported, source: _Source) -> dict[str, Any]:
    """Return data.columns of a data set of judged answers; set the source's format and template."""
    kind = entry.any("type")
    names = kind if isinstance(kind, dict) else {}
    base, _, form = ("" if isinstance(kind, dict) else str(kind or "")).partition(".")
    if base in ("chatml", "llama3") and (form in JUDGED_QUESTIONS or form == "argilla_chat"):
        source.is_chat, source.template = True, template_of(base, None, imported)
        if form == "argilla_chat":
            source.format = "chat"
            return {"messages": "completion"}
        source.format = "alpaca"
        return _renamed({"instruction": JUDGED_QUESTIONS[form], "output": "completion"})
    written = [name for name in ("prompt_format", "completion_format") if names.get(name)]
    if written or f"{base}.{form}".strip(".") not in AS_THEY_ARE:
        imported.tell("{place}type | judged", place=entry.place)
    source.format = "prompt_completion"
    return _renamed({key: str(names.get(f"field_{key}") or key) for key in ("prompt", "completion", "label")})


def _reasoning(entry: Keys, imported: Imported) -> str | None:
    """Return reasoning_key: the key of a message that templates are given as reasoning_content."""
    theirs = entry.text("field_thinking") or "reasoning_content"
    given = entry.text("template_thinking_key") or "reasoning_content"
    if theirs == given and given in ("reasoning_content", "thinking"):  # Templates are given both as they are.
        return None
    if given != "reasoning_content":
        imported.tell("{place}template_thinking_key={given}", place=entry.place, given=given, theirs=theirs)
        return None
    return theirs


def _chat(entry: Keys, imported: Imported, source: _Source, shared: _Shared, *, is_sharegpt: bool) -> dict[str, Any]:
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
            imported.tell("{place}message_property_mappings", place=entry.place, role=role, content=content)
    for ours, theirs in mapping.items():
        if ours != theirs:
            imported.tell("{place}message_property_mappings.{ours}", place=entry.place, ours=ours, theirs=theirs)
    tools = entry.text("field_tools")
    if tools not in (None, "tools"):
        columns["tools"] = tools
    source.template = shared.template_for(entry, imported, entry.text("conversation"))
    _trained(entry, imported, source)
    return columns


def _trained(entry: Keys, imported: Imported, source: _Source) -> None:
    """roles_to_train, end-of-turn tokens, flags of single turns, names of roles."""
    trained = {_role(word) for word in (entry.words("roles_to_train") or ["assistant"])}
    if {"user", "assistant"} <= trained:
        source.train_on = "all"
        imported.tell("{place}roles_to_train | all", place=entry.place)
    elif trained != {"assistant"}:
        imported.tell("{place}roles_to_train", place=entry.place)
    for name in ("train_on_eos", "train_on_eot"):
        if entry.text(name) not in (None, "turn"):
            imported.tell("{place}{name} | ends", place=entry.place, name=name)
    flag = entry.text("message_field_training")
    if flag not in (None, *MASK_KEYS):
        imported.tell("{place}message_field_training={flag}", place=entry.place, flag=flag)
    for ours, words in _words_by_role(entry):
        if odd := [word for word in words if _role(word) != ours]:
            imported.tell("{place}roles.{ours}", place=entry.place, ours=ours, odd=", ".join(odd))


def _role(word: str) -> str:
    return next((role for role, words in ROLES.items() if word in words), word)


def _one(sources: list[_Source], name: str, imported: Imported) -> Any:
    """Return the value that all chats share; the first chat's where they differ."""
    values = list(dict.fromkeys(getattr(source, name) for source in sources if source.is_chat))
    if len(values) > 1:
        imported.tell("data.{name}", name=name, first=values[0], others=values[1:])
    return values[0] if values else None


def _too_long(keys: Keys, imported: Imported, formats: set[str]) -> str:
    """Axolotl drops what is longer than a row, unless told to cut it off; plain text it always splits."""
    strategy = keys.text("excess_length_strategy") or "drop"
    if strategy == "raise":
        imported.tell("excess_length_strategy=raise")
        strategy = "drop"
    if formats == {"text"}:
        return "split"
    if "text" in formats and strategy == "drop":
        imported.tell("excess_length_strategy")
    return "auto" if "text" in formats else strategy


def _held_out(keys: Keys, imported: Imported, shared: _Shared, sources: list[_Source]) -> None:
    data = imported.section("data")
    share = keys.number("val_set_size") or 0.0
    if share >= 1:
        imported.tell("val_set_size={share:g}", share=share)
        share = 0.05
    data["eval_fraction"] = share
    tests = _entries(keys.any("test_datasets"), "test_datasets")
    aside = Imported()  # What is said of a test set holds for the one that is evaluated on.
    held_out = [source for entry in tests for source in _sources(entry, aside, shared)]
    if not held_out:
        if tests:
            imported.tell("test_datasets | no path")
        return
    test = held_out[0]
    data["eval_path"] = test.settings["path"]
    data["eval_split"] = test.settings.get("split", "train")
    if len(held_out) > 1:
        imported.tell("test_datasets", path=data["eval_path"])
    imported.notes += [note for note in aside.notes if note.group != "changed" and note.key.startswith(tests[0].place)]
    if len(sources) != 1:
        own = {name: test.settings.get(name) for name in ("format", "columns", "name", "reasoning_key")}
        data |= {name: value for name, value in own.items() if value is not None}
    read = {name: data.get(name) for name in ("format", "columns", "reasoning_key")}
    is_same = data.get("path") == data["eval_path"]
    read["name"] = data.get("name") if is_same or "path" not in data else None
    read["revision"] = data.get("revision") if is_same else None
    own = {name: test.settings.get(name) for name in read}
    if test.is_chat:
        read |= {"template": data["template"], "train_on": data["train_on"]}
        own |= {"template": test.template, "train_on": test.train_on}
    for name, value in read.items():
        if own[name] != value:
            theirs, ours = own[name] or "(not set)", value or "null"
            imported.tell("test_datasets: {name}={theirs}", name=name, theirs=theirs, ours=ours)
