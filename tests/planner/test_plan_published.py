"""Memory that others have published, beside what we calculate for the same settings, with sources and our errors.

Where a figure is of another program, its own layout is calculated here: what that keeps in which dtype, what it cuts,
what it gathers. Activations are ours, of the same decoder. What is left is said, and nothing is scaled to fit.
docs/benchmarks.md has the table.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distlora.architecture.shapes import ARCHITECTURES, KEEP, ModelShapes
from distlora.planner import Plan, plan_of, traffic
from distlora.planner.machine import machine_of
from distlora.planner.memory.activations import Activations
from distlora.planner.memory.base import base_of
from distlora.planner.memory.step import blocks_of
from distlora.planner.model import built_in, find_model
from distlora.planner.workload import Workload
from distlora_kernels.format_layouts import FORMAT_LAYOUTS, GROUP
from support.plan_inputs import composed
from support.planned import block_bytes, held_bytes

GB, MIB, GIB = 1e9, 2**20, 2**30
BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
LLAMA = {"7B": "huggyllama/llama-7b", "13B": "huggyllama/llama-13b", "65B": "huggyllama/llama-65b"}
LLAMA3_405B = "meta-llama/Llama-3.1-405B"


@functools.cache
def planned(name: str, *words: str) -> Plan:
    """Return a plan of `section.field=value` overrides."""
    adapter = {} if "adapter.method=full" in words else {"target_modules": "all-linear"}
    config = composed(*words, model={"path": name}, data={"path": "/data"}, adapter=adapter, gpu={"name": "a100_80gb"})
    return plan_of(config, find_model(config), machine_of(config.gpu, config.cluster))


def shapes_of(name: str) -> ModelShapes:
    return built_in(name, ARCHITECTURES[name]).shapes


def packed(shapes: ModelShapes, *, bits_of_scales: float) -> float:
    """Bytes of weights in 4 bits, with so many for their scales."""
    return shapes.quantized_numel("nf4") * (4 + bits_of_scales) / 8


def bits() -> float:
    return 8 * FORMAT_LAYOUTS["nf4"].group_bytes / GROUP


def fp16(size: str) -> float:
    return 2 * shapes_of(LLAMA[size]).numel / GB


def full_finetuning() -> float:
    """fp32 masters, fp32 gradients, two fp32 moments."""
    held = planned(LLAMA["7B"], "adapter.method=full", "quant.method=none", "data.sequence_length=512").device.held
    masters = held["embeddings"] + held["weights"] + held["norms"]
    return (masters + held["gradients"] + held["optimizer"]) / GB


def qlora_paper_adapters(shapes: ModelShapes) -> int:
    """Return the adapter parameters as the paper's figure has them: rank 64 on all linears.

    Its MLP has two linears of 4 h: 18 h rows and columns per decoder layer (LLaMA's three give 19.06 h at 65B).
    """
    return 64 * 18 * shapes.hidden * shapes.num_layers


def qlora_65b() -> float:
    """Its layout: NF4 without double quantization, embedding and head in fp32, adapters in bf16."""
    shapes = shapes_of(LLAMA["65B"])
    matrices = 4 * 2 * shapes.vocabulary * shapes.hidden
    return (packed(shapes, bits_of_scales=0.5) + matrices + 2 * qlora_paper_adapters(shapes)) / GB


def steps(name: str, *words: str) -> tuple[Plan, Activations]:
    plan = planned(name, *words)
    tokens = plan.config.data.sequence_length * plan.config.train.micro_batch
    (alike,) = blocks_of(plan.work, plan.model, plan.machine, at_once=tokens, tokens=tokens)
    return plan, alike.activations


def torchtune_405b(micro_batch: int) -> float:
    """Return the GiB of one of eight ranks: NF4 all sharded, the trained part in bf16.

    The root unit (embedding, head) stays whole from forward to backward's end, one layer is whole, and the next is on
    its way; a weight dequantized.
    """
    words = (f"train.micro_batch={micro_batch}", f"train.global_batch={8 * micro_batch}", "data.sequence_length=2048")
    plan, step = steps(LLAMA3_405B, *words, "adapter.r=16", "cluster.gpus_per_node=8", "train.fused_kernels=none")
    shapes = plan.model.shapes
    held = held_bytes(shapes, 8, format="nf4", itemsize=2) + shapes.adapted_numel(plan.config.adapter)
    root = 2 * 2 * shapes.vocabulary * shapes.hidden
    block = block_bytes(shapes.block, 8, format="nf4", itemsize=2)
    largest = 2 * max(weight.numel for weight in shapes.block)
    return (held + root + step.kept + 2 * block + step.working + largest) / GIB


@dataclass(frozen=True)
class Published:
    what: str
    source: str
    said: float
    unit: str
    calculated: Callable[[], float]
    within: float
    """The share that our figure may be off."""
    left: str = ""
    """What explains it."""

    @property
    def error(self) -> float:
        return self.calculated() / self.said - 1

    @property
    def row(self) -> str:
        digits = 3 if self.unit == "bits" else 1
        ours = f"{self.calculated():.{digits}f}"
        return f"| {self.what} | {self.said:g} {self.unit} | {ours} | {self.error:+.1%} | {self.left} | {self.source} |"


KIMI_K2: dict[str, Any] = ARCHITECTURES["unsloth/DeepSeek-V3-bf16"] | json.loads(
    (Path(__file__).parents[1] / "golden" / "kimi_k2.json").read_text()
)
"""Sizes and quantization_config of Kimi-K2-Thinking, whose model_type kimi_k2 is DeepSeek-V3's code."""
EXPERT = 3 * 2048 * 7168
"""Weights of an expert of DeepSeek-V3 and Kimi-K2."""
MLA_TILES = 12 * 56 + 192 * 12 + 5 * 56 + 256 * 4 + 56 * 128
"""Tiles of q_a, q_b, kv_a (576 rows: the fifth is ragged), kv_b and o of a layer of DeepSeek-V3."""
DEEPSEEK_TILES = 61 * MLA_TILES + 3 * 3 * 144 * 56 + 58 * 257 * EXPERT // 128**2
DEEPSEEK_DENSE = 2 * 129_280 * 7168 + 58 * 256 * 7168 + 61 * (2 * 7168 + 1536 + 512) + 7168
QWEN_TILES = 48 * (2 * 32 * 16 + 2 * 4 * 16 + 128 * 3 * 6 * 16)
KIMI_EXPERTS = 60 * 384 * EXPERT
AS_SHIPPED: dict[str, tuple[str, float, int]] = {
    # The hub's index says 13,761,264,768 and 65,248,815,744 bytes in total.
    "openai/gpt-oss-20b": ("mxfp4", 4.25, 24 * 32 * 3 * 2880**2 * 17 // 32 + 2 * 1_804_459_584),
    "openai/gpt-oss-120b": ("mxfp4", 4.25, 36 * 128 * 3 * 2880**2 * 17 // 32 + 2 * 2_167_371_072),
    "Qwen/Qwen3-30B-A3B-FP8": (
        *("fp8_block", 8 + 32 / 16_384),
        (16_384 + 4) * QWEN_TILES + 2 * (30_532_122_624 - 16_384 * QWEN_TILES),
    ),
    "deepseek-ai/DeepSeek-V3": ("fp8_block", 8 + 32 / 16_384, (16_384 + 4) * DEEPSEEK_TILES + 2 * DEEPSEEK_DENSE),
    "Kimi-K2-shaped": ("int4_g32", 4.5, KIMI_EXPERTS * 9 // 16 + 2 * (1_026_408_209_408 - KIMI_EXPERTS)),
}
"""Format, bits per kept weight, and bytes of the whole base with quant=keep."""


@pytest.mark.parametrize("name", AS_SHIPPED)
def test_a_base_as_it_is_shipped_takes_the_bits_of_its_format(name: str) -> None:
    """The formats follow from quantization_config alone; sizes are multiples of 8 ranks, so that nothing is padded."""
    format, bits, total = AS_SHIPPED[name]
    model = built_in(name, ARCHITECTURES.get(name, KIMI_K2))
    shapes = model.shapes
    assert model.cannot_keep is None
    assert shapes.kept_formats == FORMAT_LAYOUTS[format].label
    assert 8 * FORMAT_LAYOUTS[format].group_bytes / GROUP == bits
    assert model.stored_bytes == pytest.approx(total, rel=1e-4), "on disk ragged tiles are not padded"
    words = ("train.global_batch=8", "train.micro_batch=1", "cluster.gpus_per_node=8")
    for method, kept in (("keep", KEEP), ("nf4", "nf4")):
        config = composed(*words, f"quant.method={method}", model={"path": name}, data={"path": "/data"})
        work = Workload.of(config)
        for shards in (1, 8):
            held = held_bytes(shapes, shards, format=kept, itemsize=2)
            sizes = base_of(work, shapes).kept(shards)
            assert sum(sizes.values()) - base_of(work, shapes).replicated == held
            if method == "keep":
                assert held == total // shards
        ends = 2 * (2 * shapes.vocabulary + 1) * shapes.hidden
        layers = 8 * held_bytes(shapes, 8, format=kept, itemsize=2) - ends  # NF4: filled up to 8 groups.
        assert traffic.moved_bytes(work, shapes, 8) == layers
        step = traffic.step_traffic(work, shapes, world=8, accumulation=1)
        assert step.gathered == 2 * layers + ends


def test_qwen3_in_fp8_has_as_many_scales_as_its_files() -> None:
    """The hub counts 30,533,947,392 elements, scales among them."""
    assert QWEN_TILES == 30_533_947_392 - 30_532_122_624


PAPER = "QLoRA, arXiv 2305.14314"
FIGURES = (
    Published("NF4 and double quantization, a parameter", f"{PAPER}, section 3", 4.127, "bits", bits, 1e-4),
    Published("7B in fp16", "2 bytes of 7e9", 14, "GB", lambda: fp16("7B"), 0.04, "7B are 6.74e9"),
    Published("13B in fp16", f"{PAPER}, table 6 (Vicuna)", 26, "GB", lambda: fp16("13B"), 0.002),
    Published("65B in fp16", "2 bytes of 65e9", 130, "GB", lambda: fp16("65B"), 0.005, "65B are 65.29e9"),
    Published(
        "7B trained whole: 16 bytes a parameter",
        "ZeRO, arXiv 1910.02054, section 3.1",
        112,
        "GB",
        full_finetuning,
        0.04,
        "7B are 6.74e9; theirs are fp16 copies of weights and gradients and three fp32 numbers, ours four fp32",
    ),
    Published(
        "LLaMA 65B QLoRA: base in NF4 and adapters",
        f"{PAPER}, table 6",
        41,
        "GB",
        qlora_65b,
        0.03,
        "no double quantization, matrices in fp32; the figure in its appendix says 40.4",
    ),
    Published(
        "Llama 3.1 405B QLoRA on 8 GPUs, one row of 2,048",
        "torchtune README, 405B_qlora.yaml",
        44.8,
        "GiB",
        lambda: torchtune_405b(1),
        0.10,
        "torch.compile, which keeps less within a block",
    ),
)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.what)
def test_what_is_published_is_what_we_calculate(figure: Published) -> None:
    assert abs(figure.error) < figure.within, figure.row
    # A bound that is far from the error would not notice a slip.
    assert figure.within <= max(0.005, 3 * abs(figure.error)), figure.row
    start, _, _ = figure.row.partition(f" {figure.unit} | ")
    written = re.search(re.escape(f"{start} {figure.unit} | ") + r"([\d.]+) \|", BENCHMARKS.read_text())
    assert written is not None, f"the table lacks it:\n{figure.row}"
    assert float(written[1]) == pytest.approx(figure.calculated(), rel=0.01), f"the table says otherwise:\n{figure.row}"
