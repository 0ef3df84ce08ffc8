"""LLaMA-Factory's settings as ours: its keys under Axolotl's names, its own defaults, and dataset_info.json.

Read off LLaMA-Factory ff6d4d1 (2026-08): its arguments, its data parser and its trainers. Most keys mean what a key of
Axolotl means, and axolotl.py converts them; keys without an equal are in llamafactory_keys.yaml.
"""

import itertools
import re
from pathlib import Path
from typing import Any

from distlora.config import UserError, nearest
from distlora.config.json_files import read_object
from distlora.config.objectives import OBJECTIVES
from distlora.data.chat_template import OF_TOKENIZER, template_choice
from distlora.data.files import read_file
from distlora.data.formats import FORMATS, ROLES, SHAREGPT_ROLES, VERDICT_KEYS
from distlora_launcher.importing import axolotl
from distlora_launcher.importing.axolotl_data import adapters_beside_images
from distlora_launcher.importing.recipe import Imported, Keys, Note

NAMES = {
    "base_model": "model_name_or_path",
    "revision_of_model": "model_revision",
    "tokens": "add_special_tokens",
    "lora_model_dir": "adapter_name_or_path",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_target",
    "lora_modules_to_save": "additional_target",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
    "peft_init_lora_weights": "pissa_init",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "sample_packing": "packing",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "num_epochs": "num_train_epochs",
    "early_stopping_patience": "early_stopping_steps",
    "wandb_name": "run_name",
    "adapter": "finetuning_type",
    "load_in_8bit": "quantization_bit",
    "model_config": "moe_aux_loss_coef",
}
"""LLaMA-Factory's name of each key that axolotl.py reads under another one."""
DEFAULTS: dict[str, Any] = {
    "finetuning_type": "lora",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "num_train_epochs": 3.0,
    "optim": "adamw_torch",
    "logging_steps": 500,
    "save_total_limit": 1_000_000,
    "cutoff_len": 2048,
    "stage": "sft",
}
"""Values of keys that a file leaves out."""
IMAGE_PIXELS = {"image_max_pixels": 768 * 768, "image_min_pixels": 32 * 32}
"""Its bounds of an image's size."""
LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
"""Our objective by pref_loss."""
WRITES_THOUGHTS = ("qwen3", "qwen3_vl", "qwen3_5", "qwen3_6", "deepseekr1", "exaone4", "glm4_moe", "glm4_7", "glmz1")
"""Templates with which LLaMA-Factory writes an empty thought into an answer without one."""
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
"""Our keys of a record of instructions, by the key of "columns"."""
CHATS = {("from", "value"): ("sharegpt", SHAREGPT_ROLES), ("role", "content"): ("chat", {role: role for role in ROLES})}
"""Our format, and its words for speakers, by role_tag and content_tag."""
NOT_READ = {
    "script_url": "scripts of data sets are not run",
    "cloud_file_name": "copy the file to this node",
    "folder": "download the data set and name its files",
    "num_samples": "name a slice of the hub's split, or write so many records into a file of their own",
}
"""Keys of dataset_info.json that are refused, and the reason."""
SPEAKERS = {
    "user": "user",
    "assistant": "assistant",
    "observation": "tool",
    "function": "assistant",
    "system": "system",
}
"""Our role by the tag of a speaker, without its ending _tag."""


def convert(values: dict[str, Any], *, processes: int | None = None) -> Imported:
    """Return a parsed LLaMA-Factory file as our settings. Raises UserError where nothing sensible can be made of it.

    processes: the number of GPUs that it is for; None: as many as the file itself asks for. Paths of data begin at the
    working folder, as there.
    """
    keys, imported = Keys(_shared(values), names=NAMES), Imported(tool="LLaMA-Factory")
    imported.processes = processes = processes or keys.integer("ray_num_workers") or 1
    rank = keys.integer("lora_r")
    if rank is not None and keys.any("lora_alpha") is None:
        keys.values["lora_alpha"] = 2 * rank
    if not keys.flag("do_train"):
        raise UserError(
            "do_train is not true: the file does not train; add do_train: true, or use `distlora generate`, "
            "`distlora eval`, `distlora merge` or `distlora export`"
        )
    convert_stage(keys, imported)
    axolotl.convert_model(keys, imported)
    axolotl.convert_adapter(keys, imported)
    convert_quantization(keys, imported)
    convert_data(keys, imported)
    axolotl.convert_training(keys, imported, processes)
    imported.notes = [Note(note.group, _their_name(note.key), note.reason) for note in imported.notes]
    for name in NAMES.keys() & values.keys():
        imported.note("unknown", name, f"not a known key of LLaMA-Factory (did you mean {NAMES[name]!r}?)")
    return imported


