"""Axolotl's settings as ours: what each means there, its default there, and what has no equal.

Read off Axolotl 067b021 (2026-07): its schema, its builders of training arguments and its prompt strategies. Where a
default of ours differs from Axolotl's, Axolotl's value is written, so that the recipe means what the file meant. Keys
without an equal, and the reasons of all notes, are in axolotl_keys.yaml, data sets in axolotl_data.py.
"""

import math
import re
from typing import Any

from distlora.config import SAVED_MODULES, TARGET_PRESETS, UserError
from distlora.config.base import check_init
from distlora.config.objectives import OBJECTIVES
from distlora.config.peer_names import OPTIMIZERS
from distlora_launcher.importing.axolotl_data import convert_data, convert_objective
from distlora_launcher.importing.recipe import Imported, Keys, note_unread

NEAR_OPTIMIZERS = {
    "adamw_8bit": ("adamw_torch_8bit", "adamw_torch_4bit", "ao_adamw_8bit", "ao_adamw_4bit", "ao_adamw_fp8"),
    "adamw": ("adamw_anyprecision", "optimi_adamw", "flash_adamw"),
}
"""AdamW whose states are stored in another form there."""
EMBEDDINGS = ("embed_tokens", "lm_head")
ADDITIONAL = ("additional_special_tokens", "extra_special_tokens")
"""Lists of special_tokens beside the tokens with a role."""
OTHER_TRAINING = ("kd_trainer", "diffusion", "ebft")
SPLIT_SEQUENCES = ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size")
"""Numbers of GPUs that share one sequence in Axolotl."""
OF_AN_ADAPTER = (
    *("lora_r", "lora_alpha", "lora_target_modules", "lora_target_linear", "lora_target_parameters"),
    *("peft_use_rslora", "peft_use_dora"),
)
"""Keys of which an adapter at lora_model_dir has its own."""
MLP_TILE = 4096
TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio", "swanlab")
PROJECTS = {
    "wandb": "wandb_project",
    "mlflow": "mlflow_experiment_name",
    "trackio": "trackio_project_name",
    "swanlab": "swanlab_project",
}
"""Trackers that have a project, and its key."""
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


def processes_of(keys: Keys) -> int:
    """Return the number of GPUs that the file itself asks for; 1 if it names none."""
    names = (*SPLIT_SEQUENCES, "dp_shard_size", "dp_replicate_size", "expert_parallel_size")
    return max(math.prod(max(1, keys.integer(name) or 1) for name in names), keys.integer("ray_num_workers") or 1)


def convert(values: dict[str, Any], *, processes: int | None = None) -> Imported:
    """Return a parsed Axolotl file as our settings. Raises UserError where nothing sensible can be made of it.

    processes: the number of GPUs that it was written for; None: as many as the file itself asks for.
    """
    keys, imported = Keys(values), Imported()
    processes = processes or processes_of(keys)
    imported.processes = processes
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
    convert_training(keys, imported, processes)
    return imported


def convert_training(keys: Keys, imported: Imported, processes: int) -> None:
    """Convert what follows model, adapter and data, and note the keys that nothing has read."""
    convert_batch(keys, imported, processes)
    convert_optimizer(keys, imported, processes)
    convert_steps(keys, imported)
    convert_schedule(keys, imported)
    convert_precision(keys, imported)
    convert_tracker(keys, imported)
    convert_parallel(keys, imported, processes)
    note_unread(keys, imported)


