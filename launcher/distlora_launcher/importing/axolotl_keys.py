"""Axolotl's keys that have no equal here: for each, why, and what to do instead.

A key that is off (false, empty) asks for nothing and is not mentioned, except where off is what changes the run.
"""

from __future__ import annotations

from typing import Any

from distlora.config import nearest
from distlora_launcher.importing.recipe import Group, Imported, Keys

Row = tuple[Group, str, str]
"""Group, reason and what to do, names; a name that ends in * stands for all that begin so."""

ROWS: tuple[Row, ...] = (
    # The data.
    (
        "idle",
        "tokenized rows are cached by their content in data.cache_dir",
        "dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory num_dataset_shards_to_save "
        "skip_prepare_dataset is_preprocess preprocess_iterable dataloader_num_workers dataloader_pin_memory "
        "dataloader_prefetch_factor remove_unused_columns hf_use_auth_token",
    ),
    (
        "idle",
        "every row is packed by best fit, whole documents only, and has data.sequence_length tokens",
        "sample_packing_* eval_sample_packing pad_to_sequence_len pad_to_multiple_of group_by_length batch_flattening "
        "multipack_real_batches pretrain_multipack_buffer_size streaming_multipack_buffer_size total_num_tokens "
        "total_supervised_tokens",
    ),
    ("idle", "every epoch is shuffled by the seed", "shuffle_merged_datasets shuffle_before_merging_datasets"),
    ("unsupported", "rows are shuffled in every epoch", "curriculum_sampling"),
    (
        "unsupported",
        "nothing is dropped for being a duplicate; remove them from the data",
        "dataset_exact_deduplication",
    ),
    ("unsupported", "the last step of an epoch takes the rows that are left", "dataloader_drop_last"),
    (
        "unsupported",
        "the whole data set is read; a part of a hub data set is data.split=train[:10%]",
        "dataset_shard_*",
    ),
    ("unsupported", "held-out rows are as long as the others (data.sequence_length)", "eval_sequence_len"),
    ("unsupported", "short documents are kept; remove them from the data", "min_sample_len"),
    ("unsupported", "documents are never joined without a border", "pretraining_sample_concatenation"),
    ("unsupported", "the template gets no further arguments; write a .jinja file with them", "chat_template_kwargs"),
    ("unsupported", "a system message is only there where the data has one; add it there", "default_system_message"),
    ("unsupported", "the end of a turn is what the template writes; name them in a .jinja file", "eot_tokens"),
    ("unsupported", "upload the data set yourself", "push_dataset_to_hub"),
    ("unsupported", "set data.sequence_length", "max_packed_sequence_len"),
    # The model and its tokenizer.
    (
        "idle",
        "read off the model's config.json",
        "model_type type_of_model cls_model_config is_falcon_derived_model is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model tokenizer_type tokenizer_use_fast tokenizer_legacy "
        "tokenizer_save_jinja_files",
    ),
    (
        "idle",
        "attention is chosen by the model's family",
        "flash_attention flash_attn_* xformers_attention sdp_attention flex_attention flex_attn_* eager_attention "
        "sage_attention attn_implementation sdpa_varlen large_head_attention gemma4_hybrid_attn_impl flash_optimum "
        "fused_attn_kernel",
    ),
    ("idle", "logits exist a few at a time only", "chunked_cross_entropy* liger_* cut_cross_entropy*"),
    ("idle", "the adapted linear is one fused function already", "lora_*_kernel use_kernels"),
    ("refused", "code that comes with a model is not run; use a model that transformers knows", "trust_remote_code"),
    (
        "refused",
        "a model is used as its config.json says; change that file in a copy",
        "overrides_of_model_config model_config overrides_of_model_kwargs model_kwargs rope_scaling "
        "model_quantization_config*",
    ),
    ("refused", "ids keep the texts that they have; model.new_tokens adds tokens", "added_tokens_overrides"),
    ("refused", "a vocabulary only grows; change the embeddings in a copy of the model", "shrink_embeddings"),
    ("unsupported", "a vocabulary grows by what model.new_tokens needs, no further", "resize_token_embeddings_to_32x"),
    ("idle", "rows of new tokens start as the mean of all others", "mean_resizing_embeddings"),
    ("unsupported", "rows of new tokens start as the mean of all others, no other row changes", "fix_untrained_tokens"),
    ("refused", "Hugging Face tokenizers are used", "tokenizer_use_mistral_common"),
    ("refused", "a run starts from the checkpoint's weights", "reinit_weights"),
    ("refused", "GPTQ weights cannot be read; set base_model to the 16-bit checkpoint", "gptq"),
    ("unsupported", "only text is trained on", "image_size image_resize_algorithm processor_* role_boundaries"),
    ("idle", "there is no other tower in memory", "freeze_mm_modules"),
    ("idle", "experts are in NF4 under quant=nf4, and run as one grouped product on a GPU", "quantize_moe_experts"),
    ("idle", "experts run as one grouped product on a GPU", "experts_implementation"),
    ("unsupported", "Llama 4 is not supported", "llama4_*"),
    # The adapter.
    ("refused", "weights are stored (out, in)", "lora_fan_in_fan_out"),
    (
        "unsupported",
        "write adapter.target_modules as a regular expression: model.layers.(0|1|2).*q_proj",
        "peft_layers_to_transform peft_layers_pattern",
    ),
    ("idle", "no adapter starts anew", "peft peft_init_lora_weights"),
    (
        "refused",
        "only linears of the blocks are adapted",
        "peft_layer_replication",
    ),
    ("idle", "embeddings have no adapter", "loraplus_lr_embedding"),
    ("idle", "trained rows of a tied embedding are the head's", "peft_ensure_weight_tying"),
    ("idle", "adapters are fp32, the rest as train.dtype says", "peft_autocast_adapter_dtype embeddings_skip_upcast"),
    ("unsupported", "norms compute in fp32 and are stored in 16 bits", "fp32_norms fp32_norm_classes"),
    (
        "idle",
        "each process reads its own shard of the base",
        "qlora_sharded_model_loading lora_on_cpu low_cpu_mem_usage",
    ),
    ("unsupported", "an adapter is published, PEFT merges it (merge_and_unload)", "merge_lora"),
    ("idle", "belongs to merging", "merge_method"),
    ("unsupported", "adapter=lora trains adapters, adapter=full everything", "unfrozen_parameters"),
    ("unsupported", "this way of training is not built", "relora* jagged_restart_* lisa_* use_pose pose_* spectrum_*"),
    # Optimizer, schedule, loss.
    (
        "unsupported",
        "this form of the learning rate is not built",
        "cosine_constant_lr_ratio lr_quadratic_warmup lr_div_factor",
    ),
    ("unsupported", "one learning rate for all (and optim.loraplus_lr_ratio for B)", "lr_groups embedding_lr*"),
    ("unsupported", "of another optimizer than AdamW", "optim_args optim_target_modules torchdistx_path"),
    ("unsupported", "of another optimizer than AdamW", "adam_beta3 adam_epsilon2 dion_* qgalore_* grokfast_*"),
    ("unsupported", "no noise is added to embeddings", "neftune_noise_alpha noisy_embedding_alpha"),
    ("unsupported", "another loss than the next token's is not built", "use_eaft eaft_* kd_* num_labels trainer_cls"),
    ("idle", "the reference is the base, run in the same pass as the policy", "rl_adapter_ref_model"),
    ("idle", "the reference is the base, run in the same pass as the policy", "precompute_ref_log_probs"),
    ("unsupported", "of DPO the plain loss is built", "dpo_* rpo_* rl_*"),
    ("refused", "belongs to preference training other than DPO", "kto_* orpo_* simpo_* cpo_* trl vllm"),
    ("refused", "belongs to reward models", "center_rewards_coefficient max_prompt_len"),
    ("unsupported", "only a loss or gradient that is not finite stops a run", "loss_watchdog_*"),
    # Precision and memory.
    ("idle", "bf16 GEMMs do not use it", "tf32"),
    ("unsupported", "8-bit floating point is not built; bf16 is written", "fp8 fp8_*"),
    (
        "unsupported",
        "not built; nothing is quantized after or while training beyond NF4",
        "qat quantization use_onebitllms",
    ),
    ("idle", "checkpointing is never reentrant", "gradient_checkpointing_kwargs"),
    ("unsupported", "set train.checkpointing=selective, which recomputes MLPs alone", "selective_checkpointing"),
    (
        "unsupported",
        "the base stays on the GPUs, in 4 bits; parallel=zero3 parallel.offload_base=true keeps it on the host",
        "layer_offloading",
    ),
    ("unsupported", "leave train.micro_batch out and add plan=auto, which calculates it", "auto_find_batch_size"),
    (
        "idle",
        "what it fuses is liger-kernel's or one kernel on a GPU already; on a CPU add train.compile=true",
        "torch_compile torch_compile_* deepcompile",
    ),
    ("idle", "the MLP that is run in tiles is the model's own", "tiled_mlp_use_original_mlp"),
    ("idle", "belongs to tiled_mlp", "tiled_mlp_*"),
    ("unsupported", "attention is the model's own", "scaling_softmax* s2_attention"),
    ("idle", "memory is given back by itself", "gc_steps gc_collect_steps torch_empty_cache_steps"),
    ("unsupported", "the whole GPU may be used", "gpu_memory_limit max_memory"),
    # Processes.
    (
        "idle",
        "the launcher starts one process a GPU (cluster.gpus_per_node), the base sharded over all",
        "fsdp_version fsdp_final_state_dict_type device device_map world_size local_rank ddp ddp_* "
        "accelerator_config experimental_skip_move_to_device",
    ),
    ("unsupported", "each process runs whole rows", "heads_k_stride ring_attn_func"),
    ("unsupported", "Ray does not start runs here", "use_ray ray_* resources_per_worker"),
    # The run.
    ("idle", "`distlora resume RUN` continues a run", "resume_from_checkpoint auto_resume_from_checkpoints"),
    ("idle", "a checkpoint has the adapter and the optimizer, in safetensors", "save_safetensors"),
    ("unsupported", "a checkpoint always has the optimizer, so that a run can be resumed", "save_only_model"),
    ("unsupported", "set train.save_every=1 for a trial", "save_first_step"),
    ("unsupported", "checkpoints are written by steps", "dynamic_checkpoint"),
    (
        "unsupported",
        "nothing is uploaded while training; `distlora push RUN` does it after",
        "hub_strategy hub_revision",
    ),
    ("unsupported", "set train.sample_every and train.sample_prompts", "generate_samples"),
    ("idle", "belongs to samples; see train.sample_prompts", "num_generation_samples generation_* diffusion_*"),
    ("unsupported", "the held-out loss is what is measured", "do_causal_lm_eval do_bench_eval bench_* lm_eval*"),
    ("idle", "the held-out loss is what is measured", "eval_causal_lm_metrics eval_table_size eval_max_new_tokens"),
    ("unsupported", "each run has a new wandb id", "wandb_run_id"),
    ("unsupported", "adapters and gradients are not sent to wandb", "wandb_log_model wandb_watch"),
    ("unsupported", "metrics go to metrics.jsonl and wandb", "use_mlflow use_comet use_trackio use_tensorboard"),
    ("unsupported", "metrics go to metrics.jsonl and wandb", "use_otel_metrics use_swanlab swanlab_*"),
    ("idle", "metrics go to metrics.jsonl and wandb", "mlflow_* hf_mlflow_* comet_* trackio_* otel_*"),
    ("idle", "tokens a second are always shown", "include_tokens_per_second include_tkps"),
    ("unsupported", "no profile is written", "profiler_steps profiler_steps_start"),
    ("idle", "belongs to Axolotl's inference", "gradio_*"),
    ("idle", "belongs to Axolotl's command line", "strict axolotl_config_path"),
)

