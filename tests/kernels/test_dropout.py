"""lora_dropout: a mask is a function of (seed, linear, step, row, position, column), and nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from distlora.data.loader import open_data
from distlora.model.adapters import AdaptedLinear, StepRows
from distlora.model.build import CausalLM
from distlora.system import randomness
from distlora_kernels.buffers import COUNTERS
from distlora_kernels.dropout import Dropout, dropped, philox, threshold_of
from support.closeness import assert_adapters_close, assert_close, assert_losses_close
from support.family_models import dequantized
from support.peft_models import our_trained_model
from support.runs import SINGLE, outcome, run_until
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
    monkeypatch.setitem(COUNTERS, "cpu", 20)
    assert torch.equal(mask([4, 9, 1, 7], 6, 50), whole), "the pieces in which it is computed show"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
def test_a_gpu_drops_what_the_cpu_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor([4, 2**31, -1])
    on_cpu = dropped(Dropout(KEY, threshold_of(0.3), 5, rows), 3 * 7, 99)
    on_gpu = Dropout(KEY, threshold_of(0.3), 5, rows.cuda())
    assert torch.equal(dropped(on_gpu, 3 * 7, 99).cpu(), on_cpu)
    monkeypatch.setitem(COUNTERS, "cuda", 20)
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


class OurDropout(nn.Module):
    """Stands in PEFT's layer for its nn.Dropout, and drops what one of our linears drops."""

    def __init__(self, linear: AdaptedLinear, at: StepRows) -> None:
        super().__init__()
        self.linear, self.at = linear, at

    def forward(self, x: Tensor) -> Tensor:
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
            # fp32 sums of a few hundred products through three blocks, in another order.
            assert_close(actual.grad, peer["default"].weight.grad, ulps=100)


# Known answers of Random123's kat_vectors for philox4x32-10: counter, key -> words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter: tuple, key: tuple, words: tuple) -> None:
    words_of_one = philox(key, tuple(torch.tensor([word]) for word in counter))  # type: ignore[arg-type]
    assert [int(word) for word in words_of_one] == list(words)


def test_an_element_depends_on_its_position_alone() -> None:
    long = randomness.uniform((1000,), seed=3, name="a")
    assert torch.equal(randomness.uniform((7, 11), seed=3, name="a").view(-1), long[:77])
    assert not torch.equal(randomness.uniform((1000,), seed=3, name="b"), long)
    assert not torch.equal(randomness.uniform((1000,), seed=4, name="a"), long)


def test_distributions_have_their_moments() -> None:
    uniform = randomness.uniform((200_000,), seed=0, name="u")
    assert uniform.min() > 0
    assert uniform.max() < 1
    # Four standard errors of the mean and of the variance of 200,000 draws.
    assert abs(uniform.mean() - 0.5) < 4 * (1 / 12 / 200_000) ** 0.5
    normal = randomness.normal((200_000,), seed=0, name="n")
    assert abs(normal.mean()) < 4 / 200_000**0.5
    assert abs(normal.var() - 1) < 4 * (2 / 200_000) ** 0.5
