"""Which settings the trials of a pack may have each to themselves."""

from __future__ import annotations

MAY_DIFFER = (
    "name",
    "run_dir",
    "optim.lr",
    "optim.betas",
    "optim.eps",
    "optim.weight_decay",
    "optim.warmup_ratio",
    "optim.schedule",
    "optim.decay_ratio",
    "optim.min_lr_ratio",
    "optim.max_grad_norm",
    "optim.loraplus_lr_ratio",
    "adapter.r",
    "adapter.lora_alpha",
    "adapter.use_rslora",
    "adapter.lora_dropout",
    "adapter.target_modules",
    "adapter.rank_pattern",
    "adapter.alpha_pattern",
    "adapter.init",
    "data.path",
    "data.sources",
    "data.eval_path",
    "data.eval_fraction",
    "train.seed",
    "train.max_steps",
    "train.epochs",
    "train.global_batch",
    "train.eval_every",
    "train.save_every",
    "train.early_stopping_patience",
    "train.early_stopping_threshold",
    "train.load_best_at_end",
    "tracker.group",
    "tracker.tags",
)
"""Whatever else differs needs another computation for the base's part of a step, so such trials do not fit into one
pack."""
