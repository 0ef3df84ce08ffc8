"""Train, plan and load a model from Python (`import distlora`; docs/python.md).

`train` starts `distlora train` in a process of its own, so a run from Python is a run from the shell: the same checks,
plan, workers and run folder. The calling process imports no torch and initializes neither CUDA nor a process group.
Only `load` does, to hold a model in the calling process.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distlora.config import Config, UserError, require
from distlora.config.errors import short
from distlora.config.file import load_config
from distlora.post.trained import Name
from distlora.run_folder.layout import PLAN_NAME, REPORT_NAME, SUMMARY_NAME, find_result, metric_records, read_record
from distlora.run_folder.sweep import words_of
from distlora.system import atomic_io
from distlora.system.exit_codes import BAD_INPUT, DONE, STOPPED
from distlora_launcher.cli import report as report_command
from distlora_launcher.cli.plan import PlanResult, plan_run
from distlora_launcher.cli.status import Status, statuses
from distlora_launcher.compose.checks import check_run_dir
from distlora_launcher.compose.compose import MAPPINGS, compose_config
from distlora_launcher.compose.overrides import known_models
from distlora_launcher.follow import Command, RunFollower
from distlora_launcher.importing.settings_file import with_file
from distlora_launcher.launch.local import remove_if_empty
from distlora_launcher.launch.lock import CONFIG_NAME

if TYPE_CHECKING:
    from distlora.post.loaded import LoadedModel

DOCUMENTS_NAME = "documents.jsonl"
"""File in RUN with documents that were given as Python objects."""

Answer = Literal["stop"] | None
"""Answer of a callback: "stop" requests a save and a stop, as SIGTERM does."""


class RunFailedError(RuntimeError):
    """Report a run that failed, with the launcher's explanation."""

    def __init__(self, message: str, folder: Path, exit_code: int) -> None:
        super().__init__(message)
        self.folder = folder
        """The run folder, with logs/; a run that failed before its first step may have none."""
        self.exit_code = exit_code
        """Exit code of the command; negative: the signal that killed it."""


CALLBACKS = ("on_step", "on_eval", "on_save")


class Callback:
    """Base class of callbacks: override the methods that you need, or pass functions to the constructor.

    They are called in your process, in order, after rank 0 has written the step, so they cannot slow or break training.
    Return "stop" to save and stop the run.
    """

    def __init__(self, **functions: Any) -> None:
        """Use functions in place of methods: `Callback(on_step=lambda step, metrics: print(step, metrics["loss"]))`."""
        for name, function in functions.items():
            if name not in CALLBACKS or not callable(function):
                raise TypeError(f"Callback({name}=...): give functions for {', '.join(CALLBACKS)}")
            setattr(self, name, function)

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> Answer:
        """Receive the metrics of a training step: loss, lr, grad_norm, tokens_per_second and others."""

    def on_eval(self, step: int, metrics: Mapping[str, Any]) -> Answer:
        """Receive the metrics of an evaluation after `step` steps: eval_loss and others."""

    def on_save(self, step: int, folder: Path) -> Answer:
        """Receive the folder of a complete checkpoint; train.keep sets how many stay."""


class Run:
    """A run folder: its settings, plan, metrics and results, at any time."""

    def __init__(self, folder: str | Path) -> None:
        """Open a run. Raises UserError for a folder without one."""
        self.folder = Path(folder).expanduser().absolute()
        load_config(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.status.state})"

    @property
    def config(self) -> Config:
        """The settings."""
        return load_config(self.folder)

    @property
    def plan(self) -> dict[str, Any]:
        """The plan that the run started with, in bytes and seconds (plan.json)."""
        return read_record(self.folder / PLAN_NAME)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One record per training step and per evaluation (`eval_loss`), as `pandas.DataFrame` takes them."""
        return metric_records(self.folder)

    @property
    def summary(self) -> dict[str, Any]:
        """The final metrics (summary.json); empty before the end."""
        return read_record(self.folder / SUMMARY_NAME)

    @property
    def adapter(self) -> Path | None:
        """Folder of the result: an adapter in PEFT's format, or a model with adapter=full. None before the end."""
        return find_result(self.folder)

    @property
    def status(self) -> Status:
        """The state (`state`: running, done, stopped, failed ...), with `figures`, `seconds_left` and `saved`."""
        return statuses(self.folder)[0]

    def resume(self, *, settings: Mapping[str, Any] | None = None, callbacks: Sequence[Callback] = ()) -> Run:
        """Continue the run from its newest checkpoint, as `distlora resume` does. Errors are those of `train`.

        settings: those of a new stage, such as `{"train.max_steps": 2000}`.
        """
        check_callbacks(callbacks, self.config.cluster.launcher)
        return _follow(["resume", str(self.folder), *as_overrides(settings=settings)], self.folder, callbacks)

    def report(self, out: str | Path | None = None) -> Path:
        """Write the HTML report of the run to `out`, by default report.html in its folder. Returns its path."""
        place = self.folder / REPORT_NAME if out is None else Path(out).expanduser().absolute()
        report_command.write(place, report_command.page_of(self.folder))
        return place


