"""Axolotl's settings as ours: what each means there, its default there, and what has no equal.

Read off Axolotl 067b021 (2026-07): its schema, its builders of training arguments and its prompt strategies. Where a
default of ours differs from Axolotl's, Axolotl's value is written, so that the recipe means what the file meant. Keys
without an equal are in axolotl_keys.yaml, data sets in axolotl_data.py.
"""

from __future__ import annotations

import math
from typing import Any

from distlora.config import SAVED_MODULES, TARGET_PRESETS, UserError
from distlora.config.base import check_init
from distlora_launcher.importing.axolotl_data import convert_data, convert_objective
from distlora_launcher.importing.recipe import Imported, Keys, additional_special_tokens, note_unread

SCHEDULES = {
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "warmup_stable_decay",
}
DEFAULT_WARMUP, MOST_DEFAULT_WARMUP = 0.03, 100
"""Axolotl's warm-up where none is set: a share of the steps, and at most so many."""


def convert_steps(keys: Keys, imported: Imported) -> None:
    """Convert steps, saves, evaluations and early stopping."""
    train, max_steps, epochs = imported.section("train"), keys.integer("max_steps"), keys.number("num_epochs")
    epochs = 1.0 if epochs is None else epochs
    train["max_steps"] = max_steps
    train["epochs"] = max(1, math.ceil(epochs))
    if not epochs.is_integer() and max_steps is None:
        imported.note(
            "unsupported", f"num_epochs={epochs:g}", "distlora trains whole epochs; set train.max_steps to end earlier"
        )
    train["log_every"] = keys.integer("logging_steps") or 1
    train["keep"] = keys.integer("save_total_limit") or 4
    train["save_every"] = _interval(keys, imported, "save", max_steps, epochs)
    evaluates = imported.section("data").get("eval_path") is not None or imported.section("data")["eval_fraction"] > 0
    train["eval_every"] = _interval(keys, imported, "eval", max_steps, epochs) if evaluates else None
    if not evaluates:
        for name in ("evals_per_epoch", "eval_steps", "eval_strategy", "evaluation_strategy"):
            if keys.any(name):
                imported.note("idle", name, "nothing is held out")
    _early_stopping(keys, imported)


def _interval(keys: Keys, imported: Imported, kind: str, max_steps: int | None, epochs: float) -> int | None:
    """Return the steps between saves or evaluations (`kind`); None for the end only."""
    per_epoch, steps = keys.number(f"{kind}s_per_epoch"), keys.number(f"{kind}_steps")
    aliases = ("eval_strategy", "evaluation_strategy") if kind == "eval" else ("save_strategy",)
    chosen = keys.any(*aliases)
    strategy = "no" if chosen is False else chosen  # YAML reads a bare no as false.
    setting = f"train.{kind}_every"
    if steps is None and per_epoch:
        steps, key = 1 / (per_epoch * epochs), f"{kind}s_per_epoch={per_epoch:g}"
    elif steps is None:
        by_epoch = strategy == "epoch" or (strategy is None and kind == "save")
        if strategy == "best":
            imported.note("idle", "save_strategy=best", "the best adapter is kept in RUN/best beside the checkpoints")
        if strategy not in (None, "no", "epoch", "best"):
            imported.note("unsupported", f"{aliases[0]}={strategy}", f"needs {kind}_steps, or set {setting}")
        if not by_epoch or epochs <= 1:
            return None
        steps, key = 1 / epochs, f"{aliases[0]}=epoch" if strategy else f"{kind}_steps (not set: every epoch)"
    else:
        key = f"{kind}_steps={steps:g}"
    if steps >= 1:  # Once an epoch or less often, and the run ends there.
        return None if key.startswith(f"{kind}s_per_epoch") else int(steps)
    if max_steps is not None:
        return math.ceil(steps * max_steps)
    imported.note(
        "unsupported",
        key,
        f"a number of steps is needed, and only the tokenized data gives how many {steps:.3g} of the run are; "
        f"set {setting} once the start of a run has printed them",
    )
    return None


