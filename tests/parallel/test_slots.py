"""Trials in the slots of one model: each computes what it would alone, whoever is beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from distlora.config import AdapterConfig
from distlora.loading.peft_format import adapter_config, adapter_tensors
from distlora.model.adapters import StepRows, adapter_parameters
from distlora.model.build import CausalLM
from distlora.model.trial_slots import put_trial, trial_parameters
from distlora.parallel import Ranks
from distlora.parallel.gradients import GradientReducer, Launches
from distlora.parallel.ranks import Traffic
from distlora.training.setup import StartOptions, start_run_model
from support.closeness import assert_close
from support.family_models import config_for, positions_of, tokens, write_family_folder
from support.packs import filled, labels_of
from support.runs import SINGLE
from support.worlds import World

CPU = torch.device("cpu")


class Trial(NamedTuple):
    adapter: dict[str, Any]
    seed: int
    step: int
    rows: tuple[int, ...]
    """Of the training data."""


TRIALS = (
    Trial({"r": 5, "target_modules": "all-linear"}, seed=3, step=7, rows=(4, 9)),
    Trial({"r": 8, "target_modules": "qv", "lora_dropout": 0.3, "lora_alpha": 5.0}, seed=4, step=2, rows=(4, 1, 0)),
    Trial({"r": 3, "target_modules": "mlp", "lora_dropout": 0.1, "rank_pattern": {"up_proj": 1}}, 3, 0, (2,)),
)


def alone(
    folder: Path, trial: Trial, batch: Tensor, *, mlp_tile: int | None = None
) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Losses of its rows, gradients by the adapters' names, and what is saved of it."""
    train = {"seed": trial.seed, "dtype": "fp32", "mlp_tile": mlp_tile}
    config = config_for(folder, adapter=trial.adapter, train=train)
    model, _, _ = start_run_model(config, SINGLE)
    parameters = adapter_parameters(model)
    filled(parameters, trial.seed)
    at = StepRows(trial.step, torch.tensor(trial.rows))
    losses = model(batch, positions_of(batch), labels_of(batch), step_rows=at)
    gradients = torch.autograd.grad(losses.sum(), list(parameters.values()))
    saved = adapter_config(config.spec, model), {name: value.detach() for name, value in adapter_tensors(model).items()}
    return losses.detach(), dict(zip(parameters, gradients, strict=True)), saved


def pack_model(folder: Path, *, mlp_tile: int | None = None, **adapter: Any) -> CausalLM:
    train = {"dtype": "fp32", "mlp_tile": mlp_tile}
    config = config_for(folder, adapter={"target_modules": "qv", **adapter}, train=train)
    return start_run_model(config, SINGLE, StartOptions(for_slots=True))[0]


def put(model: CausalLM, slot: int, trial: Trial) -> dict[str, nn.Parameter]:
    parameters = put_trial(model, slot, AdapterConfig(**trial.adapter), seed=trial.seed, device=CPU)
    filled(parameters, trial.seed)
    return parameters


def together(
    model: CausalLM, slots: Mapping[int, Trial], batches: Mapping[int, Tensor]
) -> tuple[dict[int, Tensor], dict[int, dict[str, Tensor]]]:
    """Losses and gradients of each slot's trial, all rows in one batch, with a row of an empty slot between."""
    parts, numbers, steps, rows = [], [], [], []
    for slot, trial in slots.items():
        parts += [batches[slot], batches[slot][:1]]
        numbers += [slot] * len(trial.rows) + [7]
        steps += [trial.step] * len(trial.rows) + [1]
        rows += [*trial.rows, 5]
    batch, chosen = torch.cat(parts), torch.tensor(numbers)
    at = StepRows(torch.tensor(steps), torch.tensor(rows))
    losses = model(batch, positions_of(batch), labels_of(batch), chosen, step_rows=at)
    parameters = {slot: trial_parameters(model, slot) for slot in slots}
    used = torch.isin(chosen, torch.tensor(list(slots)))
    flat = torch.autograd.grad(losses[used].sum(), [p for own in parameters.values() for p in own.values()])
    gradients = iter(flat)
    found = {slot: {name: next(gradients) for name in own} for slot, own in parameters.items()}
    return {slot: losses[chosen == slot].detach() for slot in slots}, found


