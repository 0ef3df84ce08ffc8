"""How long an Axolotl run is, when it evaluates and saves, and the shape of its learning rate.

Axolotl knows the steps of an epoch before it starts and states much relative to them. Here evaluations and saves are a
number of steps, which only a run with max_steps tells without tokenizing the data.
"""

from __future__ import annotations

import math

from distlora_launcher.importing.keys import Keys
from distlora_launcher.importing.recipe import Imported

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
    train, max_steps, epochs = imported.section("train"), keys.integer("max_steps"), keys.number("num_epochs")
    epochs = 1.0 if epochs is None else epochs
    train["max_steps"] = max_steps
    train["epochs"] = max(1, math.ceil(epochs))
    if not epochs.is_integer() and max_steps is None:
        imported.note("unsupported", f"num_epochs={epochs:g}", "epochs are whole; set train.max_steps to end earlier")
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
    """Steps between saves or evaluations; None: at the end only. `kind` is save or eval."""
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
        f"a number of steps is needed, and only the tokenized data tells how many {steps:.3g} of the run are; "
        f"set {setting} once the start of a run has shown them",
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
    """The learning rate over the run. Warm-ups start one step higher here: at lr / steps instead of 0."""
    optim, max_steps = imported.section("optim"), imported.section("train")["max_steps"]
    name = keys.text("lr_scheduler") or "cosine"
    options = Keys(keys.mapping("lr_scheduler_kwargs"), place="lr_scheduler_kwargs.")
    if name not in SCHEDULES:
        known = ", ".join(dict.fromkeys(SCHEDULES.values()))
        imported.note("unsupported", f"lr_scheduler={name}", f"cosine is written; choose among {known}")
    optim["schedule"] = SCHEDULES.get(name, "cosine")
    floor = keys.number("cosine_min_lr_ratio")
    if floor is not None and optim["schedule"] != "cosine":
        imported.note("idle", "cosine_min_lr_ratio", f"lr_scheduler={name} is no cosine")
        floor = None
    floor = options.number("min_lr_rate") if floor is None and name == "cosine_with_min_lr" else floor
    optim["min_lr_ratio"] = float(floor or 0.0)
    if name == "warmup_stable_decay":
        _stable_decay(options, imported, max_steps)
    for option, _ in options.unread():
        imported.note("unsupported", f"lr_scheduler_kwargs.{option}", "this shape of the learning rate is not built")
    optim["warmup_ratio"] = _warmup(keys, imported, max_steps, constant=name == "constant")


def _stable_decay(options: Keys, imported: Imported, max_steps: int | None) -> None:
    """transformers' WSD: num_decay_steps, and a cosine fall unless decay_type says linear."""
    decay, shape = options.integer("num_decay_steps"), options.text("decay_type") or "cosine"
    if shape != "linear":
        imported.note("differs", f"lr_scheduler_kwargs.decay_type={shape}", "the last fall is linear here")
    if decay is not None and max_steps:
        imported.section("optim")["decay_ratio"] = decay / max_steps
    else:
        imported.note(
            "unsupported",
            "lr_scheduler_kwargs.num_decay_steps",
            "a share of all steps is needed, which max_steps would tell; set optim.decay_ratio (0.1 is the default)",
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
            f"a share of all steps is needed, which max_steps would tell; {DEFAULT_WARMUP} is written: "
            f"set optim.warmup_ratio to {steps:g} / steps once the start of a run has shown them",
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
