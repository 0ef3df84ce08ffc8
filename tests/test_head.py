"""Seam 2: the chunked loss head equals the plain one, forward and gradients, frozen or trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from closeness import assert_close
from distlora.model.lm_head import LossHead

VOCABULARY, HIDDEN = 1001, 24


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden (3, 37, 24), labels with some rows and positions ignored, weight."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 37, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCABULARY, (3, 37), generator=generator)
    labels[0, ::3] = -100
    labels[2] = -100
    return hidden, labels, torch.randn(VOCABULARY, HIDDEN, generator=generator)


def plain_loss(hidden: Tensor, labels: Tensor, weight: Tensor, softcap: float | None, scale: float) -> Tensor:
    logits = hidden @ weight.T * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).sum(dim=1)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (30.0, 1.0), (None, 0.25)])
@pytest.mark.parametrize("tokens_per_chunk", [16, 1000])
def test_row_sums_and_gradients_equal_the_plain_loss(
    monkeypatch: pytest.MonkeyPatch, frozen: bool, softcap: float | None, scale: float, tokens_per_chunk: int
) -> None:
    monkeypatch.setattr("distlora.architecture.shapes.LOGITS_PER_CHUNK", tokens_per_chunk * VOCABULARY)
    hidden, labels, weight = inputs()
    module = LossHead(nn.Parameter(weight, requires_grad=not frozen), logit_softcap=softcap, logit_scale=scale)
    row_weights = torch.tensor([0.5, -2.0, 3.0])  # Any combination of rows, as DPO takes.
    results = []
    for loss in (module, lambda h, y: plain_loss(h, y, module.weight, softcap, scale)):
        leaf = hidden.clone().requires_grad_()
        sums = loss(leaf, labels)
        wanted = [leaf] if frozen else [leaf, module.weight]
        results.append([sums, *torch.autograd.grad((sums * row_weights).sum(), wanted)])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, ulps=8)
    assert results[0][0][2] == 0, "a row without labels has no loss"


def test_no_gradient_mode_gives_the_same_sums() -> None:
    hidden, labels, weight = inputs()
    module = LossHead(nn.Parameter(weight, requires_grad=False))
    with torch.no_grad():
        sums = module(hidden, labels)
    assert torch.equal(sums, module(hidden.requires_grad_(), labels).detach())


def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlora.architecture.shapes.LOGITS_PER_CHUNK", 16 * VOCABULARY)
    hidden, labels, weight = inputs()
    module = LossHead(nn.Parameter(weight, requires_grad=False))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(
                [largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor))]
            )
            return result

    with Watch():
        module(hidden.requires_grad_(), labels).sum().backward()
    assert largest <= max(16 * VOCABULARY, weight.numel())