def _their_name(key: str) -> str:
    if key == "load_in_8bit=true":
        return "quantization_bit=8"
    name = re.split("[ =]", key, maxsplit=1)[0]
    return NAMES.get(name, name) + key.removeprefix(name)


def _shared(values: dict[str, Any]) -> dict[str, Any]:
    """Return the file's keys under the names that axolotl.py reads, with LLaMA-Factory's defaults."""
    given = DEFAULTS | {name: value for name, value in values.items() if name not in NAMES and value is not None}
    ours = {theirs: name for name, theirs in NAMES.items()}
    shared = {ours.get(name, name): value for name, value in given.items()}
    kind = given["finetuning_type"]
    if kind not in ("lora", "full"):
        raise UserError(f"finetuning_type={kind}: only lora and full are supported; set finetuning_type: lora")
    shared["adapter"] = "lora" if kind == "lora" else None
    read = Keys(given)
    for name in ("max_steps", "warmup_steps"):  # 0 and -1 stand for unset.
        if (read.number(name) or 0) <= 0:
            shared.pop(name, None)
    evaluates = given.get("eval_strategy", given.get("evaluation_strategy", "no"))
    strategies = {"save": (given.get("save_strategy", "steps"), 500), "eval": (evaluates, given["logging_steps"])}
    for name, (strategy, default) in strategies.items():
        if strategy != "steps":
            shared.pop(f"{name}_steps", None)
        else:
            shared.setdefault(f"{name}_steps", default)
    if kind == "lora":
        targets, steps = _words(given.get("lora_target", "all")), read.integer("pissa_iter")
        shared["lora_r"] = given.get("lora_rank", 8)
        shared["lora_target_modules"] = "all-linear" if "all" in targets else targets
        start = "pissa" if steps == -1 else f"pissa_niter_{16 if steps is None else steps}"
        shared["peft_init_lora_weights"] = start if read.flag("pissa_init") else None
    if read.flag("create_new_adapter") and "lora_model_dir" in shared:  # The run starts a new one.
        shared["adapter_name_or_path"] = shared.pop("lora_model_dir")
    shared["lora_modules_to_save"] = _words(given.get("additional_target"))
    shared["tokens"] = _words(given.get("add_tokens")) + _words(given.get("add_special_tokens"))
    bits = read.integer("quantization_bit")
    shared |= {"quantization_bit": bits, "load_in_8bit": bits == 8, "load_in_4bit": bits == 4}
    shared["gradient_checkpointing"] = not read.flag("disable_gradient_checkpointing")
    shared["bf16"] = read.flag("bf16") or read.flag("pure_bf16") or not read.flag("fp16")
    if read.flag("neat_packing") or (given["stage"] == "pt" and "packing" not in given):
        shared["sample_packing"] = True
    if (weight := given.get("moe_aux_loss_coef")) is not None:
        shared["model_config"] = {"output_router_logits": True, "router_aux_loss_coef": weight}
    return shared | {f"use_{name}": True for name in _words(given.get("report_to")) if name in axolotl.TRACKERS}


def _words(value: Any) -> list[str]:
    """Return a list, also of names with commas between them."""
    items = value if isinstance(value, list) else str("" if value is None else value).split(",")
    return [name for item in items if (name := str(item).strip())]