def _early_stopping(keys: Keys, imported: Imported) -> None:
    train = imported.section("train")
    patience, best = keys.integer("early_stopping_patience"), keys.flag("load_best_model_at_end")
    metric, greater = keys.text("metric_for_best_model"), keys.flag("greater_is_better")
    if metric not in (None, "loss", "eval_loss") or greater:
        imported.note("unsupported", f"metric_for_best_model={metric}", "the held-out loss decides, lower is better")
    given = {"early_stopping_patience": patience, "load_best_model_at_end": best}
    if train["eval_every"] is None:
        for name, value in given.items():
            if value:
                imported.note("unsupported", name, "needs evaluations while training; set train.eval_every with it")
        return
    train["early_stopping_patience"] = patience or None
    train["load_best_at_end"] = best


def convert_schedule(keys: Keys, imported: Imported) -> None:
    """Convert the learning-rate schedule.

    distlora's warm-up starts one step higher: at lr / steps instead of 0.
    """
    optim, max_steps = imported.section("optim"), imported.section("train")["max_steps"]
    name = keys.text("lr_scheduler") or "cosine"
    options = Keys(keys.mapping("lr_scheduler_kwargs"), place="lr_scheduler_kwargs.")
    if name not in SCHEDULES:
        known = ", ".join(dict.fromkeys(SCHEDULES.values()))
        imported.note("unsupported", f"lr_scheduler={name}", f"cosine is written; choose among {known}")
    optim["schedule"] = SCHEDULES.get(name, "cosine")
    floor = keys.number("cosine_min_lr_ratio")
    if floor is not None and optim["schedule"] != "cosine":
        imported.note("idle", "cosine_min_lr_ratio", f"lr_scheduler={name} is not a cosine schedule")
        floor = None
    floor = options.number("min_lr_rate") if floor is None and name == "cosine_with_min_lr" else floor
    optim["min_lr_ratio"] = float(floor or 0.0)
    if name == "warmup_stable_decay":
        _stable_decay(options, imported, max_steps)
    for option, _ in options.unread():
        imported.note("unsupported", f"lr_scheduler_kwargs.{option}", "this shape of the learning rate is not built")
    optim["warmup_ratio"] = _warmup(keys, imported, max_steps, constant=name == "constant")


def _stable_decay(options: Keys, imported: Imported, max_steps: int | None) -> None:
    """Convert the WSD schedule of transformers: num_decay_steps, with a cosine decay unless decay_type is linear."""
    decay, shape = options.integer("num_decay_steps"), options.text("decay_type") or "cosine"
    if shape != "linear":
        imported.note("differs", f"lr_scheduler_kwargs.decay_type={shape}", "the last decay is linear in distlora")
    if decay is not None and max_steps:
        imported.section("optim")["decay_ratio"] = decay / max_steps
    else:
        imported.note(
            "unsupported",
            "lr_scheduler_kwargs.num_decay_steps",
            "a fraction of all steps is needed, which requires max_steps; set optim.decay_ratio (0.1 is the default)",
        )


def _warmup(keys: Keys, imported: Imported, max_steps: int | None, *, constant: bool) -> float:
    steps, ratio = keys.number("warmup_steps"), keys.number("warmup_ratio")
    if constant:
        if steps or ratio:
            given = f"warmup_steps={steps:g}" if steps else f"warmup_ratio={ratio:g}"
            imported.note("idle", given, "lr_scheduler=constant has no warm-up")
        return 0.0
    if steps is not None and not steps:
        return 0.0
    if steps is not None and max_steps is None:
        imported.note(
            "unsupported",
            f"warmup_steps={steps:g}",
            f"a fraction of all steps is needed, which requires max_steps; {DEFAULT_WARMUP} is written: "
            f"set optim.warmup_ratio to {steps:g} / steps once the start of a run has printed them",
        )
        return DEFAULT_WARMUP
    if steps is not None:
        assert max_steps is not None
        return min(1.0, steps / max_steps)
    if ratio is not None:
        return ratio
    if max_steps is not None:
        return min(DEFAULT_WARMUP, MOST_DEFAULT_WARMUP / max_steps)
    imported.note(
        "differs",
        "warmup_ratio (not set)",
        f"{DEFAULT_WARMUP} of the steps, which Axolotl caps at {MOST_DEFAULT_WARMUP} steps in runs of more than 3,333",
    )
    return DEFAULT_WARMUP


