"""Axolotl's steps as ours: epochs, saves, evaluations, early stopping, and the schedule of the learning rate."""

import math

from distlora_launcher.importing.recipe import Imported, Keys

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
    """Convert steps, saves, evaluations and early stopping."""
    train, max_steps, epochs = imported.section("train"), keys.integer("max_steps"), keys.number("num_epochs")
    epochs = 1.0 if epochs is None else epochs
    train["max_steps"] = max_steps
    train["epochs"] = epochs
    train["log_every"] = keys.integer("logging_steps") or 1
    train["keep"] = keys.integer("save_total_limit") or 4
    train |= _interval(keys, imported, "save", max_steps, epochs)
    evaluates = imported.section("data").get("eval_path") is not None or imported.section("data")["eval_fraction"] > 0
    train["eval_every"] = None
    if evaluates:
        train |= _interval(keys, imported, "eval", max_steps, epochs)
    if not evaluates:
        for name in ("evals_per_epoch", "eval_steps", "eval_strategy", "evaluation_strategy"):
            if keys.any(name):
                imported.note("idle", name, "nothing is held out")
    _early_stopping(keys, imported)
    threshold, patience = keys.number("loss_watchdog_threshold"), keys.integer("loss_watchdog_patience")
    if threshold is not None:
        train |= {"loss_watchdog_threshold": threshold, "loss_watchdog_patience": patience or 3}
    elif patience is not None:
        imported.note("idle", "loss_watchdog_patience", "there is no loss_watchdog_threshold")


def _interval(keys: Keys, imported: Imported, kind: str, max_steps: int | None, epochs: float) -> dict[str, int]:
    """Return the setting of saves or evaluations (`kind`): per epoch or in steps; empty for the end only."""
    per_epoch, steps = keys.number(f"{kind}s_per_epoch"), keys.number(f"{kind}_steps")
    aliases = ("eval_strategy", "evaluation_strategy") if kind == "eval" else ("save_strategy",)
    chosen = keys.any(*aliases)
    strategy = "no" if chosen is False else chosen  # YAML reads a bare no as false.
    if steps is None and not per_epoch:
        if strategy == "best":
            imported.note("idle", "save_strategy=best", "the best adapter is kept in RUN/best beside the checkpoints")
        if strategy not in (None, "no", "epoch", "best"):
            imported.note("unsupported", f"{aliases[0]}={strategy}", f"needs {kind}_steps, or set train.{kind}_every")
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
        imported.note("changed", key, f"train.{kind}s_per_epoch={count}: {times / epochs:.3g} per epoch, rounded up")
    return {f"{kind}s_per_epoch": count}


def _early_stopping(keys: Keys, imported: Imported) -> None:
    train = imported.section("train")
    patience, best = keys.integer("early_stopping_patience"), keys.flag("load_best_model_at_end")
    metric, greater = keys.text("metric_for_best_model"), keys.flag("greater_is_better")
    if metric not in (None, "loss", "eval_loss") or greater:
        imported.note("unsupported", f"metric_for_best_model={metric}", "the held-out loss decides, lower is better")
    given = {"early_stopping_patience": patience, "load_best_model_at_end": best}
    if train["eval_every"] is None and "evals_per_epoch" not in train:
        for name, value in given.items():
            if value:
                imported.note("unsupported", name, "needs evaluations while training; set train.eval_every with it")
        return
    train["early_stopping_patience"] = patience or None
    train["load_best_at_end"] = best


def convert_schedule(keys: Keys, imported: Imported) -> None:
    """Convert the learning-rate schedule.

    distlora's warm-up starts one step higher: at lr / steps instead of 0.
    """
    optim, max_steps = imported.section("optim"), imported.section("train")["max_steps"]
    name = keys.text("lr_scheduler") or "cosine"
    options = Keys(keys.mapping("lr_scheduler_kwargs"), place="lr_scheduler_kwargs.")
    if name not in SCHEDULES:
        known = ", ".join(dict.fromkeys(SCHEDULES.values()))
        imported.note("unsupported", f"lr_scheduler={name}", f"cosine is written; choose among {known}")
    optim["schedule"] = SCHEDULES.get(name, "cosine")
    floor = keys.number("cosine_min_lr_ratio")
    if floor is not None and optim["schedule"] != "cosine":
        imported.note("idle", "cosine_min_lr_ratio", f"lr_scheduler={name} is not a cosine schedule")
        floor = None
    floor = options.number("min_lr_rate") if floor is None and name == "cosine_with_min_lr" else floor
    optim["min_lr_ratio"] = float(floor or 0.0)
    if name == "warmup_stable_decay":
        _stable_decay(options, imported, max_steps)
    for option, _ in options.unread():
        imported.note("unsupported", f"lr_scheduler_kwargs.{option}", "this shape of the learning rate is not built")
    optim |= _warmup(keys, imported, max_steps, constant=name == "constant")


def _stable_decay(options: Keys, imported: Imported, max_steps: int | None) -> None:
    """Convert the WSD schedule of transformers: num_decay_steps, with a cosine decay unless decay_type is linear."""
    decay, shape = options.integer("num_decay_steps"), options.text("decay_type") or "cosine"
    if shape != "linear":
        imported.note("changed", f"lr_scheduler_kwargs.decay_type={shape}", "the last decay is linear in distlora")
    if decay is not None and max_steps:
        imported.section("optim")["decay_ratio"] = decay / max_steps
    else:
        imported.note(
            "unsupported",
            "lr_scheduler_kwargs.num_decay_steps",
            "a fraction of all steps is needed, which requires max_steps; set optim.decay_ratio (0.1 is the default)",
        )


def _warmup(keys: Keys, imported: Imported, max_steps: int | None, *, constant: bool) -> dict[str, float]:
    """Return the warm-up in steps or as a share of them."""
    steps, ratio = keys.number("warmup_steps"), keys.number("warmup_ratio")
    if constant:
        if steps or ratio:
            given = f"warmup_steps={steps:g}" if steps else f"warmup_ratio={ratio:g}"
            imported.note("idle", given, "lr_scheduler=constant has no warm-up")
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
    imported.note(
        "changed",
        "warmup_ratio (not set)",
        f"{DEFAULT_WARMUP} of the steps, which Axolotl caps at {MOST_DEFAULT_WARMUP} steps in runs of more than 3,333",
    )
    return {"warmup_ratio": DEFAULT_WARMUP}
