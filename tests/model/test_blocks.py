"""Seam 1: the block wrapper slices what has a batch dimension, refuses what it does not know, and changes no number."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distlora.derive.shrink import build, decoder_layers, shrink
from distlora.model.adapters import BlockContext, Rows, StepRows
from distlora.model.by_document import ByDocument, DocumentRows, slow_scan_note
from distlora.model.layer_wrapper import Block, Reference, argument_names, batch_dims
from support.model_types import config_of


class Layer(nn.Module):
    """A decoder layer as transformers calls one; remembers what it was given."""

    attention_type = "full_attention"

    def __init__(self, context: BlockContext) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.context = context
        self.seen: list[dict[str, Any]] = []

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.seen.append({**kwargs, "rows": self.context.rows.adapters, "step_rows": self.context.rows.places})
        cos, _ = kwargs["position_embeddings"]
        return torch.tanh(self.linear(hidden_states)) * cos + kwargs["scale"]


def block_and_inputs(num_micro: int, checkpointing: bool) -> tuple[Block, Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    context = BlockContext()
    block = Block(Layer(context), context)
    block.num_micro, block.checkpointing = num_micro, checkpointing
    kwargs = {
        "attention_mask": None,
        "position_embeddings": (torch.randn(6, 5, 8), torch.randn(1, 5, 8)),
        "use_cache": False,
        "scale": 2.0,
    }
    return block, torch.randn(6, 5, 8, requires_grad=True), kwargs


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_slice_sees_its_own_rows_in_recomputation_too(checkpointing: bool) -> None:
    block, x, kwargs = block_and_inputs(3, checkpointing)
    block.rows = Rows(torch.tensor([0, 1, 2, 3, 4, 5]), StepRows(7, torch.tensor([10, 11, 12, 13, 14, 15])))
    block(x, **kwargs).sum().backward()
    seen = [call["rows"].tolist() for call in block.inner.seen]  # type: ignore[union-attr]
    assert seen[:3] == [[0, 1], [2, 3], [4, 5]]
    assert sorted(seen[3:]) == (sorted(seen[:3]) if checkpointing else [])
    for call in block.inner.seen:  # type: ignore[union-attr]
        assert call["step_rows"].step == 7
        assert call["step_rows"].rows.tolist() == [10 + choice for choice in call["rows"].tolist()]
    shapes = [tuple(t.shape) for t in block.inner.seen[0]["position_embeddings"]]  # type: ignore[index, union-attr]
    assert shapes == [(2, 5, 8), (1, 5, 8)], "what has one row is shared, what has six is cut"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mask", torch.zeros(4, 5), "shape \\(4, 5\\)"),
        ("cache", object(), "object"),
        ("masks", (torch.zeros(2),), "shape \\(2,\\)"),
    ],
)
def test_an_argument_that_may_hide_a_batch_is_refused(name: str, value: Any, message: str) -> None:
    block, x, kwargs = block_and_inputs(3, False)
    with pytest.raises(TypeError, match=f"'{name}'.*{message}"):
        block(x, **kwargs, **{name: value})


def test_a_batch_that_slices_do_not_divide_is_refused() -> None:
    block, x, kwargs = block_and_inputs(4, False)
    with pytest.raises(ValueError, match="6 rows cannot be run in 4 equal slices"):
        block(x, **kwargs)


TYPES = ("gemma3n_text", "gemma4_text@shared", "bloom", "gpt_neo", "zaya", "lfm2", "falcon_h1", "qwen3_next")
"""What layers hand on, calls by position, batch dimensions other than 0, tuples, mixers."""
BY_DOCUMENT = {"lfm2": "conv", "falcon_h1": "mamba", "qwen3_next": "linear_attn", "zaya": "self_attn.qkv_proj"}
"""Modules that carry state along a row."""
LENGTH = 24
DOCUMENTS = ((0, 5), (5, 6), (6, 17), (17, LENGTH))


def tiny_model(name: str) -> Any:
    torch.manual_seed(0)
    model = build(shrink(config_of(name))).eval()
    with torch.no_grad():  # Off their start, where gates are closed and scales are 1.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def wrapped(model: Any, dims: list[dict[str, int | None]], *, num_micro: int, by_document: str = "") -> list[Block]:
    layers, blocks = decoder_layers(model), []
    for index, layer in enumerate(list(layers)):
        context = BlockContext()
        if by_document and any(name == by_document for name, _ in layer.named_modules()):
            layer.set_submodule(by_document, ByDocument(layer.get_submodule(by_document), context))
        block = Block(layer, context, dims[index])
        block.num_micro, block.checkpointing = num_micro, num_micro > 1
        layers[index] = block
        blocks.append(block)
    return blocks


def probed(model: Any) -> list[dict[str, int | None]]:
    """Return Block.batch_dims of each layer, from calls of the model."""
    layers = list(decoder_layers(model))
    calls: list[list[tuple[int, dict[str, Any]]]] = [[] for _ in layers]
    for rows in (2, 3):

        def record(layer: Any, args: Any, kwargs: Any, rows: int = rows) -> None:
            arguments = dict(zip(argument_names(layer), args, strict=False)) | kwargs
            calls[layers.index(layer)].append((rows, arguments))

        hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
        model(torch.randint(8, 90, (rows, 11)), use_cache=False)
        for hook in hooks:
            hook.remove()
    return [batch_dims(of_layer) for of_layer in calls]


def outcome(model: Any, ids: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and gradients by the names of an unwrapped model."""
    model.zero_grad()
    logits = model(ids, use_cache=False, **kwargs).logits
    logits.mul(torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {re.sub(r"(\.inner)+\.", ".", name): gradient for name, gradient in gradients.items()}


def assert_same(
    actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], gradients: float
) -> None:
    assert (actual[0] - expected[0]).abs().max() <= 2e-5
    assert actual[1].keys() == expected[1].keys()
    for name, one in expected[1].items():
        difference = (actual[1][name] - one).norm()
        assert difference <= gradients * one.norm() + 1e-6, f"{name}: {float(difference)} of {float(one.norm())}"


