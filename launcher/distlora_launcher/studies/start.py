"""Read a sweep from its command line and check it; start its workers, or wandb agents.

Workers on this node have an equal number of GPUs each, and are stopped together. With cluster=slurm they are the tasks
of an array: each has `cluster.nodes` nodes and trains one trial after the other on them. Before its time limit, or when
it is preempted, its trial saves, and the task is requeued and resumes it.
"""

import contextlib
import dataclasses
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from distlora.config import (
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    QuantConfig,
    TrainConfig,
    UserError,
    nearest,
    require,
)
from distlora.config.base import is_hub_name
from distlora.config.sweep import SweepConfig
from distlora.config.training import AUTO_EVALUATIONS
from distlora.planner.learning_rate import with_learning_rate
from distlora.planner.report import packed_trials
from distlora.run_folder.sweep import COMPLETE, RESULTS_NAME, TrialRecord, at_rest, is_sweep_folder, words_of
from distlora.system.exit_codes import BAD_INPUT, DONE, FAILED, INTERRUPTED, STOPPED
from distlora.system.stop_signals import Forwarder, forwarding
from distlora.training.multi_trial.protocol import check_trial
from distlora_launcher.compose.checks import check, check_writable, gpu_count
from distlora_launcher.compose.compose import MOST_JOBS_CHECKED, Composed, compose_run, expand_home, section_of
from distlora_launcher.compose.hub import localize, locate
from distlora_launcher.compose.planning import decide, planned_model
from distlora_launcher.importing.settings_file import with_file
from distlora_launcher.jobs import scheduler
from distlora_launcher.jobs.scheduler import SchedulerError
from distlora_launcher.jobs.script import mounts, render_workers, write_script
from distlora_launcher.jobs.submit import live_jobs, make_cache, submit_script
from distlora_launcher.launch.bound import start_command
from distlora_launcher.launch.local import create_run, prepare
from distlora_launcher.studies.multi_trial import plan_first_run
from distlora_launcher.studies.results import LONGEST_REASON, results_table, summary_lines
from distlora_launcher.studies.sources import Listed, Source, make_source
from distlora_launcher.studies.sweep import (
    LOGS,
    Sweep,
    first_cell,
    read_section,
)
from distlora_launcher.studies.table import TrialTable
from distlora_launcher.terminal.arguments import Parser
from distlora_launcher.terminal.output import say, shown, warn

POLL_SECONDS = 0.1

WORKER = "distlora_launcher.studies.worker"
"""Module of a worker."""


def visible_devices(workers: int, processes: int) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of each worker; None if the node has no GPU. Raises UserError for too few."""
    available = gpu_count()
    if available == 0:
        return [None] * workers
    share = available // workers
    require(
        share >= processes,
        f"sweep.workers={workers} with cluster.gpus_per_node={processes} need {workers * processes} GPUs, and this "
        f"node has {available}; set sweep.workers={max(1, available // processes)}",
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        [str(number) for number in range(available)]
        if visible is None
        else [entry.strip() for entry in visible.split(",") if entry.strip() not in ("", "-1")]
    )
    return [",".join(gpus[worker * share : (worker + 1) * share]) for worker in range(workers)]


def run_together(
    arguments: Sequence[str], gpus: Sequence[str | None], forwarder: Forwarder, *, logs: Path | None = None
) -> list[int]:
    """Run one process per entry of `gpus` (CUDA_VISIBLE_DEVICES) to its end; return their exit codes.

    `arguments`: module and its arguments, to which --index is added. `logs`: folder for their output, if it is not
    printed.
    """
    sys.stdout.flush()
    processes = []
    for index, visible in enumerate(gpus):
        environment = dict(os.environ) if visible is None else os.environ | {"CUDA_VISIBLE_DEVICES": visible}
        log = None if logs is None else logs / f"agent_{index}.log"
        with contextlib.nullcontext() if log is None else log.open("ab") as file:
            process = start_command(
                *arguments, "--index", str(index), environment=environment, stdout=file, stderr=file
            )
        if log is not None:
            say(f"agent {index}: {shown(log)}")
        processes.append(process)

    def ask_to_stop(_: int) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    heard = None
    while alive := [process for process in processes if process.poll() is None]:
        if alive[0] is not heard:  # Any live process can stand for all of them.
            heard = alive[0]
            forwarder.attach(heard, ask_to_stop)
        if forwarder.killed:
            for process in alive:
                process.kill()
        time.sleep(POLL_SECONDS)
    forwarder.detach()
    return [process.returncode for process in processes]


def run_workers_here(sweep: Sweep, processes: int) -> int:
    """Run the workers to their end and print the results. Returns the exit code.

    `processes`: ranks per trial. With too few GPUs for sweep.workers it starts as many workers as there are GPUs for.
    """
    wanted, available = sweep.settings.workers, gpu_count()
    workers_here = wanted if available == 0 else max(1, min(wanted, available // processes))
    if workers_here < wanted:
        say(f"{workers_here} of {wanted} workers (sweep.workers), as this node has {available} GPUs")
    with forwarding() as forwarder:
        arguments = [WORKER, str(sweep.folder)]
        codes = run_together(arguments, visible_devices(workers_here, processes), forwarder)
    if set(codes) == {BAD_INPUT}:
        return BAD_INPUT
    source = make_source(sweep)
    table = TrialTable(sweep, source)
    code = show_results(sweep, table.records(), source)
    if table.is_over():
        return code
    say(f"continue with: distlora resume {shown(sweep.folder)}")
    return INTERRUPTED if forwarder.killed else STOPPED if STOPPED in codes else FAILED


def show_results(sweep: Sweep, trials: Sequence[TrialRecord], source: Source) -> int:
    """Print the table. Returns 1 if no trial is complete, else 0."""
    trials = at_rest(trials)  # The workers have ended.
    say(f"\n{results_table(sweep, trials, longest=LONGEST_REASON).text()}\n")
    for line in [*summary_lines(sweep, trials), *source.conclusion(trials)]:
        say(line)
    return DONE if any(trial.state == COMPLETE for trial in trials) else FAILED


def render_script(sweep: Sweep, config: Config) -> str:
    """Return the script of a sweep's workers; `config` is of one trial. Raises UserError if it cannot be made."""
    settings, cluster = sweep.settings, config.cluster
    require(
        settings.packed == 1 or cluster.nodes == 1,
        f"sweep.packed={settings.packed} with cluster.nodes={cluster.nodes}: trials are trained together on one "
        "node; set cluster.nodes=1, or sweep.packed=1",
    )
    return render_workers(
        sweep.folder,
        config.name,
        cluster,
        gpus=scheduler.has_gpus(cluster.partition),
        workers=settings.workers,
        worker=[WORKER, str(sweep.folder)],
        trials="trials/*",
        mounts=mounts([config]),
    )