OPTIMIZERS = {
    "adamw": ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_hf", "adamw_apex_fused", "adamw"),
    "adamw_8bit": ("adamw_bnb_8bit", "adamw_8bit"),
    "paged_adamw": ("paged_adamw", "paged_adamw_32bit"),
    "paged_adamw_8bit": ("paged_adamw_8bit",),
}
"""distlora's optimizers, and the names in Axolotl (mostly transformers') that mean the same update."""

EMBEDDINGS = ("embed_tokens", "lm_head")
OTHER_TRAINING = ("reward_model", "process_reward_model", "kd_trainer", "diffusion", "ebft")


def convert(values: dict[str, Any], *, processes: int) -> Imported:
    """Return a parsed Axolotl file as our settings. Raises UserError where nothing sensible can be made of it."""
    keys, imported = Keys(values), Imported()
    for name in OTHER_TRAINING:
        if value := keys.any(name):
            raise UserError(
                f"{name}={value!r}: Axolotl trains another objective than the next token, which distlora does not "
                "support; remove the key to import the supervised fine-tuning"
            )
    convert_objective(keys, imported)
    convert_model(keys, imported)
    convert_adapter(keys, imported)
    convert_data(keys, imported)
    convert_batch(keys, imported, processes)
    convert_optimizer(keys, imported, processes)
    convert_steps(keys, imported)
    convert_schedule(keys, imported)
    convert_precision(keys, imported)
    convert_tracker(keys, imported)
    convert_parallel(keys, imported, processes)
    note_unread(keys, imported)
    return imported


def convert_model(keys: Keys, imported: Imported) -> None:
    """Convert the base model and its tokens."""
    base = keys.text("base_model")
    if base is None:
        raise UserError("base_model is not set; is this an Axolotl file? It names the model to fine-tune")
    model = imported.section("model")
    model["path"] = base
    revision = keys.text("revision_of_model", "model_revision")
    if revision is not None:
        model["revision"] = revision
    for name, what in (("base_model_config", "config.json"), ("tokenizer_config", "tokenizer")):
        other = keys.text(name)
        if other is not None and other != base:
            imported.note("refused", f"{name}={other}", f"a model is one folder; put that {what} into a copy of {base}")
    tokens = [*(keys.words("tokens") or []), *additional_special_tokens(keys)]
    if tokens:
        model["new_tokens"] = list(dict.fromkeys(tokens))
        reason = "those that the tokenizer has already must be left out (the run names them), which Axolotl ignores"
        imported.note("differs", f"tokens={_list(tokens)}", reason)
    output = keys.text("output_dir")
    if output is not None:
        imported.settings["run_dir"] = output
    target = keys.text("hub_model_id")
    if target is not None:
        imported.note(
            "unsupported", "hub_model_id", f"nothing is uploaded while training; `distlora push RUN {target}`"
        )