def convert_stage(keys: Keys, imported: Imported) -> None:
    """Set train.objective and its settings. Raises UserError for what is not trained here."""
    stage, loss = keys.text("stage"), keys.text("pref_loss") or "sigmoid"
    for name in ("pissa_iter", "disable_gradient_checkpointing", "save_strategy", "add_tokens", "enable_thinking"):
        keys.any(name)
    for name in _words(keys.any("report_to")):
        if name not in ("none", *axolotl.TRACKERS):
            imported.tell("report_to={name}", name=name)
    if stage not in ("pt", "sft", "rm", "dpo", "kto"):
        raise UserError(f"stage={stage}: distlora imports pt, sft, rm, dpo and kto; see docs/rl.md for sampled answers")
    if stage == "dpo" and loss not in LOSSES:
        imported.tell("pref_loss={loss}", loss=loss)
    objective = {"rm": "reward", "kto": "kto", "dpo": LOSSES.get(loss, "dpo")}.get(str(stage), "sft")
    if keys.values["adapter"] is None and (OBJECTIVES[objective].reference or objective == "reward"):
        raise UserError(
            f"stage={stage} with finetuning_type: full: distlora trains adapters there, over the base as reference; "
            "set finetuning_type: lora"
        )
    given = {
        "beta": keys.number("pref_beta"),
        "label_smoothing": keys.number("dpo_label_smoothing"),
        "sft_weight": keys.number("pref_ftx"),
        "target_margin": keys.number("simpo_gamma"),
        "desirable_weight": keys.number("kto_chosen_weight"),
        "undesirable_weight": keys.number("kto_rejected_weight"),
    }
    given["beta"] = 0.1 if given["beta"] is None else given["beta"]
    if objective == "simpo" and given["target_margin"] is None:
        given["target_margin"] = 0.5
    if objective != "sft":
        read = OBJECTIVES[objective].settings
        train = {name: value for name, value in given.items() if value is not None and name in read}
        imported.section("train").update(objective=objective, **train)
    if stage in ("rm", "kto"):
        imported.tell(f"stage={stage}")


def convert_quantization(keys: Keys, imported: Imported) -> None:
    """Convert the bits of the base, and adapters to start from."""
    bits, kind = keys.integer("quantization_bit"), keys.text("quantization_type")
    method, doubled = keys.text("quantization_method") or "bnb", keys.any("double_quantization")
    if bits not in (None, 4, 8):
        imported.options["quant"] = "nf4"
        imported.tell("quantization_bit={bits}", bits=bits)
    theirs = {"quantization_type": kind, "quantization_method": method, "double_quantization": doubled}
    for name, value in theirs.items():
        if bits == 4 and value not in (None, "nf4", "bnb", True):
            imported.tell("{name}={value} | NF4", name=name, value=value)
    adapters = _words(keys.any("lora_model_dir", "adapter_name_or_path"))
    is_new = keys.flag("create_new_adapter")
    if adapters and (is_new or len(adapters) > 1):
        imported.tell("adapter_name_or_path={names}" + " | new" * is_new, names=", ".join(adapters))


def convert_data(keys: Keys, imported: Imported) -> None:
    """Convert the data sets, held-out data and the template."""
    data, stage = imported.section("data"), str(keys.text("stage"))
    sources = [_source(name, keys, imported, stage) for name in _words(keys.any("dataset"))]
    if not sources:
        raise UserError("dataset is not set; it names data sets of dataset_info.json to train on")
    _mixture(keys, imported, sources)
    data |= sources[0] if len(sources) == 1 else {"sources": sources}
    data["streaming"] = keys.flag("streaming")
    data["template"] = _template(keys, imported, stage)
    whole, last = keys.flag("train_on_prompt"), keys.flag("mask_history")
    data["train_on"] = "all" if whole else "last" if last else "assistant"
    data["sequence_length"] = keys.integer("cutoff_len") or DEFAULTS["cutoff_len"]
    packs, is_neat = keys.flag("sample_packing"), keys.flag("neat_packing")
    data["too_long"] = "split" if stage == "pt" and packs else "drop" if stage == "rm" else "truncate"
    if stage != "pt":
        imported.tell("cutoff_len | too long", what="are left out" if stage == "rm" else "lose their end")
    if packs and stage == "pt":
        imported.tell("stage=pt")
    elif packs and not is_neat:
        imported.tell("packing=true")
    if any(source["format"] == "preference" for source in sources):
        data["sequence_length"] *= 2
        imported.tell("cutoff_len | pairs")
    share = keys.number("val_size") or 0.0
    if share >= 1:
        imported.tell("val_size={share:g}", share=share)
    data["eval_fraction"] = share if share < 1 else 0.05
    if held_out := _words(keys.any("eval_dataset")):
        tests = [_source(name, keys, imported, stage) for name in held_out]
        if len(tests) > 1 or any(_reading(tests[0]) != _reading(source) for source in sources):
            imported.tell("eval_dataset={names}", names=", ".join(held_out), first=held_out[0])
        data |= {"eval_path": tests[0]["path"], "eval_split": tests[0].get("split", "train")}
    bounds = {name: keys.integer(name) for name in IMAGE_PIXELS}
    for name, size in bounds.items():
        if size is not None and not data.get("images"):
            imported.tell("{name}={size} | no images", name=name, size=size)
    if data.get("images"):
        if imported.options["adapter"] == "full":
            data["images"] = False
            imported.tell("finetuning_type=full | images")
            return
        adapters_beside_images(imported)
        data |= {name: IMAGE_PIXELS[name] if size is None else size for name, size in bounds.items()}
        if bounds["image_max_pixels"] is None:
            imported.tell("image_max_pixels={most} (not set)", most=IMAGE_PIXELS["image_max_pixels"])