MEANT_WHEN_OFF: dict[str, tuple[Group, str]] = {
    "shuffle_merged_datasets": ("unsupported", "every epoch is shuffled by the seed"),
    "pretrain_multipack_attn": ("refused", "documents in a row never see each other"),
}
"""Keys that are on by default in Axolotl, and change the run when they are off."""

NEARBY = (
    "base_model datasets adapter load_in_4bit load_in_8bit lora_r lora_alpha lora_dropout lora_target_modules "
    "lora_target_linear lora_modules_to_save sequence_len sample_packing micro_batch_size gradient_accumulation_steps "
    "num_epochs max_steps learning_rate lr_scheduler optimizer warmup_steps warmup_ratio weight_decay max_grad_norm "
    "val_set_size output_dir bf16 gradient_checkpointing saves_per_epoch evals_per_epoch chat_template wandb_project"
)
"""Names that a mistyped key may have meant, beside those of ROWS."""

_SHARDS = "the whole data set is read; a part of a hub data set is split=train[:10%]"
ENTRY_ROWS: tuple[Row, ...] = (
    ("refused", "code that comes with data is not run; use a data set without it", "trust_remote_code"),
    ("unsupported", _SHARDS, "shards shards_idx skip"),
    ("idle", "documents are tokenized as they are read", "preprocess_shards"),
    ("unsupported", "system messages stay; remove them from the data", "drop_system_message"),
    ("unsupported", "put the reasoning into reasoning_content in the data", "split_thinking"),
    ("unsupported", "the reasoning is read from reasoning_content; rename it in the data", "field_thinking"),
    ("unsupported", "templates are given reasoning_content", "template_thinking_key"),
    ("unsupported", "a turn is trained whole or not at all", "message_field_training_detail"),
    ("unsupported", "transform the data before", "input_transform"),
    ("idle", "the system message is in the conversation", "field_system"),
    ("idle", "the format is read off the file's name", "input_format"),
    (
        "idle",
        "not read by this type",
        "field_human field_model field field_messages message_field_role message_field_content "
        "message_property_mappings roles roles_to_train train_on_eos train_on_eot chat_template chat_template_jinja "
        "conversation field_tools message_field_training",
    ),
    ("idle", "belongs to distillation", "temperature logprobs_field"),
)
"""The same for the keys of one data set."""
_ENTRY_KEYS = {name: (group, reason) for group, reason, names in ENTRY_ROWS for name in names.split()}

