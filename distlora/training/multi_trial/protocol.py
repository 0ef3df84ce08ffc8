"""Define the files by which a sweep's launcher and the processes of multi-trial training exchange work, in GROUP.

Each file is written atomically (system.atomic_io), and all but the last are written once, so there are no locks:

    GROUP/config.yaml             settings that all trials share, like a run's; run_dir is GROUP                launcher
    GROUP/pack.json               {"slots": k, "verdicts": bool}                                               launcher
    GROUP/inbox/0007.json         {"number", "run_dir"}: a prepared trial (RUN/config.yaml, RUN/data.json)     launcher
                                 that may start, or resume from its newest checkpoint
    GROUP/closed                  no more trials will come                                                     launcher
    GROUP/verdicts/0007_00000050.json  {"prune": bool}: the verdict after trial 7's evaluation at step 50      launcher
    GROUP/outcomes/0007.json      {"state": complete|pruned|failed, "reason", "step", "seconds"}               trainer
    GROUP/slots.json              {"numbers"}: trials in slots and the one about to enter, in order of         trainer
                                 entering: the suspects if the processes die

The trainer takes trials in the order of their numbers into free slots, between steps. It ends (exit code 0) when the
inbox is closed and every trial in it has an outcome. After a request to stop it saves every trial in
a slot and ends with exit code 75. A trial's metrics are in its run folder, as for a
single run. A restart reads the same inbox and continues the trials without an outcome. With "verdicts" the trainer
waits for one after each evaluation after which a trial would continue, except the base's at step 0. Imports no torch:
the launcher uses it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distlora.config import Config, UserError
from distlora.config.file import settings_by_name

SETTINGS_NAME, CLOSED_NAME, SLOTS_NAME = "pack.json", "closed", "slots.json"
INBOX, VERDICTS, OUTCOMES = "inbox", "verdicts", "outcomes"


def inbox_file(folder: Path, number: int) -> Path:
    """Return the file that hands a trial to the trainer."""
    return folder / INBOX / f"{number:04d}.json"


def verdict_file(folder: Path, number: int, step: int) -> Path:
    """Return the file that decides if a trial continues after the evaluation at `step`."""
    return folder / VERDICTS / f"{number:04d}_{step:08d}.json"


def outcome_file(folder: Path, number: int) -> Path:
    """Return the file with the outcome of a trial."""
    return folder / OUTCOMES / f"{number:04d}.json"


_MAY_DIFFER = {
    "optim": "lr betas eps weight_decay warmup_steps warmup_ratio schedule decay_ratio min_lr_ratio max_grad_norm "
    "loraplus_lr_ratio",
    "adapter": "r lora_alpha use_rslora lora_dropout target_modules rank_pattern alpha_pattern init",
    "data": "path sources eval_path eval_fraction",
    "train": "seed max_steps epochs global_batch eval_every evals_per_epoch save_every saves_per_epoch "
    "loss_watchdog_threshold loss_watchdog_patience early_stopping_patience early_stopping_threshold "
    "load_best_at_end",
    "tracker": "group tags",
}
MAY_DIFFER = {
    "name",
    "run_dir",
    *(f"{section}.{name}" for section, names in _MAY_DIFFER.items() for name in names.split()),
}
"""Settings that may differ between trials. Any other difference needs another computation for the base's part of a
step."""

_ALONE = "leave it out, or set sweep.packed=1, where every trial trains by itself"


def check_trial(config: Config) -> None:
    """Refuse a run that cannot be a trial of multi-trial training, naming the setting."""
    adapter, model, train = config.adapter, config.model, config.train
    refused = {
        f"adapter={adapter.method} trains the base, which": adapter.method != "lora",
        f"adapter.init={adapter.init} starts from a decomposition of the base, which": adapter.decomposes,
        f"adapter.init_from={adapter.init_from}, which": adapter.init_from is not None,
        f"adapter.modules_to_save={list(adapter.modules_to_save)}, which": bool(adapter.modules_to_save),
        "adapter.trainable_token_indices, which": bool(adapter.trainable_token_indices),
        f"model.new_tokens={list(model.new_tokens)}, which": bool(model.new_tokens),
        f"train.objective={train.objective}, which": train.objective != "sft",
        "data.images=true, which": config.data.images,
        "parallel.resident_blocks=auto (a number of layers is), which": config.parallel.resident_blocks == "auto",
        f"train.neftune_alpha={train.neftune_alpha}, which": train.neftune_alpha is not None,
        f"train.sample_every={train.sample_every}, which": train.sample_every is not None,
        "tracker=swanlab, whose client logs one run per process, which": config.tracker.swanlab,
    }
    for setting, is_refused in refused.items():
        if is_refused:
            raise UserError(f"{setting} is not supported where trials train together on one base; {_ALONE}")


def check_pack(configs: Sequence[Config]) -> None:
    """Refuse runs that cannot train together, naming the setting, and both values if they differ."""
    for config in configs:
        check_trial(config)
    first, *others = map(settings_by_name, configs)
    for settings in others:
        check_beside(settings, first=first)


def check_beside(settings: Mapping[str, Any], *, first: Mapping[str, Any]) -> None:
    """Refuse a run that cannot share a base with the run `first`. Both are `settings_by_name` of the runs."""
    for setting, value in settings.items():
        if setting not in MAY_DIFFER and value != first[setting]:
            raise UserError(
                f"{setting}={value} beside {setting}={first[setting]}: trials trained together run as one batch on one "
                "base, and this setting must be the same for all; give it one value, or set sweep.packed=1 to train "
                "every trial by itself"
            )
