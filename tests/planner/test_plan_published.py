"""Memory that others have published, beside what we calculate for the same settings; docs/benchmarks.md has the table.

Where a figure is of another program, its own layout is calculated here: what that keeps in which dtype, what it shards,
what it gathers. Activations are ours, of the same decoder. Nothing is scaled to fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from distlora.architecture.shapes import ARCHITECTURES
from distlora.planner import plan_of, traffic
from distlora.planner.machine import machine_of
from distlora.planner.memory.base import base_of
from distlora.planner.memory.step import blocks_of
from distlora.planner.model import built_in, find_model
from distlora.planner.workload import Workload
from distlora_kernels.format_layouts import FORMAT_LAYOUTS
from support.plan_inputs import composed
from support.planned import block_bytes, held_bytes

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
QWEN_TILES = 30_533_947_392 - 30_532_122_624
"""Scales of Qwen3-30B-A3B-FP8: elements that the hub counts, less the parameters."""
AS_SHIPPED: dict[str, tuple[str, int]] = {
    # The hub's index says 13,761,264,768 and 65,248,815,744 bytes in total.
    "openai/gpt-oss-20b": ("mxfp4", 24 * 32 * 3 * 2880**2 * 17 // 32 + 2 * 1_804_459_584),
    "openai/gpt-oss-120b": ("mxfp4", 36 * 128 * 3 * 2880**2 * 17 // 32 + 2 * 2_167_371_072),
    "Qwen/Qwen3-30B-A3B-FP8": ("fp8_block", 16_388 * QWEN_TILES + 2 * (30_532_122_624 - 16_384 * QWEN_TILES)),
}
"""Format, and bytes of the whole base with quant=keep."""


@pytest.mark.parametrize("name", AS_SHIPPED)
def test_a_base_as_it_is_shipped_takes_the_bits_of_its_format(name: str) -> None:
    """The formats follow from quantization_config alone; sizes are multiples of 8 ranks, so that nothing is padded."""
    format, total = AS_SHIPPED[name]
    model = built_in(name, ARCHITECTURES[name])
    shapes = model.shapes
    assert shapes.kept_formats == FORMAT_LAYOUTS[format].label
    assert model.stored_bytes == pytest.approx(total, rel=1e-4), "on disk ragged tiles are not padded"
    words = ("train.global_batch=8", "train.micro_batch=1", "cluster.gpus_per_node=8", "quant.method=keep")
    work = Workload.of(composed(*words, model={"path": name}, data={"path": "/data"}))
    base = base_of(work, shapes)
    assert sum(base.kept(8).values()) - base.replicated == total // 8
    ends = 2 * (2 * shapes.vocabulary + 1) * shapes.hidden
    assert traffic.step_traffic(work, shapes, world=8, accumulation=1).gathered == 2 * (total - ends) + ends


def qlora_65b() -> float:
    """Return GB of the paper's layout: NF4 without double quantization, embedding and head in fp32, adapters in bf16.

    Its adapters have rank 64 on all linears of an MLP with two linears of 4 h: 18 h rows and columns per decoder layer
    (LLaMA's three give 19.06 h at 65B).
    """
    shapes = built_in("65B", ARCHITECTURES["huggyllama/llama-65b"]).shapes
    matrices = 4 * 2 * shapes.vocabulary * shapes.hidden
    adapters = 2 * 64 * 18 * shapes.hidden * shapes.num_layers
    return (shapes.quantized_numel("nf4") * 4.5 / 8 + matrices + adapters) / 1e9


def torchtune_405b() -> float:
    """Return the GiB of one of eight ranks: NF4 all sharded, the trained part in bf16.

    The root unit (embedding, head) stays whole from forward to backward's end, one layer is whole, and the next is on
    its way; a weight dequantized.
    """
    words = ("train.micro_batch=1", "train.global_batch=8", "data.sequence_length=2048", "train.fused_kernels=none")
    words += ("cluster.gpus_per_node=8", "gpu.name=a100_80gb", "adapter.r=16", "adapter.target_modules=all-linear")
    config = composed(*words, model={"path": "meta-llama/Llama-3.1-405B"}, data={"path": "/data"})
    plan = plan_of(config, find_model(config), machine_of(config.gpu, config.cluster))
    (alike,) = blocks_of(plan.work, plan.model, plan.machine, at_once=2048, tokens=2048)
    shapes, step = plan.model.shapes, alike.activations
    held = held_bytes(shapes, 8, format="nf4", itemsize=2) + shapes.adapted_numel(config.adapter)
    root = 2 * 2 * shapes.vocabulary * shapes.hidden
    block = block_bytes(shapes.block, 8, format="nf4", itemsize=2)
    largest = 2 * max(weight.numel for weight in shapes.block)
    return (held + root + step.kept + 2 * block + step.working + largest) / 2**30


@pytest.mark.parametrize(
    ("row", "said", "calculated", "within"),
    [
        ("LLaMA 65B QLoRA: base in NF4 and adapters | 41 GB", 41, qlora_65b, 0.03),
        ("Llama 3.1 405B QLoRA on 8 GPUs, one row of 2,048 | 44.8 GiB", 44.8, torchtune_405b, 0.10),
    ],
)
def test_what_is_published_is_what_we_calculate(
    row: str, said: float, calculated: Callable[[], float], within: float
) -> None:
    assert calculated() == pytest.approx(said, rel=within)
    written = re.search(re.escape(f"| {row} | ") + r"([\d.]+) \|", BENCHMARKS.read_text())
    assert written is not None, "the table lacks it"
    assert float(written[1]) == pytest.approx(calculated(), rel=0.01)