KNOWN_PLUGINS = ("LigerPlugin", "CutCrossEntropyPlugin")
"""Plugins that make the loss and its memory cheaper, and change no result."""


_ADDITIONAL = ("additional_special_tokens", "extra_special_tokens")


def additional_special_tokens(keys: Keys) -> list[str]:
    """Return the tokens that special_tokens adds beside the tokens with a role."""
    special = keys.mapping("special_tokens")
    return [str(token) for name in _ADDITIONAL for token in special.get(name) or ()]


def note_unread(keys: Keys, imported: Imported) -> None:
    """Note every unread key with its group and reason, or that Axolotl does not know it."""
    for plugin in keys.words("plugins") or []:
        name = plugin.rpartition(".")[2]
        known = name in KNOWN_PLUGINS
        reason = "logits exist a few at a time only" if known else "plugins of Axolotl are not run"
        imported.note("idle" if known else "unsupported", f"plugins: {name}", reason)
    for name, value in keys.mapping("special_tokens").items():
        if name == "pad_token" and value is not None:
            imported.note("idle", "special_tokens.pad_token", "padding is never trained nor seen, any token does")
        elif value and name not in _ADDITIONAL:
            imported.note(
                "refused",
                f"special_tokens.{name}={value}",
                "the tokenizer decides which token this is; change it in a copy of the model",
            )
    exact, prefixes = _table()
    for name, value in keys.unread():
        row = exact.get(name) or next((row for prefix, row in prefixes.items() if _fits(name, prefix)), None)
        if name in MEANT_WHEN_OFF and value is False:
            imported.note(MEANT_WHEN_OFF[name][0], f"{name}=false", MEANT_WHEN_OFF[name][1])
        elif row is None and name not in MEANT_WHEN_OFF:
            near = nearest(name, [*NEARBY.split(), *exact])
            imported.note("unknown", name, f"no key of Axolotl that is known here{near}; it was ignored")
        elif row is not None and value not in (None, False, "", [], {}):
            imported.note(row[0], _shown(name, value), row[1])


