"""Layout of a run folder: names, records, checkpoints and trained results. Needs no torch.

    RUN/adapter or RUN/model        the published result
    RUN/best                        the state with the lowest held-out loss
    RUN/checkpoints/step_00000100/  adapter_config.json, adapter_model.safetensors (PEFT's format; model.safetensors for
                                    adapter=full), trainer.safetensors (optimizer), state.json, manifest.json (SHA-256);
                                    rollout.safetensors of answers that the next steps train on
    RUN/rollouts/step_00000101.parquet  sampled answers and their rewards, by the first step that trains on them
    RUN/eval_answers/step_00000100.parquet  answers to held-out prompts, by the steps done before

A checkpoint is written to a temporary folder, synced and renamed, so a name `step_*` always stands for a complete one.
The manifest reveals later damage.
"""

import itertools
import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import Config, UserError, nearest, require
from distlora.config.errors import in_one_line
from distlora.config.file import load_config
from distlora.config.json_files import Shape, check_shape, parse_object, read_object
from distlora.system import atomic_io
from distlora.system.atomic_io import sha256
from distlora.weights.peft_folder import CONFIG_NAME as ADAPTER_CONFIG
from distlora_kernels import processor

MANIFEST_NAME, STATE_NAME, TRAINER_NAME = "manifest.json", "state.json", "trainer.safetensors"
ROLLOUT_NAME = "rollout.safetensors"
"""The answers that the next steps of online reinforcement learning train on."""
ROLLOUTS_NAME = "rollouts"
"""Folder of the sampled answers that a person reads."""
EVAL_ANSWERS_NAME = "eval_answers"
"""Folder of the answers to the held-out prompts."""
ROLLOUT_ADAPTER_NAME = "rollout_adapter"
"""Folder of the adapter that a vLLM server samples with (rollout.url)."""
ROLLOUT_ID_NAME = "rollout_id.txt"
"""Random id in the names that this run's adapters have on the server: other runs may have a folder of the same name."""

_STEP = re.compile(r"step_(\d{8,})")
_ANSWERS = re.compile(r"step_(\d{8,})\.parquet")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEMPORARY, _REPLACED = ".tmp", ".old"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of the state after `step` steps."""
    return checkpoints / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Return the number of steps before a checkpoint."""
    match = _STEP.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1])


def steps(checkpoints: Path) -> list[Path]:
    """List the checkpoint folders, whole or not, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted((path for path in checkpoints.iterdir() if _STEP.fullmatch(path.name)), key=step_of)


def answers_file(folder: Path, step: int) -> Path:
    """Return the file of this step in RUN/rollouts or RUN/eval_answers."""
    return folder / f"step_{step:08d}.parquet"


def answers_files(folder: Path) -> dict[int, Path]:
    """Return the files in RUN/rollouts or RUN/eval_answers by step, oldest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return dict(sorted((int(match[1]), path) for path in paths if (match := _ANSWERS.fullmatch(path.name))))


def temporary_folder(folder: Path) -> Path:
    """Return the folder in which `folder` is written before it is renamed."""
    return folder.with_name(f".{folder.name}{_TEMPORARY}")


def replaced_folder(folder: Path) -> Path:
    """Return the folder to which an older `folder` moves while a new one takes its name."""
    return folder.with_name(f".{folder.name}{_REPLACED}")


def fault(folder: Path, required: Collection[str] = (STATE_NAME, TRAINER_NAME)) -> str | None:
    """Return what is wrong with a checkpoint by its manifest and every byte; None if it is whole.

    Reads only within `folder`, whatever the manifest names. `required`: files that it must name.
    """
    reason = _fault(folder, required)
    return None if reason is None else in_one_line(reason)


def _fault(folder: Path, required: Collection[str]) -> str | None:
    try:
        if not (folder / MANIFEST_NAME).is_file():
            return f"{MANIFEST_NAME} is missing"
        sums = _sums(json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8")), required)
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST_NAME}: {error}"
    for name, expected in sums.items():
        path = folder / name
        try:
            if not path.is_file() or path.is_symlink():
                return f"{name} is missing"
            if sha256(path) != expected:
                return f"{name} is not what was saved"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return None


def _sums(manifest: Any, required: Collection[str]) -> dict[str, str]:
    """Return the SHA-256 by file of a manifest. Raises ValueError for an invalid one."""
    sums = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(sums, dict):
        raise ValueError("it lists no files")
    for name, value in sums.items():
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r} is not a file of this folder")
        if not isinstance(value, str) or _SHA256.fullmatch(value) is None:
            raise ValueError(f"{name} has no SHA-256 but {value!r}")
    missing = sorted(set(required) - sums.keys())
    if missing:
        raise ValueError(f"it does not list {missing[0]}")
    return sums