def _reading(source: dict[str, Any]) -> dict[str, Any]:
    return {name: source.get(name) for name in ("format", "columns", "ignore_columns", "name")}


def _mixture(keys: Keys, imported: Imported, sources: list[dict[str, Any]]) -> None:
    """Give sources the weights of an interleaved mixture."""
    strategy, shares = keys.text("mix_strategy") or "concat", _words(keys.any("interleave_probs"))
    if strategy == "concat" or len(sources) < 2:
        return
    numbers = [Keys({"interleave_probs": share}).number("interleave_probs") for share in shares]
    weights = numbers or [1.0] * len(sources)
    if len(weights) != len(sources):
        raise UserError(f"interleave_probs has {len(weights)} numbers for {len(sources)} data sets; give each one")
    for source, weight in zip(sources, weights, strict=True):
        source["weight"] = weight
    imported.section("data")["stopping_strategy"] = (
        "first_exhausted" if strategy == "interleave_under" else "all_exhausted"
    )
    imported.tell("interleave_probs")


def _template(keys: Keys, imported: Imported, stage: str) -> str | None:
    """Return data.template."""
    name = keys.text("template")
    if name is None:
        return None
    if stage == "pt":
        imported.tell("template={name} | text", name=name)
        return None
    if name not in OF_TOKENIZER and name.removesuffix("_nothink") in OF_TOKENIZER:
        imported.tell("template={name} | own", name=name)
        return name.removesuffix("_nothink")
    try:
        template_choice(name)
    except UserError:
        imported.tell("template={name}", name=name)
        return None
    if name in WRITES_THOUGHTS:
        imported.tell("template={name} | thoughts", name=name)
    return name


def _source(name: str, keys: Keys, imported: Imported, stage: str) -> dict[str, Any]:
    """Return a data set of dataset_info.json as a source: its place, format, columns, and what is not read."""
    folder = keys.text("dataset_dir") or "data"
    info = Keys(_described(name, folder), place=f"dataset {name}: ")
    place = _place(name, folder, info, keys.integer("max_samples"), imported)
    columns = {key: str(value) for key, value in info.mapping("columns").items() if value}
    is_chat = (info.text("formatting") or "alpaca") != "alpaca"
    tags = {key: str(value) for key, value in info.mapping("tags").items()}
    info.any("ranking", "ms_hub_url", "om_hub_url")
    if media := [key for key in ("videos", "audios") if key in columns]:
        _refuse(imported, name, media[0], "videos and audio are not trained on; leave the data set out")
    if images := columns.pop("images", None):
        imported.section("data")["images"] = True
        if images not in ("images", "image"):
            _refuse(imported, name, f"images={images}", "rename the column to images")
    if is_chat:
        format, words = CHATS.get((tags.get("role_tag", "from"), tags.get("content_tag", "value")), ("chat", {}))
        given = {role: tags[f"{tag}_tag"] for tag, role in SPEAKERS.items() if tags.get(f"{tag}_tag")}
        if not words or any(words.get(word) != role for role, word in given.items()):
            _refuse(imported, name, "tags", "turns are read with from and value, or with role and content")
        ours = {"messages": "conversations" if format == "sharegpt" else "messages"}
        columns = {"messages": "conversations"} | columns
    else:
        format, ours = "alpaca", ALPACA
        columns = columns or {"prompt": "instruction", "query": "input", "response": "output"}
    if stage == "pt":
        format, ours = "text", {"prompt": "text"}
        if is_chat:
            _refuse(imported, name, "formatting", "chats are no plain text; set stage: sft")
        elif columns.keys() & {"query", "history"}:
            one = "plain text is read from one column; write it into one, and name only that one as prompt"
            _refuse(imported, name, "columns", one)
    elif stage in ("dpo", "rm"):
        format, ours = "preference", _pairs(name, columns, imported, is_chat=is_chat)
    else:
        ours = ours | {"tools": "tools", "system": "system"}
        if stage == "kto" and columns.get("kto_tag") not in (None, *VERDICT_KEYS):
            ours = ours | {"kto_tag": "label"}
    renamed = {ours[key]: column for key, column in columns.items() if ours.get(key, column) != column}
    optional = {*FORMATS[format].optional} - {"label"} | ({"input", "history"} if format == "preference" else set())
    source = {**place, "format": format, "columns": renamed}
    source["ignore_columns"] = sorted(optional - {*renamed} - {*columns.values()})
    for key, _ in info.unread():
        _refuse(imported, name, key, f"not a known key of dataset_info.json{nearest(key, sorted(info.read))}")
    return {key: value for key, value in source.items() if value}


