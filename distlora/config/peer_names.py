"""Names of other trainers' settings, in distlora's terms: for hints at what to type instead."""

import difflib

_SETTINGS = {
    "name": "run_name wandb_name",
    "run_dir": "output_dir",
    "model.path": "base_model model_name_or_path model_name model_id pretrained_model_name_or_path hf_model",
    "model.revision": "model_revision revision_of_model",
    "model.new_tokens": "tokens additional_special_tokens extra_special_tokens add_tokens",
    "model.special_tokens": "special_tokens",
    "data.deduplicate": "dataset_exact_deduplication",
    "data.reasoning_key": "field_thinking",
    "data.images": "processor_type is_multimodal",
    "data.image_max_pixels": "max_pixels image_size",
    "data.image_min_pixels": "min_pixels",
    "data.path": "dataset datasets dataset_name dataset_path dataset_dir train_file train_data data_path data_files",
    "data.eval_path": "test_datasets eval_dataset eval_data validation_file val_file",
    "data.eval_fraction": "val_size val_set_size test_size validation_split",
    "data.split": "dataset_train_split",
    "data.template": "chat_template",
    "data.train_on": "train_on_inputs train_on_prompt assistant_only_loss completion_only_loss mask_history",
    "rollout.max_new_tokens": "max_completion_length",
    "data.rewards": "reward_funcs reward_functions reward_function",
    "data.environment": "environment_factory env",
    "rollout.max_turns": "max_tool_calling_iterations",
    "data.cache_dir": "dataset_prepared_path tokenized_path",
    "data.sequence_length": "max_length max_seq_length max_seq_len sequence_len cutoff_len seq_length block_size",
    "adapter.method": "finetuning_type use_peft",
    "adapter.r": "lora_r lora_rank rank",
    "adapter.lora_alpha": "lora_alpha alpha",
    "adapter.lora_dropout": "lora_dropout dropout",
    "adapter.use_rslora": "peft_use_rslora rslora",
    "adapter.use_dora": "peft_use_dora",
    "adapter.init": "init_lora_weights peft_init_lora_weights",
    "adapter.init_from": "lora_model_dir adapter_name_or_path",
    "adapter.target_modules": "lora_target lora_target_modules lora_target_linear targets",
    "adapter.target_parameters": "lora_target_parameters",
    "adapter.expert_sharing": "experts_shared_outer_loras share_expert_adapters",
    "adapter.modules_to_save": "lora_modules_to_save additional_target",
    "adapter.trainable_token_indices": "peft_trainable_token_indices token_indices",
    "optim.name": "optimizer",
    "optim.lr": "learning_rate lr",
    "optim.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optim.eps": "adam_epsilon",
    "optim.schedule": "lr_scheduler_type lr_scheduler",
    "optim.warmup_steps": "warmup_steps num_warmup_steps",
    "optim.max_grad_norm": "gradient_clipping clip_grad_norm",
    "train.objective": "rl stage",
    "train.beta": "pref_beta rl_beta dpo_beta",
    "train.desirable_weight": "kto_chosen_weight kto_desirable_weight",
    "train.undesirable_weight": "kto_rejected_weight kto_undesirable_weight",
    "train.epochs": "num_train_epochs num_epochs",
    "train.save_every": "save_steps save_strategy",
    "train.saves_per_epoch": "saves_per_epoch",
    "train.eval_every": "eval_steps eval_strategy evaluation_strategy",
    "train.evals_per_epoch": "evals_per_epoch",
    "train.log_every": "logging_steps",
    "train.keep": "save_total_limit",
    "train.neftune_alpha": "neftune_noise_alpha noisy_embedding_alpha",
    "train.router_aux_loss": "router_aux_loss_coef moe_aux_loss_coef",
    "train.load_best_at_end": "load_best_model_at_end",
    "train.checkpointing": "gradient_checkpointing activation_checkpointing",
    "train.dtype": "bf16 fp16 torch_dtype precision pure_bf16",
    "train.attention": "attn_implementation flash_attention flash_attn xformers_attention sdp_attention",
    "train.compile": "torch_compile",
    "tracker": "report_to",
    "tracker.project": "wandb_project",
    "cluster.gpus_per_node": "num_processes nproc_per_node num_gpus n_gpus gpus devices",
    "cluster.nodes": "num_nodes nnodes num_machines",
    "cluster.timeout_seconds": "ddp_timeout",
}
"""Our setting: the last parts of names that stand for it in Transformers, PEFT, TRL, Axolotl and LLaMA-Factory."""
_SAME_VALUE = {
    *("name", "run_dir", "model.path", "model.revision", "data.sequence_length", "data.eval_fraction", "adapter.r"),
    *("adapter.lora_alpha", "adapter.lora_dropout", "optim.lr", "optim.warmup_steps", "train.epochs", "train.keep"),
    *("train.saves_per_epoch", "train.evals_per_epoch", "train.neftune_alpha", "train.log_every", "tracker.project"),
}
"""Settings for which a number or a word of another tool means the same here."""

