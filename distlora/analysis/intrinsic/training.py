"""One training of a model, whole or in a subspace, and what it makes of the held-out rows.

A loop of its own and not the trainer's: that one updates parameters of the model, saves and publishes them, and goes on
from them. Here the model's parameters are a function of what is trained, and what remains of a training is a number.
Data, loss, optimizer and schedule are a run's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from distlora.analysis.intrinsic.request import IntrinsicRequest
from distlora.analysis.intrinsic.subspace import Everything, FlatParameters, Subspace, Trainable
from distlora.architecture.checkpoint_files import read_hf_config
from distlora.config import OptimConfig
from distlora.data.loader import StepLoader
from distlora.data.prepare import prepare
from distlora.data.rows import PackedRows
from distlora.model.build import CausalLM
from distlora.parallel import Ranks
from distlora.post.divergence import Readings, evenly
from distlora.training.objectives import NextToken
from distlora.training.optimizers import build_optimizer, learning_rate
from distlora.training.setup import start_model

MOST_EVAL_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """The settings of a training, which also identify its result."""

    model: str
    """Model name in the report."""
    random: bool
    """From random weights, of `seed`."""
    scaling: str
    """none, layers; full: everything is trained; untrained: nothing."""
    dimension: int
    """Numbers that are trained; 0: none."""
    lr: float
    seed: int
    """Seed of the subspace, the row order and random weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of one training."""

    loss: float | None
    """Held-out, nats a token; None where it is not finite."""
    distance: float
    """||theta - theta_0|| / ||theta_0||."""
    seconds: float
    """CPU time of the process, in seconds."""


class Bench:
    """A model and its data, to train again and again from the same start."""

    def __init__(self, request: IntrinsicRequest, folder: str, ranks: Ranks, say: Callable[[str], None]) -> None:
        self.request, self.folder, self.ranks, self.say = request, folder, ranks, say
        spec, data, train = request.spec(folder), request.data_settings(), request.train_settings()
        entry = prepare(spec.model, data, train)
        self.rows = PackedRows.open(entry, "train")
        self.held_out = evenly(PackedRows.open(entry, "eval"), MOST_EVAL_ROWS)
        self.model, _, _ = start_model(
            spec, ranks, train=train, shard_degree=ranks.world, sequence_length=data.sequence_length
        )
        self.flat = FlatParameters(self.model)
        self._pretrained = self.flat.values.detach().clone()
        self._random: tuple[int, Tensor] | None = None

    @property
    def size(self) -> int:
        """Return the number of the model's parameters."""
        return len(self.flat.values)

    def start(self, training: Training) -> Tensor:
        """theta_0."""
        if not training.random:
            return self._pretrained
        if self._random is None or self._random[0] != training.seed:
            self._random = None  # The one before goes first.
            random_weights(self.model, self.folder, training.seed)
            self._random = training.seed, self.flat.values.detach().clone()
        return self._random[1]

    def run(self, training: Training) -> Outcome:
        """Train from the start, and read the held-out rows."""
        began = time.process_time()
        start = self.start(training)
        with torch.no_grad():
            self.flat.values.copy_(start)
        if training.scaling != "untrained":
            self._train(training, self._trainable(training, start))
        readings = Readings(self.held_out, self.ranks, lambda text: None)
        readings.take(self.model, training.model)
        loss = float(readings.losses.sum()) / int(self.held_out.targets.sum())
        distance = float((self.flat.values.detach() - start).norm() / start.norm())
        return Outcome(
            loss=loss if loss < float("inf") else None,
            distance=distance,
            seconds=time.process_time() - began,
        )

    def _trainable(self, training: Training, start: Tensor) -> Trainable:
        if training.scaling == "full":
            return Everything(self.flat)
        return Subspace(
            self.flat,
            start,
            dimension=training.dimension,
            seed=training.seed,
            scales_layers=training.scaling == "layers",
        )

    def _train(self, training: Training, trainable: Trainable) -> None:
        optim = OptimConfig(lr=training.lr, warmup_ratio=0.1)
        optimizer = build_optimizer(trainable.parameters, optim)
        objective, train = NextToken(), self.request.train_settings(training.seed)
        loader = StepLoader(
            self.rows,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            rank=0,
            world=1,
            seed=train.seed,
            shuffle=True,
        )
        loss = torch.zeros(())
        for step in range(self.request.steps):
            batch = loader.batch(step)
            self.flat.gradients.zero_()
            for part in batch.micro_batches:
                loss = objective.losses(self.model, part, self.ranks.device, step).rows.sum() / objective.units(batch)
                loss.backward()
            trainable.pull()
            norm = clip_grad_norm_(trainable.parameters.values(), optim.max_grad_norm)
            optimizer.step(learning_rate(step, self.request.steps, optim), torch.isfinite(norm))
            trainable.push()
            self.say(f"  step {step + 1}/{self.request.steps}, training loss {float(loss.detach()):.3f}")


def random_weights(model: CausalLM, folder: str, seed: int) -> None:
    """Fill the model with what transformers starts a new one of this config.json with."""
    from transformers import AutoModelForCausalLM

    # A copy, because from_config writes into it.
    config = copy.deepcopy(read_hf_config(Path(folder)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    theirs = dict(fresh.named_parameters())
    with torch.no_grad():
        for name, parameter in model.hf_state_dict().items():
            parameter.copy_(theirs[name])
