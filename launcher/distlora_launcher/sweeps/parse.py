"""Read a sweep from its command line and check it before anything is made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from distlora.config import ClusterConfig, DataConfig, ModelConfig, TrainConfig, UserError, nearest, require
from distlora.config.places import is_hub_name
from distlora.config.sweep import SweepConfig
from distlora.planner.report import packed_trials
from distlora.run_folder.sweep import JOURNAL_NAME, is_sweep_folder, words_of
from distlora.training.multi_trial.protocol import check_trial
from distlora_launcher.compose.checks import check, check_writable
from distlora_launcher.compose.compose import MOST_JOBS_CHECKED, Composed, compose_run, expand_home, section_of
from distlora_launcher.compose.hub import locate
from distlora_launcher.compose.planning import decide
from distlora_launcher.sweeps.folder import Sweep
from distlora_launcher.sweeps.multi_trial import plan_first_run
from distlora_launcher.sweeps.search import Cells, Search, check_sampler
from distlora_launcher.sweeps.space import first_cell, read_section
from distlora_launcher.sweeps.start import visible_devices
from distlora_launcher.terminal.arguments import Parser
from distlora_launcher.terminal.output import say, warn

FIGURES = ("eval_loss", "loss", "grad_norm", "tokens_per_second", "mfu", "peak_memory_bytes")
"""Comparable figures of RUN/metrics.jsonl."""
PREFERENCE_FIGURES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
"""Further figures with train.objective=dpo; evaluations have them with the prefix `eval_`."""


def parse_sweep(arguments: Sequence[str]) -> tuple[Sweep, Composed]:
    """Return the sweep of a command line and the composed settings of one trial; make nothing."""
    require(
        not {"-m", "--multirun"} & set(arguments),
        "-m is an option of `distlora train`; distlora sweep runs several without it",
    )
    parser = Parser("distlora sweep")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--config-dir")
    options = parser.parse_args([expand_home(word) for word in arguments])
    config_dir = None if options.config_dir is None else str(Path(options.config_dir).absolute())
    settings, space, shared = read_section(options.words, config_dir=config_dir)
    probe = compose_run([*shared, *words_of(first_cell(space))], config_dir=config_dir)
    folder = Path(probe.config.run_dir)
    check_folder(folder)
    shared = [word for word in shared if not word.startswith(("run_dir=", "hydra.run.dir=", "name="))]
    if probe.config.tracker.name == "wandb" and probe.config.tracker.group is None:
        shared += words_of({"tracker.group": folder.name})
    searched = {dimension.setting for dimension in space}
    sweep = Sweep(
        folder=folder,
        settings=settings,
        overrides=tuple(shared),
        space=space,
        config_dir=config_dir,
        cwd=os.getcwd(),
        name=None if "name" in searched else probe.config.name,
    )
    return sweep, probe


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds a sweep or a run, or that cannot be written."""
    require(
        not is_sweep_folder(folder),
        f"run_dir={folder} already holds a sweep; continue it with `distlora resume {folder}`, or set another run_dir",
    )
    for name in ("config.yaml", JOURNAL_NAME):
        require(not (folder / name).exists(), f"run_dir={folder} already holds a run; set another run_dir")
    check_writable(folder, "run_dir")


def check_trials(sweep: Sweep, search: Search, first: Composed) -> None:
    """Refuse settings, a model or data that no trial can have.

    A grid's first MOST_JOBS_CHECKED trials are checked; of drawn values, one. A trial that does not fit in memory gets
    a warning, and will be recorded as failed.
    """
    check_sampler(sweep.settings)
    check_metric(sweep.settings, first.config.data, first.config.train)
    trials = list(search.all())[:MOST_JOBS_CHECKED] if isinstance(search, Cells) else [first_cell(sweep.space)]
    refused = []
    for number, values in enumerate(trials):
        overrides = " ".join(words_of(values))
        try:
            composed = sweep.compose(number, values, search.overrides)
            check(composed.config, new_run=True)
            if sweep.settings.packed != 1:
                check_trial(composed.config)
        except UserError as error:
            raise UserError(f"trial {number} ({overrides}): {error}" if overrides else str(error)) from error
        try:
            decide(composed.config, composed.fixed)
        except UserError as error:
            refused.append(f"trial {number} ({overrides}) cannot run, and will be recorded as failed: {error}")
    if len(refused) == len(trials) and isinstance(search, Cells):
        raise UserError(refused[0].replace(" cannot run, and will be recorded as failed", ""))
    for line in refused:
        warn(line)
    if sweep.settings.packed != 1:
        say(f"packed: {packed_trials(plan_first_run(sweep))}")


def check_place(sweep: Sweep, cluster: ClusterConfig) -> None:
    """Refuse workers with too few GPUs each, and trials on several nodes without SLURM."""
    require(
        not cluster.on_each_node,
        f"cluster=torchrun with cluster.nodes={cluster.nodes} would not keep trials in step over several nodes; set "
        "cluster=slurm",
    )
    if cluster.launcher != "slurm":
        visible_devices(sweep.settings.workers, cluster.gpus_per_node)


def pinned(sweep: Sweep, model: ModelConfig) -> Sweep:
    """Return the sweep with its Hub model pinned to one commit: a branch may move between two trials."""
    searched = {section_of(dimension.setting) for dimension in sweep.space}
    if not is_hub_name(model.path) or "model" in searched or "recipe" in searched:
        return sweep
    commit = locate(model.path, model.revision).commit
    return dataclasses.replace(sweep, overrides=(*sweep.overrides, *words_of({"model.revision": commit})))


def check_metric(settings: SweepConfig, data: DataConfig, train: TrainConfig) -> None:
    """Refuse a held-out metric without held-out documents, and pruning without evaluations."""
    figures = [*FIGURES, *(f"{kind}{name}" for name in PREFERENCE_FIGURES for kind in ("", "eval_"))]
    metric, pruner = settings.metric, settings.pruner
    known = figures if train.objective == "dpo" else list(FIGURES)
    require(
        metric in known,
        f"sweep.metric={metric} is not a figure that runs log{nearest(metric, known)}; set sweep.metric=eval_loss",
    )
    held_out = data.held_out_source is not None or data.eval_fraction > 0
    require(
        held_out or not metric.startswith("eval_"),
        f"sweep.metric={metric} needs held-out documents, and data.eval_fraction=0 holds none out; set "
        "data.eval_path or data.eval_fraction=0.05, or compare another figure: sweep.metric=loss",
    )
    require(
        pruner == "none" or train.eval_every is not None,
        f"sweep.pruner={pruner} judges trials by their evaluations, and there is only one, at the end; set "
        "train.eval_every=50, or sweep.pruner=none",
    )
    require(
        pruner == "none" or metric.startswith("eval_"),
        f"sweep.pruner={pruner} judges trials by their evaluations, which have no {metric} "
        "(sweep.metric); set sweep.metric=eval_loss, or sweep.pruner=none",
    )
