"""Make the `Trial` that the trainer runs, once the run's adapter is in a model.

Single runs (worker.py) and multi-trial training (multi_trial/) both use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from distlora.checkpoint.saver import Saver, checkpoint_files
from distlora.checkpoint.state import RunProgress, TrainState
from distlora.config import DataConfig, ModelConfig, TrainConfig
from distlora.loading.peft_format import header_marks
from distlora.model.build import CausalLM
from distlora.parallel import Backend
from distlora.run_folder.layout import CHECKPOINTS
from distlora.training.memory_meter import MemoryCheck
from distlora.training.open_run import OpenRun
from distlora.training.publish import publish_best
from distlora.training.reporter import Reporter
from distlora.training.trial import Hooks, TrainedParts, Trial

if TYPE_CHECKING:
    from distlora.training.rollouts import RolloutLoader


def trial_of(
    run: OpenRun,
    model: CausalLM,
    backend: Backend,
    reporter: Reporter,
    trained: TrainedParts,
    *,
    memory: MemoryCheck | None = None,
    rollouts: RolloutLoader | None = None,
) -> tuple[Trial, Saver]:
    """Return the run's trial and the saver of its checkpoints.

    `rollouts` samples the answers to prompts.
    """
    config, settings = run.config, run.config.train
    adapter, identity = run.adapter, run.identity()

    def state_files() -> dict[str, Any]:
        files = checkpoint_files(model, config.spec, trained.optimizer, trained.parameters, backend, adapter)
        return files if rollouts is None else files | rollouts.files(run.progress.step)

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

    def keep_best(progress: RunProgress) -> None:
        if not settings.keeps_best(config.adapter.method):
            return
        template = run.data["chat_template"]
        publish_best(run.folder, model, config.spec, progress, template, backend, reporter.event, adapter)

    hooks = Hooks(
        save=saver.save,
        save_last=saver.save_last,
        publish_best=keep_best,
        sample=sample_hook(model, backend, config.model, config.train, config.data, reporter, run.data),
    )
    return Trial(model, backend, run, trained, reporter, hooks, rollouts=rollouts, memory=memory), saver


def sample_hook(
    model: CausalLM,
    backend: Backend,
    base: ModelConfig,
    train: TrainConfig,
    settings: DataConfig,
    reporter: Reporter,
    data: Mapping[str, Any],
) -> Callable[[int], None] | None:
    """Return a function that logs samples, if the settings ask for them. Raises UserError for an unusable prompt."""
    if train.sample_every is None:
        return None
    # Imported late: it imports parts of transformers that other runs do not need.
    from distlora.training.samples import Sampler

    sampler = Sampler(model, backend, base, train, settings, dict(data))

    def sample(step: int) -> None:
        lacking = torch.tensor(reporter.lacks_samples(step), dtype=torch.int64, device=backend.ranks.device)
        if backend.max_over_ranks(lacking) > 0:
            reporter.samples(step, sampler())

    return sample
