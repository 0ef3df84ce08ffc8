"""Open a run from its folder: data, checkpoint, and the `Trial` that the trainer runs once its adapter is in a model.

Single runs (worker.py) and multi-trial training (multi_trial/) both use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.checkpoint.saver import Saver, choose, environment
from distlora.checkpoint.state import (
    Identity,
    Progress,
    TrainState,
    check_matches,
    environment_line,
    identity_of,
    load_state,
)
from distlora.config import Config, ModelConfig, TrainConfig
from distlora.config.training import Cadence
from distlora.data.loader import StepLoader
from distlora.data.prepare import open_split
from distlora.data.rows import PackedRows
from distlora.model.adapters import DEFAULT_ADAPTER, slot_name
from distlora.model.build import CausalLM
from distlora.parallel import Backend, Gradients, Ranks
from distlora.run_folder.layout import CHECKPOINTS, DATA_NAME, PUBLISHED, TRAINER_NAME, read_record
from distlora.training.memory_meter import MemoryCheck
from distlora.training.optimizers import Optimizer
from distlora.training.publish import finish, header_marks, publish_best, trainer_tensors, weight_files
from distlora.training.reporter import Reporter
from distlora.training.trial import Hooks, Trial
from distlora.weights.initial_adapter_file import base_identity

if TYPE_CHECKING:
    from distlora.training.rollouts.loader import RolloutLoader


@dataclass(frozen=True, slots=True)
class OpenRun:
    """Content of a run folder before there is a model."""

    folder: Path
    config: Config
    loader: StepLoader
    eval_loader: StepLoader | None
    data: Mapping[str, Any]
    """Content of data.json."""
    identity: Callable[[], Identity]
    """Return the identity of this run's checkpoints. The initial adapter must exist by then."""
    made_on: dict[str, Any]
    """Environment that determines the bits of this start."""
    newest: Path | None
    """Checkpoint to resume from."""
    progress: Progress
    notes: list[str]
    """Lines for the log about the checkpoints."""

    @property
    def rows_per_epoch(self) -> int:
        """Sequences of an epoch's steps."""
        return self.config.rows_per_epoch(len(self.loader.rows))

    @property
    def evaluations(self) -> Cadence | None:
        """Evaluations between the first and the last step."""
        if self.eval_loader is None:
            return None
        return self.config.train.evaluations(self.rows_per_epoch, len(self.eval_loader.rows))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.train.total_steps(self.rows_per_epoch)

    def reporter(self, ranks: Ranks, *, label: str = "") -> Reporter:
        """Open the reporter. `label`: prefix of terminal lines, if several runs print there."""
        return Reporter(
            self.folder,
            self.config,
            rank=ranks.rank,
            world=ranks.world,
            total_steps=self.total_steps,
            progress=self.progress,
            label=label,
        )

    def publish(self, model: CausalLM, backend: Backend, reporter: Reporter, adapter: str = DEFAULT_ADAPTER) -> None:
        """Publish the result, complete on disk when this returns."""
        saved = finish(
            self.folder,
            model,
            self.config.spec,
            self.progress,
            self.data["chat_template"],
            backend,
            adapter,
            load_best=self.config.train.load_best_at_end,
        )
        reporter.event(f"saved {saved}")
        backend.barrier()
        reporter.result(self.folder / PUBLISHED[self.config.adapter.method])


def open_run(run_dir: Path, config: Config, ranks: Ranks, base: CheckpointFiles) -> OpenRun:
    """Open a run folder. Every rank must call it alike.

    Raises UserError for damaged records, and for a checkpoint of another run.
    """
    train = config.train
    if train.needs.data == "prompts":
        train = replace(train, global_batch=config.prompts_per_rollout)
    loader, eval_loader = open_data(run_dir, train, ranks)
    data = read_record(run_dir / DATA_NAME)
    # What this run's bits depend on, apart from settings that a resume must not change.
    made_on = environment(ranks.world, ranks.device, compiles=config.train.compile is True)
    for name in ("dtype", "micro_batch", "attention", "compile"):
        made_on[f"train.{name}"] = getattr(config.train, name)
    if ranks.device.type == "cuda" and config.train.fused_kernels != "none":
        made_on["fused_kernels"] = config.train.fused_kernels  # A name without a dot, so old checkpoints differ too.
    degree = config.shard_degree(ranks.world)
    if config.adapter.trains_base is not None and degree < ranks.world:
        # Several replicas change the order in which sharded gradients are summed, but not that of adapters.
        made_on["shard_degree"] = degree

    def identity() -> Identity:
        base_id = base_identity(base, config.adapter, config.run_dir)
        return identity_of(
            config,
            data_digest=data["content"],
            base_identity=base_id,
        )

    newest, notes = choose(run_dir / CHECKPOINTS, ranks)
    progress = Progress()
    if newest is not None:
        state = load_state(newest)
        check_matches(state, newest, identity(), reference=config.reference_setting)
        progress, line = state.progress, environment_line(state.environment, made_on)
        notes += [] if line is None else [line]
    return OpenRun(
        folder=run_dir,
        config=config,
        loader=loader,
        eval_loader=eval_loader,
        data=data,
        identity=identity,
        made_on=made_on,
        newest=newest,
        progress=progress,
        notes=notes,
    )


