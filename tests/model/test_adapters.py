"""LoRA on a frozen linear: its start, shared inputs, and rows that choose adapters."""

from __future__ import annotations

import math

import pytest
import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from distlora.config import AdapterConfig
from distlora.model.adapters import AdaptedLinear, BlockContext, Rows, reset_adapters
from distlora.model.frozen_linear import link_shared_inputs
from support.adapted_linears import adapted, empty, filled
from support.closeness import assert_close


def plain(linear: AdaptedLinear, x: Tensor, index: int) -> Tensor:
    """Compute the textbook formula with one of the adapters, or none for -1."""
    y = x @ linear.weight.T
    if index < 0:
        return y
    pair = linear.pairs[index]
    return y + pair.scaling * (x @ pair.A.T) @ pair.B.T


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
        assert_close(linear(x), plain(linear, x, 0), ulps=4)


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


def test_rows_choose_their_adapter_and_minus_one_is_the_base() -> None:
    context = BlockContext()
    linear = adapted(context, names=("first", "second"))
    x = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    context.rows = Rows(torch.tensor([1, -1, 0, 1]))
    y = linear(x)
    expected = torch.stack([plain(linear, x[i], int(choice)) for i, choice in enumerate([1, -1, 0, 1])])
    assert_close(y, expected, ulps=4)

    gradients = torch.autograd.grad(y.square().sum(), [x, *linear.adapters.parameters()])
    references = torch.autograd.grad(expected.square().sum(), [x, *linear.adapters.parameters()])
    for actual, reference in zip(gradients, references, strict=True):
        assert_close(actual, reference, ulps=8)


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
    assert shared is not None
    assert module.v_proj.shared_input is shared
    calls: list[int] = []
    for linear in module.children():
        assert isinstance(linear, AdaptedLinear)
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
        assert isinstance(linear, AdaptedLinear)
        assert_close(output, plain(linear, x, 0), ulps=4)
    loss = sum(output.square().sum() for output in outputs)
    expected = sum(plain(linear, x, 0).square().sum() for linear in module.children())  # type: ignore[arg-type]
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
    assert_close(module.k_proj(x), plain(module.k_proj, x, 0), ulps=4)
    other = torch.randn(2, 3, 32)
    assert_close(module.v_proj(other), plain(module.v_proj, other, 0), ulps=4)
    # Called twice in a row with one input: the second call must not find its own result gone.
    assert torch.equal(module.q_proj(other), module.q_proj(other))


def test_a_group_leaves_no_activation_behind(attention: tuple[Attention, list[int]]) -> None:
    module, _ = attention
    x = torch.randn(2, 3, 32)
    for linear in module.children():
        linear(x)
    assert module.q_proj.shared_input is not None
    assert module.q_proj.shared_input._input is None
