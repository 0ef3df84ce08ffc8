"""Traced steps of large models on the pretended GPU: bytes beside the plan, launches of a layer, compiled variants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretend_cuda import groups
from support.tiers import slow
from tools.kernel_cases import Case, all_cases

pytestmark = pytest.mark.ci

EXACT = 0.001
"""Largest relative difference between planned and traced bytes.

Temporary memory of FlashAttention 2 is a model of it in both, after its source. cuBLAS' and NCCL's workspaces and
fragmentation are in neither.
"""
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
KEPT: dict[str, Any] = {"config": {"quantization_config": FP8}, "settings": {"quant": {"method": "keep"}}}
CELLS: dict[str, dict[str, Any]] = {
    "8B, one rank": {"model": "8b", "ranks": 1, "tokens": 2048},
    "8B, checkpointing=none": {
        "model": "8b",
        "ranks": 1,
        "tokens": 8192,
        "settings": {"train": {"checkpointing": "none"}},
    },
    "8B, FSDP2": {"model": "8b", "ranks": 8, "tokens": 8192},
    "70B, FSDP2": {"model": "70b", "ranks": 8, "tokens": 2048},
    "70B, checkpointing=offload": {
        "model": "70b",
        "ranks": 8,
        "tokens": 8192,
        "settings": {"train": {"checkpointing": "offload"}},
    },
    "Qwen3-30B-A3B, FSDP2": {"model": "moe", "ranks": 8, "tokens": 4096},
    "8B, FP8 kept": {"model": "8b", "ranks": 1, "tokens": 2048, **KEPT},
    "Qwen3-30B-A3B, FP8 kept, FSDP2": {"model": "moe", "ranks": 8, "tokens": 4096, **KEPT},
}


LONG = ("70B, checkpointing=offload", "Qwen3-30B-A3B, FSDP2")


@pytest.mark.parametrize("name", [slow(name) if name in LONG else name for name in CELLS])
def test_plan_beside_trace(name: str, tmp_path: Path) -> None:
    seen = groups.in_process("trace_step", tmp_path / "seen.json", json.dumps(CELLS[name]), mode="shapes")
    traced, planned = seen["persistent"]
    assert planned == pytest.approx(traced, rel=EXACT), "bytes from the first update to the end"
    traced, planned = seen["peak"]
    assert planned == pytest.approx(traced, rel=EXACT), f"peak, planned at the moment {seen['worst']!r}"
    assert seen["waits"] == {}


LAYER = {2048: (53.0, 20.0), 8192: (56.2, 20.5)}
"""By tokens: launches of Triton kernels and of matrix products per layer and step of 8B (forward, recomputation and
backward; the few launches of a step outside the layers are in it)."""


@pytest.mark.parametrize("tokens", LAYER)
def test_launches_of_a_layer(tokens: int, tmp_path: Path) -> None:
    cell = {"model": "8b", "ranks": 1, "tokens": tokens}
    seen = groups.in_process("trace_step", tmp_path / "seen.json", json.dumps(cell), mode="shapes")
    kernels, products = LAYER[tokens]
    assert sum(seen["kernels"].values()) / seen["layers"] == pytest.approx(kernels, abs=0.1)
    assert sum(seen["operators"][name] for name in ("mm", "addmm")) / seen["layers"] == pytest.approx(products, abs=0.1)
    assert seen["operators"]["mul"] < 10 * seen["layers"], "adapters are copied once per step, which scales 7 B"
    compiled = {variant_of(case) for case in all_cases()}
    assert not {text for text in seen["variants"] if text.partition(" num_stages")[0] not in compiled}


TOKEN = {1: (769, 180), 64: (673, 180), 256: (513, 404)}
"""By rows that decode together: launches of Triton kernels and of torch per token of 8B, docs/benchmarks.md's.
256 rows multiply by dense copies of the weights, in 224 of torch's products."""


@pytest.mark.parametrize("rows", TOKEN)
def test_launches_of_a_token(rows: int, tmp_path: Path) -> None:
    cell = {"model": "8b", "rows": rows, "tokens": 1024}
    seen = groups.in_process("trace_token", tmp_path / "seen.json", json.dumps(cell), mode="shapes")
    assert (sum(seen["kernels"].values()), sum(seen["operators"].values())) == TOKEN[rows]
    assert sum(seen["waits"].values()) == 1, seen["waits"]
    gathered = rows * 1024 * 2 * 2 * 8 * 128
    assert seen["temporary"] < gathered + 2 * 4 * rows * 128256, "a layer's keys and values are gathered"


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "u8": "uint8", "i64": "int64", "i32": "int32"}


def variant_of(case: Case) -> str:
    """Return a case as launches.variant_of writes a launch, without its stages."""
    parts = [case.kernel.__name__]
    for name in case.kernel.arg_names:
        if name in case.constants:
            parts.append(f"{name}={case.constants[name]}")
        elif (type := case.signature[name]).startswith("*"):
            parts.append(f"{name}:{DTYPES[type[1:].partition(':')[0]]}")
    return " ".join([*parts, f"num_warps={case.num_warps}"])