def _pairs(name: str, columns: dict[str, str], imported: Imported, *, is_chat: bool) -> dict[str, str]:
    """Return our keys of a pair: a conversation of any name, or a question, which is known by its own name."""
    ours = {key: key for key in ("system", "tools", "chosen", "rejected")}
    if is_chat:
        return ours | ({} if columns["messages"] in ("conversations", "messages") else {"messages": "prompt"})
    names = {columns[key] for key in ("prompt", "query") if key in columns}
    if not names <= {"instruction", "input", "question"} or columns.get("history", "history") != "history":
        _refuse(imported, name, "columns", "rename the question's column to instruction, and its query's to input")
    return ours


def _refuse(imported: Imported, name: str, key: str, reason: str) -> None:
    imported.tell("dataset {name}: {key}", name=name, key=key, reason=reason)


def _described(name: str, folder: str) -> dict[str, Any]:
    """Return what dataset_info.json says of a data set; ONLINE: the name is the hub's."""
    if folder == "ONLINE":
        return {"hf_hub_url": name}
    if folder.startswith("REMOTE:"):
        raise UserError(f"dataset_dir={folder} is on the hub; download it, and set dataset_dir to the folder")
    cure = "start in LLaMA-Factory's folder, or set dataset_dir to the folder of dataset_info.json"
    path = Path(folder).expanduser() / "dataset_info.json"
    known = read_object(path, cure, {"*": dict})
    if name not in known:
        raise UserError(f"dataset={name}: {path} does not describe it{nearest(name, known)}; {cure}")
    return {str(key): value for key, value in known[name].items()}


def _place(name: str, folder: str, info: Keys, most: int | None, imported: Imported) -> dict[str, Any]:
    """Return path, name and split of a data set of `most` records."""
    hub, file = info.text("hf_hub_url"), info.text("file_name")
    split, subset = info.text("split") or "train", info.text("subset")
    for key, reason in NOT_READ.items():
        if info.any(key) and (hub is None or key in ("folder", "num_samples")):
            _refuse(imported, name, key, reason)
    if hub is not None:
        if most is not None:
            imported.tell("max_samples={most} | hub", most=most, path=hub)
        return {"path": hub, "name": subset, "split": split if most is None else f"{split}[:{most}]"}
    if file is None:
        raise UserError(f"dataset={name}: dataset_info.json names neither hf_hub_url nor file_name; download it first")
    path = Path(folder).expanduser() / file
    if most is not None and not path.is_file():
        imported.tell("max_samples={most} | folder", most=most, path=path)
    elif most is not None:
        count = sum(1 for _ in itertools.islice(read_file(path, "", "line"), most + 1))
        imported.tell("max_samples={most}" + " | all" * (count <= most), most=most, path=path)
    return {"path": str(path), "sample_by": "line" if path.suffix == ".txt" else None}
