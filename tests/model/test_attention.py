"""Attention by documents against dense masks: the same numbers in every family, and nothing that makes the host wait.

The operation on the CPU is the reference of the contract, in the place of the one that needs CUDA.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distlora.config import ParallelConfig, TrainConfig, UserError
from distlora.config.file import build
from distlora.model import attention, fused_modules
from distlora.model.attention import LONGEST, Documents
from distlora.model.build import CausalLM
from distlora.parallel import Ranks
from distlora.training import setup
from distlora.training import worker as train
from distlora_launcher.compose.checks import check_model_sizes
from support.closeness import assert_close, assert_losses_close, relative_error
from support.family_models import VARIANTS, architecture, config_for, load_ours, tokens, write_family_folder
from support.run_models import build_run_model
from support.small_models import make_run, read_metrics

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")

CPU, CPU_DTYPE = torch.device("cpu"), torch.float32
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


def test_documents_hold_starts_and_the_longest() -> None:
    documents = Documents.of(POSITIONS)
    assert documents.longest == 64
    assert documents.starts.dtype == torch.int32
    assert documents.starts.shape == (4, 1, 1, 5)
    assert documents.starts[:, 0, 0].tolist() == [
        [0, 23, 24, 64, 64],
        [0, 64, 64, 64, 64],
        [0, 1, 2, 19, 64],
        [0, 30, 64, 64, 64],
    ]
    bounds = attention.cu_seqlens(documents.starts[:1], 64).tolist()
    assert bounds == [0, 23, 24, 64, 64]
    assert attention.cu_seqlens(documents.starts[2:], 64).tolist() == [0, 1, 2, 19, 64, 64, 94, 128, 128, 128]
    assert Documents.of(positions_of([[3, 61], [40, 24]])).longest == 61


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


def mask_of(make: Any, config: Any, embeds: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor | None:
    """Return a mask as a decoder has it made; the cache's name depends on transformers' version."""
    cache = "cache" if "cache" in inspect.signature(make).parameters else "past_key_values"
    values = {"config": config, "inputs_embeds": embeds, "attention_mask": attention_mask, cache: None}
    mask: Tensor | None = make(**values, position_ids=positions)
    return mask


def varlen_as_torch_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Torch's function before it grouped heads, computed by the reference."""
    assert query.shape[1] == key.shape[1], "this one wants as many heads of keys as of queries"
    assert (max_q, window_size[1]) == (max_k, 0)
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert scale is not None
    left = None if window_size[0] == -1 else window_size[0]
    return attention.reference(query, key, value, cu_seq_q, max_q, scale, left)


def varlen_as_torch_2_13(*tensors: Any, enable_gqa: bool = False, **options: Any) -> Tensor:
    query, key, value, *rest = tensors
    assert enable_gqa == (query.shape[1] != key.shape[1])
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return varlen_as_torch_2_11(query, key, value, *rest, **options)


@pytest.mark.parametrize("left", [None, 15])
@pytest.mark.parametrize("function", [varlen_as_torch_2_11, varlen_as_torch_2_13])
def test_torchs_function_is_called_as_each_version_takes_it(function: Callable[..., Tensor], left: int | None) -> None:
    inputs = grouped_inputs(CPU_DTYPE, CPU)
    bounds = attention.cu_seqlens(Documents.of(POSITIONS).starts, 64)
    actual = attention.from_torch(function, deterministic=True)(*inputs, bounds, 64, 0.3, left)
    assert torch.equal(actual, attention.reference(*inputs, bounds, 64, 0.3, left))