def convert_model(keys: Keys, imported: Imported) -> None:
    """Convert the base model and its tokens."""
    base = keys.text("base_model")
    if base is None:
        raise UserError("base_model is not set; is this an Axolotl file? It names the model to fine-tune")
    model = imported.section("model")
    model["path"] = base
    if (revision := keys.text("revision_of_model", "model_revision")) is not None:
        model["revision"] = revision
    for name, what in (("base_model_config", "config.json"), ("tokenizer_config", "tokenizer")):
        other = keys.text(name)
        if other is not None and other != base:
            imported.tell("{name}={other}", name=name, other=other, what=what, base=base)
    special_tokens = keys.mapping("special_tokens")
    tokens = [*(keys.words("tokens") or [])]
    tokens += [str(token) for name in ADDITIONAL for token in special_tokens.get(name) or ()]
    if tokens:
        model["new_tokens"] = list(dict.fromkeys(tokens))
        imported.tell("tokens={tokens}", tokens=_list(tokens))
    special = Keys(special_tokens, place="special_tokens.")
    named = {name: special.text(name) for name in ("bos_token", "eos_token", "unk_token")}
    if named := {name: text for name, text in named.items() if text is not None}:
        model["special_tokens"] = named
    if special.text("pad_token") is not None:
        imported.tell("special_tokens.pad_token")
    special.any(*ADDITIONAL)
    for name, value in special.unread():
        if value:
            imported.tell("special_tokens.{name}={value}", name=name, value=value)
    if (output := keys.text("output_dir")) is not None:
        imported.settings["run_dir"] = output
    if (target := keys.text("hub_model_id")) is not None:
        imported.tell("hub_model_id", target=target)
    _model_settings(keys, imported)
    _unfrozen(keys, imported)


def _model_settings(keys: Keys, imported: Imported) -> None:
    """Convert settings that replace those in config.json: the routers' loss, and nothing else."""
    name = "overrides_of_model_config" if keys.values.get("overrides_of_model_config") else "model_config"
    settings = Keys(keys.mapping("overrides_of_model_config", "model_config"), place=f"{name}.")
    weight = settings.number("router_aux_loss_coef")
    if settings.flag("output_router_logits"):
        imported.section("train")["router_aux_loss"] = 0.001 if weight is None else weight
        if weight is None:
            imported.tell("{name}.output_router_logits", name=name)
    for key, value in settings.unread():
        imported.tell("{name}.{key}={value}", name=name, key=key, value=value)


def _unfrozen(keys: Keys, imported: Imported) -> None:
    """Convert unfrozen_parameters: the whole language model is what is trained here, or what the adapter is on."""
    patterns = keys.words("unfrozen_parameters") or []
    names = {re.sub(r"[.*$]+$", "", pattern.removeprefix("^")).removesuffix(".weight") for pattern in patterns}
    text = {"model", "model.language_model", "language_model"}
    is_whole = names & text and names <= text | {"lm_head", "embed_tokens", "model.embed_tokens"}
    if names:
        imported.tell("unfrozen_parameters={names}" + " | whole" * bool(is_whole), names=_list(patterns))


def convert_adapter(keys: Keys, imported: Imported) -> None:
    """Convert the adapter and quantization."""
    kind, in_4bit, in_8bit = keys.text("adapter"), keys.flag("load_in_4bit"), keys.flag("load_in_8bit")
    if kind not in (None, "lora", "qlora"):
        raise UserError(
            f"adapter={kind}: only lora, qlora and none are supported; set adapter: qlora to import the rest"
        )
    imported.options["adapter"] = "full" if kind is None else "lora"
    imported.options["quant"] = "nf4" if kind is not None and (in_4bit or kind == "qlora") else "none"
    if in_8bit and kind == "lora" and not in_4bit:
        imported.options["quant"] = "auto"
        imported.tell("load_in_8bit=true")
    elif in_8bit:
        imported.tell("load_in_8bit=true | unused", quant=imported.options["quant"])
    if kind == "qlora" and not in_4bit:
        imported.tell("load_in_4bit (not set)")
    ours = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "load_in_4bit": True}
    for name, value in keys.mapping("bnb_config_kwargs").items():
        if name not in ("bnb_4bit_quant_storage", "bnb_4bit_compute_dtype") and value != ours.get(name):
            imported.tell("bnb_config_kwargs.{name}={value}", name=name, value=value)
    if kind is None:
        for name, value in list(keys.values.items()):
            if name.startswith(("lora_", "peft_", "loraplus_")) and keys.any(name):
                imported.tell("{name}={value} | no adapter", name=name, value=value)
        return
    start = keys.text("lora_model_dir")
    adapter = imported.section("adapter")
    if start is not None:
        adapter["init_from"] = start
        for name in OF_AN_ADAPTER:
            if keys.any(name):
                imported.tell("{name} | own", name=name)
    else:
        _new_adapter(keys, imported, adapter)
    adapter["lora_dropout"] = keys.number("lora_dropout") or 0.0
    imported.section("optim")["loraplus_lr_ratio"] = keys.number("loraplus_lr_ratio") or 1.0
    _modules_to_save(keys, imported, adapter, given=start is not None)


