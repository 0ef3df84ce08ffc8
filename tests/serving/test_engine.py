"""Users who train on one base at once have, each, the run that they would have alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distlora.config import ModelConfig, ModelSpec, QuantConfig, TrainConfig, UserError
from distlora.parallel import Ranks
from distlora.serving.engine import Engine, EngineLimits
from distlora.serving.operations import (
    Adapter,
    CreateModel,
    ForwardBackward,
    ForwardBackwardResult,
    Load,
    Operation,
    OptimStep,
    Row,
    Sample,
    Save,
    Unload,
)
from distlora.training.setup import StartOptions, start_model
from support.closeness import assert_adapters_close, assert_losses_close
from support.small_models import VOCABULARY
from support.worlds import World

SINGLE = Ranks(0, 1, torch.device("cpu"), None)
USERS = {
    "a": Adapter(rank=8, seed=1, unembed=False),
    "b": Adapter(rank=3, seed=2, mlp=False, unembed=False),
    "c": Adapter(rank=6, seed=3, attention=False, unembed=False),
    "d": Adapter(rank=16, seed=4, unembed=False),
}
LOSSES = {"a": "cross_entropy", "b": "importance_sampling", "c": "ppo", "d": "dro"}
STEPS = 4


def started(ranks: Ranks, folder: Path, **options: Any) -> Engine:
    """Return an engine on the tiny model."""
    spec = ModelSpec(model=ModelConfig(path=str(folder)), quant=QuantConfig(cache=False), dtype="fp32")
    train = TrainConfig(router_aux_loss=0.0, dtype="fp32")
    model, backend, _ = start_model(spec, ranks, StartOptions(for_slots=True), train=train)
    return Engine(model, backend, spec, end_tokens=[1], **options)


def rows_of(user: str, step: int) -> list[Row]:
    """Return rows of uneven lengths, with the inputs of the user's loss."""
    generator = np.random.default_rng([ord(user), step])
    rows = []
    for length in generator.integers(5, 40, size=3).tolist():
        tokens = generator.integers(5, VOCABULARY, size=length + 1)
        values = {
            "weights": generator.random(length),
            "logprobs": -5 - 3 * generator.random(length),
            "advantages": generator.normal(size=length),
        }
        names = ["weights"] if LOSSES[user] == "cross_entropy" else ["logprobs", "advantages"]
        inputs = {name: (values[name] / (3 * length)).astype(np.float32) if name != "logprobs" else
                  values[name].astype(np.float32) for name in names}  # fmt: skip
        rows.append(Row(tokens[:-1], {"target_tokens": tokens[1:], **inputs}))
    return rows


def calls_of(user: str, steps: Sequence[int] = range(STEPS)) -> list[Operation]:
    """Return a user's steps, each of two calls whose gradients accumulate."""
    rows = {step: rows_of(user, step) for step in steps}
    return [
        operation
        for step in steps
        for operation in (
            ForwardBackward(user, rows[step][:1], LOSSES[user]),
            ForwardBackward(user, rows[step][1:], LOSSES[user]),
            OptimStep(user, learning_rate=2e-3, eps=1e-4, beta2=0.9 + ord(user) / 2000, grad_clip_norm=0.5),
        )
    ]


def losses_of(results: Sequence[Any]) -> list[float]:
    return [each.metrics["loss:sum"] for each in results if isinstance(each, ForwardBackwardResult)]


def run_users(ranks: Ranks, *, folder: Path, users: Sequence[str]) -> Mapping[str, tuple[list[Any], dict[str, Tensor]]]:
    """Train users at once; return each one's results, and its adapter on this rank."""
    engine = started(ranks, folder, limits=EngineLimits(micro_batch_tokens=64))
    futures: dict[str, list[Any]] = {user: [] for user in users}
    if ranks.rank == 0:
        calls = {user: [CreateModel(user, USERS[user]), *calls_of(user)] for user in users}
        for at in range(max(map(len, calls.values()))):
            for user in users:
                futures[user] += [engine.submit(each) for each in calls[user][at : at + 1]]
    engine.close()
    engine.run()
    kept = {user: {n: p.detach().clone() for n, p in engine.adapter(user).parameters.items()} for user in users}
    return {user: ([each.result(0) for each in futures[user]], kept[user]) for user in users}


@pytest.fixture(scope="module")
def alone(folders: Path) -> Mapping[str, tuple[list[Any], dict[str, Tensor]]]:
    """Return what each user has alone on one rank."""
    return {user: run_users(SINGLE, folder=folders / "llama", users=[user])[user] for user in USERS}


def assert_same_users(
    actual: Mapping[str, tuple[list[Any], dict[str, Tensor]]], expected: Mapping[str, tuple[list[Any], dict[str, Tensor]]]
) -> None:
    for user, (results, adapter) in expected.items():
        assert_losses_close(losses_of(actual[user][0]), losses_of(results))
        assert_adapters_close(actual[user][1], adapter)


def test_users_at_once_are_the_users_alone(folders: Path, alone: Any) -> None:
    together = run_users(SINGLE, folder=folders / "llama", users=list(USERS))
    assert_same_users(together, alone)