def train(
    config: str | Path | None = None,
    *,
    model: str | Path | None = None,
    data: str | Path | Iterable[Mapping[str, Any]] | None = None,
    recipe: str | None = None,
    run_dir: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Fine-tune a model and return its run once it has ended.

    Args:
        config: a settings file (mine.yaml), or one of Axolotl or LLaMA-Factory; the other arguments win over it.
        model: a name for model= (`llama3_8b`), a folder in Hugging Face format, or a name on the hub.
        data: a file, a folder or a data set on the hub; or documents as a list of dictionaries, which are written to
            RUN/documents.jsonl.
        recipe: a recipe of conf/recipe, such as `qlora`.
        run_dir: the run folder (default: runs/ and the time).
        settings: all other settings, by dotted names or nested: `{"optim.lr": 1e-4, "adapter": {"r": 32}}`.
        callbacks: see `Callback`.

    Prints what `distlora train` prints. A run that a callback, `distlora cancel` or a signal has stopped is returned
    too, with `run.status.state == "stopped"`; Ctrl-C saves, stops and raises KeyboardInterrupt. With cluster=slurm the
    job is submitted, and the run is returned at once.

    Raises UserError for wrong input and RunFailedError for a run that failed.
    """
    is_path = data is None or isinstance(data, str | Path)
    path: Any = data if is_path else DOCUMENTS_NAME
    words = as_overrides(model=model, data=path, recipe=recipe, run_dir=run_dir, settings=settings)
    words = _with_config(config, words)
    composed = compose_config(words)
    check_callbacks(callbacks, composed.cluster.launcher)
    folder = Path(composed.run_dir)
    words += as_overrides(run_dir=folder)  # Of two values the last one counts.
    if is_path:
        return _follow(["train", *words], folder, callbacks)
    check_run_dir(folder)
    documents: Any = data
    place = _write_documents(documents, folder / DOCUMENTS_NAME)
    words += as_overrides(data=place)
    try:
        return _follow(["train", *words], folder, callbacks)
    except UserError:
        if not (folder / CONFIG_NAME).exists():  # The launcher has left no run.
            place.unlink()
            remove_if_empty(folder)
        raise


def plan(
    config: str | Path | None = None,
    *,
    model: str | Path | None = None,
    gpu: str | None = None,
    data: str | Path | None = None,
    recipe: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PlanResult:
    """Predict what a run needs: memory by category, disk, network traffic, time. Downloads no weights.

    gpu: a name of `distlora plan --help`, such as `h100` (default: this node). The other arguments are those of
    `train`. `print` shows the result as `distlora plan` does; `result.fits` and `result.as_json()` are for programs.

    Raises UserError for settings that `train` refuses.
    """
    words = as_overrides(model=model, data=data, recipe=recipe, gpu=gpu, settings=settings)
    return plan_run(_with_config(config, words))


def load(
    run: Run | str | Path,
    *,
    checkpoint: str | None = None,
    adapter: str | Path | None = None,
    device: str | None = None,
    dtype: Literal["bf16", "fp32"] | None = None,
) -> LoadedModel:
    """Load what a run trained into this process, to generate text and to compute logits.

    Args:
        run: a run or its folder; of an unfinished run, the newest checkpoint is loaded.
        checkpoint: `best` (lowest held-out loss) or a saved step, such as `step_100`.
        adapter: another adapter of the run's base, or `base` for the base alone.
        device: `cpu`, `cuda` or `cuda:1` (default: the first GPU, else the CPU).
        dtype: compute dtype (default: as trained).

    Raises UserError for a run without anything trained, and for a missing base.
    """
    folder = run.folder if isinstance(run, Run) else Run(run).folder
    require(checkpoint is None or adapter is None, "checkpoint and adapter exclude each other; give one of them")
    from distlora.post.loaded import LoadedModel, in_python
    from distlora_launcher.compose.hub import restore

    with in_python():
        weights = None if adapter is None else str(adapter)
        trained = Name(place=str(folder), adapter=weights, checkpoint=checkpoint).read()
        restore(trained.spec.model)
        return LoadedModel(trained, device=device, dtype=dtype)


def as_overrides(
    *,
    model: str | Path | None = None,
    data: str | Path | None = None,
    recipe: str | None = None,
    gpu: str | None = None,
    run_dir: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the arguments of `distlora train` for these settings; None is left out. Raises UserError for two values.

    model: a name for model=, a folder or a name on the hub. settings: dotted names, or nested mappings of them.
    """
    named = {"recipe": recipe, "gpu": gpu, "data.path": data, "run_dir": run_dir}
    if model is not None:
        named["model" if str(model) in known_models() else "model.path"] = model
    values = {name: _plain(name, value) for name, value in named.items() if value is not None}
    for name, value in _leaves(settings or {}):
        require(name not in values, f"{name} is set twice; leave one of them out")
        values[name] = _plain(name, value)
    return words_of(values)


def _with_config(config: str | Path | None, words: list[str]) -> list[str]:
    """Return overrides in which a settings file has become its settings."""
    return words if config is None else with_file([str(config), *words], "distlora")


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value); the mappings of MAPPINGS are values."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in MAPPINGS:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _plain(name: str, value: Any) -> Any:
    """Return a value as YAML has it. Raises UserError for an object that is not the value of a setting."""
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith("~/")):
        return str(Path(value).expanduser())
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    raise UserError(
        f"{name}={short(value)} is of type {type(value).__name__}; give a text, a number, True, False, None, a list or "
        "a mapping"
    )


