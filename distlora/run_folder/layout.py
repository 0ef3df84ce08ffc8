"""What a run folder says of its run: the names in it, its records, and what it holds that was trained.

RUN/adapter or RUN/model is what a finished run publishes, RUN/best what had the lowest held-out loss,
RUN/checkpoints/step_* what can be resumed. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import Config, UserError, nearest
from distlora.config.file import load_config
from distlora.config.json_files import (
    Shape,
    check_shape,
    parse_object,
    read_object,
)
from distlora.run_folder.checkpoints import steps
from distlora.weights.peft_folder import CONFIG_NAME as ADAPTER_CONFIG

PUBLISHED = {"lora": "adapter", "full": "model"}
"""The folder in RUN that a finished run leaves, by adapter.method."""
BEST_NAME = "best"
"""In RUN: what had the lowest held-out loss, where there are evaluations during training."""
BEST_STEP_NAME = "step.json"
"""In RUN/best: the step that it is of. A kill can come between a new best and the save of its step, and the resume then
knows of an older one."""
CHECKPOINTS, CHECKPOINT_PATTERN = "checkpoints", "step_*"
DATA_NAME, SUMMARY_NAME, METRICS_NAME = "data.json", "summary.json", "metrics.jsonl"
PLAN_NAME = "plan.json"
REPORT_NAME = "report.html"
"""In RUN and in SWEEP: its page (distlora_launcher.report), of the end or of when somebody asked."""
TEMPLATE_NAME = "chat_template.jinja"
"""Beside what was trained, where chats were rendered with another template than the base's own."""

_CHECKPOINT = re.compile(r"(?:step_)?0*(\d+)")

_METRICS: Shape = {"step": int, "eval_loss?": (float, type(None))}
_SUMMARY: Shape = {
    "best_step?": (int, type(None)),
    "tokens_per_second?": float,
    "train_seconds?": float,
    "peak_memory_bytes?": float,
    "bits_per_parameter?": float,
    "trainable_parameters?": int,
}
_COUNTS: Shape = {"documents?": int, "share?": float, "commit?": (str, type(None))}
_DATA: Shape = {
    "chat_template?": (str, type(None)),
    "settings?": dict,
    "splits?": {"*": {"documents": int, "targets": int, "tokens": int, "sources?": [_COUNTS]}},
}
ENVIRONMENT: Shape = {"*": (int, str, bool)}
"""Of `TrainState.environment` on disk, for who reads it without a run."""

_STATE: Shape = {"environment?": ENVIRONMENT}
_ADAPTER: Shape = {
    "r": float,
    "lora_alpha": float,
    "target_modules": (str, [str], type(None)),
    "rank_pattern?": ({"*": float}, type(None)),
    "alpha_pattern?": ({"*": float}, type(None)),
    "target_parameters?": ([str], type(None)),
    "trainable_token_indices?": ({"*": [int]}, [int], type(None)),
    "modules_to_save?": ([str], type(None)),
}
"""What is read of each record, and by what follows it (model_card.py); what else one says is not looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Something that a run trained, and what the run folder says of it."""

    config: Config
    folder: Path
    """The files: an adapter in PEFT's format, or a whole model."""
    step: int | None
    """Optimizer steps behind it; None where no figure was logged."""
    adapter: Mapping[str, Any] | None
    """adapter_config.json; None for a whole model."""
    evaluations: Mapping[int, float]
    """Held-out loss, nats a token, by step."""
    data: Mapping[str, Any]
    """data.json."""
    summary: Mapping[str, Any]
    """summary.json; empty before the end of a run."""
    environment: Mapping[str, Any]
    """What the newest checkpoint was made on: ranks, device, versions."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that chats were rendered with in place of the base's own; None where that was used."""
        return self.data.get("chat_template")