def _modules_to_save(keys: Keys, imported: Imported, adapter: dict[str, Any], *, given: bool) -> None:
    saved = keys.words("lora_modules_to_save")
    if saved and given:
        imported.tell("{name} | own", name="lora_modules_to_save")
        return
    known = [name for name in (name.rpartition(".")[2] for name in saved or ()) if name in SAVED_MODULES]
    others = [name for name in saved or () if name.rpartition(".")[2] not in SAVED_MODULES]
    if others:
        modules = " and ".join(SAVED_MODULES)
        imported.tell("lora_modules_to_save={names}", names=_list(others), modules=modules)
    objective = imported.section("train").get("objective", "sft")
    if known and OBJECTIVES[objective].reference:
        imported.tell("lora_modules_to_save={names} | reference", names=_list(known), objective=objective)
    elif known:
        adapter["modules_to_save"] = known


def _new_adapter(keys: Keys, imported: Imported, adapter: dict[str, Any]) -> None:
    rank, alpha = keys.integer("lora_r"), keys.number("lora_alpha")
    if rank is None or alpha is None:
        raise UserError("lora_r and lora_alpha are not both set; Axolotl has no default for them: add lora_r: 16, ...")
    adapter |= {"r": rank, "lora_alpha": alpha, "use_rslora": keys.flag("peft_use_rslora")}
    if keys.flag("peft_use_dora"):
        adapter["use_dora"] = True
    adapter["target_modules"] = _targets(keys, imported)
    more = {
        "target_parameters": keys.words("lora_target_parameters"),
        "trainable_token_indices": keys.any("peft_trainable_token_indices"),
        "rank_pattern": keys.mapping("lora_rank_pattern"),
        "alpha_pattern": keys.mapping("lora_alpha_pattern"),
    }
    adapter |= {name: value for name, value in more.items() if value}
    adapter["init"] = _start(keys, imported)


def _start(keys: Keys, imported: Imported) -> str:
    """Return adapter.init."""
    start = keys.any("peft_init_lora_weights")
    loftq = Keys(dict(keys.mapping("peft").get("loftq_config") or {}), place="peft.loftq_config.")
    if "loftq_config" in keys.mapping("peft") or start == "loftq":
        bits, iterations = loftq.integer("loftq_bits") or 4, loftq.integer("loftq_iter") or 1
        if bits != 4:
            imported.tell("peft.loftq_config.loftq_bits={bits}", bits=bits)
            return "kaiming"
        imported.options["quant"] = "nf4"
        count = "" if iterations == 1 else f", in one iteration instead of {iterations}"
        imported.tell("peft.loftq_config", count=count)
        return "loftq"
    if start in (None, True):
        return "kaiming"
    try:
        check_init(str(start))
    except UserError:
        imported.tell("peft_init_lora_weights={start}", start=start)
        return "kaiming"
    return str(start)


def _targets(keys: Keys, imported: Imported) -> str | list[str]:
    """Return the targets of lora_target_linear and lora_target_modules, without embeddings."""
    linear, modules = keys.flag("lora_target_linear"), keys.any("lora_target_modules")
    if isinstance(modules, str) and not linear:
        return "linears" if modules == "all-linear" else modules  # A regular expression: the same in PEFT and here.
    names = keys.words("lora_target_modules") or []
    if embeddings := [name for name in names if name in EMBEDDINGS]:
        imported.tell("lora_target_modules={names}", names=_list(embeddings))
    names = [name for name in names if name not in EMBEDDINGS]
    if linear:
        if extra := [name for name in names if name not in TARGET_PRESETS["all-linear"]]:
            imported.tell("lora_target_modules={names} | covered", names=_list(extra))
        return "linears"
    if not names and keys.any("lora_target_parameters"):
        return []
    if not names:
        raise UserError(
            "neither lora_target_linear nor lora_target_modules names a linear; add lora_target_linear: true"
        )
    # Not mlp and all-linear, which mean the fused weights of experts too: PEFT adapts none by these names.
    preset = next((name for name in ("qv", "attention") if sorted(TARGET_PRESETS[name]) == sorted(names)), None)
    return preset or names