def trial_of(
    run: OpenRun,
    model: CausalLM,
    backend: Backend,
    reporter: Reporter,
    *,
    gradients: Gradients,
    optimizer: Optimizer,
    trained: Mapping[str, nn.Parameter],
    memory: MemoryCheck | None = None,
    slot: int | None = None,
    rollouts: RolloutLoader | None = None,
) -> tuple[Trial, Saver]:
    """Return the run's trial and the saver of its checkpoints.

    `trained` has the names of a checkpoint. `slot`: the slot of the run's adapter in multi-trial training. `rollouts`
    samples the answers to prompts.
    """
    config, settings = run.config, run.config.train
    adapter, identity = DEFAULT_ADAPTER if slot is None else slot_name(slot), run.identity()

    def state_files() -> dict[str, Any]:
        state = trainer_tensors(optimizer, trained, backend)
        answers = {} if rollouts is None else rollouts.files(run.progress.step)
        return {**weight_files(model, config.spec, adapter), TRAINER_NAME: state, **answers}

    saver = Saver(
        run.folder / CHECKPOINTS,
        backend.verified(state_files) if settings.verify else state_files,
        backend=backend,
        state_of=lambda progress: TrainState(progress=progress, identity=identity, environment=run.made_on),
        keep=settings.keep,
        in_background=settings.save_in_background,
        say=reporter.event,
        metadata=header_marks(config.adapter),
        saved_step=None if run.newest is None else run.progress.step,
    )

    def keep_best(progress: Progress) -> None:
        if not settings.keeps_best(config.adapter.method):
            return
        template = run.data["chat_template"]
        publish_best(run.folder, model, config.spec, progress, template, backend, reporter.event, adapter)

    trial = Trial(
        model,
        backend,
        optimizer,
        gradients,
        loader=run.loader,
        rollouts=rollouts,
        eval_loader=run.eval_loader,
        progress=run.progress,
        total_steps=run.total_steps,
        reporter=reporter,
        train=config.train,
        optim=config.optim,
        hooks=Hooks(
            save=saver.save,
            save_last=saver.save_last,
            publish_best=keep_best,
            sample=sample_hook(model, backend, config.model, config.train, reporter, run.data),
        ),
        evaluations=run.evaluations,
        memory=memory,
        slot=slot,
    )
    return trial, saver


def open_data(run_dir: Path, train: TrainConfig, ranks: Ranks) -> tuple[StepLoader, StepLoader | None]:
    """Return the loaders of the training rows and of the held-out rows, if there are any."""
    rows, held_out = open_split(run_dir, "train"), open_split(run_dir, "eval")
    assert rows is not None, "a preparation without training rows is refused"
    evaluation = None if held_out is None else step_loader(held_out, train, ranks, shuffle=False)
    return step_loader(rows, train, ranks, shuffle=True), evaluation


def step_loader(rows: PackedRows, train: TrainConfig, ranks: Ranks, *, shuffle: bool) -> StepLoader:
    """Return the loader of this rank's rows of each step."""
    return StepLoader(
        rows,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        rank=ranks.rank,
        world=ranks.world,
        seed=train.seed,
        shuffle=shuffle,
        mismatched=train.needs.mismatched,
    )


def sample_hook(
    model: CausalLM,
    backend: Backend,
    base: ModelConfig,
    train: TrainConfig,
    reporter: Reporter,
    data: Mapping[str, Any],
) -> Callable[[int], None] | None:
    """Return a function that logs samples, if the settings ask for them. Raises UserError for an unusable prompt."""
    if train.sample_every is None:
        return None
    # Imported late: it imports parts of transformers that other runs do not need.
    from distlora.training.samples import Sampler

    sampler = Sampler(model, backend, base, train, dict(data))

    def sample(step: int) -> None:
        lacking = torch.tensor(reporter.lacks_samples(step), dtype=torch.int64, device=backend.ranks.device)
        if backend.max_over_ranks(lacking) > 0:
            reporter.samples(step, sampler())

    return sample
