"""Axolotl's settings as ours: what each means there, its default there, and what has no equal.

Read off Axolotl 067b021 (2026-07): its schema, its builders of training arguments and its prompt strategies. Where a
default of ours differs from Axolotl's, Axolotl's value is written, so that the recipe means what the file meant. Keys
without an equal are in axolotl_keys.yaml, data sets in axolotl_data.py, steps and schedules in axolotl_steps.py.
"""

import math
import re
from typing import Any

from distlora.config import SAVED_MODULES, TARGET_PRESETS, UserError
from distlora.config.base import check_init
from distlora.config.objectives import OBJECTIVES
from distlora.config.peer_names import OPTIMIZERS
from distlora_launcher.importing.axolotl_data import convert_data, convert_objective
from distlora_launcher.importing.axolotl_steps import convert_schedule, convert_steps
from distlora_launcher.importing.recipe import Imported, Keys, note_unread

NEAR_OPTIMIZERS = {
    "adamw_8bit": ("adamw_torch_8bit", "adamw_torch_4bit", "ao_adamw_8bit", "ao_adamw_4bit", "ao_adamw_fp8"),
    "adamw": ("adamw_anyprecision", "optimi_adamw", "flash_adamw"),
}
"""AdamW whose states are stored in another form there."""

EMBEDDINGS = ("embed_tokens", "lm_head")
ADDITIONAL = ("additional_special_tokens", "extra_special_tokens")
"""Lists of special_tokens beside the tokens with a role."""
OTHER_TRAINING = ("reward_model", "process_reward_model", "kd_trainer", "diffusion", "ebft")


SPLIT_SEQUENCES = ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size")
"""Numbers of GPUs that share one sequence in Axolotl."""


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
    special_tokens = keys.mapping("special_tokens")
    tokens = [*(keys.words("tokens") or [])]
    tokens += [str(token) for name in ADDITIONAL for token in special_tokens.get(name) or ()]
    if tokens:
        model["new_tokens"] = list(dict.fromkeys(tokens))
        reason = "those that the tokenizer has already must be left out (the run names them), which Axolotl ignores"
        imported.note("changed", f"tokens={_list(tokens)}", reason)
    special = Keys(special_tokens, place="special_tokens.")
    named = {name: special.text(name) for name in ("bos_token", "eos_token", "unk_token")}
    if named := {name: text for name, text in named.items() if text is not None}:
        model["special_tokens"] = named
    if special.text("pad_token") is not None:
        imported.note("idle", "special_tokens.pad_token", "padding is neither trained nor attended to")
    special.any(*ADDITIONAL)
    for name, value in special.unread():
        if value:
            imported.note("idle", f"special_tokens.{name}={value}", "a causal language model has no use for it")
    output = keys.text("output_dir")
    if output is not None:
        imported.settings["run_dir"] = output
    target = keys.text("hub_model_id")
    if target is not None:
        imported.note("changed", "hub_model_id", f"uploaded after training by `distlora push RUN {target}`, not during")
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
            reason = (
                "train.router_aux_loss=0.001, transformers' default; set it to router_aux_loss_coef of config.json "
                "if that differs"
            )
            imported.note("changed", f"{name}.output_router_logits", reason)
    for key, value in settings.unread():
        reason = "a model is used as its config.json says; change that file in a copy"
        imported.note("refused", f"{name}.{key}={value}", reason)