def grouped_inputs(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """query, key, value of the four rows: 4 heads over 2."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(256, heads, 32, generator=generator).to(device, dtype).requires_grad_() for heads in (4, 2, 2)]


def test_only_the_backward_of_attention_is_run_deterministically() -> None:
    seen: dict[str, bool] = {}

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
            ctx.name = name
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            fills = torch.utils.deterministic.fill_uninitialized_memory
            seen[ctx.name] = torch.are_deterministic_algorithms_enabled()
            assert fills != seen[ctx.name]
            return grad, None

    x = torch.ones(3, requires_grad=True)
    attended = Spy.apply(Spy.apply(x, "before"), "attention")
    attention.deterministic_backward(attended)
    Spy.apply(attended, "after").sum().backward()
    assert seen == {"after": False, "attention": True, "before": False}
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


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


def test_models_without_flash_attention_keep_their_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: available)
    capability, available = (9, 0), True

    def choice(family: str = "llama", dtype: torch.dtype = torch.bfloat16, size: int = 128) -> Any:
        known = architecture(family)
        kinds = tuple(dataclasses.replace(kind, heads=(32, 32, size)) for kind in known.kinds)
        return attention.choose(
            dataclasses.replace(known, kinds=kinds),
            wanted="auto",
            device=torch.device("cuda"),
            dtype=dtype,
            deterministic=True,
        )

    assert choice().op is not None
    assert "torch.nn.attention.varlen" in choice().note
    for refused, reason in (
        (choice("gemma2"), "caps"),
        (choice(dtype=torch.float32), "16 bits"),
        (choice(size=264), "have 264"),
        (choice(size=100), "have 100"),
    ):
        assert refused.op is None
        assert reason in refused.note
    capability = (7, 5)
    assert choice().op is None
    assert "8.0" in choice().note
    capability, available = (9, 0), False
    assert choice().op is None
    assert "without flash attention" in choice().note


@pytest.mark.parametrize(
    ("name", "train", "note"),
    [("llama", {}, None), ("gemma2", {}, "on gemma2, whose"), ("llama", {"dtype": "fp32"}, r"train\.dtype=fp32")],
)
def test_asking_for_sdpa_where_nothing_else_is_done_is_refused(
    name: str, train: dict[str, str], note: str | None
) -> None:
    settings = build(TrainConfig, {"attention": "sdpa", **train})
    refused = contextlib.nullcontext() if note is None else pytest.raises(UserError, match=f"has no effect .*{note}")
    with refused:
        check_model_sizes(ParallelConfig(), settings, architecture(name))


def test_queries_that_autocast_left_in_fp32_meet_values_in_16_bits() -> None:
    query, key, value = (tensor.view(4, 64, -1, 32).transpose(1, 2) for tensor in grouped_inputs(CPU_DTYPE, CPU))
    attend = attention._attention_function(attention.reference)
    documents = Documents.of(POSITIONS)
    module = torch.nn.Module()
    output, _ = attend(module, query, key, value.bfloat16(), documents.starts, scaling=0.3)
    expected, _ = attend(module, query.bfloat16(), key.bfloat16(), value.bfloat16(), documents.starts, scaling=0.3)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


def test_a_run_that_attends_by_documents_is_the_run_with_masks(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer and evaluation hand the documents over."""
    calls: list[int] = []

    def op(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float, left: Any) -> Tensor:
        calls.append(longest)
        return attention.reference(query, key, value, bounds, longest, scale, left)

    losses = {}
    for kind in ("masks", "documents"):
        settings = {"max_steps": 2, "global_batch": 6, "micro_batch": 3, "accumulate": "block"}
        make_run(tmp_path / kind, folders, train=settings)
        if kind == "documents":
            monkeypatch.setattr(setup, "use_device_kernels", lambda model, *_: by_documents(model, op))
        train.run(tmp_path / kind, Ranks(0, 1, CPU, None))
        lines = read_metrics(tmp_path / kind)
        losses[kind] = [line[name] for line in lines for name in ("loss", "eval_loss") if name in line]
    assert calls
    assert_losses_close(losses["documents"], losses["masks"])


def by_documents(model: CausalLM, op: attention.VarlenOp) -> None:
    model.attend_by_documents(op)
    model.notes.append("attention by documents")


def test_a_start_chooses_by_device_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    write_family_folder(tmp_path, "llama")
    for device, dtype, wanted, note in (
        ("cuda", "bf16", "auto", "in no fixed order"),
        ("cuda", "fp32", "auto", None),
        ("cuda", "bf16", "sdpa", None),
        ("cpu", "bf16", "auto", "products of matrices"),
        ("cpu", "fp32", "auto", None),
        ("cpu", "bf16", "sdpa", None),
    ):
        settings = {"dtype": dtype, "fused_kernels": "none", "deterministic_attention": False, "attention": wanted}
        config = config_for(tmp_path, train=settings)
        model = build_run_model(config)
        setup.use_device_kernels(model, config.spec, config.train, torch.device(device))
        assert model.attends_by_documents == (note is not None)
        assert model.decoder.config._attn_implementation == ("sdpa" if note is None else attention.NAME)
        assert len(model.notes) == (device == "cuda" or note is not None)
        assert all((note or "dense masks") in note for note in model.notes)
    config = config_for(tmp_path)
    monkeypatch.setattr(fused_modules, "why_not_fused", lambda **_: "the norms are trained")
    setup.use_device_kernels(model, config.spec, config.train, torch.device("cuda"))
    assert model.notes[-1] == "fused kernels are not used: the norms are trained"


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
