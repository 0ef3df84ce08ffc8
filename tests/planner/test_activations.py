"""Compare a row's calculated memory with what autograd keeps and operations make, within 5 %, in every mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distlora.derive.shrink import build, shrink
from distlora.model import experts
from distlora.planner.memory import layer
from distlora.planner.memory.activations import Mode
from distlora.planner.memory.device import device_bytes
from distlora.planner.memory.step import blocks_of
from distlora.planner.model import model_in
from distlora.planner.workload import Workload
from support import activation_steps
from support.accounting import Kept, Made
from support.activation_steps import NARROW, TOKENS, WIDE, check_steps, load, loss, positions
from support.family_models import config_for
from support.model_types import config_of
from support.plan_inputs import cpu_machine
from support.small_models import use_chunks_of
from support.tiers import ci

pytestmark = pytest.mark.usefixtures("torch_products")  # What their blocks take is in test_products.py.

Modes = list[tuple[Mode, int | None, int]]
"""(mode, tile, slices of a step: with 1 a block at work is the most there is at once here, with 3 often the head)."""
FEW: Modes = [("none", None, 1), ("block", None, 3)]
ALL: Modes = [*FEW, ("selective", None, 1), ("block", None, 1), ("offload", None, 1), ("offload", None, 3)]
TILES: Modes = [*ALL, ("block", 64, 1), ("selective", 64, 1), ("offload", 64, 3)]
SCORES = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 6, "head_dim": 24}
"""Scores are most of what attention makes."""
SHALLOW = {"num_hidden_layers": 2}
QWEN3_MOE = {"moe_intermediate_size": 160}
MASKS, EAGER = {"attention": "sdpa"}, {"attention": "eager"}
DORA, DROPOUT = {"use_dora": True}, {"lora_dropout": 0.1}
BOTH = DORA | DROPOUT

CASES: list[tuple[str, str, dict[str, int], dict[str, Any]]] = [
    ("llama, narrow", "llama", NARROW, {}),
    ("llama, wide", "llama", WIDE, {}),
    ("qwen3, wide", "qwen3", WIDE, {}),
    ("gemma3, narrow", "gemma3", NARROW, {}),
    ("gemma3, wide", "gemma3", WIDE, {}),
    ("mixtral, narrow", "mixtral", NARROW, {}),
    ("mixtral in NF4", "mixtral", WIDE, {"quant": "nf4"}),
    ("qwen3_moe, narrow", "qwen3_moe", NARROW | QWEN3_MOE | SHALLOW, {}),
    ("qwen3_moe, adapters in attention", "qwen3_moe", WIDE | QWEN3_MOE, {"target_modules": ["q_proj", "v_proj"]}),
    ("gpt_oss, narrow", "gpt_oss", NARROW, EAGER),
    ("gpt_oss, scores", "gpt_oss", SCORES, EAGER),
    ("gemma2, narrow", "gemma2", NARROW, EAGER),
    ("gemma2, scores", "gemma2", SCORES, EAGER),
    ("gemma2 in fp32", "gemma2", SCORES, EAGER | {"dtype": "fp32"}),
    ("phi3, narrow", "phi3", NARROW, {}),
    ("qwen2", "qwen2", NARROW, {}),
    ("llama with masks", "llama", WIDE, MASKS),
    ("qwen3 with masks in NF4 and fp32", "qwen3", WIDE, MASKS | {"quant": "nf4", "dtype": "fp32"}),
    ("gemma3 with masks", "gemma3", WIDE, MASKS),
    ("llama, DoRA, wide", "llama", WIDE, DORA),
    ("llama, dropout", "llama", WIDE, DROPOUT),
    ("llama, DoRA and dropout", "llama", NARROW | SHALLOW, BOTH),
    ("qwen3, DoRA and dropout", "qwen3", WIDE, BOTH),
    ("qwen2, DoRA beside biases", "qwen2", NARROW, DORA),
    ("phi3, DoRA", "phi3", NARROW, DORA),
    ("llama with masks, DoRA in NF4", "llama", NARROW, MASKS | DORA | {"quant": "nf4"}),
]
DEFAULT = ("gpt_oss, scores", "llama, DoRA and dropout")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have so few logits at once that a block can be a step's peak."""
    use_chunks_of(monkeypatch, 16)
    # What an operation makes within itself, nothing sees that looks at operations (test_plan_memory.py does).
    monkeypatch.setattr(layer, "STRIPE_BYTES", 0)


