"""The worker: `python -m distlora.train RUN`, started once a rank by torchrun. A table of contents of a run.

Everything it does is in RUN/config.yaml and RUN/data.json, both written by the launcher; a run with checkpoints
continues from the newest whole one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distlora.checkpoints.choice import choose
from distlora.checkpoints.environment import environment
from distlora.checkpoints.folder import TRAINER_NAME, step_folder
from distlora.checkpoints.identity import identity_of
from distlora.checkpoints.saver import Saver
from distlora.checkpoints.state import Progress, TrainState, check_matches, environment_line, load_state
from distlora.config import Config, UserError, check_ranks
from distlora.config_file import load_config
from distlora.data.loader import StepLoader
from distlora.data.prepare import open_split
from distlora.figures import describe, describe_steps, summarize
from distlora.memory_check import memory_check, read_plan
from distlora.model import CausalLM
from distlora.optim import build_optimizer
from distlora.parallel import Backend, Ranks, join_ranks, leave_ranks, watch
from distlora.parallel.control import Control
from distlora.reporting import Reporter
from distlora.results import finish, marks, publish_best, restore, trainer_tensors, weight_files
from distlora.run_folder import CHECKPOINTS, DATA_NAME, PUBLISHED, read_record
from distlora.startup import start_adapters, start_model
from distlora.stopping import Stopped
from distlora.trainer import Trainer
from distlora.trial import Hooks, Trial


def run(run_dir: Path, ranks: Ranks) -> None:
    """One run, or the rest of one, on this rank: to its end, or until all ranks agreed to stop and what they trained is
    saved."""
    config = load_config(run_dir)
    check_ranks(config, ranks.world)
    control = Control(ranks, save_minutes=config.train.save_minutes)
    with contextlib.suppress(Stopped):
        train(run_dir, config, ranks, control)
    control.end()


def train(run_dir: Path, config: Config, ranks: Ranks, control: Control) -> None:
    """From the data to the result. Raises Stopped, on every rank, after all that a stop asks for is done."""
    loader, eval_loader = open_data(run_dir, config, ranks)
    total_steps = config.train.max_steps or config.train.epochs * loader.steps_per_epoch
    data, plan = read_record(run_dir / DATA_NAME), read_plan(run_dir, config)
    chat_template: str | None = data["chat_template"]
    checkpoints = run_dir / CHECKPOINTS
    made_on = environment_of(config, ranks)
    newest, progress, notes = find_checkpoint(checkpoints, config, data, ranks, made_on)
    with (
        Reporter(
            run_dir, config, rank=ranks.rank, world=ranks.world, total_steps=total_steps, start_step=progress.step
        ) as reporter,
        recording_a_stop(reporter, progress),
    ):
        control.boundary(None, "reading the run", long=True)
        for line in notes:
            reporter.event(line)
        reporter.event(f"reading {config.model.path}")
        model, backend, loaded = start_model(
            config, ranks, say=reporter.event, restores=newest is not None, boundary=control.boundary
        )
        identity = identity_of(config, data)
        trained = trained_parameters(model)
        gradients = backend.reduce_gradients_of(trained.values(), config.parallel.bucket_mb)
        optimizer = build_optimizer(backend.updated(trained), config.optim)
        start_adapters(model, config, backend, restores=newest is not None, say=reporter.event)
        control.boundary(None, "reading the checkpoint", long=True)
        if newest is not None:
            restore(newest, model, optimizer, trained, backend)
            reporter.event(f"continuing from {newest.name}")
        backend.compare_trained(model)
        describe(reporter, model, loaded, config, backend)
        describe_steps(reporter, loader, total_steps)
        if config.train.save_every is None and config.train.save_minutes is None:
            reporter.event("nothing is saved before the end, unless the run is asked to stop (set train.save_minutes)")

        def state_files() -> dict[str, Any]:
            return {**weight_files(model, config), TRAINER_NAME: trainer_tensors(optimizer, trained, backend)}

        saver = Saver(
            checkpoints,
            backend.verified(state_files) if config.train.verify else state_files,
            backend=backend,
            state_of=lambda progress: TrainState(progress=progress, identity=identity, environment=made_on),
            keep=config.train.keep,
            in_background=config.train.save_in_background,
            say=reporter.event,
            metadata=marks(config),
            saved_step=None if newest is None else progress.step,
        )

        def keep_best(progress: Progress) -> None:
            publish_best(run_dir, model, config, progress, chat_template, backend, reporter.event)

        trial = Trial(
            model,
            backend,
            optimizer,
            gradients,
            loader=loader,
            eval_loader=eval_loader,
            progress=progress,
            total_steps=total_steps,
            reporter=reporter,
            config=config,
            hooks=Hooks(
                save=saver.save,
                save_last=saver.save_last,
                publish_best=keep_best,
                sample=sample_hook(model, backend, config, reporter, data),
            ),
            memory=memory_check(plan, config, model, optimizer, backend, first_step=progress.step),
        )
        with saver:
            Trainer(model, backend, control, [trial]).fit()
        summarize(trial, model, loaded, trained)
        reporter.event(f"saved {finish(run_dir, model, config, progress, chat_template, backend)}")
        backend.barrier()
        reporter.result(run_dir / PUBLISHED[config.adapter.method])


def environment_of(config: Config, ranks: Ranks) -> dict[str, Any]:
    """What this run's bits depend on. Gradients that are cut are summed in another order with several copies of the
    base, adapters' are not."""
    is_cut = config.adapter.trains_base is not None
    degree = config.shard_degree(ranks.world)
    return environment(ranks.world, ranks.device) | (
        {"shard_degree": degree} if is_cut and degree < ranks.world else {}
    )