def read_result(run_dir: Path, checkpoint: str | None = None) -> Result:
    """What a run published, or with `checkpoint` its best (`best`) or a saved step (`step_100`, `100`).

    Raises UserError for a folder without a run, a run that is not finished, a checkpoint that is not there, and a
    record that is damaged.
    """
    config = load_config(run_dir)
    lines = _read_lines(run_dir / METRICS_NAME)
    evaluations = {line["step"]: line["eval_loss"] for line in lines if line.get("eval_loss") is not None}
    summary = read_record(run_dir / SUMMARY_NAME, _SUMMARY)
    last = max((line["step"] for line in lines), default=None)
    if checkpoint is None:
        folder = run_dir / PUBLISHED[config.adapter.method]
        if not folder.is_dir():
            raise UserError(
                f"{run_dir} is not finished: it has no {folder.name} folder; continue it with `distlora resume "
                f"{run_dir}`, or name what it has with --checkpoint{_saved(run_dir)}"
            )
        step = summary.get("best_step", last) if config.train.load_best_at_end else last
    elif checkpoint == BEST_NAME:
        folder = run_dir / BEST_NAME
        if not folder.is_dir():
            raise UserError(
                f"{run_dir} has no best: that needs evaluations during training (train.eval_every); leave "
                "--checkpoint out, or name a saved step"
            )
        trained = {step: loss for step, loss in evaluations.items() if step > 0}
        step = min(trained, key=trained.__getitem__, default=None)
    else:
        step, folder = _checkpoint(run_dir, checkpoint, config)
    is_adapter = config.adapter.method == "lora"
    if is_adapter and not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder} holds no {ADAPTER_CONFIG}; put a whole copy in its place")
    return Result(
        config=config,
        folder=folder,
        step=step,
        adapter=read_record(folder / ADAPTER_CONFIG, _ADAPTER) if is_adapter else None,
        evaluations=evaluations,
        data=read_record(run_dir / DATA_NAME, _DATA),
        summary=summary,
        environment=_environment(run_dir),
    )


def find_result(run_dir: Path) -> Path | None:
    """What a finished run published, or None."""
    return next((run_dir / name for name in PUBLISHED.values() if (run_dir / name).is_dir()), None)


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The saved steps, oldest first, whole or not."""
    return steps(run_dir / CHECKPOINTS)


def read_record(path: Path, shape: Shape = dict) -> dict[str, Any]:
    """A JSON object in a run folder, of this shape; empty where there is no such file.

    Raises UserError for one that is damaged.
    """
    if not path.is_file():
        return {}
    values = read_object(path, _remedy(path))
    check_shape(values, shape, path, _remedy(path))
    return values


def _remedy(path: Path) -> str:
    if path.name == DATA_NAME:
        return f"make it again with `distlora data prepare {path.parent}`"
    return "put a whole copy in its place" if path.name == ADAPTER_CONFIG else "move it out of the run folder"


def _checkpoint(run_dir: Path, name: str, config: Config) -> tuple[int, Path]:
    """(step, folder) of a saved step."""
    match = _CHECKPOINT.fullmatch(name)
    folder = run_dir / CHECKPOINTS / f"step_{int(match[1]):08d}" if match else None
    if match is None or folder is None or not folder.is_dir():
        have = [path.name for path in checkpoint_folders(run_dir)]
        raise UserError(
            f"--checkpoint {name}: {run_dir} has no such checkpoint{nearest(name, have)}; "
            f"it has{_saved(run_dir) or ' none'}"
        )
    if config.adapter.method == "full":
        raise UserError(
            f"--checkpoint {name} holds weights without the model's configuration; leave --checkpoint out to take the "
            "finished model"
        )
    return int(match[1]), folder


def _saved(run_dir: Path) -> str:
    """` best, step_00000100` for what a run has saved, or an empty string."""
    names = [path.name for path in checkpoint_folders(run_dir)]
    names = ([BEST_NAME] if (run_dir / BEST_NAME).is_dir() else []) + names
    return f" {', '.join(names)}" if names else ""


def _environment(run_dir: Path) -> dict[str, Any]:
    states = [folder / "state.json" for folder in checkpoint_folders(run_dir) if (folder / "state.json").is_file()]
    environment: dict[str, Any] = read_record(states[-1], _STATE).get("environment", {}) if states else {}
    return environment


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; a kill may have cut off the last."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    entries = []
    for number, line in enumerate(lines, start=1):
        if line.startswith(b"{") and line.endswith(b"}"):
            entry = parse_object(line, f"{path} is damaged: line {number}", _remedy(path))
            check_shape(entry, _METRICS, f"{path} is damaged: line {number}", _remedy(path))
            entries.append(entry)
    return entries