def tier(name: str) -> Any:
    return [] if name in DEFAULT else pytest.mark.ci if name in ("llama, narrow", "qwen3, wide") else pytest.mark.slow


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("name", "family", "sizes", "settings"), [pytest.param(*case, id=case[0], marks=tier(case[0])) for case in CASES]
)
def test_what_is_kept_and_the_peak_of_a_step_are_calculated_within_5_percent(
    name: str, family: str, sizes: dict[str, int], settings: dict[str, Any], tmp_path: Path
) -> None:
    modes = FEW if name in DEFAULT else TILES if family in ("llama", "qwen3", "gemma3") and not settings else ALL
    check_steps(load(tmp_path, family, sizes, **settings), modes)


DOCUMENTS = [
    ("llama", WIDE, 512, {}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("llama", NARROW, 512, {"quant": "nf4"}),
            ("llama", WIDE, 64, {}),
            ("qwen3", WIDE, 256, DORA),
            ("gemma3", WIDE, 512, {}),
            ("phi3", NARROW, 512, {}),
        )
    ),
]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("family", "sizes", "document", "settings"), DOCUMENTS)
def test_tiles_of_attention_are_calculated_within_5_percent(
    family: str,
    sizes: dict[str, int],
    document: int,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(activation_steps, "POSITIONS", positions(document))
    loaded = load(tmp_path, family, sizes, attention="tiles", document=document, **settings)
    check_steps(loaded, FEW if family == "llama" and sizes is WIDE else ALL)


@pytest.mark.slow
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("family", "sizes"), [("qwen3_moe", NARROW | QWEN3_MOE), ("qwen3_moe", WIDE | QWEN3_MOE), ("mixtral", WIDE)]
)
def test_the_peak_with_experts_in_one_grouped_product_is_calculated_within_5_percent(
    family: str, sizes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 the CPU has it too."""
    monkeypatch.setattr(experts, "runs_grouped", lambda *arguments: True)
    loaded = load(tmp_path, family, sizes)
    check_steps(loaded._replace(costs=replace(loaded.costs, groups_experts=True)), ALL)


MIXERS: dict[str, dict[str, int]] = {
    "lfm2": {"intermediate_size": 768, "block_ff_dim": 768},
    "qwen3_next": {
        "intermediate_size": 512,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 96,
        "linear_num_value_heads": 8,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
}
"""Settings of a model with hidden size 256, where the measured one has 64."""


@pytest.mark.parametrize(("name", "within", "peak_within"), [("lfm2", 0.1, 0.2), ci("qwen3_next", 0.3, 0.3)])
def test_layers_without_formulas_are_scaled_from_a_measured_small_model(
    name: str, within: float, peak_within: float, tmp_path: Path
) -> None:
    """Compare what layers keep, and a step's peak in a layer, with a model of four times the columns and one document.

    The plan's backward of a layer is too large rather than too small.
    """
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32} | MIXERS[name]
    settings = shrink(config_of(name)) | sizes | {"vocab_size": 1001}
    build(settings).save_pretrained(tmp_path)
    model, _, _ = load(tmp_path, name, {}, attention="tiles", document=TOKENS)
    config = config_for(
        tmp_path,
        data={"path": "none.jsonl", "sequence_length": TOKENS},
        quant={"method": "none"},
        train={"dtype": "bf16"},
    )
    work, planned = Workload.of(config), model_in(tmp_path)
    groups = blocks_of(work, planned, cpu_machine(1), at_once=TOKENS, tokens=TOKENS)
    kept = sum(blocks.count * blocks.costs.kept("none", TOKENS) for blocks in groups)
    saved = Kept()
    for block in model.blocks:
        block.checkpointing = False
    with saved.within(list(model.blocks)):
        loss(model, document=TOKENS)
    assert kept == pytest.approx(saved.nbytes / TOKENS, rel=within)
    for block in model.blocks:
        block.checkpointing = True
    with Made(model) as made:
        loss(model, document=TOKENS).backward()
    moments = device_bytes(work, planned, cpu_machine(1)).moments
    assert max(sum(kinds.values()) for kinds in moments.values()) == pytest.approx(made.peak, rel=peak_within)