def note_entry_key(entry: Keys, name: str, value: Any, imported: Imported) -> None:
    """Note an unread key of a data set."""
    if name not in _ENTRY_KEYS:
        known = [*_ENTRY_KEYS, "path", "type", "name", "split", "revision", "data_files", "ds_type"]
        imported.note("unknown", f"{entry.place}{name}", f"Axolotl has no such key{nearest(name, known)}")
    elif value not in (None, False, ""):
        group, reason = _ENTRY_KEYS[name]
        if (name, value) not in (
            ("field_thinking", "reasoning_content"),
            ("template_thinking_key", "reasoning_content"),
        ):
            imported.note(group, f"{entry.place}{name}", reason)


def _table() -> tuple[dict[str, tuple[Group, str]], dict[str, tuple[Group, str]]]:
    """(rows by whole name, rows by pattern)."""
    exact: dict[str, tuple[Group, str]] = {}
    prefixes: dict[str, tuple[Group, str]] = {}
    for group, reason, names in ROWS:
        for name in names.split():
            (prefixes if "*" in name else exact)[name] = (group, reason)
    return exact, prefixes


def _fits(name: str, pattern: str) -> bool:
    start, _, end = pattern.partition("*")
    return len(name) >= len(start) + len(end) and name.startswith(start) and name.endswith(end)


def _shown(name: str, value: Any) -> str:
    """Return the key, with its value where that is a word or a number."""
    return f"{name}={value}" if isinstance(value, (int, float, str)) and value is not True else name