def check_callbacks(callbacks: Sequence[Callback], launcher: str) -> None:
    """Refuse what is not a callback, and callbacks of a run that this process does not wait for."""
    for callback in callbacks:
        if not any(callable(getattr(callback, name, None)) for name in CALLBACKS) or isinstance(callback, type):
            raise UserError(
                f"callbacks: {callback!r} has none of {', '.join(CALLBACKS)}; give objects of distlora.Callback, such "
                "as Callback(on_step=function)"
            )
    require(
        not callbacks or launcher == "local",
        f"callbacks are called with cluster=local only, not with cluster={launcher}; leave them out, and look at "
        "distlora.Run(folder).metrics",
    )


def _follow(arguments: Sequence[str], folder: Path, callbacks: Sequence[Callback]) -> Run:
    """Run a command to its end, and return its run. Raises UserError and RunFailedError with its explanation."""
    follower = RunFollower(folder, callbacks)
    command = Command(*arguments)
    code = command.wait(follower.look)
    if code in (DONE, STOPPED):
        return Run(folder)
    killed = f"the launcher was killed by {signal.Signals(-code).name}" if code < 0 else ""
    message = "\n".join(line for line in (killed, command.explanation) if line)
    if code == BAD_INPUT:
        raise UserError(*message.splitlines())
    raise RunFailedError(message, folder, code)


def _write_documents(documents: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Write documents as JSON lines. Raises UserError for one that JSON cannot hold."""
    lines = []
    for index, document in enumerate(documents):
        require(isinstance(document, Mapping), f"data[{index}] is not a dictionary; give a list of dictionaries")
        try:
            lines.append(json.dumps(dict(document), ensure_ascii=False, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise UserError(f"data[{index}] is not JSON ({error}); give texts, numbers, lists and dicts") from error
    atomic_io.private_folder(path.parent)
    path.write_text("".join(lines), encoding="utf-8")
    return path
