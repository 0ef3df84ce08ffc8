"""Bases whose weights are in a mix of formats: products, runs, and the bytes of the plan."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.config import Config
from distlora.config.file import load_config
from distlora.derive.prove import dense_weights
from distlora.parallel import Ranks
from distlora.planner import traffic
from distlora.planner.memory.base import base_of
from distlora.planner.model import find_model, model_in
from distlora.planner.workload import Workload
from distlora.training.setup import start_run_model
from distlora_kernels import experts_grouped, experts_torch
from distlora_kernels.formats import Format
from distlora_kernels.formats.fp8_block import FP8_BLOCK, in_tiles
from distlora_kernels.formats.integers import INT8
from distlora_kernels.lora_linear import Adapter, FrozenWeight, Linear, lora_linears
from distlora_kernels.operands import ExpertLinear, Routing
from support.closeness import assert_adapters_close, assert_losses_close
from support.counted_step import measure_ours, only_collectives
from support.runs import adapters_after, result_of, run_until
from support.small_models import make_run, write_type
from support.tiers import ci
from support.worlds import Alone, World

FORMATS: list[Format] = [INT8, FP8_BLOCK]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frozen(format: Format, shape: tuple[int, ...], device: torch.device | None = None, seed: int = 1) -> FrozenWeight:
    weight = random(*shape, seed=seed) / shape[-1] ** 0.5
    parts = format.quantize(weight.flatten() if format.tile is None else in_tiles(weight.flatten(0, -2)).view(-1))
    return FrozenWeight(tuple(part.to(device or "cpu") for part in parts), shape, format)


def outcomes(x: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
    """Return outputs and all gradients of linears of one input."""
    x = x.clone().requires_grad_()
    leaves = [x, *(t for linear in linears if linear.adapter is not None for t in linear.adapter[:2])]
    ys = lora_linears(x, linears)
    return [*ys, *torch.autograd.grad(ys, leaves, [random(*y.shape, seed=9).to(y.device, y.dtype) for y in ys])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", ci("triton")])
def test_products_are_those_of_the_dequantized_weight(
    request: pytest.FixtureRequest, dtype: torch.dtype, device: str
) -> None:
    """Bit for bit on the CPU; on a GPU a dense weight's adapter term may be summed in another order."""
    place = torch.device("cpu") if device == "cpu" else request.getfixturevalue("triton_device")
    x = random(3, 37, 256, seed=0).to(place, dtype)
    weights = [frozen(format, (192, 256), place, seed) for seed, format in enumerate((INT8, FP8_BLOCK, INT8), start=1)]
    adapters: list[Adapter | None] = [
        Adapter(
            random(8, 256, seed=20 + index).to(place).requires_grad_(),
            random(192, 8, seed=30 + index).to(place).requires_grad_(),
            2.0 - index,
        )
        for index in range(2)
    ]
    adapters.append(None)
    kept = outcomes(x, list(map(Linear, weights, adapters)))
    dense = [FrozenWeight((weight.dense(dtype),), weight.shape) for weight in weights]
    for actual, wanted in zip(kept, outcomes(x, list(map(Linear, dense, adapters))), strict=True):
        error = (actual.float() - wanted.float()).norm() / wanted.float().norm()
        assert error <= (0 if device == "cpu" else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize("path", [experts_torch, experts_grouped], ids=["loop", "grouped"])
def test_experts_products_are_those_of_the_dequantized_weight(path: Any, format: Format) -> None:
    routing = Routing.of(random(23, 4, seed=5).topk(2).indices, 4, on_host=True)
    x, dy, needs = random(46, 48, seed=6).bfloat16(), random(46, 72, seed=7).bfloat16(), (True, False, False)
    weight = frozen(format, (4, 72, 48))
    dense = FrozenWeight((weight.dense(torch.bfloat16),), weight.shape)
    linears = [ExpertLinear(each, False, None, None) for each in (weight, dense)]
    assert torch.equal(*(path.forward(x, linear, routing)[0] for linear in linears))
    assert torch.equal(*(path.backward(x, linear, routing, None, dy, needs).x for linear in linears))


DORA = {"use_dora": True}


def format_of(name: str) -> str:
    """Return the format of a weight in runs of this file."""
    formats = {"k_proj": "bf16", "gate_proj": "int8", "up_proj": "nf4", "gate_up_proj": "fp8_block"}
    own = name.removesuffix(".weight").rpartition(".")[2]
    if ".layers.1." in name and own == "down_proj":
        return "nf4"
    return formats.get(own, "fp8_block" if "_attn" in name else "int8")


def make_mixed(run_dir: Path, folders: Path, model: str = "llama", **sections: Any) -> Config:
    """Prepare a run on a mix of formats."""
    write_type(folders, model)
    known = model_in(folders / model).shapes.architecture
    places = [(index, weight) for index in range(known.num_layers) for weight in known.layer(index).weights]
    names = [f"{known.layer_prefix}{index}.{weight.path}" for index, weight in places if weight.packs]
    formats = {each: [n for n in names if format_of(n) == each] for each in ("bf16", "int8", "fp8_block")}
    quant = {"method": "mixed", "formats": formats} | sections.pop("quant", {})
    return make_run(run_dir, folders, model, quant=quant, **sections)


def outcome(world: Any, size: int, run_dir: Path) -> tuple[list[float], dict[str, Tensor]]:
    first, *others = world.run(size, adapters_after, run_dir=run_dir)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    return result_of(run_dir)


@pytest.fixture(scope="module")
def by_one(world: World, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Train on a mix of formats on one rank, at the first use."""

    @functools.cache
    def result(model: str, use_dora: bool) -> Any:
        run_dir = tmp_path_factory.mktemp("mixed") / model
        make_mixed(run_dir, folders, model, train={"micro_batch": 12}, adapter={"use_dora": use_dora})
        return outcome(world, 1, run_dir)

    return result


def save_dense(ranks: Ranks, *, run_dir: Path, to: Path) -> None:
    """Write the base of a mixed run with the values of its formats in fp32."""
    config = load_config(run_dir)
    model, _, _ = start_run_model(config, ranks)
    source = Path(config.model.path)
    shutil.copytree(source, to)
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    values = {name: value.contiguous() for name, value in dense_weights(model, adapted=False)}
    assert values.keys() <= tensors.keys()
    safetensors.torch.save_file(tensors | values, to / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("use_dora", [True, ci(False)])
def test_a_run_on_formats_is_the_run_on_their_dequantized_weights(
    world: World, folders: Path, tmp_path: Path, by_one: Callable[..., Any], use_dora: bool
) -> None:
    make_mixed(tmp_path / "mixed", folders, adapter={"use_dora": use_dora})
    shutil.copytree(folders, tmp_path / "dense", ignore=lambda *names: ["llama"])
    world.run(1, save_dense, run_dir=tmp_path / "mixed", to=tmp_path / "dense" / "llama")
    sections: dict[str, Any] = {"train": {"micro_batch": 12}, "adapter": {"use_dora": use_dora}}
    make_run(tmp_path / "run", tmp_path / "dense", **sections, quant={"method": "none"})
    losses, adapter = outcome(world, 1, tmp_path / "run")
    expected_losses, expected_adapter = by_one("llama", use_dora)
    assert_losses_close(losses, expected_losses)
    assert_adapters_close(adapter, expected_adapter)


@pytest.mark.parametrize(
    ("model", "size", "sections"),
    [
        ("llama", 3, {"train": {"verify": True, "accumulate": "block"}, "quant": {"dense_layers": 1}, "adapter": DORA}),
        ci("llama", 4, {"parallel": {"shard_degree": 2}, "adapter": DORA}),
        ci("llama", 3, {"parallel": {"backend": "zero3", "offload_base": True}, "adapter": DORA}),
        ci("glm4_moe", 3, {"train": {"verify": True}}),
    ],
    ids=str,
)
def test_a_run_on_formats_does_not_depend_on_the_ranks(
    request: pytest.FixtureRequest,
    folders: Path,
    tmp_path: Path,
    by_one: Callable[..., Any],
    model: str,
    size: int,
    sections: dict[str, Any],
) -> None:
    ranks: World | Alone = request.getfixturevalue("alone" if "zero3" in str(sections) else "world")
    make_mixed(tmp_path / "run", folders, model, **sections, cluster={"gpus_per_node": size})
    losses, adapter = outcome(ranks, size, tmp_path / "run")
    expected_losses, expected_adapter = by_one(model, "adapter" in sections)
    assert_losses_close(losses, expected_losses)
    assert_adapters_close(adapter, expected_adapter)


@pytest.mark.ci
def test_a_run_on_formats_resumes_bit_for_bit_and_on_other_ranks(
    world: World, folders: Path, tmp_path: Path, by_one: Callable[..., Any]
) -> None:
    for name in ("whole", "stopped"):
        make_mixed(tmp_path / name, folders, adapter=DORA, train={"save_every": 2})
    world.run(2, run_until, run_dir=tmp_path / "stopped", stop_before=4)
    shutil.copytree(tmp_path / "stopped", tmp_path / "moved")
    _, expected = outcome(world, 2, tmp_path / "whole")
    _, adapter = outcome(world, 2, tmp_path / "stopped")
    assert all(torch.equal(adapter[name], expected[name]) for name in expected)
    assert_adapters_close(outcome(world, 3, tmp_path / "moved")[1], by_one("llama", True)[1])


def counted(ranks: Ranks, *, run_dir: Path) -> tuple[int, int, int]:
    """Return the bytes of the frozen base on this rank, and those a step gathers as torch issues and as we count."""
    config = load_config(run_dir)
    with only_collectives():
        counts, moved = measure_ours(config, ranks, accumulation=2)
        model, backend, _ = start_run_model(config, ranks)
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.requires_grad]
    made = sum(buffer.nbytes for name, buffer in model.named_buffers() if "rotary" in name)
    return sum(backend.local_rows(tensor)[0].nbytes for tensor in tensors) - made, counts.gathered, moved.gathered_bytes


def test_the_plan_counts_a_mix_of_formats_to_the_byte(world: World, folders: Path, tmp_path: Path) -> None:
    config = make_mixed(tmp_path / "run", folders)
    work, shapes = Workload.of(config), find_model(config).shapes
    (own, gathered, ours), _ = world.run(2, counted, run_dir=tmp_path / "run")
    step = traffic.step_traffic(work, shapes, world=2, accumulation=2)
    assert gathered == ours == step.gathered
    assert own == sum(base_of(work, shapes).kept(2).values())