def convert_adapter(keys: Keys, imported: Imported) -> None:
    """Convert the adapter and quantization."""
    kind, in_4bit, in_8bit = keys.text("adapter"), keys.flag("load_in_4bit"), keys.flag("load_in_8bit")
    if kind not in (None, "lora", "qlora"):
        raise UserError(
            f"adapter={kind}: only lora, qlora and none are supported; set adapter: qlora to import the rest"
        )
    imported.options["adapter"] = "full" if kind is None else "lora"
    imported.options["quant"] = "nf4" if kind is not None and (in_4bit or kind == "qlora") else "none"
    if kind == "qlora" and not in_4bit:
        imported.note("differs", "load_in_4bit (not set)", "Axolotl refuses qlora without it; the base is kept in NF4")
    if in_8bit:
        where = "the base is kept in 16 bits; quant=nf4 takes less than 8 bits would"
        imported.note("unsupported", "load_in_8bit=true", where)
    bnb = keys.mapping("bnb_config_kwargs")
    for name, value in bnb.items():
        ours = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "load_in_4bit": True}.get(name)
        if name not in ("bnb_4bit_quant_storage", "bnb_4bit_compute_dtype") and value != ours:
            imported.note("unsupported", f"bnb_config_kwargs.{name}={value}", "4 bits are NF4 with double quantization")
    if kind is None:
        for name, value in list(keys.values.items()):
            if name.startswith(("lora_", "peft_", "loraplus_")) and keys.any(name):
                imported.note("idle", f"{name}={value}", "there is no adapter")
        return
    start = keys.text("lora_model_dir")
    adapter = imported.section("adapter")
    if start is not None:
        adapter["init_from"] = start
        for name in (
            "lora_r",
            "lora_alpha",
            "lora_target_modules",
            "lora_target_linear",
            "lora_target_parameters",
            "peft_use_rslora",
            "peft_use_dora",
        ):
            if keys.any(name):
                imported.note("idle", name, "the adapter in lora_model_dir has its own")
    else:
        _new_adapter(keys, imported, adapter)
    adapter["lora_dropout"] = keys.number("lora_dropout") or 0.0
    imported.section("optim")["loraplus_lr_ratio"] = keys.number("loraplus_lr_ratio") or 1.0
    _modules_to_save(keys, imported, adapter, given=start is not None)


def _modules_to_save(keys: Keys, imported: Imported, adapter: dict[str, Any], *, given: bool) -> None:
    saved = keys.words("lora_modules_to_save")
    if saved and given:
        imported.note("idle", "lora_modules_to_save", "the adapter in lora_model_dir has its own")
        return
    known = [name for name in (name.rpartition(".")[2] for name in saved or ()) if name in SAVED_MODULES]
    others = [name for name in saved or () if name.rpartition(".")[2] not in SAVED_MODULES]
    if others:
        reason = f"only {' and '.join(SAVED_MODULES)} can be trained fully beside adapters; remove it"
        imported.note("refused", f"lora_modules_to_save={_list(others)}", reason)
    if known:
        adapter["modules_to_save"] = known


def _new_adapter(keys: Keys, imported: Imported, adapter: dict[str, Any]) -> None:
    rank, alpha = keys.integer("lora_r"), keys.number("lora_alpha")
    if rank is None or alpha is None:
        raise UserError("lora_r and lora_alpha are not both set; Axolotl has no default for them: add lora_r: 16, ...")
    adapter |= {"r": rank, "lora_alpha": alpha, "use_rslora": keys.flag("peft_use_rslora")}
    if parameters := keys.words("lora_target_parameters"):
        adapter["target_parameters"] = parameters
    if keys.flag("peft_use_dora"):
        adapter["use_dora"] = True
    adapter["target_modules"] = _targets(keys, imported)
    if rows := keys.any("peft_trainable_token_indices"):
        adapter["trainable_token_indices"] = rows
    for name, ours in (("lora_rank_pattern", "rank_pattern"), ("lora_alpha_pattern", "alpha_pattern")):
        if pattern := keys.mapping(name):
            adapter[ours] = pattern
    adapter["init"] = _start(keys, imported)


def _start(keys: Keys, imported: Imported) -> str:
    """Return adapter.init."""
    start = keys.any("peft_init_lora_weights")
    if keys.mapping("peft").get("loftq_config") is not None:
        imported.note("unsupported", "peft.loftq_config", "set adapter.init=loftq, which goes with quant=nf4")
    if start in (None, True):
        return "kaiming"
    try:
        check_init(str(start))
    except UserError:
        imported.note("unsupported", f"peft_init_lora_weights={start}", "A starts Kaiming-uniform, B is zero")
        return "kaiming"
    return str(start)


