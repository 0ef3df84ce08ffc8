"""Attention by documents against dense masks: the same numbers in every family, and nothing that makes the host wait.

The operation on the CPU is the reference of the contract, in the place of the one that needs CUDA.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distlora.model import attention
from distlora.model.attention import LONGEST, Documents
from distlora.model.build import CausalLM
from distlora.parallel import Ranks
from distlora.training import worker as train
from support.closeness import assert_close, assert_losses_close, relative_error
from support.family_models import VARIANTS, load_ours, tokens, write_family_folder
from support.small_models import make_run, read_metrics

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")

SDPA_VARIANTS = [name for name in VARIANTS if not name.startswith(("gemma2", "gpt-oss"))]
"""Those whose scores have no caps and no sinks."""
BY_DEFAULT = ("llama", "gemma3", "phi3", "mixtral")
"""The others run in `make test-ci`."""
LAYOUTS = ([23, 1, 40], [64], [1, 1, 17, 45], [30, 34])
"""Lengths of the documents of each row; 64 is a document alone, or a row of padding."""


def positions_of(layouts: Any) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in layouts])


POSITIONS = positions_of(LAYOUTS)


def losses_and_gradients(model: CausalLM, documents: Documents | None, num_micro: int) -> tuple[Tensor, list[Tensor]]:
    """Row losses, and the gradients of every adapter."""
    model.set_num_micro(num_micro)
    input_ids = tokens(*POSITIONS.shape)
    labels = input_ids.roll(-1, dims=1)
    losses = model(input_ids, POSITIONS, labels, documents=documents)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return losses.detach(), list(torch.autograd.grad(losses.sum() / labels.numel(), parameters))


@pytest.mark.parametrize(
    "name", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.ci) for name in SDPA_VARIANTS]
)
def test_attending_by_documents_equals_dense_masks(name: str, tmp_path: Path) -> None:
    write_family_folder(tmp_path, name)
    model, _ = load_ours(tmp_path)
    expected_losses, expected = losses_and_gradients(model, None, 1)
    calls: list[tuple[int, int | None]] = []

    def op(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float, left: Any) -> Tensor:
        assert bounds.dtype == torch.int32
        assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
        calls.append((longest, left))
        return attention.reference(query, key, value, bounds, longest, scale, left)

    model.attend_by_documents(op)
    for num_micro in (1, 2):
        calls.clear()
        # 65, which is no length of these rows: it is this that comes down to the operation.
        losses, gradients = losses_and_gradients(model, Documents.of(POSITIONS)._replace(longest=65), num_micro)
        # Three blocks, each run for every slice in forward and in recomputation.
        assert len(calls) == 3 * 2 * num_micro
        assert {longest for longest, _ in calls} == {65}
        windowed = any(setting in name for setting in ("window", "gemma3")) or name in ("phi3", "mixtral")
        assert (15 in {left for _, left in calls}) == windowed
        assert_losses_close(losses.tolist(), expected_losses.tolist())
        # With scores in fp64 instead both sides move by as much (1e-6 together, 2e-6 the worst of the tensors): it is
        # the rounding of fp32 attention through three blocks.
        assert relative_error(flat(gradients), flat(expected)) <= 2e-6
        for actual, gradient in zip(gradients, expected, strict=True):
            assert relative_error(actual, gradient) <= 3e-6
    # Without documents the masks are SDPA's again, to the bit: evaluation of other code, and generation.
    calls.clear()
    losses, gradients = losses_and_gradients(model, None, 1)
    assert not calls
    assert torch.equal(losses, expected_losses)
    assert all(torch.equal(actual, gradient) for actual, gradient in zip(gradients, expected, strict=True))


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
@torch.no_grad()
def test_masks_of_decoders_take_the_hosts_word_for_packed_rows(name: str, tmp_path: Path) -> None:
    write_family_folder(tmp_path, name)
    model, _ = load_ours(tmp_path, train={"attention": "sdpa"})
    ids = tokens(len(LAYOUTS), 64)
    known = inspect.signature(type(model.decoder).forward).parameters
    assert ["self", *inspect.signature(model.decoder.forward).parameters] == list(known), "callers look names up"

    def hidden(documents: Documents | None) -> Tensor:
        return model.hidden_states(ids, POSITIONS, documents=documents)

    packed = model.documents_of(POSITIONS, ids.device)
    asked_of_device = hidden(None)
    assert torch.equal(hidden(packed), asked_of_device)
    single = model.documents_of(torch.arange(64).expand_as(ids), ids.device)
    assert not torch.equal(hidden(single), asked_of_device), "the masks read the positions"
    positions = torch.arange(64).expand_as(ids)
    alone = model.hidden_states(ids, positions)
    assert torch.equal(model.hidden_states(ids, positions, documents=single), alone)


def mask_of(make: Any, config: Any, embeds: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor | None:
    """Return a mask as a decoder has it made; the cache's name depends on transformers' version."""
    cache = "cache" if "cache" in inspect.signature(make).parameters else "past_key_values"
    values = {"config": config, "inputs_embeds": embeds, "attention_mask": attention_mask, cache: None}
    mask: Tensor | None = make(**values, position_ids=positions)
    return mask


def grouped_inputs(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """query, key, value of the four rows: 4 heads over 2."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(256, heads, 32, generator=generator).to(device, dtype).requires_grad_() for heads in (4, 2, 2)]