def start_workers(sweep: Sweep, config: Config) -> int:
    """Run the workers of a sweep here, or submit a SLURM array; `config` is of one trial. Returns the exit code.

    The model is downloaded and the data of a first trial prepared before the job waits in the queue: compute nodes may
    have no network.
    """
    if config.cluster.launcher != "slurm":
        return run_workers_here(sweep, config.cluster.gpus_per_node)
    refuse_live(sweep.folder)
    first = dataclasses.replace(config, model=localize(config.model))
    with tempfile.TemporaryDirectory(prefix="distlora-prepare-") as scratch:
        create_run(Path(scratch) / "run", dataclasses.replace(first, run_dir=f"{scratch}/run"))
        code = prepare(Path(scratch) / "run")
    if code != DONE:
        say(f"nothing was submitted; start another sweep, or try again with: distlora resume {shown(sweep.folder)}")
        return code
    submit_workers(sweep.folder, render_script(sweep, config), sweep.settings.workers, config.cluster, config.quant)
    say(f"watch with: distlora status {shown(sweep.folder)}")
    say(f"stop with: distlora cancel {shown(sweep.folder)}")
    return DONE


def submit_workers(
    folder: Path, script: str, workers: int, cluster: ClusterConfig, quant: QuantConfig | None = None
) -> None:
    """Write an array's script into a folder, and submit it. Raises UserError as `submit_script` does."""
    write_script(folder, script)
    (folder / LOGS).mkdir(exist_ok=True)  # For the tasks' logs: SLURM does not make it.
    if quant is not None:
        make_cache(cluster, quant)
    submission = submit_script(folder)
    count = "1 worker" if workers == 1 else f"{workers} workers"
    say(f"submitted {count} of {shown(folder)} as SLURM job array {submission.job_id}")


def refuse_live(folder: Path) -> None:
    """Raise UserError if SLURM still has workers of a sweep, or does not answer."""
    try:
        jobs = live_jobs(folder)
    except SchedulerError as error:
        raise UserError(
            f"cannot tell whether SLURM still runs workers of {folder} ({error}); try again later"
        ) from error
    if jobs:
        raise UserError(
            f"{shown(folder)} has SLURM job {jobs[0].job_id}, which is {jobs[0].state.lower()}; wait for it, or end it "
            f"with `distlora cancel {shown(folder)}`"
        )