def _targets(keys: Keys, imported: Imported) -> str | list[str]:
    """Return the targets of lora_target_linear and lora_target_modules, without embeddings."""
    linear, modules = keys.flag("lora_target_linear"), keys.any("lora_target_modules")
    if isinstance(modules, str) and not linear:
        return modules  # A regular expression for whole paths, or all-linear: the same in PEFT and here.
    names = keys.words("lora_target_modules") or []
    embeddings = [name for name in names if name in EMBEDDINGS]
    if embeddings:
        imported.note(
            "refused", f"lora_target_modules={_list(embeddings)}", "only linears of the blocks are adapted; remove them"
        )
    names = [name for name in names if name not in EMBEDDINGS]
    if linear:
        extra = [name for name in names if name not in TARGET_PRESETS["all-linear"]]
        if extra:
            imported.note(
                "idle", f"lora_target_modules={_list(extra)}", "lora_target_linear already covers every linear"
            )
        return "all-linear"
    if not names and keys.any("lora_target_parameters"):
        return []
    if not names:
        raise UserError(
            "neither lora_target_linear nor lora_target_modules names a linear; add lora_target_linear: true"
        )
    preset = next((name for name, modules in TARGET_PRESETS.items() if sorted(modules) == sorted(names)), None)
    return preset or names


