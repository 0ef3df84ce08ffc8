"""Settings by the names that other trainers give them: what to type instead, where spelling would mislead."""

from __future__ import annotations

_BATCH = "; write train.micro_batch (rows a rank runs at once) or train.global_batch (rows a step)"
_RESUME = "; to continue a run write `distlora resume RUN`"
_PACKING = "; documents are always packed, so leave it out"
_BITS = "; write quant=nf4 (4 bits) or quant=none (16 bits)"

_SETTINGS = {
    "optim.lr": ("learning_rate", "lr"),
    "optim.warmup_ratio": ("warmup_steps", "num_warmup_steps"),
    "adapter.r": ("lora_r", "lora_rank", "rank"),
    "adapter.lora_alpha": ("lora_alpha",),
    "model.new_tokens": ("tokens", "special_tokens", "additional_special_tokens", "extra_special_tokens"),
    "adapter.trainable_token_indices": ("peft_trainable_token_indices", "token_indices"),
    "adapter.init": ("init_lora_weights", "peft_init_lora_weights"),
    "adapter.use_dora": ("use_dora", "peft_use_dora"),
    "train.global_batch": ("gradient_accumulation_steps", "grad_accum"),
    "train.save_every": ("save_steps",),
    "train.eval_every": ("eval_steps",),
    "train.log_every": ("logging_steps",),
    "train.epochs": ("num_train_epochs", "num_epochs"),
    "data.eval_fraction": ("val_size", "val_set_size"),
    "data.sequence_length": ("max_length", "max_seq_length", "max_seq_len", "sequence_len", "cutoff_len"),
}
"""Our setting: the last parts of the names that stand for it elsewhere (Transformers, TRL, Axolotl, LLaMA-Factory)."""

_SENTENCES = {
    "batch_size": _BATCH,
    "micro_batch_size": _BATCH,
    "per_device_train_batch_size": _BATCH,
    "resume": _RESUME,
    "resume_from_checkpoint": _RESUME,
    "packing": _PACKING,
    "sample_packing": _PACKING,
    "bits": _BITS,
    "load_in_4bit": _BITS,
    "load_in_8bit": _BITS,
}
"""Names that no single setting stands for, and what to say of them."""

_OURS = {name: ours for ours, names in _SETTINGS.items() for name in names}


def peer_hint(key: str) -> str:
    """Return a hint for a setting's name of another trainer, in any section; empty for other names."""
    last = key.rpartition(".")[2]
    if last in _OURS:
        return f" (did you mean {_OURS[last]!r}?)"
    return _SENTENCES.get(last, "")