FIGURES = ("eval_loss", "loss", "grad_norm", "tokens_per_second", "mfu", "peak_memory_bytes")
"""Comparable figures of RUN/metrics.jsonl."""


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
    words = with_file(options.words, "distlora sweep", config_dir=config_dir)
    typed = {word for word in options.words if "=" in word}
    if "sweep=rank_search" in words:  # A file that `distlora init` wrote sets the rank; a typed one is refused.
        for word in [word for word in words if re.match(r"\+*adapter\.r=", word) and word not in typed]:
            say(f"{word.lstrip('+')} of the settings file is not used: sweep=rank_search tries ranks")
            words.remove(word)
    settings, space, shared = read_section(words, config_dir=config_dir)
    probe = compose_run([*shared, *words_of(first_cell(space))], config_dir=config_dir)
    folder = Path(probe.config.run_dir)
    require(
        not is_sweep_folder(folder),
        f"run_dir={folder} already holds a sweep; continue it with `distlora resume {folder}`, or set another run_dir",
    )
    for name in ("config.yaml", RESULTS_NAME):
        require(not (folder / name).exists(), f"run_dir={folder} already holds a run; set another run_dir")
    check_writable(folder, "run_dir")
    shared = [word for word in shared if not word.startswith(("run_dir=", "hydra.run.dir=", "name="))]
    if probe.config.tracker.supports("group") and probe.config.tracker.group is None:
        shared += words_of({"tracker.group": folder.name})
    searched = {dimension.setting for dimension in space}
    shared += words_of(evaluations_for(settings, probe.config.train))
    shared += words_of(lr_for(searched, shared, config_dir))
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


def evaluations_for(settings: SweepConfig, train: TrainConfig) -> dict[str, int]:
    """Return settings of five evaluations for a pruner: train.eval_every=auto leaves them out of short runs."""
    if settings.pruner == "none" or train.eval_every != "auto" or train.evals_per_epoch is not None:
        return {}
    if train.max_steps is not None:
        return {"train.eval_every": max(1, train.max_steps // AUTO_EVALUATIONS)}
    return {"train.evals_per_epoch": math.ceil(AUTO_EVALUATIONS / train.epochs)}


def lr_for(searched: Collection[str], shared: Sequence[str], config_dir: str | None) -> dict[str, float | None]:
    """Return optim.lr of all trials where null would make it follow a searched setting, such as adapter.r."""
    decides = {"optim.lr", "recipe", "adapter", "adapter.method", "train.objective"}
    if decides.intersection(searched) or "model" in map(section_of, searched):
        return {}
    config = compose_run(shared, config_dir=config_dir, may_lack_paths=True).config
    if config.optim.lr is not None:
        return {}
    return {"optim.lr": with_learning_rate(config, planned_model(config, any_length=True))[0].optim.lr}


def check_trials(sweep: Sweep, source: Source, first: Composed) -> None:
    """Refuse settings, a model or data that no trial can have.

    A grid's first MOST_JOBS_CHECKED trials are checked; of drawn values, one. A trial that does not fit in memory gets
    a warning, and will be recorded as failed.
    """
    check_metric(sweep.settings, first.config.data, first.config.train)
    trials = list(source.all())[:MOST_JOBS_CHECKED] if isinstance(source, Listed) else [first_cell(sweep.space)]
    refused = []
    for number, values in enumerate(trials):
        overrides = " ".join(words_of(values))
        try:
            composed = sweep.compose(number, values, source.overrides)
            check(composed.config, new_run=True)
            if sweep.settings.packed != 1:
                check_trial(composed.config)
        except UserError as error:
            raise UserError(f"trial {number} ({overrides}): {error}" if overrides else str(error)) from error
        try:
            decide(composed)
        except UserError as error:
            refused.append(f"trial {number} ({overrides}) cannot run, and will be recorded as failed: {error}")
    if len(refused) == len(trials) and isinstance(source, Listed):
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
    commit = locate(model.path, model.revision).folder.name
    return dataclasses.replace(sweep, overrides=(*sweep.overrides, *words_of({"model.revision": commit})))


def check_metric(settings: SweepConfig, data: DataConfig, train: TrainConfig) -> None:
    """Refuse a held-out metric without held-out documents, and pruning without evaluations."""
    metric, pruner = settings.metric, settings.pruner
    known = [*FIGURES, *(f"{kind}{name}" for name in train.needs.figures for kind in ("", "eval_"))]
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
        pruner == "none" or train.evaluates,
        f"sweep.pruner={pruner} judges trials by their evaluations, and there is only one, at the end; set "
        "train.eval_every=50, or sweep.pruner=none",
    )
    require(
        pruner == "none" or metric.startswith("eval_"),
        f"sweep.pruner={pruner} judges trials by their evaluations, which have no {metric} "
        "(sweep.metric); set sweep.metric=eval_loss, or sweep.pruner=none",
    )
