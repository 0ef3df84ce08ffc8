"""Compare the counted work of a step with launches counted elsewhere and with operations on the CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distlora.model.lm_head import LossHead
from distlora.planner.flops import step_flops
from distlora.planner.model import model_in
from distlora.planner.speed.launches import KernelOptions, Linear, head_work, linears, norm
from distlora.planner.speed.timing import kernel_options, step_work
from distlora.planner.workload import Workload
from support.accounting import Moved
from support.family_models import config_for, hf_config, load_ours, positions_of, tokens
from support.plan_inputs import machine_of
from support.plan_runs import LORA, run_of
from support.small_models import write_model_folder


@pytest.mark.parametrize(
    ("is_dora", "quantized", "few_rows", "expected"),
    [
        (False, True, 0, (10_405_249_024, 15_451_144_847_360, 26)),
        (False, False, 0, (8_041_529_344, 15_451_144_847_360, 22)),
        (False, True, 256, (634_929_152, 482_848_276_480, 20)),
        (True, True, 0, (11_748_786_176, 15_466_177_232_896, 40)),
        (True, False, 0, (14_625_734_656, 15_466_177_232_896, 32)),
    ],
)
def test_two_linears_of_one_input_move_what_their_launches_move(
    is_dora: bool, quantized: bool, few_rows: int, expected: tuple[int, int, int]
) -> None:
    """Bytes, operations and launches of Llama 70B's gate and up, rank 16, as kernels/bench once counted them too."""
    pair = [Linear(28672, 8192, 16, is_dora=is_dora, format="nf4" if quantized else None)] * 2
    how, m = KernelOptions(itemsize=2, few_rows=few_rows), few_rows or 8192
    work = [*linears(pair, m, how), *linears(pair, m, how, "backward")]
    found = sum(w.nbytes for w in work), sum(w.flops for w in work), sum(w.launches for w in work)
    assert found == pytest.approx(expected, rel=1e-9)


def test_extended_products_write_no_term_and_read_it_never_again() -> None:
    """Llama 70B's gate and up: x is copied for their outputs; for dX neither gradient, which is larger than x."""
    pair, m, e = [Linear(28672, 8192, 16, format="nf4")] * 2, 8192, 2
    plain, extended = (KernelOptions(itemsize=2, extends=extends) for extends in (False, True))
    before, after = ([*linears(pair, m, how)] for how in (plain, extended))
    assert sum(each.flops for each in after) == sum(each.flops for each in before)
    assert sum(each.launches for each in before) - sum(each.launches for each in after) == 2 - 1  # x A^T, copied.
    written, copied = 2 * e * m * 28672, e * m * 8192
    saved = sum(each.nbytes for each in before) - sum(each.nbytes for each in after)
    assert saved == pytest.approx(2 * written - copied, rel=1e-2)
    assert sum(each.rereads for each in after) == 0
    assert sum(each.padding for each in after) == 2 * 2 * m * 28672 * (64 - 16)
    assert [*linears(pair, m, plain, "backward")] == [*linears(pair, m, extended, "backward")]
    down = [Linear(8192, 28672, 16, format="nf4")]
    before, after = ([*linears(down, m, how, "backward")] for how in (plain, extended))
    saved = sum(each.nbytes for each in before) - sum(each.nbytes for each in after)
    assert saved == pytest.approx(2 * e * m * 28672 - copied, rel=1e-2)


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
def test_launches_compute_what_a_step_is_counted_to(name: str, tmp_path: Path) -> None:
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
            machine = machine_of(is_gpu=is_gpu)
            work = step_work(Workload.of(config), model, machine, document=9)
            step = step_flops(Workload.of(config), model, ranks=1, is_gpu=is_gpu, document=9)
            assert work.flops == pytest.approx(step.total, rel=1e-12), sections
            assert set(work.moved) >= {"products", "elementwise", "attention", "head", "update"}


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
    work, how = (
        step_work(Workload.of(config), model_in(tmp_path), machine),
        kernel_options(Workload.of(config), model_in(tmp_path), machine),
    )
    for moved, launches, is_backward in (
        (forwards, [work for block in work.blocks for work in block.forward], False),
        (backwards, [work for block in work.blocks for work in block.backward], True),
    ):
        found = sum(n for op, n in moved.by_name.items() if not re.fullmatch(NOT_COUNTED_HERE, op))
        last = norm(states.numel(), how, backward=is_backward).nbytes
        counted = last + sum(each.nbytes for each in launches if each.kind == "elementwise")
        assert counted == pytest.approx(found, rel=0.05), moved.by_name


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_the_heads_logits_move_the_bytes_that_operations_move(dtype: torch.dtype, trained: bool) -> None:
    hidden, vocabulary, length = 64, 4000, 256
    weight = torch.nn.Parameter(torch.randn(vocabulary, hidden, dtype=dtype), requires_grad=trained)
    states = torch.randn(1, length, hidden, dtype=dtype, requires_grad=True)
    with Moved() as moved:
        LossHead(weight)(states, torch.randint(0, vocabulary, (1, length))).sum().backward()
    how, rows = KernelOptions(itemsize=dtype.itemsize), {"trained": trained, "trained_rows": 0}
    launches = list(head_work(vocabulary, hidden, how, m=length, form="plain", reference=False, **rows))
    beside = sum(work.nbytes for work in launches if work.kind == "elementwise") + 2 * dtype.itemsize * states.numel()
    counted = sum(work.nbytes for work in launches) - beside  # Without the last norm and the embedding.
    assert counted == pytest.approx(sum(moved.by_name.values()), rel=0.05), moved.by_name
