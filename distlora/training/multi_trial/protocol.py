"""What passes between a sweep's worker (the launcher) and a pack (the processes that train), as files in PACK.

Each file appears whole (durable.write_json), and all but the last two are written once, so neither side locks anything:

```
PACK/config.yaml             the settings that all trials share, as a run's; run_dir is PACK      launcher
PACK/pack.json               {"slots": k, "verdicts": bool}                                       launcher
PACK/inbox/0007.json         {"number", "run_dir"}: a trial that is prepared (RUN/config.yaml,    launcher
                             RUN/data.json) and may start, or go on from its newest checkpoint
PACK/closed                  no more trials will come                                             launcher
PACK/verdicts/0007_00000050.json  {"prune": bool}: after trial 7's evaluation at step 50, which   launcher
                             the pack waits for
PACK/outcomes/0007.json      {"state": complete|pruned|failed, "reason", "step", "seconds"}       pack
PACK/seats.json              {"numbers"}: of the trials in slots, and of the one that is about    pack
                             to enter, in the order in which they did: whom to ask when the pack dies
PACK/stopped.json            {"signal", "time"}: it was asked to stop; not there after a start    pack
```

The pack takes trials in the order of their numbers into free slots, between steps. It ends (exit code 0) when the inbox
is closed and every trial that was in it has an outcome; asked to stop, it saves every trial that is in a slot and
leaves PACK/stopped.json, of which `run_workers` makes exit code 75. A trial's figures are in its own run folder, as
those of a run alone. A pack that is started again finds the same inbox, and goes on with what has no outcome. With
"verdicts" it waits for one after each evaluation after which a trial would go on, but for the base's at step 0.
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
"""Whatever else differs needs another computation for the base's part of a step, so such trials do not fit into one
pack."""

_ALONE = "leave it out, or set sweep.packed=1, where every trial trains by itself"


def check_trial(config: Config) -> None:
    """Refuse a run that cannot be a trial of any pack, naming the setting."""
    for setting, reason in _refused(config):
        raise UserError(f"{setting} {reason}; {_ALONE}")


def check_pack(configs: Sequence[Config]) -> None:
    """Refuse runs that cannot be trials of one pack, naming the setting, and both values where they differ."""
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
    """(setting, why no pack has it)."""
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
