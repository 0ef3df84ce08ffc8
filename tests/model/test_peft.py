"""Compare with PEFT on the dequantized weights: equal logits and gradients."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from distlora.loading.peft_format import adapter_tensors
from distlora.model.adapters import reset_adapters
from distlora.model.buffers import materialize_buffers
from distlora.model.frozen_linear import FrozenLinear
from distlora.training import worker
from support.closeness import assert_close
from support.family_models import dequantized, our_logits
from support.loaded_shards import config_for, loaded
from support.peft_models import SINGLE, our_trained_model
from support.small_models import make_run
from support.tiers import ci

FIRST_BLOCKS = r"model\.layers\.[01]\..*\.(q_proj|v_proj)"
TARGETS: list[Any] = ["all-linear", "attention", "qv", "mlp", ["o_proj"], FIRST_BLOCKS]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(5, 1000, (2, 40), generator=torch.Generator().manual_seed(3))


CASES = [("qwen3", "all-linear", True), ci("llama-tied", "qv", False)]
CASES += [pytest.param("llama", targets, True, marks=pytest.mark.slow) for targets in TARGETS]


@pytest.mark.parametrize(("model", "targets", "rslora"), CASES, ids=str)
def test_peft_gives_our_logits(
    folders: Path, tmp_path: Path, tokens: Tensor, model: str, targets: Any, rslora: bool
) -> None:
    run_dir = tmp_path / "run"
    adapter = {"target_modules": targets, "r": 4, "lora_alpha": 8.0, "use_rslora": rslora}
    make_run(run_dir, folders, model, adapter=adapter, train={"max_steps": 4}, optim={"lr": 2e-2})
    worker.run(run_dir, SINGLE)
    ours = our_trained_model(run_dir)
    base = dequantized(folders / model, ours)
    with torch.no_grad():
        base_logits = base(tokens).logits
        tuned = peft.PeftModel.from_pretrained(base, run_dir / "adapter")
        theirs = {name.replace(".default", "") for name, _ in tuned.named_parameters() if ".lora_" in name}
        assert theirs == adapter_tensors(ours).keys(), "PEFT adapts other linears than we did"
        difference = (tuned(tokens).logits - our_logits(ours, tokens)).abs().max()
        assert difference <= 1e-4, f"logits are {difference:.1e} apart"
        assert (tuned(tokens).logits - base_logits).abs().max() > 1e-2, "the adapter does nothing, so this says nothing"


def test_gradients_equal_peft(folders: Path, tmp_path: Path, tokens: Tensor) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir, folders, train={"max_steps": 2}, optim={"lr": 2e-2})
    worker.run(run_dir, SINGLE)
    ours = our_trained_model(run_dir)
    base = dequantized(folders / "llama", ours)
    tuned = peft.PeftModel.from_pretrained(base, run_dir / "adapter", is_trainable=True)

    labels = torch.full_like(tokens, -100)
    labels[:, :-1] = tokens[:, 1:]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    loss = ours(tokens, positions, labels).sum() / (labels >= 0).sum()
    loss.backward()
    expected = tuned(input_ids=tokens, labels=tokens).loss
    expected.backward()
    assert_close(loss, expected, ulps=8)
    theirs = {name.replace(".default", ""): p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    for name, parameter in adapter_tensors(ours).items():
        assert parameter.grad is not None
        # Three blocks of fp32 sums in another order: some tens of ulps of the gradient's norm.
        assert_close(parameter.grad, theirs[name], ulps=64)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fresh_adapter_changes_no_bit(folders: Path, tokens: Tensor, dtype: str) -> None:
    """Compare step 0 with the adapter and without (sequences that choose none)."""
    sections: dict[str, Any] = {"adapter": {"target_modules": "all-linear"}, "train": {"dtype": dtype}}
    model, backend = loaded(folders / "qwen3", **sections)
    materialize_buffers(model, backend.ranks.device)
    reset_adapters(model.adapted_linears(), config_for(folders / "qwen3", **sections).adapter, seed=0)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with_adapter = model.hidden_states(tokens, positions)
    for _, linear in model.adapted_linears():
        linear.forward = functools.partial(FrozenLinear.forward, linear)  # type: ignore[method-assign]
    assert torch.equal(with_adapter, model.hidden_states(tokens, positions))
