"""A new stage of a run: `distlora resume RUN setting=value` changes its settings from the newest checkpoint on."""

import errno
import fcntl
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from distlora.checkpoint.state import changeable_settings, newest_state
from distlora.config import Config, TrainConfig, UserError, require
from distlora.config.checks import check_settings
from distlora.config.errors import as_typed
from distlora.config.file import as_mapping, build, load_config, settings_by_name
from distlora.run_folder.layout import CHECKPOINTS, DATA_NAME, SUMMARY_NAME, find_result, read_record, step_folder
from distlora.run_folder.stages import CONFIG_NAME, STAGES_NAME, end_stages_at
from distlora.system import atomic_io
from distlora_launcher.compose.checks import check, check_parallel
from distlora_launcher.compose.compose import made_absolute, parse_overrides
from distlora_launcher.compose.hub import restore
from distlora_launcher.launch.lock import holders
from distlora_launcher.report.records import total_steps
from distlora_launcher.terminal.output import say, shown, warn


def begin_stage(run_dir: Path, words: Sequence[str]) -> None:
    """Change the settings of a run that nobody runs. It keeps those that it had, and a result, in RUN/stages.

    Nothing changes if the run has these settings already. Raises UserError for a setting that may not change, for one
    that is refused, and for a run that would have no step left.
    """
    with (run_dir / CONFIG_NAME).open("r+", encoding="utf-8") as file:  # NFS locks only what is open for writing.
        _lock(file)
        config = load_config(run_dir)
        changed = with_words(config, words)
        before, after = settings_by_name(config), settings_by_name(changed)
        names = [name for name in after if after[name] != before[name]]
        if not names:
            return
        require(not holders(run_dir), f"{run_dir} is running; end it with `distlora cancel {run_dir}`, then resume it")
        total = total_steps(changed.total_steps, read_record(run_dir / DATA_NAME))
        step = _check_steps(run_dir, changed.train, total)
        restore(changed.model)
        check(changed, new_run=False, before=config)  # Before anything moves: a refusal must not cost the result.
        check_parallel(changed.parallel, changed.cluster.ranks)
        if step:
            end_stages_at(run_dir, step)
            _keep(run_dir, step)
        text = yaml.safe_dump(as_mapping(changed), sort_keys=False, allow_unicode=True)
        atomic_io.write_text(run_dir / CONFIG_NAME, text)
    lines = ", ".join(f"{name}={as_typed(after[name])} (was {as_typed(before[name])})" for name in names)
    say(f"{shown(run_dir)} continues after step {step:,} with {lines}")


def _lock(file: TextIO) -> None:
    """Wait for the lock of a run's settings: each node may type the command, and one of them changes the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        warn(f"{file.name} is on a file system without locks: make sure that only one node types this command")


def with_words(config: Config, words: Sequence[str]) -> Config:
    """Return the settings of a run with those that were typed. Raises UserError for one that may not change."""
    values: dict[str, Any] = as_mapping(config)
    allowed, sections = changeable_settings(config), set()
    for word, override in zip(words, parse_overrides(words), strict=True):
        section, _, name = override.key_or_group.partition(".")
        is_value = name != "" and not (override.is_delete() or override.is_sweep_override())
        require(
            is_value and isinstance(values.get(section), dict),
            f"{word} is no setting of a run with one value; write for example train.max_steps=200",
        )
        values[section][name] = made_absolute(override.key_or_group, override.value())
        build(type(getattr(config, section)), values[section], f"{section}.")
        require(
            override.key_or_group in allowed,
            f"{word} cannot change in a run that has begun; what can: train.max_steps and epochs, early stopping, "
            "evaluations, optim without optim.name, and what changes no result (saves, logs, memory, ranks, trackers). "
            "Start another run with it, from this one's result by adapter.init_from=RUN/adapter",
        )
        require(
            override.key_or_group != "optim.lr" or override.value() is not None,
            f"{word}: the usual rate is found when a run begins; write a number, or leave it out",
        )
        sections.add(section)
    changed = build(Config, values)
    check_settings(changed, sections)
    streamed = config.data.streaming and changed.train.max_steps != config.train.max_steps
    require(not streamed, "train.max_steps cannot change with data.streaming: no more was read; start another run")
    return changed


def _check_steps(run_dir: Path, train: TrainConfig, total: int | None) -> int:
    """Return the steps of the newest checkpoint, 0 without one. Raises UserError if none follows, of `total` steps."""
    newest, result = newest_state(run_dir / CHECKPOINTS), find_result(run_dir)
    if newest is None:
        require(result is None, f"{run_dir} has no checkpoint to continue from; start another run from its result")
        return 0
    progress, cure = newest[1].progress, "set train.max_steps or train.epochs higher"
    if total is not None and (total < progress.step or (result is not None and total == progress.step)):
        raise UserError(f"{run_dir} has done {progress.step:,} steps, and these settings end it at {total:,}; {cure}")
    patience = train.early_stopping_patience
    if patience is not None and progress.evaluations_since_best(train.early_stopping_threshold) >= patience:
        raise UserError(
            f"{run_dir} was stopped early by train.early_stopping_patience={patience}, which would end it again; add "
            "train.early_stopping_patience=null or a higher number"
        )
    return progress.step


def _keep(run_dir: Path, step: int) -> None:
    """Keep the settings until `step`, and the result. A kill in it leaves a run that resumes with its old settings."""
    kept, result = step_folder(run_dir / STAGES_NAME, step), find_result(run_dir)
    atomic_io.private_folder(kept)
    if not (kept / CONFIG_NAME).is_file():  # A stage in which no step was saved is replaced by the new one.
        atomic_io.write_text(kept / CONFIG_NAME, (run_dir / CONFIG_NAME).read_text(encoding="utf-8"))
    if result is not None:
        if (summary := run_dir / SUMMARY_NAME).is_file():
            summary.replace(kept / SUMMARY_NAME)
        shutil.rmtree(kept / result.name, ignore_errors=True)  # Of a change that was killed: the same result.
        result.rename(kept / result.name)