def _unfrozen(keys: Keys, imported: Imported) -> None:
    """Convert unfrozen_parameters: the whole language model is what is trained here, or what the adapter is on."""
    patterns = keys.words("unfrozen_parameters") or []
    names = {re.sub(r"[.*$]+$", "", pattern.removeprefix("^")).removesuffix(".weight") for pattern in patterns}
    if not names:
        return
    shown = f"unfrozen_parameters={_list(patterns)}"
    text = {"model", "model.language_model", "language_model"}
    if names & text and names <= text | {"lm_head", "embed_tokens", "model.embed_tokens"}:
        imported.note("idle", shown, "only the language model is loaded: all of it is trained, or the adapters on it")
    else:
        imported.note("unsupported", shown, "adapter=lora trains adapters, adapter=full trains every parameter")


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
        reason = "quant=auto: the base is kept in 16 bits where the plan says that it fits, else in NF4 (4 bits)"
        imported.note("changed", "load_in_8bit=true", reason)
    elif in_8bit:
        imported.note("idle", "load_in_8bit=true", f"quant={imported.options['quant']} decides")
    if kind == "qlora" and not in_4bit:
        imported.note("changed", "load_in_4bit (not set)", "Axolotl refuses qlora without it; the base is kept in NF4")
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
    objective = imported.section("train").get("objective", "sft")
    if known and OBJECTIVES[objective].reference:
        reason = f"rl={objective} trains adapters only: the base under them is its reference"
        imported.note("refused", f"lora_modules_to_save={_list(known)}", reason)
    elif known:
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
    loftq = Keys(dict(keys.mapping("peft").get("loftq_config") or {}), place="peft.loftq_config.")
    if "loftq_config" in keys.mapping("peft") or start == "loftq":
        bits, iterations = loftq.integer("loftq_bits") or 4, loftq.integer("loftq_iter") or 1
        if bits != 4:
            imported.note("unsupported", f"peft.loftq_config.loftq_bits={bits}", "LoftQ is supported with 4 bits only")
            return "kaiming"
        imported.options["quant"] = "nf4"
        count = "" if iterations == 1 else f", in one iteration instead of {iterations}"
        reason = f"adapter.init=loftq: the base is kept in NF4, and the start does not depend on lora_alpha{count}"
        imported.note("changed", "peft.loftq_config", reason)
        return "loftq"
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
        return "linears" if modules == "all-linear" else modules  # A regular expression: the same in PEFT and here.
    names = keys.words("lora_target_modules") or []
    embeddings = [name for name in names if name in EMBEDDINGS]
    if embeddings:
        imported.note(
            "refused",
            f"lora_target_modules={_list(embeddings)}",
            "only linears of the decoder layers are adapted; remove them",
        )
    names = [name for name in names if name not in EMBEDDINGS]
    if linear:
        extra = [name for name in names if name not in TARGET_PRESETS["all-linear"]]
        if extra:
            imported.note(
                "idle", f"lora_target_modules={_list(extra)}", "lora_target_linear already covers every linear"
            )
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
            reason = "each GPU computes whole sequences, which takes more memory; the global batch is the same"
            imported.note("changed", f"{name}={size}", reason)
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
        imported.note(
            "changed",
            "sample_packing=false" if "sample_packing" in keys.values else "sample_packing (not set)",
            "documents are always packed, so a sequence holds several and an epoch has fewer steps; "
            "lower train.global_batch for as many documents per step",
        )
    if keys.any("eval_batch_size") not in (None, micro):
        imported.note("idle", "eval_batch_size", "the held-out loss does not depend on it")


def convert_optimizer(keys: Keys, imported: Imported, processes: int) -> None:
    """Convert the optimizer and batch sizes."""
    name = keys.text("optimizer") or "adamw_torch_fused"
    ours = next((ours for ours, names in OPTIMIZERS.items() if name in names), None)
    near = next((ours for ours, names in NEAR_OPTIMIZERS.items() if name in names), None)
    if ours is None and near is None:
        reason = f"choose among {', '.join(OPTIMIZERS)}; adamw is written"
        if name == "muon":
            reason = "optim=muon needs another learning rate than Axolotl's (of AdamW's size); set both"
        imported.note("unsupported", f"optimizer={name}", reason)
    whole = imported.options["adapter"] == "full" or "modules_to_save" in imported.section("adapter")
    chosen = ours or near or "adamw"
    if chosen.endswith("_8bit") and whole and processes > 1:
        chosen = chosen.removesuffix("_8bit")
        imported.note("changed", f"optimizer={name}", f"optim={chosen}: 8-bit optimizer states cannot be sharded")
    elif near == "adamw_8bit":
        reason = "optim=adamw_8bit: bitsandbytes keeps the optimizer states in 8 bits (pip install 'distlora[bnb]')"
        imported.note("changed", f"optimizer={name}", reason)
    elif near is not None:
        imported.note("changed", f"optimizer={name}", f"optim={near}: the optimizer states are kept in fp32")
    imported.options["optim"] = chosen
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
        imported.note("changed", "fp16", "bf16: it has the range of fp32 and needs no loss scaling")
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
            imported.note("changed", f"{key}={value}", "layer inputs are offloaded to CPU memory, not to a disk")
    _tiles(keys, imported)
    noise = keys.number("neftune_noise_alpha", "noisy_embedding_alpha")
    if noise:
        train["neftune_alpha"] = noise
    seed = keys.integer("seed")
    train["seed"] = 42 if seed is None else seed


MLP_TILE = 4096