def newest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Return (the newest whole checkpoint or None, one line per newer damaged one). Reads all their bytes."""
    damaged: list[str] = []
    for folder in reversed(steps(checkpoints)):
        reason = fault(folder)
        if reason is None:
            return folder, damaged
        damaged.append(f"checkpoint {folder.name} is damaged ({reason}) and was not used")
    return None, damaged


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that it no longer counts as one; return its new path.

    The run saves those steps again: if the old folder became readable by then, it would take their place.
    """
    for number in itertools.count(1):
        aside = folder.with_name(f"unused_{folder.name}" + (f"_{number}" if number > 1 else ""))
        if not aside.exists():
            break
    folder.rename(aside)
    atomic_io.sync(aside.parent)
    return aside


def tidy(parent: Path, name: str) -> None:
    """Remove what a killed writer left of the folders in `parent` that match the glob pattern `name`.

    A folder that was set aside and not replaced gets its name back. Call it at the start of a run, while nothing writes
    there.
    """
    for path in sorted(parent.glob(f".{name}{_REPLACED}")):
        folder = parent / path.name[1 : -len(_REPLACED)]
        if not folder.exists():
            path.rename(folder)
            atomic_io.sync(parent)
    for pattern in (f".{name}{_REPLACED}", f".{name}{_TEMPORARY}"):
        for path in parent.glob(pattern):
            shutil.rmtree(path)


PUBLISHED = {"lora": "adapter", "full": "model"}
"""Folder in RUN of the published result, by adapter.method."""
BEST_NAME = "best"
"""Folder in RUN of the state with the lowest held-out loss, if the run evaluates during training."""
BEST_STEP_NAME = "step.json"
"""File in RUN/best with its step. After a kill between a new best and the save of its step, the resume knows an older
best.
"""
CHECKPOINTS, CHECKPOINT_PATTERN = "checkpoints", "step_*"
DATA_NAME, SUMMARY_NAME, METRICS_NAME = "data.json", "summary.json", "metrics.jsonl"
PLAN_NAME = "plan.json"
MACHINES = "machines"
"""Folder in RUN and in SWEEP of the launchers' records, which they lock (distlora_launcher.launch.lock)."""
COMPILED_NAME = "compiled.json"
"""What train.compile=auto was at the run's first start, and the path of its products on CPUs."""
REPORT_NAME = "report.html"
"""Report page in RUN and in SWEEP (distlora_launcher.report)."""
TEMPLATE_NAME = "chat_template.jinja"
"""Chat template beside the results, if it is not the base's."""

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
    "splits?": {"*": {"documents": int, "targets": int, "tokens": int, "images?": int, "sources?": [_COUNTS]}},
}
ENVIRONMENT: Shape = {"*": (int, str, bool)}
"""Shape of `TrainState.environment` on disk, for readers without a run."""

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
"""Fields that are read of each record; others are ignored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A trained result of a run, with the records of the run folder."""

    config: Config
    folder: Path
    """Folder of an adapter in PEFT's format, or of a whole model."""
    step: int | None
    """Optimizer steps done; None if no figure was logged."""
    adapter: Mapping[str, Any] | None
    """adapter_config.json; None for a whole model."""
    evaluations: Mapping[int, float]
    """Held-out loss in nats per token, by step."""
    data: Mapping[str, Any]
    """data.json."""
    summary: Mapping[str, Any]
    """summary.json; empty before the end of a run."""
    environment: Mapping[str, Any]
    """Environment of the newest checkpoint: ranks, device, versions."""

    @property
    def chat_template(self) -> str | None:
        """Jinja chat template that replaced the base's; None if the base's was used."""
        return self.data.get("chat_template")


def read_result(run_dir: Path, checkpoint: str | None = None) -> Result:
    """Return what a run published, or with `checkpoint` its best (`best`) or a saved step (`step_100`, `100`).

    Raises UserError for a folder without a run, an unfinished run, a missing checkpoint, and a damaged record.
    """
    config = load_config(run_dir)
    lines = metric_records(run_dir)
    evaluations = {line["step"]: line["eval_loss"] for line in lines if line.get("eval_loss") is not None}
    summary = read_record(run_dir / SUMMARY_NAME, _SUMMARY)
    last = max((line["step"] for line in lines), default=None)
    if checkpoint is None:
        folder = run_dir / PUBLISHED[config.adapter.method]
        if not folder.is_dir():
            raise UserError(
                f"{run_dir} is not finished: it has no {folder.name} folder; continue it with `distlora resume "
                f"{run_dir}`, or name a saved state with --checkpoint{_saved(run_dir)}"
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
        step, folder = _checkpoint(run_dir, checkpoint, config.adapter.method)
    states = [folder / "state.json" for folder in checkpoint_folders(run_dir) if (folder / "state.json").is_file()]
    is_adapter = config.adapter.method == "lora"
    if is_adapter and not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder} holds no {ADAPTER_CONFIG}; restore a complete copy")
    return Result(
        config=config,
        folder=folder,
        step=step,
        adapter=read_record(folder / ADAPTER_CONFIG, _ADAPTER) if is_adapter else None,
        evaluations=evaluations,
        data=read_record(run_dir / DATA_NAME, _DATA),
        summary=summary,
        environment=read_record(states[-1], _STATE).get("environment", {}) if states else {},
    )


