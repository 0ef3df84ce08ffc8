"""The operations that MFU divides by are those that torch counts while a step runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distlora.config import AdapterConfig, Config
from distlora.config.file import build
from distlora.model.buffers import materialize_buffers
from distlora.model.build import CausalLM, put_trial
from distlora.planner.flops import ModelFlops
from distlora.training.trial import active_weights, peak_flops
from support.run_models import build_run_model

TOKENS, ROWS = 48, 2


def make_model(folder: Path, *, for_slots: bool = False) -> CausalLM:
    sections = {
        "model": {"path": str(folder)},
        "data": {"path": "unused", "sequence_length": TOKENS},
        "adapter": {"target_modules": "all-linear", "r": 8},
        "quant": {"method": "none"},
        "train": {"dtype": "fp32", "checkpointing": "none"},
    }
    model = build_run_model(build(Config, {**sections, "run_dir": "unused"}), for_slots=for_slots)
    model.to_empty(device="cpu")
    materialize_buffers(model, torch.device("cpu"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.tie()
    return model


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3"])
def test_counted_operations_are_those_that_run(folders: Path, name: str) -> None:
    model = make_model(folders / name)
    # Its products are plain GEMMs, over all pairs of positions, which torch's counter knows.
    model.decoder.config._attn_implementation = "eager"
    ids = torch.randint(0, 1001, (ROWS, TOKENS))
    positions = torch.arange(TOKENS).repeat(ROWS, 1)
    with FlopCounterMode(display=False) as counter:
        model(ids, positions, ids).sum().backward()
    flops = active_weights(model).model_flops()
    config = model.hf_config
    with FlopCounterMode(display=False) as angles:  # transformers multiplied matrices for them until 5.2x.
        model.decoder.rotary_emb(torch.empty(ROWS, TOKENS, 0), positions)
    # The first block's input needs no gradient: neither through q, k, v nor through their adapters.
    projected = sum(
        linear.out_features for path, linear in model.adapted_linears() if ".layers.0." in path and path[-6] in "qkv"
    )
    unneeded = 2 * config.hidden_size * (projected + 3 * 8) * ROWS * TOKENS
    pairs = sum(operations for operations, _ in flops.per_pair) * ROWS * TOKENS**2
    assert counter.get_total_flops() - angles.get_total_flops() == flops.per_token * ROWS * TOKENS - unneeded + pairs


def test_the_operations_of_a_trial_in_a_pack_are_its_own(folders: Path) -> None:
    model = make_model(folders / "llama", for_slots=True)
    for slot, rank in enumerate((8, 32)):
        config = AdapterConfig(target_modules="all-linear", r=rank)
        put_trial(model, slot, config, seed=0, device=torch.device("cpu"))
    alone = active_weights(make_model(folders / "llama")).model_flops().per_token
    assert active_weights(model, 0).model_flops().per_token == alone
    assert active_weights(model, 1).model_flops().per_token > alone


def test_attention_counts_the_pairs_within_documents_and_windows() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])  # Two documents: 10 and 3 pairs.
    assert ModelFlops(per_token=100, per_pair=((7, None),)).of(positions) == 600 + 7 * 13
    assert ModelFlops(per_token=0, per_pair=((1, None), (1, 2))).of(positions) == 13 + (1 + 2 + 2 + 2 + 1 + 2)


def test_a_cpu_has_no_peak_to_divide_by() -> None:
    assert peak_flops(torch.device("cpu")) is None
