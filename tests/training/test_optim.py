"""Optimizers by name: torch's and bitsandbytes' alike skip what is not finite and continue from their saved state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from distlora.config import OptimConfig
from distlora.training.optimizers import Optimizer, build_optimizer, learning_rate, parameter_groups

OK, NOT_OK = torch.tensor(True), torch.tensor(False)


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    """Return a pair large enough for 8 bits (4,096 elements and more) and a small one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x.A": (16, 512), "x.B": (512, 16), "small.A": (4, 8)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def parameters_for(name: str) -> dict[str, nn.Parameter]:
    """Return those parameters, for Muon in a decoder layer and beside some that it leaves to AdamW."""
    if name != "muon":
        return parameters()
    beside = {
        "token_rows.embed_tokens.rows": (3, 8),
        "layers.0.x.magnitude": (8,),
        "layers.0.mlp.experts.down.A": (4, 8),
    }
    found = {f"decoder.layers.0.{name}": parameter for name, parameter in parameters().items()}
    return found | {name: nn.Parameter(torch.ones(shape)) for name, shape in beside.items()}


def steps(optimizer: Optimizer, seeds: range, ok: Tensor = OK) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(100 + seed)
        for parameter in optimizer.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(1e-2, ok)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_a_restored_optimizer_goes_on_bit_for_bit(name: str) -> None:
    config = OptimConfig(name=name, weight_decay=0.1)  # type: ignore[arg-type]
    whole = build_optimizer(parameters_for(name), config)
    steps(whole, range(6))

    first = build_optimizer(parameters_for(name), config)
    steps(first, range(3))
    saved = {key: value.clone() for key, value in first.state_tensors().items()}
    second = build_optimizer({k: nn.Parameter(p.detach().clone()) for k, p in first.parameters.items()}, config)
    second.load_state_tensors(saved.items())
    steps(second, range(3, 6))
    for key, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[key]), key
    for key, value in whole.state_tensors().items():
        assert torch.equal(value, second.state_tensors()[key]), key


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_a_step_that_is_not_ok_changes_neither_parameters_nor_state(name: str) -> None:
    optimizer = build_optimizer(parameters_for(name), OptimConfig(name=name))  # type: ignore[arg-type]
    steps(optimizer, range(2))
    before = {key: value.clone() for key, value in optimizer.state_tensors().items()}
    weights = {key: value.detach().clone() for key, value in optimizer.parameters.items()}
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.step(1e-2, NOT_OK)
    assert all(torch.equal(before[key], value) for key, value in optimizer.state_tensors().items())
    assert all(torch.equal(weights[key], value) for key, value in optimizer.parameters.items())


def test_muon_updates_matrices_of_layers_and_adamw_the_rest() -> None:
    config = OptimConfig(name="muon", weight_decay=0.1)
    ours, alone = build_optimizer(parameters_for("muon"), config), parameters_for("muon")
    matrices = [name for name in alone if name.startswith("decoder.layers.")]
    muon = torch.optim.Muon(
        [alone[name] for name in matrices], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([alone[n] for n in alone if n not in matrices], lr=1e-2, weight_decay=0.1, fused=True)
    steps(ours, range(3))
    for seed in range(3):
        generator = torch.Generator().manual_seed(100 + seed)
        for parameter in alone.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        muon.step()
        adamw.step()
    assert all(torch.equal(ours.parameters[name], parameter) for name, parameter in alone.items())
    keys = [path.partition("/") for path in ours.state_tensors()]
    states = {name: {key for key, _, owner in keys if owner == name} for name in alone}
    assert all(states[name] == ours.states_of(name) == {"momentum_buffer"} for name in matrices)
    assert all(states[name] == ours.states_of(name) for name in alone)
    moved = (ours.parameters[matrices[1]] - parameters()["x.B"]).detach().pow(2).mean().sqrt()
    assert 0.1 < float(moved) / 3e-2 < 0.5, "of the size of AdamW's updates: 0.2 per step, less where signs change"


def test_lora_plus_gives_b_the_higher_rate() -> None:
    config = OptimConfig(loraplus_lr_ratio=16.0)
    groups = parameter_groups(parameters(), config)
    assert [(group["lr_ratio"], len(group["params"])) for group in groups] == [(1.0, 2), (16.0, 1)]
    optimizer = build_optimizer(parameters(), config)
    start = parameters()
    steps(optimizer, range(1))
    # The first step of Adam moves every element by the learning rate, but where eps or the rounding of the sum counts.
    for name, rate in (("x.A", 1e-2), ("x.B", 16e-2)):
        moved = (optimizer.parameters[name] - start[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-2, atol=0)


def rates(config: OptimConfig, total: int) -> list[float]:
    return [learning_rate(step, total, config) / config.peak_lr for step in range(total)]


def test_warmup_stable_decay_rises_stays_and_falls() -> None:
    config = OptimConfig(schedule="warmup_stable_decay", warmup_ratio=0.2, decay_ratio=0.3, min_lr_ratio=0.1)
    expected = [0.5, 1, 1, 1, 1, 1, 1, 1, 0.7, 0.4]
    assert rates(config, 10) == pytest.approx(expected)


def test_warm_up_in_steps_is_that_of_a_ratio() -> None:
    assert rates(OptimConfig(schedule="constant", warmup_steps=4), 6) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert rates(OptimConfig(schedule="constant", warmup_steps=0), 40) == [1.0] * 40
    assert (
        rates(OptimConfig(), 100)
        == rates(OptimConfig(warmup_ratio=0.03), 100)
        == rates(OptimConfig(warmup_steps=3), 100)
    )
    assert rates(OptimConfig(schedule="warmup_stable_decay", warmup_steps=9, decay_ratio=0.5), 10)[-1] == 1