def find_result(run_dir: Path) -> Path | None:
    """Return the folder of the published result, or None."""
    return next((run_dir / name for name in PUBLISHED.values() if (run_dir / name).is_dir()), None)


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """List the saved steps, oldest first, whole or not."""
    return steps(run_dir / CHECKPOINTS)


def read_record(path: Path, shape: Shape = dict) -> dict[str, Any]:
    """Read a JSON object of this shape in a run folder; empty if there is no such file.

    Raises UserError if it is damaged.
    """
    return read_object(path, _remedy(path), shape) if path.is_file() else {}


def compiled_before(run_dir: Path) -> bool | None:
    """Return what train.compile=auto was at the first start of a run; None before it."""
    return decided_before(run_dir).get("train.compile")


def path_before(run_dir: Path) -> str | None:
    """Return the path of products (distlora_kernels.processor) at the first start of a run; None before it.

    Runs of versions that recorded none have the path that those versions took on this processor.
    """
    decided = decided_before(run_dir)
    path = decided.get("path")
    known = path is None or path in processor.PATHS
    require(known, f"{run_dir / COMPILED_NAME} has path={path}, which this version of distlora does not know")
    if path is None and (decided or checkpoint_folders(run_dir)):
        return next(name for name in ("amx", "avx512_bf16", "generic") if processor.is_supported(name))
    return path


def decided_before(run_dir: Path) -> dict[str, Any]:
    """Return what the first start of a run recorded in COMPILED_NAME; empty before it."""
    return read_record(run_dir / COMPILED_NAME, {"train.compile?": bool, "path?": str})


def cannot_continue(run_dir: Path, reason: str) -> str:
    """Return the error for a run that train.compile=auto compiled, where that is not possible."""
    return (
        f"{run_dir} was compiled at its first start (train.compile=auto), and {reason}. Continue it on a node that "
        f"can, or set train.compile to false in {run_dir / 'config.yaml'} (changes results by rounding)"
    )


def _remedy(path: Path) -> str:
    if path.name == DATA_NAME:
        return f"make it again with `distlora data prepare {path.parent}`"
    return "restore a complete copy" if path.name == ADAPTER_CONFIG else "move it out of the run folder"


def _checkpoint(run_dir: Path, name: str, method: str) -> tuple[int, Path]:
    """Return (step, folder) of a saved step."""
    match = _CHECKPOINT.fullmatch(name)
    folder = run_dir / CHECKPOINTS / f"step_{int(match[1]):08d}" if match else None
    if match is None or folder is None or not folder.is_dir():
        have = [path.name for path in checkpoint_folders(run_dir)]
        raise UserError(
            f"--checkpoint {name}: {run_dir} has no such checkpoint{nearest(name, have)}; "
            f"it has{_saved(run_dir) or ' none'}"
        )
    if method == "full":
        raise UserError(
            f"--checkpoint {name} holds weights without the model's configuration; leave --checkpoint out to take the "
            "finished model"
        )
    return int(match[1]), folder


def _saved(run_dir: Path) -> str:
    """Return ` best, step_00000100` for what a run has saved, or an empty string."""
    names = [path.name for path in checkpoint_folders(run_dir)]
    names = ([BEST_NAME] if (run_dir / BEST_NAME).is_dir() else []) + names
    return f" {', '.join(names)}" if names else ""


def metric_records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the whole lines of metrics.jsonl; a kill may have cut off the last. Raises UserError for a damaged one."""
    path = run_dir / METRICS_NAME
    lines = path.read_bytes().splitlines() if path.is_file() else []
    entries = []
    for number, line in enumerate(lines, start=1):
        if line.startswith(b"{") and line.endswith(b"}"):
            entry = parse_object(line, f"{path} is damaged: line {number}", _remedy(path))
            check_shape(entry, _METRICS, f"{path} is damaged: line {number}", _remedy(path))
            entries.append(entry)
    return entries