_BATCH = "; write train.micro_batch (sequences per rank and forward) or train.global_batch (sequences per step)"
_RESUME = "; to continue a run write `distlora resume RUN`"
_PACKING = "; documents are always packed, so leave it out"
_BITS = "; write quant=nf4 (4 bits) or quant=none (16 bits)"
_PUSH = "; nothing is uploaded while training: write `distlora push RUN ORG/NAME` afterwards"
_SHARDING = "; the base is sharded over all GPUs: set cluster.gpus_per_node, and parallel=zero3 for DeepSpeed"

ACCUMULATION = ("gradient_accumulation_steps", "gradient_accumulation", "grad_accum", "accumulation_steps")

_SENTENCES = {
    "batch_size micro_batch_size per_device_train_batch_size train_batch_size": _BATCH,
    " ".join(ACCUMULATION): "; write train.global_batch: the micro-batch x GPUs x steps of accumulation",
    "resume resume_from_checkpoint": _RESUME,
    "packing sample_packing group_by_length": _PACKING,
    "bits load_in_4bit load_in_8bit quantization_bit": _BITS,
    "push_to_hub hub_model_id": _PUSH,
    "deepspeed fsdp fsdp_config": _SHARDING,
    "keep_dequantized": "; quant.dense_layers keeps dequantized weights, of a number of layers and for the whole run",
    "liger use_liger_kernel use_liger enable_liger_kernel": (
        "; write train.fused_kernels=liger for true (the default is own), and none for false"
    ),
    "trust_remote_code": "; code that comes with a model is never run",
    "tracker.name": "; write tracker=wandb, or several as tracker=[wandb,tensorboard]",
    "top_p top_k min_p": (
        "; answers are sampled from all tokens at rollout.temperature, because the loss is of the distribution that "
        "was sampled: the tokens that a cut leaves out change with the weights, and then the ratio of such a token's "
        "probabilities has no value. Leave it out, or lower rollout.temperature"
    ),
    "do_train do_eval": "; leave it out: `distlora train` trains, and evaluates on data.eval_fraction",
}
"""Names that no single setting stands for, and what to say of them."""

OPTIMIZERS = {
    "adamw": (
        *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"),
        *("adamw_hf", "adamw_apex_fused", "adamw"),
    ),
    "adamw_8bit": ("adamw_bnb_8bit", "adamw_8bit"),
    "paged_adamw": ("paged_adamw", "paged_adamw_32bit"),
    "paged_adamw_8bit": ("paged_adamw_8bit",),
}
"""distlora's optimizers, and the names in Axolotl (mostly transformers') that mean the same update."""

SETTING_BY_NAME = {name: ours for ours, names in _SETTINGS.items() for name in names.split()}
HINTS = {name: text for names, text in _SENTENCES.items() for name in names.split()}


def peer_hint(key: str) -> str:
    """Return a hint for a setting's name of another trainer, in any section; empty for other names."""
    last = key.rpartition(".")[2]
    if last in SETTING_BY_NAME:
        return f" (did you mean {SETTING_BY_NAME[last]!r}?)"
    return HINTS.get(key) or HINTS.get(last, "")


def nearest_peer(name: str) -> str:
    """Return the hint for a misspelled name of another trainer; empty for one that is like none."""
    close = difflib.get_close_matches(name[:100], [*SETTING_BY_NAME, *HINTS], 1, cutoff=0.8)
    return peer_hint(close[0]) if close else ""


def same_setting(key: str) -> str | None:
    """Return the setting that takes the same values as another trainer's, or None."""
    return ours if (ours := SETTING_BY_NAME.get(key)) in _SAME_VALUE else None
