"""lora_dropout: a mask is a function of (seed, linear, step, row, position, column), and nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from distlora.config import AdapterConfig
from distlora.model.adapters import AdaptedLinear, BlockContext, Rows, StepRows
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import link_shared_inputs
from distlora.training.open_run import open_data
from distlora_kernels import dropout as dropout_module
from distlora_kernels.dropout import Dropout, Stream, dropped, philox, threshold_of
from distlora_kernels.formats import nf4
from distlora_kernels.lora_linear import Adapter, FrozenWeight, RowChoice, lora_linear
from support.adapted_linears import adapted
from support.closeness import adapter_of, assert_adapters_close, assert_close, assert_losses_close, figures_of
from support.family_models import dequantized
from support.gates import gate_of
from support.lora_tensors import tensors
from support.parity_runs import outcome
from support.peft_models import our_trained_model
from support.resumed_runs import SINGLE, run_until
from support.small_models import make_run
from support.tiers import ci
from support.worlds import World

KEY = (0x01234567, 0x89ABCDEF)


def mask(rows: list[int], tokens: int, columns: int, *, p: float = 0.3, step: int = 5, key: Any = KEY) -> Tensor:
    """Return the mask, (rows, tokens, columns) bool."""
    dropout = Dropout(key, threshold_of(p), step, torch.tensor(rows))
    return dropped(dropout, len(rows) * tokens, columns).view(len(rows), tokens, columns)


def test_the_mask_is_what_its_definition_says() -> None:
    """Each element by itself, with one call of the generator, in Python's own integers."""
    rows, tokens, columns, step = [3, 2**32 + 1, -1], 4, 19, 7
    actual = mask(rows, tokens, columns, step=step)
    for (b, row), position, column in itertools.product(enumerate(rows), range(tokens), range(columns)):
        counter = (column // 8, position, row % 2**32, step)
        words = [int(word) for word in philox(KEY, tuple(torch.tensor(word) for word in counter))]  # type: ignore[arg-type]
        half = words[column % 8 // 2] >> 16 * (column % 2) & 0xFFFF
        signed = half - 2**16 if half >= 2**15 else half
        assert bool(actual[b, position, column]) == (signed < threshold_of(0.3) - 2**15)


def test_rows_and_columns_depend_on_nothing_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mask([4, 9, 1, 7], 6, 50)
    assert torch.equal(mask([1, 4], 6, 50), whole[[2, 0]])
    assert torch.equal(mask([9], 3, 21), whole[1:2, :3, :21])
    end = Dropout(KEY, threshold_of(0.3), 5, torch.tensor([4, 9, 1, 7]), first=2)
    assert torch.equal(dropped(end, 4 * 4, 50).view(4, 4, 50), whole[:, 2:])
    monkeypatch.setattr(dropout_module, "_CPU_COUNTERS", 20)
    assert torch.equal(mask([4, 9, 1, 7], 6, 50), whole), "the pieces in which it is computed show"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
def test_a_gpu_drops_what_the_cpu_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor([4, 2**31, -1])
    on_cpu = dropped(Dropout(KEY, threshold_of(0.3), 5, rows), 3 * 7, 99)
    on_gpu = Dropout(KEY, threshold_of(0.3), 5, rows.cuda())
    assert torch.equal(dropped(on_gpu, 3 * 7, 99).cpu(), on_cpu)
    monkeypatch.setattr(dropout_module, "_GPU_COUNTERS", 20)
    assert torch.equal(dropped(on_gpu, 3 * 7, 99).cpu(), on_cpu)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_the_share_that_is_dropped_is_p_everywhere_and_neighbours_are_independent(p: float) -> None:
    draws = mask(list(range(64)), 64, 512, p=p).float()
    deviation = (p * (1 - p) / draws.numel()) ** 0.5
    assert abs(draws.mean() - p) < 4 * deviation + 2**-17, "the threshold is p to half of 2^-16"
    for dim, length in ((0, 64), (1, 64), (2, 512)):
        means = draws.mean(dim=[d for d in range(3) if d != dim])
        spread = float((means - p).square().mean() / (p * (1 - p) * length / draws.numel()))
        # The mean of `length` squared standard normals: 1 within four of its own deviations.
        assert abs(spread - 1) < 4 * (2 / length) ** 0.5, f"dim {dim}"
        centred = draws - p
        size = draws.shape[dim] - 1
        product = (centred.narrow(dim, 0, size) * centred.narrow(dim, 1, size)).mean() / (p * (1 - p))
        assert abs(product) < 4 / (draws.numel() * size / draws.shape[dim]) ** 0.5, f"neighbours in dim {dim}"


def test_a_probability_is_a_number_of_65536ths_and_never_none_or_all() -> None:
    assert [threshold_of(p) for p in (0.0, 0.5, 0.05, 1e-9, 1 - 1e-9)] == [0, 32768, 3277, 1, 65535]
    assert Dropout(KEY, 32768, 0, torch.tensor([0])).scale == 2.0
    quarter = Dropout(KEY, threshold_of(0.25), 0, torch.tensor([0]))
    assert quarter.scale == 1 / 0.75


@pytest.mark.parametrize(
    ("dtype", "packed", "per_row"), [(torch.float32, False, True), (torch.bfloat16, True, False)], ids=str
)
def test_output_and_gradients_are_those_of_the_formula_with_the_same_mask(
    dtype: torch.dtype, packed: bool, per_row: bool
) -> None:
    """Y = x W^T + bias + s (x * kept / (1 - p)) A^T B^T, as torch differentiates it in fp64."""
    shape = (36, 256, 320, 16)
    x, weight, a, b, bias = tensors(shape, dtype)
    frozen = FrozenWeight(
        tuple(nf4.nf4_quantize(weight)) if packed else (weight,), (shape[2], shape[1]), nf4.NF4 if packed else None
    )
    dropout = Dropout(KEY, threshold_of(0.25), 3, torch.tensor([8, 2, 5]))
    scale: RowChoice | float = RowChoice(torch.tensor([0, -1, 1]), (2.0, 1.0), (10, 6)) if per_row else 2.0
    gate = scale if isinstance(scale, float) else gate_of(scale, 36)
    kept = (~dropped(dropout, 36, 256)).double() / 0.75
    dy = torch.randn(36, 320, generator=torch.Generator().manual_seed(2)).to(dtype)

    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    wide = [leaf.double() for leaf in leaves]
    expected = wide[0] @ frozen.dense(dtype).double().T + bias.double()
    expected = expected + ((wide[0] * kept) @ wide[1].T * gate) @ wide[2].T
    references = [expected, *torch.autograd.grad(expected, leaves, dy.double())]

    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    y = lora_linear(leaves[0].view(3, 12, 256), frozen, Adapter(leaves[1], leaves[2], scale, dropout), bias=bias)
    results = [y.flatten(0, 1), *torch.autograd.grad(y.flatten(0, 1), leaves, dy)]
    for actual, reference in zip(results, references, strict=True):
        # As in tests/kernels/test_lora_linear.py: sums of up to 330 products in fp32; two roundings to bf16.
        assert_close(actual.to(dtype), reference.float().to(dtype), ulps=4 if dtype == torch.float32 else 2)


def test_no_mask_and_no_dropped_input_is_kept_for_backward() -> None:
    x, weight, a, b, _ = tensors((36, 256, 320, 16), torch.float32)
    dropout = Dropout(KEY, threshold_of(0.25), 3, torch.tensor([8, 2, 5]))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(
            x.requires_grad_(),
            FrozenWeight((weight,), (320, 256)),
            Adapter(a.requires_grad_(), b.requires_grad_(), 2.0, dropout),
        )
    assert [t.data_ptr() for t in saved if t.shape == x.shape] == [x.data_ptr()]


def test_a_linear_drops_in_training_alone_and_siblings_drop_each_their_own() -> None:
    context = BlockContext()
    q, k = adapted(context, seed=1, dropout=0.5), adapted(context, seed=1, dropout=0.5)
    key = q.pairs[0].dropout.key
    k.pairs[0].dropout = Stream((key[0], key[1] ^ 1), 2**15)  # As another path gives.
    plain_q = adapted(context, seed=1)
    link_shared_inputs({"q_proj": q, "k_proj": k})
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    assert torch.equal(q(x), plain_q(x))
    context.rows = Rows(places=StepRows(4, torch.tensor([6, 2])))
    outputs = []
    for linear in (q, k):
        kept = ~dropped(Dropout(linear.pairs[0].dropout.key, 2**15, 4, torch.tensor([6, 2])), 10, 32).view(2, 5, 32)
        pair = linear.pairs[0]
        expected = x @ linear.weight.T + pair.scaling * (x * kept * 2 @ pair.A.T) @ pair.B.T
        outputs.append(linear(x))
        assert_close(outputs[-1], expected, ulps=4)
    assert not torch.equal(outputs[0], outputs[1])


def test_the_key_is_the_seed_and_the_path() -> None:
    keys = set()
    for path, seed in (("model.layers.0.a", 0), ("model.layers.1.a", 0), ("model.layers.0.a", 1)):
        linear = adapted()
        linear.adapters = nn.ModuleDict()
        linear.add_adapter("default", AdapterConfig(lora_dropout=0.1), path=path, seed=seed)
        keys.add(linear.pairs[0].dropout.key)
    assert len(keys) == 3


ADAPTER = {"target_modules": "all-linear", "r": 8, "lora_dropout": 0.3}
NOISE = {"neftune_alpha": 2.0}
"""NEFTune's noise on the embeddings, which has the same streams (test_neftune.py)."""
CELLS: list[Any] = [
    (2, {"micro_batch": 3, "accumulate": "block"}),
    ci(3, {"micro_batch": 2, "checkpointing": "none"}),
]


@pytest.fixture(scope="module")
def reference(world: World, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train on one rank with one micro-batch and no activation checkpointing."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    make_run(run_dir, folders, adapter=ADAPTER, train=NOISE | {"micro_batch": 12, "checkpointing": "none"})
    return outcome(world, 1, run_dir)


@pytest.mark.parametrize(("size", "settings"), CELLS, ids=str)
def test_a_run_with_dropout_and_noise_does_not_depend_on_ranks_micro_batches_or_checkpointing(
    world: World, folders: Path, tmp_path: Path, reference: Any, size: int, settings: dict
) -> None:
    make_run(tmp_path / "run", folders, adapter=ADAPTER, train=NOISE | settings)
    losses, adapter = outcome(world, size, tmp_path / "run")
    assert_losses_close(losses, reference[0])
    assert_adapters_close(adapter, reference[1])


def test_training_passes_each_step_and_row_and_evaluation_passes_none(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[StepRows | None] = []
    original = CausalLM.forward

    def forward(self: CausalLM, *arguments: Any, step_rows: StepRows | None = None, **others: Any) -> Tensor:
        seen.append(step_rows)
        return original(self, *arguments, step_rows=step_rows, **others)

    monkeypatch.setattr(CausalLM, "forward", forward)
    settings = {"max_steps": 3, "eval_every": 2, "global_batch": 4, "micro_batch": 2}
    config = make_run(tmp_path / "run", folders, adapter=ADAPTER, train=settings)
    run_until(SINGLE, run_dir=tmp_path / "run", stop_before=None)
    loader, _ = open_data(tmp_path / "run", config.train, SINGLE)
    expected = [(step, row) for step in range(3) for row in loader.batch(step).rows]
    assert [(at.step, row) for at in seen if at is not None for row in at.rows.tolist()] == expected
    assert len({row for _, row in expected}) == len(expected), "no row twice, so none can stand for another"
    assert sum(at is None for at in seen) >= 3, "before, during and after the training"


def test_a_resumed_run_with_dropout_and_noise_is_the_uninterrupted_one_bit_for_bit(
    folders: Path, tmp_path: Path
) -> None:
    settings = NOISE | {"max_steps": 3, "save_every": 1, "log_every": 1, "global_batch": 6}
    for name, stops in (("whole", [None]), ("stopped", [2, None])):
        make_run(tmp_path / name, folders, adapter=ADAPTER, train=settings)
        for stop in stops:
            run_until(SINGLE, run_dir=tmp_path / name, stop_before=stop)
    whole, resumed = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert figures_of(tmp_path / "stopped") == figures_of(tmp_path / "whole")


class OurDropout(nn.Module):
    """Stands in PEFT's layer for its nn.Dropout, and drops what one of our linears drops."""

    def __init__(self, linear: AdaptedLinear, at: StepRows) -> None:
        super().__init__()
        self.linear, self.at = linear, at

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.at.step, int)
        ours = Dropout(*self.linear.pairs[0].dropout, self.at.step, self.at.rows)
        lost = dropped(ours, x.shape[0] * x.shape[1], x.shape[2]).view(x.shape)
        return x.masked_fill(lost, 0) / (1 - ours.threshold / 2**16)


@pytest.mark.parametrize("dora", [ci(False), True])
def test_with_the_same_masks_peft_gives_our_loss_and_our_gradients(folders: Path, tmp_path: Path, dora: bool) -> None:
    adapter = ADAPTER | {"use_dora": dora}
    make_run(tmp_path / "run", folders, adapter=adapter, train={"max_steps": 4}, optim={"lr": 2e-2})
    run_until(SINGLE, run_dir=tmp_path / "run", stop_before=None)
    ours = our_trained_model(tmp_path / "run")
    base = dequantized(folders / "llama", ours)
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter", is_trainable=True).train()
    at = StepRows(3, torch.tensor([5, 1]))
    replaced = 0
    for path, linear in ours.adapted_linears():
        layer = tuned.get_submodule(f"base_model.model.{path}")
        assert isinstance(layer.lora_dropout["default"], nn.Dropout)
        assert layer.lora_dropout["default"].p == 0.3
        layer.lora_dropout["default"] = OurDropout(linear, at)
        replaced += 1
    assert replaced == 3 * 7

    tokens = torch.randint(5, 1000, (2, 40), generator=torch.Generator().manual_seed(3))
    labels = torch.full_like(tokens, -100)
    labels[:, :-1] = tokens[:, 1:]
    theirs = torch.nn.functional.cross_entropy(
        tuned(tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    theirs.backward()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    loss = ours(tokens, positions, labels, step_rows=at).sum()
    loss.backward()
    assert_losses_close([float(loss.detach())], [float(theirs.detach())])
    assert abs(float((ours(tokens, positions, labels).sum() / loss).detach()) - 1) > 1e-5, "nothing was dropped"
    for path, linear in ours.adapted_linears():
        layer = tuned.get_submodule(f"base_model.model.{path}")
        pair, peers = linear.pairs[0], [layer.lora_A, layer.lora_B, *([layer.lora_magnitude_vector] if dora else [])]
        for actual, peer in zip((pair.A, pair.B, pair.magnitude), peers, strict=False):
            assert actual is not None
            assert actual.grad is not None
            # fp32 sums of a few hundred products through three blocks, in another order.
            assert_close(actual.grad, peer["default"].weight.grad, ulps=100)