@pytest.mark.parametrize("model_type", TYPES)
def test_slices_of_any_decoder_give_the_whole_batch_and_its_gradients(model_type: str) -> None:
    model, ids = tiny_model(model_type), torch.randint(8, 90, (4, LENGTH))
    expected, dims = outcome(model, ids), probed(model)
    assert dims[0] == {"bloom": {"alibi": 0}, "gemma3n_text": {"hidden_states": 1}}.get(model_type, {})
    wrapped(model, dims, num_micro=2)
    # Sums over rows are made in another order, which gates that nearly close magnify in qwen3_next.
    assert_same(outcome(model, ids), expected, 1e-4 if model_type == "qwen3_next" else 2e-6)


@pytest.mark.parametrize("model_type", list(BY_DOCUMENT))
def test_packed_documents_are_as_alone_where_a_mixer_carries_state(model_type: str) -> None:
    model, ids = tiny_model(model_type), torch.randint(8, 90, (2, LENGTH))
    # One row of four documents, one of a single document.
    positions = torch.stack([torch.cat([torch.arange(end - start) for start, end in DOCUMENTS]), torch.arange(LENGTH)])
    scale, outputs = torch.randn(2, LENGTH, model.config.get_text_config().vocab_size), []
    for row, documents in enumerate((DOCUMENTS, ((0, LENGTH),))):
        for start, end in documents:
            logits = model(ids[row : row + 1, start:end], use_cache=False).logits
            (logits * scale[row, start:end]).sum().backward()
            outputs.append(logits[0].detach())
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    leaking = model(ids, position_ids=positions, use_cache=False).logits.detach()
    assert (leaking.flatten(0, 1) - torch.cat(outputs)).abs().max() > 1e-3, "nothing leaks without the wrapper"
    blocks = wrapped(model, [{}] * 9, num_micro=2, by_document=BY_DOCUMENT[model_type])
    for block in blocks:
        block.rows = Rows(packed=DocumentRows.of(positions))
    model.zero_grad()
    logits = model(ids, position_ids=positions, use_cache=False).logits
    (logits * scale).sum().backward()
    assert (logits.detach().flatten(0, 1) - torch.cat(outputs)).abs().max() <= 2e-5
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            one = expected[re.sub(r"(\.inner)+\.", ".", name)]
            # zaya's temperatures are two numbers, whose gradients are sums over all tokens: 3.2e-6 (AMD Zen 5).
            limit = {"qwen3_next": 1e-4, "zaya": 1e-5}.get(model_type, 2e-6)
            assert (parameter.grad - one).norm() <= limit * one.norm() + 1e-6, name