def convert_batch(keys: Keys, imported: Imported, processes: int) -> None:
    """Rows of a step: micro_batch_size x accumulation x the processes that hold different rows."""
    micro = keys.integer("micro_batch_size") or 1
    accumulation, total = keys.integer("gradient_accumulation_steps"), keys.integer("batch_size")
    if accumulation is None:
        accumulation = max(1, total // micro) if total else 1
    shared = 1
    for name in SPLIT_SEQUENCES:
        size = keys.integer(name) or 1
        if size > 1:
            imported.tell("{name}={size}", name=name, size=size)
            shared *= size
    if processes % shared:
        raise UserError(
            f"{processes} GPUs: the file shares each sequence among {shared} GPUs ({', '.join(SPLIT_SEQUENCES)}); set "
            f"their number to a multiple of {shared}: `import --processes N` or `train cluster.gpus_per_node=N`"
        )
    train = imported.section("train")
    train["global_batch"] = micro * accumulation * (processes // shared)
    train["micro_batch"] = micro
    if not keys.flag("sample_packing") and "pretraining_dataset" not in keys.values:
        imported.tell("sample_packing{state}", state="=false" if "sample_packing" in keys.values else " (not set)")
    if keys.any("eval_batch_size") not in (None, micro):
        imported.tell("eval_batch_size")


def convert_optimizer(keys: Keys, imported: Imported, processes: int) -> None:
    """Convert the optimizer and batch sizes."""
    name = keys.text("optimizer") or "adamw_torch_fused"
    ours = next((ours for ours, names in OPTIMIZERS.items() if name in names), None)
    near = next((ours for ours, names in NEAR_OPTIMIZERS.items() if name in names), None)
    if name == "muon" and ours is near is None:
        imported.tell("optimizer=muon")
    elif ours is near is None:
        imported.tell("optimizer={name}", name=name, known=", ".join(OPTIMIZERS))
    chosen = ours or near or "adamw"
    if chosen.endswith("_8bit") and _trains_whole(imported) and processes > 1:
        chosen = chosen.removesuffix("_8bit")
        imported.tell("optimizer={name} | sharded", name=name, chosen=chosen)
    elif near == "adamw_8bit":
        imported.tell("optimizer={name} | 8 bits", name=name)
    elif near is not None:
        imported.tell("optimizer={name} | near", name=name, near=near)
    imported.options["optim"] = chosen
    rate = keys.number("learning_rate")
    if rate is None:
        raise UserError("learning_rate is not set; Axolotl needs it: add learning_rate: 0.0002")
    first, second = keys.number("adam_beta1"), keys.number("adam_beta2")
    norm = keys.number("max_grad_norm")
    optim = imported.section("optim")
    optim |= {
        "lr": rate,
        "betas": [0.9 if first is None else first, 0.999 if second is None else second],
        "eps": keys.number("adam_epsilon") or 1e-8,
        "weight_decay": keys.number("weight_decay") or 0.0,
        "max_grad_norm": 1.0 if norm is None else norm,
    }


def _trains_whole(imported: Imported) -> bool:
    """Return whether parameters beside adapters are trained."""
    return imported.options["adapter"] == "full" or "modules_to_save" in imported.section("adapter")


def convert_steps(keys: Keys, imported: Imported) -> None:
    """Convert steps, saves, evaluations and early stopping."""
    train, max_steps, epochs = imported.section("train"), keys.integer("max_steps"), keys.number("num_epochs")
    epochs = 1.0 if epochs is None else epochs
    train |= {"max_steps": max_steps, "epochs": epochs, "log_every": keys.integer("logging_steps") or 1}
    train["keep"] = keys.integer("save_total_limit") or 4
    train |= _interval(keys, imported, "save", max_steps, epochs)
    evaluates = imported.section("data").get("eval_path") is not None or imported.section("data")["eval_fraction"] > 0
    train["eval_every"] = None
    if evaluates:
        train |= _interval(keys, imported, "eval", max_steps, epochs)
    else:
        for name in ("evals_per_epoch", "eval_steps", "eval_strategy", "evaluation_strategy"):
            if keys.any(name):
                imported.tell("{name} | nothing held out", name=name)
    _early_stopping(keys, imported)
    threshold, patience = keys.number("loss_watchdog_threshold"), keys.integer("loss_watchdog_patience")
    if threshold is not None:
        train |= {"loss_watchdog_threshold": threshold, "loss_watchdog_patience": patience or 3}
    elif patience is not None:
        imported.tell("loss_watchdog_patience")


def _interval(keys: Keys, imported: Imported, kind: str, max_steps: int | None, epochs: float) -> dict[str, int]:
    """Return the setting of saves or evaluations (`kind`): per epoch or in steps; empty for the end only."""
    per_epoch, steps = keys.number(f"{kind}s_per_epoch"), keys.number(f"{kind}_steps") or None
    aliases = ("eval_strategy", "evaluation_strategy") if kind == "eval" else ("save_strategy",)
    chosen = keys.any(*aliases)
    strategy = "no" if chosen is False else chosen  # YAML reads a bare no as false.
    if steps is None and not per_epoch:
        if strategy == "best":
            imported.tell("save_strategy=best")
        if strategy not in (None, "no", "epoch", "best"):
            imported.tell("{name}={strategy}", name=aliases[0], strategy=strategy, kind=kind)
        by_epoch = strategy == "epoch" or (strategy is None and kind == "save")
        return {f"{kind}s_per_epoch": 1} if by_epoch and (epochs > 1 or max_steps is not None) else {}
    if steps is not None and steps >= 1:
        return {f"{kind}_every": int(steps)}
    times = (per_epoch or 0.0) * epochs if steps is None else 1 / steps
    if times <= 1:  # Once in the run or less often, and the run ends there.
        return {}
    if max_steps is not None:
        return {f"{kind}_every": math.ceil(max_steps / times)}
    count = math.ceil(times / epochs - 1e-9)
    if not math.isclose(count, times / epochs):
        key = f"{kind}_steps={steps:g}" if steps is not None else f"{kind}s_per_epoch={per_epoch:g}"
        imported.tell("{key}", key=key, kind=kind, count=count, times=f"{times / epochs:.3g}")
    return {f"{kind}s_per_epoch": count}


def _early_stopping(keys: Keys, imported: Imported) -> None:
    train = imported.section("train")
    patience, best = keys.integer("early_stopping_patience"), keys.flag("load_best_model_at_end")
    metric, greater = keys.text("metric_for_best_model"), keys.flag("greater_is_better")
    if metric not in (None, "loss", "eval_loss") or greater:
        imported.tell("metric_for_best_model={metric}", metric=metric)
    if train["eval_every"] is not None or "evals_per_epoch" in train:
        train |= {"early_stopping_patience": patience or None, "load_best_at_end": best}
        return
    for name, value in {"early_stopping_patience": patience, "load_best_model_at_end": best}.items():
        if value:
            imported.tell("{name} | no evaluations", name=name)


def convert_schedule(keys: Keys, imported: Imported) -> None:
    """Convert the learning-rate schedule.

    distlora's warm-up starts one step higher: at lr / steps instead of 0.
    """
    optim, max_steps = imported.section("optim"), imported.section("train")["max_steps"]
    name = keys.text("lr_scheduler") or "cosine"
    options = Keys(keys.mapping("lr_scheduler_kwargs"), place="lr_scheduler_kwargs.")
    if name not in SCHEDULES:
        imported.tell("lr_scheduler={name}", name=name, known=", ".join(dict.fromkeys(SCHEDULES.values())))
    optim["schedule"] = SCHEDULES.get(name, "cosine")
    floor = keys.number("cosine_min_lr_ratio")
    if floor is not None and optim["schedule"] != "cosine":
        imported.tell("cosine_min_lr_ratio", name=name)
        floor = None
    floor = options.number("min_lr_rate") if floor is None and name == "cosine_with_min_lr" else floor
    optim["min_lr_ratio"] = float(floor or 0.0)
    if name == "warmup_stable_decay":
        _stable_decay(options, imported, max_steps)
    for option, _ in options.unread():
        imported.tell("lr_scheduler_kwargs.{option}", option=option)
    optim |= _warmup(keys, imported, max_steps, constant=name == "constant")


def _stable_decay(options: Keys, imported: Imported, max_steps: int | None) -> None:
    """Convert the WSD schedule of transformers: num_decay_steps, with a cosine decay unless decay_type is linear."""
    decay, shape = options.integer("num_decay_steps"), options.text("decay_type") or "cosine"
    if shape != "linear":
        imported.tell("lr_scheduler_kwargs.decay_type={shape}", shape=shape)
    if decay is not None and max_steps:
        imported.section("optim")["decay_ratio"] = decay / max_steps
    else:
        imported.tell("lr_scheduler_kwargs.num_decay_steps")


def _warmup(keys: Keys, imported: Imported, max_steps: int | None, *, constant: bool) -> dict[str, float]:
    """Return the warm-up in steps or as a share of them."""
    steps, ratio = keys.number("warmup_steps"), keys.number("warmup_ratio")
    if constant:
        if steps or ratio:
            given = f"warmup_steps={steps:g}" if steps else f"warmup_ratio={ratio:g}"
            imported.tell("{given}", given=given)
        return {"warmup_ratio": 0.0}
    if steps is not None and 0 < steps < 1:  # A share, as in transformers.
        steps, ratio = None, steps
    if steps is not None:
        steps = 2 if steps == 1 else int(steps)  # Axolotl's least.
        return {"warmup_steps": steps if max_steps is None else min(steps, max_steps)}
    if ratio is not None:
        return {"warmup_ratio": ratio}
    if max_steps is not None:
        return {"warmup_ratio": min(DEFAULT_WARMUP, MOST_DEFAULT_WARMUP / max_steps)}
    imported.tell("warmup_ratio (not set)", share=DEFAULT_WARMUP, most=MOST_DEFAULT_WARMUP)
    return {"warmup_ratio": DEFAULT_WARMUP}


def convert_precision(keys: Keys, imported: Imported) -> None:
    """bf16 is Axolotl's default too; 32 bits only where 16 are turned off by name."""
    bf16, fp16 = keys.any("bf16"), keys.flag("fp16") or keys.flag("float16")
    if bf16 not in (None, True, False, "auto", "full"):
        raise UserError(f"bf16={bf16!r} is not auto, true, false or full; correct it in the file")
    whole_bf16, fp32 = keys.flag("bfloat16"), keys.flag("float32")
    if fp16:
        imported.tell("fp16")
    off = fp32 or (bf16 is False and not fp16 and not whole_bf16)
    train = imported.section("train")
    train["dtype"] = "fp32" if off else "bf16"
    checkpointing, offloading = keys.any("gradient_checkpointing"), keys.any("activation_offloading")
    fsdp = Keys(keys.mapping("fsdp_config"), place="fsdp_config.")
    by_fsdp = fsdp.flag("activation_checkpointing", "fsdp_activation_checkpointing")
    offloads = bool(offloading) or checkpointing in ("offload", "offload_disk", "unsloth")
    train["checkpointing"] = "offload" if offloads else "block" if checkpointing or by_fsdp else "none"
    for key, value in (("gradient_checkpointing", checkpointing), ("activation_offloading", offloading)):
        if value in ("offload_disk", "disk"):
            imported.tell("{key}={value}", key=key, value=value)
    _tiles(keys, imported)
    if noise := keys.number("neftune_noise_alpha", "noisy_embedding_alpha"):
        train["neftune_alpha"] = noise
    seed = keys.integer("seed")
    train["seed"] = 42 if seed is None else seed


def _tiles(keys: Keys, imported: Imported) -> None:
    """Convert tiles of the MLP, whose number Axolotl has and whose tokens we have. Results differ by rounding only."""
    if not keys.flag("tiled_mlp"):
        return
    train, length = imported.section("train"), imported.section("data")["sequence_length"]
    count = keys.integer("tiled_mlp_num_shards")
    tile = MLP_TILE if count is None else -(-length // max(1, count))
    if imported.options["adapter"] == "full":
        imported.tell("tiled_mlp | full")
    elif tile < length:
        train["mlp_tile"] = tile
        if train["checkpointing"] == "none":
            train["checkpointing"] = "selective"
        if count is None:
            imported.tell("tiled_mlp", tile=tile)


def convert_tracker(keys: Keys, imported: Imported) -> None:
    """Convert the experiment trackers. They share a project, an entity and the run's name."""
    projects = {name: keys.text(key) for name, key in PROJECTS.items()}
    modes = {name: keys.text(f"{name}_mode") for name in ("wandb", "swanlab")}
    names = [name for name in TRACKERS if keys.flag(f"use_{name}")]
    names += [name for name in ("wandb", "mlflow", "trackio") if projects[name] is not None and name not in names]
    names = [name for name in names if modes.get(name) != "disabled"]
    imported.options["tracker"] = "none" if not names else names[0] if len(names) == 1 else f"[{','.join(names)}]"
    for name in names:
        if (mode := modes.get(name)) not in (None, "online", "cloud"):
            imported.tell("{name}_mode={mode}", name=name, mode=mode, variable=f"{name.upper()}_MODE={mode}")
    tracker = imported.section("tracker")
    used = list(dict.fromkeys(projects[name] for name in names if projects.get(name) is not None))
    if used:
        tracker["project"] = used[0]
        if len(used) > 1:
            imported.tell("{names}", names=_list([PROJECTS[n] for n in names if n in PROJECTS]), project=used[0])
    entities = {"wandb": keys.text("wandb_entity"), "swanlab": keys.text("swanlab_workspace")}
    if entity := next((entities[name] for name in entities if name in names and entities[name]), None):
        tracker["entity"] = entity
    runs = [keys.text(key) for key in ("wandb_name", "mlflow_run_name", "trackio_run_name", "swanlab_experiment_name")]
    if run := next((run for run in runs if run is not None), None):
        imported.settings["name"] = run
    mode = None if modes["wandb"] == "disabled" else modes["wandb"]
    of_wandb = {"wandb_entity": entities["wandb"], "wandb_mode": mode, "wandb_project": projects["wandb"]}
    for key, value in of_wandb.items():
        if value is not None and "wandb" not in names:
            imported.tell("{key}={value} | no wandb", key=key, value=value)


def convert_parallel(keys: Keys, imported: Imported, processes: int) -> None:
    """Convert FSDP and DeepSpeed settings, replicas and expert parallelism."""
    imported.section("cluster")["gpus_per_node"] = processes
    if timeout := keys.number("ddp_timeout"):
        imported.section("cluster")["timeout_seconds"] = timeout
    keys.any("dp_shard_size")
    replicas = keys.integer("dp_replicate_size") or 1
    if replicas > 1 and processes % replicas == 0:  # Each is sharded over all processes of its own.
        imported.section("parallel")["shard_degree"] = processes // replicas
    elif replicas > 1:
        imported.tell("dp_replicate_size={replicas}", replicas=replicas, processes=processes)
    experts = keys.integer("expert_parallel_size") or 1
    if experts > 1:
        imported.tell("expert_parallel_size={experts}", experts=experts)
    for name in ("deepspeed", "fsdp", "fsdp_config"):
        value = keys.any(name)
        if not value:
            continue
        imported.tell("{shown}", shown=f"{name}={value}" if isinstance(value, str) else name)
        if _offloads(value):
            _offload(imported, name, processes)


def _offload(imported: Imported, name: str, processes: int) -> None:
    """Keep the base in CPU memory where that is supported; results are the same anyway."""
    kept = "one process keeps the base on its GPU" if processes == 1 else ""
    if _trains_whole(imported):
        kept = "parameters that are trained stay on the GPUs"
    elif processes > 1 and "shard_degree" in imported.section("parallel"):
        kept = "replicas of the base stay on the GPUs"
    if kept:
        imported.tell("{name} (CPU offload) | kept", name=name, reason=kept)
        return
    imported.options["parallel"] = "zero3"
    imported.section("parallel")["offload_base"] = True
    imported.tell("{name} (CPU offload)", name=name)


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
