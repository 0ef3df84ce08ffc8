"""LoRA on a frozen linear: its start, shared inputs, and rows that choose adapters."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from distlora.config import AdapterConfig
from distlora.model.adapters import AdaptedLinear, AdapterCopies, BlockContext, reset_adapters
from distlora.model.frozen_linear import FrozenLinear, link_shared_inputs
from distlora.planner.decoder_sizes import copied_adapters
from distlora.planner.model import model_in
from distlora.planner.workload import Workload
from distlora.training.setup import start_run_model
from distlora_kernels import fused
from support.closeness import assert_close
from support.family_models import SINGLE, config_for, load_ours, positions_of, tokens
from support.plan_inputs import machine_of
from support.small_models import write_model_folder


def filled(linear: FrozenLinear, seed: int) -> FrozenLinear:
    """Give a dense linear on the meta device random weights; adapters too, B included."""
    linear.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return linear


def empty(in_features: int, out_features: int) -> AdaptedLinear:
    options: dict[str, Any] = {"bias": False, "format": None, "dtype": torch.float32}
    return AdaptedLinear(in_features, out_features, context=BlockContext(), **options)


def adapted(seed: int = 0, out: int = 40) -> AdaptedLinear:
    linear = empty(32, out)
    linear.add_adapter("default", AdapterConfig(r=4, lora_alpha=8.0), path=f"model.layers.0.linear_{seed}", seed=0)
    filled(linear, seed)
    return linear


def plain(linear: AdaptedLinear, x: Tensor) -> Tensor:
    """Compute the textbook formula."""
    (pair,) = linear.pairs
    return x @ linear.weight.T + pair.scaling * (x @ pair.A.T) @ pair.B.T


PATHS = [f"model.layers.{layer}.{name}" for layer in (1, 11) for name in ("self_attn.q_proj", "mlp.gate_proj")]
KEYS = [
    "q_proj",
    "_proj",
    "layers.1.self_attn.q_proj",
    r"^model\.layers\.1\..*",
    r".*\.11\..*",
    "self_attn",
    "q_proj|mlp",
    ".",
]


@pytest.mark.parametrize("path", PATHS)
def test_ranks_and_scales_follow_the_key_that_peft_finds(path: str) -> None:
    patterns = [KEYS, KEYS[::-1], *([key] for key in KEYS)]
    for keys in patterns:
        config = AdapterConfig(
            r=3,
            lora_alpha=5.0,
            rank_pattern={key: 10 + index for index, key in enumerate(keys)},
            alpha_pattern={key: 20.0 + index for index, key in enumerate(keys)},
            use_rslora=False,
        )
        found = get_pattern_key(keys, path)
        index = keys.index(found) if found in keys else None
        assert config.rank_of(path) == (3 if index is None else 10 + index), (keys, found)
        assert config.alpha_of(path) == (5 if index is None else 20 + index)
        assert config.scaling_of(path) == config.alpha_of(path) / config.rank_of(path)
        linear = empty(32, 40)
        linear.add_adapter("default", config, path=path, seed=0)
        assert (tuple(linear.pairs[0].A.shape), tuple(linear.pairs[0].B.shape)) == (
            (config.rank_of(path), 32),
            (40, config.rank_of(path)),
        )
        assert linear.pairs[0].scaling == config.scaling_of(path)


def test_siblings_of_different_ranks_share_one_projection() -> None:
    config = AdapterConfig(rank_pattern={"k_proj": 2}, alpha_pattern={"v_proj": 7.0}, r=5)
    linears = {name: empty(32, 40) for name in ("q_proj", "k_proj", "v_proj")}
    for seed, (name, linear) in enumerate(linears.items()):
        linear.add_adapter("default", config, path=f"model.layers.0.self_attn.{name}", seed=0)
        filled(linear, seed)
    link_shared_inputs(linears)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    assert [linear.pairs[0].A.shape[0] for linear in linears.values()] == [5, 2, 5]
    for linear in linears.values():
        assert_close(linear(x), plain(linear, x), ulps=4)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_starts_like_peft_and_b_at_zero_whatever_else_exists(init: str) -> None:
    config = AdapterConfig(r=64, init=init)
    linear = empty(512, 40)
    linear.add_adapter("default", config, path="model.layers.0.q_proj", seed=5)
    linear.to_empty(device="cpu")
    reset_adapters([("model.layers.0.q_proj", linear)], config, seed=5)
    a = linear.pairs[0].A.detach().clone()
    assert not linear.pairs[0].B.any()
    bound = 1 / math.sqrt(512)
    expected_std = bound / math.sqrt(3) if init == "kaiming" else 1 / 64
    assert abs(a.std() / expected_std - 1) < 0.02
    assert init == "gaussian" or (a.abs() <= bound).all()
    reset_adapters([("other", adapted()), ("model.layers.0.q_proj", linear)], config, seed=5)
    assert torch.equal(linear.pairs[0].A, a)
    reset_adapters([("model.layers.1.q_proj", linear)], config, seed=5)
    assert not torch.equal(linear.pairs[0].A, a)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = adapted(seed=1), adapted(seed=2, out=20), adapted(seed=3)


@pytest.fixture
def attention() -> tuple[Attention, list[int]]:
    """Three linked projections, and a count of the calls in which they took part."""
    module = Attention()
    link_shared_inputs({name: linear for name, linear in module.named_children() if isinstance(linear, AdaptedLinear)})
    shared = module.q_proj.shared_input
    assert module.v_proj.shared_input is shared
    calls: list[int] = []
    for linear in module.children():
        original = linear.stacked_down

        def counted(original=original):
            calls.append(1)
            return original()

        linear.stacked_down = counted  # type: ignore[method-assign]
    return module, calls


def test_members_of_a_group_share_one_projection_of_the_same_input(attention: tuple[Attention, list[int]]) -> None:
    module, calls = attention
    x = torch.randn(2, 3, 32, requires_grad=True)
    outputs = [linear(x) for linear in module.children()]
    assert len(calls) == 3, "each took part in the first call alone"
    for output, linear in zip(outputs, module.children(), strict=True):
        assert_close(output, plain(linear, x), ulps=4)
    loss = sum(output.square().sum() for output in outputs)
    expected = sum(plain(linear, x).square().sum() for linear in module.children())  # type: ignore[arg-type]
    parameters = [x, *(p for n, p in module.named_parameters() if "adapters" in n)]
    for actual, reference in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert_close(actual, reference, ulps=8)


def test_an_input_changed_in_place_or_another_one_is_not_taken_for_the_same(
    attention: tuple[Attention, list[int]],
) -> None:
    module, _ = attention
    x = torch.randn(2, 3, 32)
    module.q_proj(x)
    x.mul_(2)
    assert_close(module.k_proj(x), plain(module.k_proj, x), ulps=4)
    other = torch.randn(2, 3, 32)
    assert_close(module.v_proj(other), plain(module.v_proj, other), ulps=4)
    # Called twice in a row with one input: the second call must not find its own result gone.
    assert torch.equal(module.q_proj(other), module.q_proj(other))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_fresh_adapter_changes_no_bit(folders: Path, dtype: str) -> None:
    model, _, _ = start_run_model(config_for(folders / "qwen3", train={"dtype": dtype}), SINGLE)
    rows = tokens(2, 40)
    with_adapter = model.hidden_states(rows, positions_of(rows))
    for _, linear in model.adapted_linears():
        linear.forward = functools.partial(FrozenLinear.forward, linear)  # type: ignore[method-assign]
    assert torch.equal(with_adapter, model.hidden_states(rows, positions_of(rows)))


SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
SECTIONS: dict[str, Any] = {
    "adapter": {"target_modules": "all-linear", "r": 4, "lora_dropout": 0.25},
    "train": {"dtype": "bf16", "checkpointing": "block", "global_batch": 1},
}


def test_copies_are_rounded_once_and_neighbours_and_as_large_as_planned(tmp_path: Path) -> None:
    write_model_folder(tmp_path, "llama", **SIZES)
    model, _ = load_ours(tmp_path, **SECTIONS)
    linears = [linear for _, linear in model.adapted_linears()]

    def copies_of(linear: AdaptedLinear) -> Any:
        adapter = linear.operand().adapter
        return adapter.copies

    copies = AdapterCopies(linears)
    assert copies_of(linears[0]) is None
    with copies.fresh():
        ends = []
        for linear in linears:
            (pair,), made = linear.pairs, copies_of(linear)
            assert made.factor == pair.scaling * pair.dropout.scale != pair.scaling
            assert torch.equal(made.a, pair.A.bfloat16())
            assert torch.equal(made.b, (pair.B * made.factor).bfloat16())
            ends.append((made.a.data_ptr(), made.a.data_ptr() + made.a.nbytes))
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(ends))
        linears[0].context.uses_start = True
        assert copies_of(linears[0]) is None, "DPO's reference has other adapters"
        linears[0].context.uses_start = False
        storage = copies_of(linears[1]).a.untyped_storage()
    work = Workload.of(config_for(tmp_path, **SECTIONS))
    assert copied_adapters(work, model_in(tmp_path).shapes, machine_of()) == (len(linears), storage.nbytes())
    assert copied_adapters(work, model_in(tmp_path).shapes, machine_of(is_gpu=False)) == (0, 0)
    assert copies_of(linears[1]) is None


@pytest.mark.ci
def test_copies_have_the_bits_of_a_cast_per_use(triton_device: torch.device, tmp_path: Path) -> None:
    write_model_folder(tmp_path, "llama", **SIZES)
    model, _ = load_ours(tmp_path, **SECTIONS)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    for context in (contextlib.nullcontext(), AdapterCopies([each for _, each in model.adapted_linears()]).fresh()):
        with context, fused.force_variant("scratch"):
            states = model.hidden_states(tokens(1, 16), positions_of(tokens(1, 16)))
            results.append([states, *torch.autograd.grad(states.sum(), parameters)])
    assert all(map(torch.equal, *results))
