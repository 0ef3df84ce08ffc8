"""Build a run without a folder: the trainer over given sequences, advanced step by step or run to its end."""

from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from distlora.checkpoint.state import Progress
from distlora.config import Config
from distlora.data.rows import PackedRows
from distlora.model.build import CausalLM
from distlora.parallel import Backend, Gradients, Ranks
from distlora.parallel.stop_and_save import Control
from distlora.training.compile_choice import decide_compile
from distlora.training.loop import Trainer
from distlora.training.open_run import step_loader
from distlora.training.optimizers import Optimizer, build_optimizer
from distlora.training.reporter import Reporter
from distlora.training.setup import start_adapters, start_run_model
from distlora.training.trial import Hooks, Trial
from distlora.training.worker import trained_parameters


def ignore(*arguments: Any) -> None:
    """Do nothing, in place of a log, a save or a publication."""


SAVES_NOTHING = Hooks(save=ignore, save_last=ignore, publish_best=ignore)


@dataclass(slots=True)
class Started:
    """A run's model and optimizer before the first step. Every rank makes it alike."""

    config: Config
    ranks: Ranks
    model: CausalLM
    backend: Backend
    trained: dict[str, nn.Parameter]
    gradients: Gradients
    optimizer: Optimizer

    @classmethod
    def of(cls, config: Config, ranks: Ranks) -> Self:
        """Build the model, load its weights and start its adapters and optimizer."""
        config, _ = decide_compile(config, ranks)
        model, backend, _ = start_run_model(config, ranks)
        trained = trained_parameters(model)
        gradients = backend.reduce_gradients_of(trained.values(), config.parallel.bucket_mb)
        optimizer = build_optimizer(backend.updated(trained), config.optim)
        start_adapters(model, config.spec, backend, config.train, restores=False, log=ignore)
        return cls(config, ranks, model, backend, trained, gradients, optimizer)

    def trainer(self, rows: PackedRows, *, reporter: Reporter, hooks: Hooks = SAVES_NOTHING) -> tuple[Trainer, Trial]:
        """Return a trainer of train.max_steps steps over the sequences in their order."""
        settings = self.config.train
        assert settings.max_steps is not None
        trial = Trial(
            self.model,
            self.backend,
            self.optimizer,
            self.gradients,
            loader=step_loader(rows, self.config.train, self.ranks, shuffle=False),
            eval_loader=None,
            progress=Progress(),
            total_steps=settings.max_steps,
            reporter=reporter,
            train=self.config.train,
            optim=self.config.optim,
            hooks=hooks,
        )
        return Trainer(self.model, self.backend, Control(self.ranks, save_minutes=None), [trial]), trial
