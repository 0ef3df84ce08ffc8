"""Trials in the slots of one model: each computes what it would alone, whoever is beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from distlora.config import AdapterConfig, UserError
from distlora.loading.peft_format import adapter_config, adapter_tensors
from distlora.model.adapters import StepRows, adapter_parameters, slot_name
from distlora.model.build import CausalLM, put_trial, remove_trial, trial_parameters
from distlora.training.setup import start_run_model
from support.closeness import assert_close
from support.family_models import config_for, positions_of, tokens, write_family_folder
from support.resumed_runs import SINGLE
from support.slot_models import filled, labels_of

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
    return start_run_model(config, SINGLE, for_slots=True)[0]


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


def test_a_slot_is_free_again_and_takes_another_trial(tmp_path: Path) -> None:
    """Replace a trial by one of another rank and targets; in between the rows are the base's."""
    write_family_folder(tmp_path, "qwen3")
    model = pack_model(tmp_path)
    first, second, beside = TRIALS
    batches = {slot: tokens(len(trial.rows), 40, seed=slot) for slot, trial in ((1, second), (3, beside))}
    put(model, 3, beside)
    put(model, 1, first)
    remove_trial(model, 1)
    rows = batches[1]
    base = model(rows, positions_of(rows), labels_of(rows), torch.full((len(rows),), -1))
    assert torch.equal(model(rows, positions_of(rows), labels_of(rows), torch.full((len(rows),), 1)), base)
    assert not trial_parameters(model, 1)
    put(model, 1, second)
    losses, gradients = together(model, {1: second, 3: beside}, batches)
    for slot, trial in ((1, second), (3, beside)):
        own_losses, own_gradients, (own_config, own_tensors) = alone(tmp_path, trial, batches[slot])
        assert_close(losses[slot], own_losses, ulps=8)
        for name, gradient in own_gradients.items():
            assert_close(gradients[slot][name], gradient, ulps=84)
        config = config_for(tmp_path, adapter=trial.adapter, train={"seed": trial.seed, "dtype": "fp32"})
        assert adapter_config(config.spec, model, slot_name(slot)) == own_config
        saved = adapter_tensors(model, slot_name(slot))
        assert saved.keys() == own_tensors.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in own_tensors.items())
    with pytest.raises(UserError, match="no module is named"):
        put_trial(model, 2, AdapterConfig(target_modules=("nothing",)), seed=0, device=CPU)
    assert not trial_parameters(model, 2)


@pytest.mark.parametrize(
    ("family", "settings"), [("qwen3", {}), ("qwen3", {"use_dora": True}), ("mixtral", {})], ids=str
)
def test_what_is_not_finite_in_one_trial_reaches_no_other(family: str, settings: dict, tmp_path: Path) -> None:
    write_family_folder(tmp_path, family)
    model = pack_model(tmp_path, **settings)
    dropout = {} if family == "mixtral" else {"lora_dropout": 0.2}
    trials = {
        slot: Trial({"target_modules": "all-linear", "r": 2 + slot, **dropout, **settings}, slot, slot, (slot, 4))
        for slot in range(3)
    }
    batches = {slot: tokens(2, 24, seed=slot) for slot in trials}
    for slot, trial in trials.items():
        put(model, slot, trial)
    losses, gradients = together(model, trials, batches)
    with torch.no_grad():
        for name, parameter in trial_parameters(model, 1).items():
            if ".layers.1." in name and name.endswith(".B"):
                parameter[0] = float("nan")
                parameter[1] = float("inf")
    spoiled_losses, spoiled = together(model, trials, batches)
    assert not spoiled_losses[1].isfinite().any()
    assert not all(gradient.isfinite().all() for gradient in spoiled[1].values())
    for slot in (0, 2):
        assert torch.equal(spoiled_losses[slot], losses[slot])
        for name, gradient in gradients[slot].items():
            assert gradient.isfinite().all()
            assert torch.equal(spoiled[slot][name], gradient), name


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
