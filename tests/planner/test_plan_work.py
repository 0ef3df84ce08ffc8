"""Compare the counted work of a step with launches counted elsewhere and with operations on the CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distlora.planner.decoder_sizes import KernelOptions
from distlora.planner.flops import PRODUCT, active_weights
from distlora.planner.model import model_in
from distlora.planner.speed.launches import norm
from distlora.planner.speed.timing import step_flops, step_work
from distlora.planner.workload import Workload
from support.accounting import Moved
from support.family_models import config_for, hf_config, load_ours, positions_of, tokens
from support.plan_inputs import LORA, machine_of, run_of
from support.small_models import write_model_folder

SETTINGS: list[dict[str, Any]] = [
    {},
    {"train": {"checkpointing": "none", "objective": "dpo"}},
    {"train": {"checkpointing": "selective", "accumulate": "block"}},
    {"train": {"mlp_tile": 16, "dtype": "fp32"}},
    {"adapter": {"target_modules": "attention", "r": 4, "modules_to_save": ["lm_head"]}},
    {"adapter": {"r": 4, "trainable_token_indices": {"embed_tokens": [5], "lm_head": [6, 7]}}},
    {"adapter": {"method": "full"}, "quant": {"method": "none"}},
]


@pytest.mark.parametrize("name", ["llama", "gemma2-untied", "qwen3-moe", "gpt-oss", "mistral-window"])
def test_launches_compute_what_mfu_counts(name: str, tmp_path: Path) -> None:
    hf_config(name).save_pretrained(tmp_path)
    model, is_mixture = model_in(tmp_path), name in ("qwen3-moe", "gpt-oss")
    for sections in SETTINGS:
        adapter = sections.get("adapter", LORA["adapter"])
        tiles = "mlp_tile" in sections.get("train", {})
        if is_mixture and (adapter.get("method") == "full" or tiles):
            continue
        if name == "qwen3-moe" and isinstance(adapter.get("trainable_token_indices"), dict):
            continue  # Its head is tied.
        train = {"global_batch": 6, "micro_batch": 2, "dtype": "bf16"} | sections.get("train", {})
        config = run_of(tmp_path, adapter=adapter, train=train, quant=sections.get("quant", {}))
        for is_gpu in (True, False):
            work, machine = Workload.of(config), machine_of(is_gpu=is_gpu)
            step, active = step_flops(work, model, machine), active_weights(work, model)
            per_token = active.model_flops(with_reference=config.train.needs.reference).per_token
            per_token += PRODUCT * active.head if active.head_is_trained else 0  # Its logits are made again.
            launched = step.total - step.by_kind["attention"] - step.by_kind.get("recomputation", 0)
            assert launched == pytest.approx(per_token * step.tokens, rel=1e-12), sections
            assert step.total > step.counted


NOT_COUNTED_HERE = r"mm|addmm|bmm|add_|embedding|cos|sin|_scaled_dot_product.*"
"""Products and attention, dX that the CPU accumulates by itself, the embedding and the rotary tables."""
SIZES: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64},
    "gemma3": {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6, "head_dim": 48},
}


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize("name", SIZES)
def test_what_is_no_product_moves_the_bytes_that_operations_move(name: str, tmp_path: Path) -> None:
    """Norms (of queries and keys too, and after halves, in gemma3), rotary embeddings, gated MLPs, residuals."""
    write_model_folder(tmp_path, name, **SIZES[name])
    sections: dict[str, Any] = {
        "data": {"path": "none.jsonl", "sequence_length": 128},
        "adapter": {"target_modules": "qv", "r": 1},
        "quant": {"method": "none"},
        "train": {"dtype": "bf16", "checkpointing": "none", "global_batch": 1},
    }
    model, _ = load_ours(tmp_path, **sections)
    # The first block's input would have no gradient, which is counted.
    model.embedding.register_forward_hook(lambda module, arguments, output: output.detach().requires_grad_())
    ids = tokens(1, 128)
    with Moved() as forwards:
        states = model.hidden_states(ids, positions_of(ids))
    gradient = torch.randn_like(states)
    with Moved() as backwards:
        states.backward(gradient)
    config, machine = config_for(tmp_path, **sections), machine_of(is_gpu=False)
    run, shapes = Workload.of(config), model_in(tmp_path)
    work, how = step_work(run, shapes, machine), KernelOptions.planned(run, shapes.shapes, machine)
    for moved, launches, is_backward in (
        (forwards, [work for block in work.blocks for work in block.forward], False),
        (backwards, [work for block in work.blocks for work in block.backward], True),
    ):
        found = sum(n for op, n in moved.by_name.items() if not re.fullmatch(NOT_COUNTED_HERE, op))
        last = norm(states.numel(), how, backward=is_backward).nbytes
        counted = last + sum(each.nbytes for each in launches if each.kind == "elementwise")
        assert counted == pytest.approx(found, rel=0.05), moved.by_name