@pytest.mark.parametrize(("rows", "window"), [(1, None), (4, 16)])
def test_torchs_own_op_takes_the_call_and_nothing_is_read_by_the_host(rows: int, window: int | None) -> None:
    """On fake tensors, which have shapes and no data: reading one raises. Masks and bounds included."""
    from torch.nn.attention.varlen import varlen_attn
    from transformers import LlamaConfig
    from transformers.masking_utils import create_causal_mask

    op = attention.from_torch(varlen_attn, deterministic=True)
    attend = attention._attention_function(op)
    config = LlamaConfig(attn_implementation="sdpa")
    with FakeTensorMode():
        starts = torch.empty(rows, 1, 1, 5, dtype=torch.int32)
        positions = torch.empty(rows, 64, dtype=torch.int64)
        embeds = torch.empty(rows, 64, 256, dtype=torch.bfloat16)
        shapes = [(rows, 64, heads, 64) for heads in (4, 2, 2)]
        query, key, value = (torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
        mask = mask_of(create_causal_mask, config, embeds, starts, positions)
        assert mask is starts
        output, _ = attend(
            torch.nn.Module(),
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            mask,
            scaling=0.125,
            sliding_window=window,
            **{LONGEST: 40},
        )
        assert output.shape == (rows, 64, 4, 64)
        gradients = torch.autograd.grad(output.sum(), (query, key, value))
        assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in (query, key, value)]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("left", [None, 15])
def test_the_op_on_the_device_equals_its_reference_and_itself(left: int | None) -> None:
    from torch.nn.attention.varlen import varlen_attn

    device = torch.device("cuda")
    inputs = grouped_inputs(torch.bfloat16, device)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    bounds = attention.cu_seqlens(Documents.of(POSITIONS).to(device).starts, 64)
    op = attention.from_torch(varlen_attn, deterministic=True)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(256, 4, 32, generator=generator).to(device, torch.bfloat16)
    expected = attention.reference(*exact, bounds, 64, 0.3, left)
    expected_gradients = torch.autograd.grad(expected, exact, grad.double())
    runs = []
    for _ in range(2):
        output = op(*inputs, bounds, 64, 0.3, left)
        runs.append([output, *torch.autograd.grad(output, inputs, grad)])
    for actual, wanted in zip(runs[0], [expected, *expected_gradients], strict=True):
        assert_close(actual, wanted, ulps=4)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.gpu
@needs_cuda
def test_a_run_on_the_device_is_the_same_bit_for_bit(folders: Path, tmp_path: Path) -> None:
    losses = []
    for name in ("first", "second"):
        make_run(tmp_path / name, folders, train={"max_steps": 5, "dtype": "bf16"})
        train.run(tmp_path / name, Ranks(0, 1, torch.device("cuda"), None))
        losses.append([line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line])
    assert losses[0] == losses[1]