def find_checkpoint(
    checkpoints: Path, config: Config, data: dict[str, Any], ranks: Ranks, made_on: dict[str, Any]
) -> tuple[Path | None, Progress, list[str]]:
    """What the run goes on from, how far that had come, and what there is to say of it. Raises UserError where it is of
    another run."""
    newest, notes = choose(checkpoints, ranks)
    if newest is None:
        return None, Progress(), notes
    state = load_state(newest)
    check_matches(state, newest, identity_of(config, data), init_from=config.adapter.init_from)
    line = environment_line(state.environment, made_on)
    return newest, state.progress, notes if line is None else [*notes, line]


@contextlib.contextmanager
def recording_a_stop(reporter: Reporter, progress: Progress) -> Iterator[None]:
    """Whoever asked the run to stop finds in RUN what continues it; `progress` is of what is saved by then."""
    try:
        yield
    except Stopped as stop:
        step = progress.step
        reporter.stopped(stop.signum, step, str(step_folder(Path(CHECKPOINTS), step)) if step > 0 else None)
        raise


def open_data(run_dir: Path, config: Config, ranks: Ranks) -> tuple[StepLoader, StepLoader | None]:
    """The loaders of the training rows and, if there are any, of the held-out rows."""
    settings = config.train

    def loader(split: str, *, shuffle: bool) -> StepLoader | None:
        rows = open_split(run_dir, split)
        if rows is None:
            return None
        return StepLoader(
            rows,
            global_batch=settings.global_batch,
            micro_batch=settings.micro_batch,
            rank=ranks.rank,
            world=ranks.world,
            seed=settings.seed,
            shuffle=shuffle,
        )

    train = loader("train", shuffle=True)
    if train is None:
        raise UserError(f"{run_dir} has no prepared training rows; start the run with `distlora train`")
    return train, loader("eval", shuffle=False)


def sample_hook(
    model: CausalLM, backend: Backend, config: Config, reporter: Reporter, data: dict[str, Any]
) -> Callable[[int], None] | None:
    """Shows what the model writes, where the config asks for samples. UserError for a prompt that cannot be asked."""
    if config.train.sample_every is None:
        return None
    # Here, as it imports much of transformers that other runs need not.
    from distlora.generation.sampler import Sampler

    sampler = Sampler(model, backend, config, data)

    def sample(step: int) -> None:
        lacking = torch.tensor(reporter.lacks_samples(step), dtype=torch.int64, device=backend.ranks.device)
        if backend.max_over_ranks(lacking) > 0:
            reporter.samples(step, sampler())

    return sample


def trained_parameters(model: CausalLM) -> dict[str, nn.Parameter]:
    """What the optimizer updates, by name, in forward order: the adapters, or everything."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def main() -> None:
    """Entry of a worker process. What it raises is the caller's to record (`worker_entry`): torch's own `record` would
    leave a file that torchrun reads while a rank is ended within writing it, and torchrun ends by half a file."""
    if len(sys.argv) != 2:
        raise UserError(
            "usage: python -m distlora.train RUN (the launcher does this; start runs with `distlora train`)"
        )
    run_dir = Path(sys.argv[1])
    ranks = join_ranks(load_config(run_dir).cluster.timeout_seconds)
    watch.at(None, "reading the run", long=True)
    run(run_dir, ranks)
    leave_ranks(ranks)


if __name__ == "__main__":
    main()
