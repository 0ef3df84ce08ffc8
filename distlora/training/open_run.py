"""Open a run from its folder: data, checkpoint, progress.

Single runs (worker.py) and multi-trial training (multi_trial/) both use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.images import image_layout
from distlora.checkpoint.saver import choose, environment
from distlora.checkpoint.state import (
    Identity,
    RunProgress,
    check_matches,
    environment_line,
    identity_of,
    load_state,
)
from distlora.config import Config
from distlora.config.training import Cadence
from distlora.data.images import ImageTensors
from distlora.data.loader import StepLoader, open_data
from distlora.model.adapters import DEFAULT_ADAPTER, slot_name
from distlora.model.build import CausalLM
from distlora.parallel import Backend, Ranks
from distlora.run_folder.layout import CHECKPOINTS, DATA_NAME, PUBLISHED, read_record
from distlora.training.publish import finish
from distlora.training.reporter import Reporter
from distlora.weights.initial_adapter_file import base_identity


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
    progress: RunProgress
    notes: list[str]
    """Lines for the log about the checkpoints."""
    slot: int | None = None
    """Slot of its adapter in multi-trial training."""

    @property
    def adapter(self) -> str:
        """Name of its adapter in the model."""
        return DEFAULT_ADAPTER if self.slot is None else slot_name(self.slot)

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
        return self.config.total_steps(len(self.loader.rows))

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

    def publish(self, model: CausalLM, backend: Backend, reporter: Reporter) -> None:
        """Publish the result, complete on disk when this returns."""
        saved = finish(
            self.folder,
            model,
            self.config.spec,
            self.progress,
            self.data["chat_template"],
            backend,
            self.adapter,
            load_best=self.config.train.load_best_at_end,
        )
        reporter.event(f"saved {saved}")
        backend.barrier()
        reporter.result(self.folder / PUBLISHED[self.config.adapter.method])


def open_run(run_dir: Path, config: Config, ranks: Ranks, base: CheckpointFiles, *, slot: int | None = None) -> OpenRun:
    """Open a run folder. Every rank must call it alike. `slot`: its adapter's in multi-trial training.

    Raises UserError for damaged records, and for a checkpoint of another run.
    """
    train = config.train
    if train.needs.data == "prompts":
        train = replace(train, global_batch=config.prompts_per_rollout)
    tensors = None
    if config.data.images:
        tensors = ImageTensors(config.spec.path, config.data, image_layout(base.folder).names)
    loader, eval_loader = open_data(run_dir, train, ranks, slot, tensors)
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
    progress = RunProgress()
    if newest is not None:
        state = load_state(newest)
        check_matches(state, newest, identity(), reference=config.reference_setting)
        progress, line = state.progress, environment_line(state.environment, made_on)
        notes += [] if line is None else [line]
    opened = OpenRun(
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
        slot=slot,
    )
    if opened.total_steps == 1 and train.max_steps is None and train.needs.data != "prompts":
        notes.append(
            f"WARNING: the whole run is one step, of {len(loader.rows):,} sequences with train.global_batch="
            f"{train.global_batch}; lower train.global_batch, or raise train.epochs"
        )
    return opened