def convert_batch(keys: Keys, imported: Imported, processes: int) -> None:
    """Rows of a step: micro_batch_size x accumulation x the processes that hold different rows."""
    micro = keys.integer("micro_batch_size") or 1
    accumulation, total = keys.integer("gradient_accumulation_steps"), keys.integer("batch_size")
    if accumulation is None:
        accumulation = max(1, total // micro) if total else 1
    shared = 1
    for name in ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"):
        size = keys.integer(name) or 1
        if size > 1:
            imported.note(
                "unsupported", f"{name}={size}", "each process computes whole sequences; the global batch is kept"
            )
            shared *= size
    if processes % shared:
        raise UserError(
            f"--processes {processes} is not a multiple of {shared}, over which the file splits each row "
            "(context_parallel_size, sequence_parallel_degree, tensor_parallel_size); "
            "write --processes with the number of GPUs that it ran on"
        )
    train = imported.section("train")
    train["global_batch"] = micro * accumulation * (processes // shared)
    train["micro_batch"] = micro
    if not keys.flag("sample_packing") and "pretraining_dataset" not in keys.values:
        imported.note(
            "differs",
            "sample_packing=false" if "sample_packing" in keys.values else "sample_packing (not set)",
            "distlora always packs documents, so a row holds several and an epoch has fewer steps; "
            "lower train.global_batch for as many documents per step",
        )
    if keys.any("eval_batch_size") not in (None, micro):
        imported.note("idle", "eval_batch_size", "the held-out loss does not depend on it")


def convert_optimizer(keys: Keys, imported: Imported, processes: int) -> None:
    """Convert the optimizer and batch sizes."""
    name = keys.text("optimizer") or "adamw_torch_fused"
    ours = next((ours for ours, names in OPTIMIZERS.items() if name in names), None)
    if ours is None:
        imported.note("unsupported", f"optimizer={name}", f"adamw is written; choose among {', '.join(OPTIMIZERS)}")
    whole = imported.options["adapter"] == "full" or "modules_to_save" in imported.section("adapter")
    if ours is not None and ours.endswith("_8bit") and whole and processes > 1:
        ours = ours.removesuffix("_8bit")
        reason = f"{ours} is written: 8-bit optimizer states cannot be sharded"
        imported.note("differs", f"optimizer={name}", reason)
    imported.options["optim"] = ours or "adamw"
    optim = imported.section("optim")
    rate = keys.number("learning_rate")
    if rate is None:
        raise UserError("learning_rate is not set; Axolotl needs it: add learning_rate: 0.0002")
    first, second = keys.number("adam_beta1"), keys.number("adam_beta2")
    norm = keys.number("max_grad_norm")
    optim |= {
        "lr": rate,
        "betas": [0.9 if first is None else first, 0.999 if second is None else second],
        "eps": keys.number("adam_epsilon") or 1e-8,
        "weight_decay": keys.number("weight_decay") or 0.0,
        "max_grad_norm": 1.0 if norm is None else norm,
    }


def convert_precision(keys: Keys, imported: Imported) -> None:
    """bf16 is Axolotl's default too; 32 bits only where 16 are turned off by name."""
    bf16, fp16 = keys.any("bf16"), keys.flag("fp16") or keys.flag("float16")
    if bf16 not in (None, True, False, "auto", "full"):
        raise UserError(f"bf16={bf16!r} is not auto, true, false or full; correct it in the Axolotl file")
    whole_bf16, fp32 = keys.flag("bfloat16"), keys.flag("float32")
    if fp16:
        imported.note("unsupported", "fp16", "bf16 is written: it has fp32's range and needs no loss scaling")
    off = fp32 or (bf16 is False and not fp16 and not whole_bf16)
    train = imported.section("train")
    train["dtype"] = "fp32" if off else "bf16"
    checkpointing, offloading = keys.any("gradient_checkpointing"), keys.any("activation_offloading")
    offloads = bool(offloading) or checkpointing in ("offload", "offload_disk", "unsloth")
    train["checkpointing"] = "offload" if offloads else "block" if checkpointing else "none"
    for key, value in (("gradient_checkpointing", checkpointing), ("activation_offloading", offloading)):
        if value in ("offload_disk", "disk"):
            imported.note("unsupported", f"{key}={value}", "the blocks' inputs go to host memory, not to a disk")
    seed = keys.integer("seed")
    train["seed"] = 42 if seed is None else seed


def convert_tracker(keys: Keys, imported: Imported) -> None:
    """Convert wandb's settings."""
    project, mode, name = keys.text("wandb_project"), keys.text("wandb_mode"), keys.text("wandb_name")
    entity = keys.text("wandb_entity")
    used = (keys.flag("use_wandb") or project is not None) and mode != "disabled"
    imported.options["tracker"] = "wandb" if used else "none"
    if name is not None:
        imported.settings["name"] = name
    if used:
        if project is not None:
            imported.section("tracker")["project"] = project
        if mode not in (None, "online"):
            imported.note("unsupported", f"wandb_mode={mode}", f"set WANDB_MODE={mode} in the environment")
        if entity is not None:
            imported.section("tracker")["entity"] = entity
        return
    for given, value in (("wandb_entity", entity), ("wandb_mode", mode), ("wandb_project", project)):
        if value is not None and value != "disabled":
            imported.note("idle", f"{given}={value}", "nothing is sent to wandb")


def convert_parallel(keys: Keys, imported: Imported, processes: int) -> None:
    """Convert FSDP and DeepSpeed settings."""
    imported.section("cluster")["gpus_per_node"] = processes
    for name in ("deepspeed", "fsdp", "fsdp_config"):
        value = keys.any(name)
        if not value:
            continue
        shown = f"{name}={value}" if isinstance(value, str) else name
        if name == "deepspeed":
            reason = (
                "the base is sharded over all processes, adapters are replicated; parallel=zero3 is DeepSpeed's way"
            )
        else:
            reason = "the base is sharded over all processes, adapters are replicated (parallel=fsdp2)"
        imported.note("idle", shown, reason)
        if _offloads(value):
            imported.note(
                "unsupported",
                f"{name} (CPU offload)",
                "the base stays on the GPUs, in 4 bits; parallel=zero3 parallel.offload_base=true keeps it on the host",
            )


def _offloads(value: Any) -> bool:
    """Return whether a DeepSpeed or FSDP setting offloads parameters to CPU memory."""
    if isinstance(value, dict):
        return any("offload" in str(key) and bool(item) for key, item in value.items()) or any(
            map(_offloads, value.values())
        )
    if isinstance(value, list):
        return any(map(_offloads, value))
    return isinstance(value, str) and "offload" in value.lower()


def _list(words: list[str]) -> str:
    return f"[{', '.join(words)}]"