@pytest.mark.parametrize(("checkpointing", "mlp_tile"), [(False, None), (True, None), (True, 16)])
def test_trials_of_other_ranks_targets_and_dropout_are_what_they_are_alone(
    tmp_path: Path, checkpointing: bool, mlp_tile: int | None
) -> None:
    """Run MLPs in tiles of 16 of 40 tokens, too."""
    write_family_folder(tmp_path, "qwen3")
    model = pack_model(tmp_path, mlp_tile=mlp_tile)
    for block in model.blocks:
        block.checkpointing = checkpointing
    slots = dict(zip((5, 0, 2), TRIALS, strict=True))
    batches = {slot: tokens(len(trial.rows), 40, seed=slot) for slot, trial in slots.items()}
    for slot, trial in slots.items():
        put(model, slot, trial)
    losses, gradients = together(model, slots, batches)
    for slot, trial in slots.items():
        own_losses, own_gradients, _ = alone(tmp_path, trial, batches[slot], mlp_tile=mlp_tile)
        assert_close(losses[slot], own_losses, ulps=8)
        assert list(gradients[slot]) == list(own_gradients), "the same names, in the same order"
        for name, gradient in own_gradients.items():
            assert gradient.any()
            # The base's products are of more rows at once: sums of a few hundred products in three blocks, 1e-5.
            assert_close(gradients[slot][name], gradient, ulps=84)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen3", {"use_dora": True}), ("qwen3", {"use_dora": True, "lora_dropout": 0.2}), ("mixtral", {})],
    ids=str,
)
def test_magnitudes_and_experts_are_each_trials_own(family: str, settings: dict, tmp_path: Path) -> None:
    write_family_folder(tmp_path, family)
    model = pack_model(tmp_path, use_dora=settings.get("use_dora", False))
    adapters = ({"target_modules": "all-linear", "r": 3}, {"target_modules": "all-linear", "r": 5}, {"r": 2})
    trials = {slot: Trial({**own, **settings}, slot, slot, (slot, 4)) for slot, own in enumerate(adapters)}
    batches = {slot: tokens(2, 24, seed=slot) for slot in trials}
    for slot, trial in trials.items():
        put(model, slot, trial)
    losses, gradients = together(model, trials, batches)
    for slot, trial in trials.items():
        own_losses, own_gradients, _ = alone(tmp_path, trial, batches[slot])
        assert_close(losses[slot], own_losses, ulps=8)
        for name, gradient in own_gradients.items():
            assert_close(gradients[slot][name], gradient, ulps=84)


def sums_of_two_runs(ranks: Ranks) -> list[list[float]]:
    """Two runs' gradients over the ranks, whose backward passes come in another order on each; then one alone."""
    traffic = Traffic()
    launches = Launches(ranks.group, traffic)
    runs = [[nn.Parameter(torch.zeros(4)) for _ in range(number)] for number in (5, 2)]
    # A bucket for each parameter.
    reducers = [GradientReducer(parameters, bucket_bytes=1, launches=launches) for parameters in runs]
    found = []
    for present in ([0, 1], [1]):
        if present == [1]:
            reducers[0].release()
        for number in present:
            reducers[number].zero()
            reducers[number].expect(torch.zeros(()), last=True)
        for number in present if ranks.rank == 0 else reversed(present):
            own = runs[number]
            sum((parameter * (ranks.rank + 1 + number)).sum() for parameter in own).backward()  # type: ignore[union-attr]
        launches.finish()
        found += [[float(p.grad[0]) for p in runs[number] if p.grad is not None] for number in present]
    return [*found, [float(traffic.reduced_bytes)]]


def test_sums_are_right_whatever_the_order_in_which_ranks_finish_them(world: World) -> None:
    for result in world.run(2, sums_of_two_runs):
        assert result == [[3.0] * 5, [5.0] * 2, [5.0] * 2, [16.0 * (5 + 2 + 2)]]
