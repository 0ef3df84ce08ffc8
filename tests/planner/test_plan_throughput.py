"""Compare published tokens per second with a plan of the same settings.

These are the ratios in docs/benchmarks.md, without a factor that would make them 1.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from distlora.planner.model import built_in
from distlora.planner.speed.timing import StepTime, step_time
from distlora.planner.workload import Workload
from support.plan_inputs import machine_of, model_of, timed_config

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
QWEN_72B = {
    "model_type": "llama",  # Its config.json has names of its own; these are the sizes.
    "hidden_size": 8192,
    "intermediate_size": 24_576,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 152_064,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Published:
    row: str
    """Row of the table."""
    published: float
    """Tokens per second of all GPUs."""
    ratio: float
    """Planned over published speed."""
    model: str
    _: KW_ONLY
    gpu: str
    ranks: int = 1
    length: int
    rows: int
    """Sequences that a rank runs at once."""
    accumulation: int = 1
    nf4: bool = True
    fused: bool
    """True if their norms and activations are single kernels; else transformers'."""
    adapter: dict[str, Any]
    train: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)


# NeMo AutoModel, docs/performance-summary.mdx of 2025-10-02 and its recipes (examples/llm_benchmark): r=16 on *_proj.
NEMO: dict[str, Any] = {"gpu": "h100", "length": 4096, "rows": 2, "nf4": False, "adapter": {"r": 16}}
NEMO_8 = NEMO | {"ranks": 8, "accumulation": 2, "fused": True}
NEMO_1 = NEMO | {"accumulation": 16, "fused": False, "train": {"checkpointing": "none"}}
# torchtune's README (batch 2, rows of 2,048, torch.compile) and recipes/configs/llama3_1.
TUNED = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TUNE: dict[str, Any] = {"length": 2048, "rows": 2, "fused": True, "adapter": {"r": 8, "target_modules": TUNED}}
TUNE_8 = TUNE | {"gpu": "a100_80gb", "ranks": 8, "adapter": {"r": 16, "target_modules": TUNED}}
# Answer.AI, fsdp_qlora/benchmarks_03_2024.md: seconds for 1,024 rows of 2,048; r=64 on all linears (train.py).
ANSWER: dict[str, Any] = {"length": 2048, "fused": False, "adapter": {"r": 64}}
OFFLOADED = ANSWER | {"ranks": 2, "rows": 2, "parallel": {"backend": "zero3", "offload_base": True}}
TOKENS = 1024 * 2048
# Qwen's README (github.com/QwenLM/Qwen, Profiling of Memory and Speed): seconds of 8 rows on each GPU; r=64.
QWEN: dict[str, Any] = {"gpu": "a100_80gb", "ranks": 4, "rows": 1, "accumulation": 8, "length": 8192, "nf4": False}
QWEN |= {"fused": False, "adapter": {"r": 64}, "parallel": {"backend": "zero3"}}
A100S = "Answer.AI, QLoRA of Llama 2 70B, 8 A100 40 GB"

RUNS = [
    Published("NeMo, LoRA of Llama 3.1 8B, 1 H100, no recomputation", 12_473, 1.07, "8b", **NEMO_1),
    Published("NeMo, LoRA of Llama 3.3 70B, 8 H100", 8 * 1091.85, 1.45, "70b", **NEMO_8),
    Published("NeMo, LoRA of Qwen2.5 32B, 8 H100", 8 * 2250.31, 1.46, "32b", **NEMO_8),
    Published("torchtune, QLoRA of Llama 3.1 8B, 1 RTX 4090", 2413, 1.08, "8b", gpu="rtx4090", **TUNE),
    Published("torchtune, LoRA of Llama 3.1 8B, 1 RTX 4090", 3083, 0.87, "8b", gpu="rtx4090", nf4=False, **TUNE),
    Published("torchtune, LoRA of Llama 3.1 8B, 1 A6000", 4699, 0.52, "8b", gpu="a6000", nf4=False, **TUNE),
    Published("torchtune, LoRA of Llama 3.1 70B, 8 A100", 3497, 1.39, "70b", nf4=False, **TUNE_8),
    Published("torchtune, QLoRA of Llama 3.1 405B, 8 A100", 653, 1.35, "405b", **TUNE_8),
    Published(
        "Answer.AI, QLoRA of Llama 2 7B, 2 RTX 4090",
        *(TOKENS / 466, 1.07, "llama2-7b"),
        **(ANSWER | {"gpu": "rtx4090", "ranks": 2, "rows": 10}),
    ),
    *(
        Published(f"Answer.AI, QLoRA of Llama 2 70B, 2 {name}, base on the host", speed, ratio, "llama2-70b", **gpu)
        for name, speed, ratio, gpu in (
            ("RTX 4090", TOKENS / 4399, 1.14, OFFLOADED | {"gpu": "rtx4090"}),
            ("RTX 3090", TOKENS / 11_795, 1.46, OFFLOADED | {"gpu": "rtx3090"}),
        )
    ),
    Published(A100S, TOKENS / 672, 1.40, "llama2-70b", gpu="a100_40gb", ranks=8, rows=4, **ANSWER),
    Published(
        "Answer.AI, QLoRA of Llama 2 70B, 4 H100",
        *(TOKENS / 667, 1.89, "llama2-70b"),
        **(ANSWER | {"gpu": "h100", "ranks": 4, "rows": 8}),
    ),
    Published("Qwen, LoRA of Qwen 72B, ZeRO-3, 4 A100, rows of 8,192", 4 * 8 * 8192 / 161.5, 1.21, "72b", **QWEN),
]


def planned(run: Published) -> StepTime:
    model = built_in("72B", QWEN_72B) if run.model == "72b" else model_of(run.model)
    batch = run.ranks * run.rows * run.accumulation
    config = timed_config(
        run.ranks,
        data={"path": "none.jsonl", "sequence_length": run.length},
        train={
            "micro_batch": run.rows,
            "global_batch": batch,
            "fused_kernels": "own" if run.fused else "none",
            **run.train,
        },
        adapter={"target_modules": "all-linear", **run.adapter},
        quant={} if run.nf4 else {"method": "none"},
        parallel=run.parallel,
    )
    return step_time(Workload.of(config), model, machine_of(run.gpu, ranks=run.ranks))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.row)
def test_a_published_speed_beside_ours_is_as_the_readme_says(run: Published) -> None:
    time = planned(run)
    assert time.tokens_per_second / run.published == pytest.approx(run.ratio, abs=0.005)
    line = f"| {run.row} | {run.published:,.0f} | {time.tokens_per_second:,.0f} | {run.ratio:.2f} |"
    assert line in BENCHMARKS.read_text(), line