def _tiles(keys: Keys, imported: Imported) -> None:
    """Convert tiles of the MLP, whose number Axolotl has and whose tokens we have. Results differ by rounding only."""
    if not keys.flag("tiled_mlp"):
        return
    train, length = imported.section("train"), imported.section("data")["sequence_length"]
    count = keys.integer("tiled_mlp_num_shards")
    tile = MLP_TILE if count is None else -(-length // max(1, count))
    if imported.options["adapter"] == "full":
        imported.note(
            "changed", "tiled_mlp", "adapter=full runs whole MLPs, which takes more memory; the plan shows it"
        )
    elif tile < length:
        train["mlp_tile"] = tile
        if train["checkpointing"] == "none":
            train["checkpointing"] = "selective"
        if count is None:
            imported.note("changed", "tiled_mlp", f"a tile has {tile:,} tokens, not as many as the model's hidden size")


PROJECTS = {
    "wandb": "wandb_project",
    "mlflow": "mlflow_experiment_name",
    "trackio": "trackio_project_name",
    "swanlab": "swanlab_project",
}
"""Trackers that have a project, and its key."""


def convert_tracker(keys: Keys, imported: Imported) -> None:
    """Convert the experiment trackers. They share a project, an entity and the run's name."""
    projects = {name: keys.text(key) for name, key in PROJECTS.items()}
    modes = {name: keys.text(f"{name}_mode") for name in ("wandb", "swanlab")}
    names = [name for name in ("wandb", "tensorboard", "mlflow", "trackio", "swanlab") if keys.flag(f"use_{name}")]
    names += [name for name in ("wandb", "mlflow", "trackio") if projects[name] is not None and name not in names]
    names = [name for name in names if modes.get(name) != "disabled"]
    imported.options["tracker"] = "none" if not names else names[0] if len(names) == 1 else f"[{','.join(names)}]"
    for mode_of in names:
        if modes.get(mode_of) not in (None, "online", "cloud"):
            variable = f"{mode_of.upper()}_MODE={modes[mode_of]}"
            imported.note("changed", f"{mode_of}_mode={modes[mode_of]}", f"set {variable} in the environment")
    tracker = imported.section("tracker")
    used = list(dict.fromkeys(projects[name] for name in names if projects.get(name) is not None))
    if used:
        tracker["project"] = used[0]
        if len(used) > 1:
            imported.note("changed", _list([PROJECTS[n] for n in names if n in PROJECTS]), f"all log to {used[0]}")
    entities = {"wandb": keys.text("wandb_entity"), "swanlab": keys.text("swanlab_workspace")}
    if entity := next((entities[name] for name in entities if name in names and entities[name]), None):
        tracker["entity"] = entity
    runs = [keys.text(key) for key in ("wandb_name", "mlflow_run_name", "trackio_run_name", "swanlab_experiment_name")]
    if name := next((run for run in runs if run is not None), None):
        imported.settings["name"] = name
    for owner, value in (("wandb_entity", entities["wandb"]), ("wandb_mode", modes["wandb"])):
        if value not in (None, "disabled") and "wandb" not in names:
            imported.note("idle", f"{owner}={value}", "nothing is sent to wandb")
    if projects["wandb"] is not None and "wandb" not in names:
        imported.note("idle", f"wandb_project={projects['wandb']}", "nothing is sent to wandb")


def convert_parallel(keys: Keys, imported: Imported, processes: int) -> None:
    """Convert FSDP and DeepSpeed settings, replicas and expert parallelism."""
    imported.section("cluster")["gpus_per_node"] = processes
    if timeout := keys.number("ddp_timeout"):
        imported.section("cluster")["timeout_seconds"] = timeout
    _replicas(keys, imported, processes)
    experts = keys.integer("expert_parallel_size") or 1
    if experts > 1:
        reason = "experts are sharded over all GPUs like the rest of the base and gathered to compute"
        imported.note("changed", f"expert_parallel_size={experts}", reason)
    for name in ("deepspeed", "fsdp", "fsdp_config"):
        value = keys.any(name)
        if not value:
            continue
        shown = f"{name}={value}" if isinstance(value, str) else name
        imported.note("idle", shown, "the base is sharded over all GPUs anyway, adapters are replicated")
        if _offloads(value):
            _offload(imported, f"{name} (CPU offload)", processes)


def _offload(imported: Imported, key: str, processes: int) -> None:
    """Keep the base in CPU memory where that is supported; results are the same anyway."""
    whole = imported.options["adapter"] == "full" or "modules_to_save" in imported.section("adapter")
    if processes == 1 or whole or "shard_degree" in imported.section("parallel"):
        reason = "parameters that are trained stay on the GPUs" if whole else "one process keeps the base on its GPU"
        if not whole and processes > 1:
            reason = "replicas of the base stay on the GPUs"
        imported.note("changed", key, f"{reason}; results are the same, and the plan shows the memory")
        return
    imported.options["parallel"] = "zero3"
    imported.section("parallel")["offload_base"] = True
    imported.note("changed", key, "parallel=zero3 parallel.offload_base=true: the base is offloaded, adapters are not")


def _replicas(keys: Keys, imported: Imported, processes: int) -> None:
    """Convert dp_replicate_size replicas of the base, each sharded over all processes of its own."""
    keys.any("dp_shard_size")
    replicas = keys.integer("dp_replicate_size") or 1
    if replicas > 1 and processes % replicas == 0:
        imported.section("parallel")["shard_degree"] = processes // replicas
    elif replicas > 1:
        reason = f"{processes} GPUs are not {replicas} equal replicas: one is sharded over all"
        imported.note("changed", f"dp_replicate_size={replicas}", f"{reason}; set parallel.shard_degree")


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