@pytest.mark.parametrize(
    ("model_type", "packages"),
    [
        ("lfm2", "causal_conv1d"),
        ("falcon_h1", "causal_conv1d, mamba_ssm"),
        ("qwen3_next", "causal_conv1d, fla"),
        ("zaya", None),
    ],
)
def test_the_log_names_the_missing_packages_that_a_type_looks_for(
    model_type: str, packages: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package if package in installed else None)
    model = tiny_model(model_type)
    assert slow_scan_note(model) is None, "no layer has a state that is known here"
    wrapped(model, [{}] * 9, num_micro=1, by_document=BY_DOCUMENT[model_type])
    note = slow_scan_note(model)
    if packages is None:
        assert note is None
        return
    assert note is not None
    assert f"reference code: {packages} not installed; `pip install" in note
    installed.update({"causal_conv1d", "mamba_ssm", "fla"})
    assert slow_scan_note(model) is None


class Sharing(nn.Module):
    """A layer that hands a tensor on, or multiplies by what an earlier one handed on."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes

    def forward(self, hidden_states: Tensor, shared: Any, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        if self.writes:  # Every writer under the same name: recomputation must not see a later one.
            shared["key"] = hidden_states.sin() * scale
        return hidden_states * shared["key"], hidden_states[:, :, 0]


def test_a_reference_reads_what_its_own_pass_handed_on() -> None:
    from transformers.cache_utils import KVSharingDict

    class Scaled(Sharing):
        def __init__(self, writes: bool) -> None:
            super().__init__(writes)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, hidden_states: Tensor, shared: Any) -> Tensor:  # type: ignore[override]
            return super().forward(hidden_states, shared, self.scale)[0]

    def run(scale: float, start: float | None) -> Tensor:
        x, mapping = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)), KVSharingDict()
        reference = None if start is None else Reference(None)
        for writes in (True, False):
            block = Block(Scaled(writes), BlockContext())
            block.num_micro, block.reference = 2, reference
            parameter = block.inner.scale
            parameter.data.fill_(scale)  # type: ignore[union-attr, operator]
            block.started = {} if start is None else {parameter: torch.tensor(start)}  # type: ignore[dict-item]
            x = block(x, mapping)
        return x if reference is None else reference.take()  # type: ignore[return-value]

    torch.testing.assert_close(run(3.0, start=2.0), run(2.0, start=None), rtol=0, atol=0)


def test_written_copies_and_outputs_without_rows_are_refused() -> None:
    class Writes(nn.Module):
        def forward(self, hidden_states: Tensor, states: dict[str, Tensor]) -> Tensor:
            states["more"] = hidden_states
            return hidden_states

    block = Block(Writes(), BlockContext())
    block.num_micro = 2
    with pytest.raises(TypeError, match="mappingproxy"):
        block(torch.zeros(4, 3, 2), states={"one": torch.zeros(4, 3)})

    class Pair(nn.Module):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            return hidden_states, torch.zeros(7)

    block = Block(Pair(), BlockContext())
    block.num_micro = 2
    with pytest.raises(TypeError, match=r"an output, a tensor of shape \(7,\)"):
        block(torch.zeros(4, 3, 2))
