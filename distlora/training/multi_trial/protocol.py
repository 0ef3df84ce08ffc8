"""Define the files by which a sweep's launcher and the processes of multi-trial training exchange work, in PACK.

Each file is written atomically (system.atomic_io), and all but the last two are written once, so there are no locks:

    PACK/config.yaml             settings that all trials share, like a run's; run_dir is PACK                launcher
    PACK/pack.json               {"slots": k, "verdicts": bool}                                               launcher
    PACK/inbox/0007.json         {"number", "run_dir"}: a prepared trial (RUN/config.yaml, RUN/data.json)     launcher
                                 that may start, or resume from its newest checkpoint
    PACK/closed                  no more trials will come                                                     launcher
    PACK/verdicts/0007_00000050.json  {"prune": bool}: the verdict after trial 7's evaluation at step 50      launcher
    PACK/outcomes/0007.json      {"state": complete|pruned|failed, "reason", "step", "seconds"}               trainer
    PACK/seats.json              {"numbers"}: trials in slots and the one about to enter, in order of         trainer
                                 entering: the suspects if the processes die
    PACK/stopped.json            {"signal", "time"}: stopped by a signal; removed at a start                  trainer

The trainer takes trials in the order of their numbers into free slots, between steps. It ends (exit code 0) when the
inbox is closed and every trial in it has an outcome. After a request to stop it saves every trial in a slot and leaves
PACK/stopped.json, which `run_workers` turns into exit code 75. A trial's metrics are in its run folder, like those of a
run alone. A restart reads the same inbox and continues the trials without an outcome. With "verdicts" the trainer waits
for one after each evaluation after which a trial would continue, except the base's at step 0. Imports no torch: the
launcher uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from distlora.config import Config, UserError
from distlora.config.file import settings_by_name

PACK_NAME, CLOSED_NAME, SEATS_NAME = "pack.json", "closed", "seats.json"
INBOX, VERDICTS, OUTCOMES = "inbox", "verdicts", "outcomes"


def inbox_file(pack: Path, number: int) -> Path:
    return pack / INBOX / f"{number:04d}.json"


def verdict_file(pack: Path, number: int, step: int) -> Path:
    return pack / VERDICTS / f"{number:04d}_{step:08d}.json"


def outcome_file(pack: Path, number: int) -> Path:
    return pack / OUTCOMES / f"{number:04d}.json"


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
"""Settings that may differ between trials. Any other difference needs another computation for the base's part of a
step."""

_ALONE = "leave it out, or set sweep.packed=1, where every trial trains by itself"


def check_trial(config: Config) -> None:
    """Refuse a run that cannot be a trial of multi-trial training, naming the setting."""
    for setting, reason in _refused(config):
        raise UserError(f"{setting} {reason}; {_ALONE}")


def check_pack(configs: Sequence[Config]) -> None:
    """Refuse runs that cannot train together, naming the setting, and both values if they differ."""
    for config in configs:
        check_trial(config)
    for config in configs[1:]:
        check_beside(config, first=configs[0])


def check_beside(config: Config, *, first: Config) -> None:
    """Refuse a run that cannot share a base with the run `first`, naming the setting."""
    own, others = settings_by_name(config), settings_by_name(first)
    for setting in (name for name in own if name not in MAY_DIFFER):
        if own[setting] != others[setting]:
            raise UserError(
                f"{setting}={own[setting]} beside {setting}={others[setting]}: trials of a pack run as one batch "
                "over one copy of the base, in which this cannot differ; give it one value, or set sweep.packed=1, "
                "where every trial trains by itself"
            )


def _refused(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (setting, reason why multi-trial training does not support it)."""
    adapter, train = config.adapter, config.train
    if adapter.method != "lora":
        yield f"adapter={adapter.method}", "trains the base, which the trials of a pack share"
    if adapter.decomposes:
        yield (
            f"adapter.init={adapter.init}",
            "starts from a decomposition of the base, which the trials of a pack share",
        )
    if adapter.init_from is not None:
        yield f"adapter.init_from={adapter.init_from}", "starts from another adapter, which packs cannot"
    if adapter.modules_to_save:
        yield (
            f"adapter.modules_to_save={list(adapter.modules_to_save)}",
            "trains embedding or head whole, which the trials of a pack share",
        )
    if adapter.trainable_token_indices:
        yield (
            "adapter.trainable_token_indices",
            "trains rows of the embedding or the head, which the trials of a pack share",
        )
    if config.model.new_tokens:
        yield (
            f"model.new_tokens={list(config.model.new_tokens)}",
            "trains rows of the embedding, which the trials of a pack share",
        )
    if train.objective != "sft":
        yield (
            f"train.objective={train.objective}",
            "compares every row with the model as it started, which packs cannot",
        )
    if config.parallel.resident_blocks == "auto":
        yield (
            "parallel.resident_blocks=auto",
            "fills the memory that a first step leaves, which trials that enter later need (name a number of blocks)",
        )
    if train.sample_every is not None:
        yield (
            f"train.sample_every={train.sample_every}",
            "generates with one adapter while others train, which packs cannot",
        )
