"""Weights in any mix of formats: every path that is not NF4's own, with two formats that exist only here."""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.architecture.shapes import ModelShapes
from distlora.config.file import load_config
from distlora.derive.prove import dense_weights
from distlora.loading import load_base
from distlora.model import build
from distlora.model.frozen_linear import FrozenTensor
from distlora.parallel import Ranks
from distlora.planner import traffic
from distlora.planner.memory.base import base_of
from distlora.planner.model import model_in
from distlora.planner.workload import Workload
from distlora.training.setup import start_run_model
from distlora_kernels import experts_grouped, experts_torch
from distlora_kernels.format_layouts import FORMAT_LAYOUTS, FormatLayout, Part
from distlora_kernels.formats import FORMATS, Format
from distlora_kernels.formats.base import place
from distlora_kernels.lora_linear import Adapter, FrozenWeight, Linear, lora_linears
from distlora_kernels.operands import ExpertLinear, Routing
from distlora_kernels.reference import GROUP
from support.closeness import assert_adapters_close, assert_losses_close
from support.counted_step import measure_ours, only_collectives
from support.parity_runs import adapters_after, result_of
from support.resumed_runs import run_until
from support.small_models import make_run
from support.tiers import ci
from support.worlds import World, start_world


class Int8(Format):
    """Eight bits and one fp32 scale per block of 32 weights, or per tile."""

    def quantize(self, flat: Tensor) -> tuple[Tensor, ...]:
        padded = torch.zeros(-(-len(flat) // GROUP) * GROUP)
        padded[: len(flat)] = flat
        return self._of_groups(padded.view(-1, GROUP))

    def quantize_tiles(self, weight: Tensor) -> tuple[Tensor, ...]:
        assert self.tile is not None
        (height, width), matrix = self.tile, weight.reshape(-1, weight.shape[-1])
        rows, columns = (-(-size // side) for size, side in zip(matrix.shape, self.tile, strict=True))
        padded = torch.zeros(rows * height, columns * width)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        return self._of_groups(padded.view(rows, height, columns, width).transpose(1, 2).reshape(-1, GROUP))

    def _of_groups(self, groups: Tensor) -> tuple[Tensor, ...]:
        blocks = groups.view(len(groups), -1, self.block)
        scales = blocks.abs().amax(dim=2) / 127
        codes = (blocks / scales.clamp_min(1e-30)[:, :, None]).round() + 128
        return codes.to(torch.uint8).view(-1, GROUP), scales

    def dequantize(
        self, parts: Sequence[Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        self.check(parts, shape)
        codes, scales = parts
        values = (codes.float().view(len(codes), -1, self.block) - 128) * scales[:, :, None]
        if self.tile is None:
            weight = values.flatten()[: math.prod(shape)]
        else:
            weight = self.in_rows(values.view(-1, GROUP), shape)[:, : shape[-1]]
        return place(out, shape, dtype, codes.device).copy_(weight.reshape(shape))


def registered(name: str, block: int, tile: tuple[int, int] | None = None) -> Int8:
    parts = (Part("codes", (GROUP,), "uint8"), Part("scales", (GROUP // block,), "float32"))
    FORMAT_LAYOUTS[name] = FormatLayout(name, name, block, parts, tile=tile)
    FORMATS[name] = format = Int8.named(name)
    return format


FLAT, TILED = registered("test_flat", 32), registered("test_tiled", GROUP, (128, 128))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frozen(format: Int8, shape: tuple[int, ...], device: torch.device | None = None, seed: int = 1) -> FrozenWeight:
    weight = random(*shape, seed=seed) / shape[-1] ** 0.5
    parts = format.quantize(weight.flatten()) if format.tile is None else format.quantize_tiles(weight)
    return FrozenWeight(tuple(part.to(device or "cpu") for part in parts), shape, format)


# --- a format alone ---


@pytest.mark.parametrize("format", [FLAT, TILED], ids=lambda format: format.name)
@pytest.mark.parametrize("shape", [(5, 7, 9), (5, 24, 40), (5, 128, 128), (3, 130, 160), (4, 200, 300)], ids=str)
def test_an_experts_slice_is_the_whole_weights(format: Int8, shape: tuple[int, int, int]) -> None:
    weight = frozen(format, shape)
    whole = weight.dense(torch.bfloat16)
    assert (whole.float() - random(*shape, seed=1) / shape[-1] ** 0.5).abs().max() < 0.02
    for expert in range(shape[0]):
        assert torch.equal(format.slice(weight.parts, shape, expert, torch.bfloat16)[:, : shape[2]], whole[expert])


@pytest.mark.parametrize("format", [FLAT, TILED], ids=lambda format: format.name)
def test_sums_over_runs_of_groups_are_found_by_row(format: Int8) -> None:
    weight = frozen(format, (200, 320))
    groups = format.dequantize_groups(weight.parts, torch.float32)
    size = 64
    by_row = format.in_rows(groups.double().square().view(len(groups), -1, size).sum(dim=2), weight.shape)
    expected = weight.dense(torch.float32).double().square().sum(dim=1)
    assert torch.allclose(by_row.sum(dim=1), expected, rtol=1e-12, atol=0)


# --- products ---


def outcomes(x: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
    """Return outputs and all gradients of linears of one input."""
    x = x.clone().requires_grad_()
    leaves = [x, *(t for linear in linears if linear.adapter is not None for t in linear.adapter[:2])]
    ys = lora_linears(x, linears)
    loss = sum((y.float() * random(*y.shape, seed=9).to(y.device)).sum() for y in ys)
    assert isinstance(loss, Tensor)
    return [*ys, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", ci("triton")])
def test_products_are_those_of_the_dequantized_weight(
    request: pytest.FixtureRequest, dtype: torch.dtype, device: str
) -> None:
    """Bit for bit on the CPU; on a GPU a dense weight's adapter term may be summed in another order."""
    place_of = torch.device("cpu") if device == "cpu" else request.getfixturevalue("triton_device")
    x = random(3, 37, 256, seed=0).to(place_of, dtype)
    weights = [frozen(format, (192, 256), place_of, seed) for seed, format in enumerate((FLAT, TILED, FLAT), start=1)]
    a = [random(8, 256, seed=20 + index).to(place_of).requires_grad_() for index in range(2)]
    b = [random(192, 8, seed=30 + index).to(place_of).requires_grad_() for index in range(2)]
    adapters = [Adapter(a[0], b[0], 2.0), Adapter(a[1], b[1], 0.5), None]
    kept = outcomes(x, [Linear(weight, adapter) for weight, adapter in zip(weights, adapters, strict=True)])
    dense = [FrozenWeight((weight.dense(dtype),), weight.shape) for weight in weights]
    expected = outcomes(x, [Linear(weight, adapter) for weight, adapter in zip(dense, adapters, strict=True)])
    for actual, wanted in zip(kept, expected, strict=True):
        if device == "cpu":
            assert torch.equal(actual, wanted)
        else:
            error = (actual.float() - wanted.float()).norm() / wanted.float().norm()
            assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("format", [FLAT, TILED], ids=lambda format: format.name)
@pytest.mark.parametrize("path", [experts_torch, experts_grouped], ids=["loop", "grouped"])
def test_experts_products_are_those_of_the_dequantized_weight(path: Any, format: Int8) -> None:
    routing = Routing.of(random(23, 4, seed=5).topk(2).indices, 4, on_host=True)
    x = random(46, 48, seed=6).bfloat16()
    weight = frozen(format, (4, 72, 48))
    dense = FrozenWeight((weight.dense(torch.bfloat16),), weight.shape)
    found = [path.forward(x, ExpertLinear(each, False, None, None), routing)[0] for each in (weight, dense)]
    assert torch.equal(*found)
    dy = random(46, 72, seed=7).bfloat16()
    needs = (True, False, False)
    found = [path.backward(x, ExpertLinear(w, False, None, None), routing, None, dy, needs).x for w in (weight, dense)]
    assert torch.equal(*found)


# --- runs ---


def format_of(name: str, kind: str) -> str | None:
    """Return the format of a weight in `mixed` runs."""
    formats = {"k_proj": None, "gate_proj": "test_flat", "up_proj": "nf4", "gate_up_proj": "test_tiled"}
    own = name.removesuffix(".weight").rpartition(".")[2]
    if ".layers.1." in name and own == "down_proj":
        return "nf4"
    return formats.get(own, "test_tiled" if "_attn" in name else "test_flat")


def fill(weight: FrozenTensor, segments: Any, reader: Any, backend: Any, name: str, **options: Any) -> None:
    """Quantize as a run does, and tiles of the whole weight."""
    format = weight.format
    if not isinstance(format, Int8) or format.tile is None:
        _quantize_into(weight, segments, reader, backend, name, **options)
        return
    whole = reader.read(segments, 0, weight.numel).float().view(weight.shape)
    own, first = backend.local_groups(weight)
    for part, values in zip(own, format.quantize_tiles(whole), strict=True):
        part.copy_(values[first : first + len(part)])


_quantize_into = load_base.quantize_into


@contextlib.contextmanager
def mixed() -> Iterator[None]:
    """Keep each weight of a model in the format of `format_of`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "formats_of", lambda *arguments: (format_of, {}))
        patch.setattr(load_base, "quantize_into", fill)
        yield


def mixed_run(ranks: Ranks, *, run_dir: Path, stop_before: int | None = None) -> dict[str, Tensor]:
    with mixed():
        if stop_before is not None:
            run_until(ranks, run_dir=run_dir, stop_before=stop_before)
            return {}
        return adapters_after(ranks, run_dir=run_dir)


def outcome(world: Any, size: int, run_dir: Path) -> tuple[list[float], dict[str, Tensor]]:
    first, *others = world.run(size, mixed_run, run_dir=run_dir)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    return result_of(run_dir)


DORA = {"use_dora": True}


@pytest.fixture(scope="module")
def alone(world: World, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Train a mix of formats on one rank, at the first use."""

    @functools.cache
    def result(model: str, use_dora: bool) -> Any:
        run_dir = tmp_path_factory.mktemp("mixed") / model
        adapter = {"use_dora": use_dora}
        make_run(run_dir, folders, model, train={"micro_batch": 12}, adapter=adapter)
        return outcome(world, 1, run_dir)

    return result


def save_dense(ranks: Ranks, *, run_dir: Path, to: Path) -> None:
    """Write the base of a mixed run with the values of its formats in fp32."""
    with mixed():
        model, _, _ = start_run_model(load_config(run_dir), ranks)
    source = Path(load_config(run_dir).model.path)
    shutil.copytree(source, to)
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    values = {name: value.contiguous() for name, value in dense_weights(model, adapted=False)}
    assert values.keys() <= tensors.keys()
    safetensors.torch.save_file(tensors | values, to / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("use_dora", [True, ci(False)])
def test_a_run_on_formats_is_the_run_on_their_dequantized_weights(
    world: World, folders: Path, tmp_path: Path, alone: Callable[..., Any], use_dora: bool
) -> None:
    make_run(tmp_path / "mixed", folders, adapter={"use_dora": use_dora})
    shutil.copytree(folders, tmp_path / "dense", ignore=lambda *names: ["llama"])
    world.run(1, save_dense, run_dir=tmp_path / "mixed", to=tmp_path / "dense" / "llama")
    sections: dict[str, Any] = {"train": {"micro_batch": 12}, "adapter": {"use_dora": use_dora}}
    make_run(tmp_path / "run", tmp_path / "dense", **sections, quant={"method": "none"})
    world.run(1, adapters_after, run_dir=tmp_path / "run")
    losses, adapter = result_of(tmp_path / "run")
    expected_losses, expected_adapter = alone("llama", use_dora)
    assert_losses_close(losses, expected_losses)
    assert_adapters_close(adapter, expected_adapter)


@pytest.mark.parametrize(
    ("model", "size", "sections"),
    [
        ("llama", 3, {"train": {"verify": True, "accumulate": "block"}, "quant": {"dense_layers": 1}, "adapter": DORA}),
        ci("llama", 4, {"parallel": {"shard_degree": 2}, "adapter": DORA}),
        ci("glm4_moe", 3, {"train": {"verify": True}}),
    ],
    ids=str,
)
def test_a_run_on_formats_does_not_depend_on_the_ranks(
    world: World,
    folders: Path,
    tmp_path: Path,
    alone: Callable[..., Any],
    model: str,
    size: int,
    sections: dict[str, Any],
) -> None:
    make_run(tmp_path / "run", folders, model, **sections, cluster={"gpus_per_node": size})
    losses, adapter = outcome(world, size, tmp_path / "run")
    expected_losses, expected_adapter = alone(model, "adapter" in sections)
    assert_losses_close(losses, expected_losses)
    assert_adapters_close(adapter, expected_adapter)


@pytest.mark.ci
def test_a_run_on_formats_is_the_same_by_zero3(folders: Path, tmp_path: Path, alone: Callable[..., Any]) -> None:
    parallel = {"backend": "zero3", "offload_base": True}
    make_run(tmp_path / "run", folders, parallel=parallel, adapter=DORA)
    with start_world(3, regroups=True) as world:
        losses, adapter = outcome(world, 3, tmp_path / "run")
    expected_losses, expected_adapter = alone("llama", True)
    assert_losses_close(losses, expected_losses)
    assert_adapters_close(adapter, expected_adapter)


def test_a_run_on_formats_resumes_bit_for_bit_and_on_other_ranks(
    world: World, folders: Path, tmp_path: Path, alone: Callable[..., Any]
) -> None:
    for name in ("whole", "stopped"):
        make_run(tmp_path / name, folders, adapter=DORA, train={"save_every": 2})
    world.run(2, mixed_run, run_dir=tmp_path / "stopped", stop_before=4)
    shutil.copytree(tmp_path / "stopped", tmp_path / "moved")
    _, expected = outcome(world, 2, tmp_path / "whole")
    _, adapter = outcome(world, 2, tmp_path / "stopped")
    assert all(torch.equal(adapter[name], expected[name]) for name in expected)
    assert_adapters_close(outcome(world, 3, tmp_path / "moved")[1], alone("llama", True)[1])


# --- the plan ---


def counted(ranks: Ranks, *, run_dir: Path) -> tuple[int, int, int]:
    """Return the bytes of the frozen base on this rank, and those a step gathers as torch issues and as we count."""
    config = load_config(run_dir)
    with mixed(), only_collectives():
        counts, moved = measure_ours(config, ranks, accumulation=2)
        model, backend, _ = start_run_model(config, ranks)
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.requires_grad]
    made = sum(buffer.nbytes for name, buffer in model.named_buffers() if "rotary" in name)
    return sum(backend.local_rows(tensor)[0].nbytes for tensor in tensors) - made, counts.gathered, moved.gathered_bytes


def with_formats(shapes: ModelShapes) -> ModelShapes:
    prefix, architecture = shapes.architecture.layer_prefix, shapes.architecture
    formats = {
        index: {w.path: format_of(f"{prefix}{index}.{w.path}", w.kind) for w in architecture.layer(index).weights}
        for index in range(shapes.num_layers)
    }
    return ModelShapes(architecture, shapes.vocabulary, formats)


def test_the_plan_counts_a_mix_of_formats_to_the_byte(world: World, folders: Path, tmp_path: Path) -> None:
    config = make_run(tmp_path / "run", folders)
    work, shapes = Workload.of(config), with_formats(model_in(folders / "llama").shapes)
    (own, gathered, ours), _ = world.run(2, counted, run_dir=tmp_path / "run")
    step = traffic.step_traffic(work, shapes, world=2, accumulation=2)
    assert gathered == ours == step.gathered
    assert own == sum(base_of(work, shapes).kept(2).values())
