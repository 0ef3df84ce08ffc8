"""Train a run: `python -m distlora.training.worker RUN`, started once per rank by the launcher.

RUN/config.yaml and RUN/data.json, both written by the launcher, hold all inputs. A run with checkpoints continues from
the newest valid one. In place of a run the folder may be a GROUP of trials that train on one base (multi_trial/).
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from torch import nn

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.checkpoint.saver import noting_stop
from distlora.config import Config, UserError, check_ranks
from distlora.config.file import load_config
from distlora.config.training import Cadence
from distlora.model.build import CausalLM
from distlora.parallel import Ranks, join_ranks, leave_ranks, watch
from distlora.parallel.watch import Control
from distlora.planner.memory.measured import RECORDED
from distlora.run_folder.layout import PLAN_NAME, read_record
from distlora.system.exit_codes import DONE, STOPPED
from distlora.system.stop_signals import Stopped
from distlora.training.compile_choice import decide_compile
from distlora.training.loop import Trainer
from distlora.training.memory_meter import MemoryCheck, measured_step
from distlora.training.metrics import describe, describe_steps, summarize
from distlora.training.multi_trial.protocol import SETTINGS_NAME
from distlora.training.multi_trial.trainer import run_group
from distlora.training.open_run import open_run
from distlora.training.optimizers import build_optimizer
from distlora.training.publish import restore
from distlora.training.setup import StartOptions, start_adapters, start_run_model
from distlora.training.start_trial import trial_of
from distlora.training.trial import TrainedParts


def run(run_dir: Path, ranks: Ranks) -> int:
    """Train a run on this rank. Returns the exit code: 0 at its end, 75 once all ranks agreed to stop and saved."""
    config = load_config(run_dir)
    check_ranks(config, ranks.world)
    control = Control(ranks.control, save_minutes=config.train.save_minutes)
    code = DONE
    try:
        train(run_dir, config, ranks, control)
    except Stopped:
        code = STOPPED
    control.end()
    return code


def train(run_dir: Path, config: Config, ranks: Ranks, control: Control) -> None:
    """Train from the data to the result. Raises Stopped, on every rank, after everything is saved."""
    base = CheckpointFiles(config.model.path)
    config, why_not_compiled = decide_compile(config, ranks, base=base, folder=run_dir)
    opened = open_run(run_dir, config, ranks, base)
    restores = opened.newest is not None
    plan = read_record(run_dir / PLAN_NAME, RECORDED) if config.plan.measure else {}
    with opened.reporter(ranks) as reporter, noting_stop(run_dir, ranks, reporter.event):
        control.boundary(None, "reading the run", long=True)
        for line in [*opened.notes, *why_not_compiled]:
            reporter.event(line)
        reporter.event(f"reading {config.model.path}")
        start = StartOptions(log=reporter.event, restores=restores, boundary=control.boundary)
        model, backend, loaded = start_run_model(config, ranks, start, base=base)
        parameters = trained_parameters(model)
        gradients = backend.reduce_gradients_of(parameters.values(), config.parallel.bucket_mb)
        trained = TrainedParts(parameters, gradients, build_optimizer(backend.updated(parameters), config.optim))
        start_adapters(model, config.spec, backend, config.train, restores=restores, log=reporter.event)
        control.boundary(None, "reading the checkpoint", long=True)
        if opened.newest is not None:
            restore(opened.newest, model, trained.optimizer, parameters, backend)
            reporter.event(f"continuing from {opened.newest.name}")
        backend.compare_trained(model)
        describe(reporter, model, loaded, config.spec, config.cluster, backend)
        describe_steps(reporter, opened)
        if config.train.saves(1) is None and config.train.save_minutes is None:
            reporter.event("no checkpoint before the end of training, except on a stop signal (set train.save_minutes)")
        every = config.train.sample_every
        between = [opened.evaluations, None if every is None else Cadence(1, every)]
        step = measured_step(opened.progress.step, [c for c in between if c]) if config.plan.measure else None
        memory = None if step is None else MemoryCheck(model, trained.optimizer, backend, plan=plan, step=step)
        with contextlib.ExitStack() as stack:
            rollouts = None
            if config.train.needs.data == "prompts":
                # Imported late: it imports parts of transformers that other runs do not need.
                from distlora.training.rollouts import open_rollouts

                rollouts = stack.enter_context(
                    open_rollouts(opened, model, backend, log=reporter.event, boundary=control.boundary)
                )
            trial, saver = trial_of(opened, model, backend, reporter, trained, memory=memory, rollouts=rollouts)
            stack.enter_context(saver)
            Trainer(model, backend, control, trial).fit()
        summarize(trial, model, loaded, config.adapter)
        opened.publish(model, backend, reporter)


def trained_parameters(model: CausalLM) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimizer updates, by name, in forward order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def main() -> int:
    """Run a worker process; return its exit code. The caller (`launch/bound.py`) records its exceptions.

    torch's `record` writes times in whole seconds, which cannot tell the first failure from its consequences.
    """
    if len(sys.argv) != 2:
        raise UserError(
            "usage: python -m distlora.training.worker FOLDER (the launcher does this; start with `distlora train`)"
        )
    folder = Path(sys.argv[1])
    ranks = join_ranks(load_config(folder).cluster.timeout_seconds)
    watch.at(None, "reading the run", long=True)
    code = (run_group if (folder / SETTINGS_NAME).is_file() else run)(folder, ranks)
    leave_ranks(ranks)
    return code


if __name__ == "__main__":
    sys.exit(main())
