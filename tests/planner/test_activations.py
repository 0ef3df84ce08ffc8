"""Compare a row's calculated memory with what autograd keeps and operations make, within 5 %, in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distlora.architecture.spec import architecture_of
from distlora.model.attention import Documents
from distlora.model.build import CausalLM
from distlora.planner.decoder_sizes import INPUTS, Decoder
from distlora.planner.memory.activations import Mode
from support.accounting import Made
from support.activation_steps import NARROW, POSITIONS, WIDE, check_steps, kept_by_a_block, load, set_mode, small_chunks
from support.family_models import tokens

pytestmark = pytest.mark.usefixtures("torch_products")  # What their blocks take is in test_products.py.

__all__ = ["small_chunks"]

MODES: list[tuple[Mode, int | None, int]] = [
    # (mode, tile, slices of a step: with 1 a block at work is the most there is at once here, with 3 often the head)
    ("none", None, 1),
    ("block", None, 1),
    ("offload", None, 1),
    ("block", None, 3),
    ("offload", None, 3),
    ("selective", None, 1),
    ("block", 64, 1),
    ("selective", 64, 1),
    ("offload", 64, 3),
]


BY_DEFAULT = [MODES[0], MODES[3], MODES[4], MODES[7]]


@pytest.mark.parametrize(
    ("family", "sizes", "modes"),
    [
        pytest.param("llama", NARROW, BY_DEFAULT, id="llama, narrow"),
        pytest.param("qwen3", WIDE, MODES, id="qwen3, wide", marks=pytest.mark.ci),
        pytest.param("llama", NARROW, MODES, id="llama, narrow, all modes", marks=pytest.mark.slow),
        pytest.param("llama", WIDE, MODES, id="llama, wide", marks=pytest.mark.slow),
        pytest.param("gemma3", NARROW, MODES, id="gemma3, narrow", marks=pytest.mark.slow),
        pytest.param("gemma3", WIDE, MODES, id="gemma3, wide", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("small_chunks")
def test_saved_bytes_and_the_peak_of_a_step_are_calculated_within_5_percent(
    family: str, sizes: dict[str, int], modes: list[tuple[Mode, int | None, int]], tmp_path: Path
) -> None:
    check_steps(load(tmp_path, family, sizes), modes)


def test_gradients_between_layers_are_counted_once_for_any_number_of_slices(tmp_path: Path) -> None:
    model, costs, _ = load(tmp_path, "llama", NARROW)
    set_mode(model, "block", None)
    # Those of the adapters are added up from slice to slice.
    of_adapters = sum(p.nbytes for p in model.blocks[-1].parameters() if p.requires_grad)
    for slices in (2, 8):
        model.set_num_micro(slices)
        ids, positions = tokens(slices, 64), POSITIONS[:, :64].repeat(slices, 1)
        gradient = slices * 64 * costs.boundary
        with Made(model) as made:
            before = last_blocks_gradient(model, made)
            hidden = model.hidden_states(ids, positions, documents=Documents.of(positions))
            hidden.backward(torch.ones_like(hidden))
        step = costs.step("block", at_once=64, kept_tokens=slices * 64)
        peak = made.peak - before[0] + gradient - of_adapters
        assert peak == pytest.approx(step.working, rel=0.05), slices


def last_blocks_gradient(model: CausalLM, made: Made) -> list[int]:
    """Bytes alive when the last block's backward begins, from where the peak counts; what comes in is one of them."""
    found: list[int] = []

    def begin(gradient: torch.Tensor) -> None:
        made.peak = made.alive
        found.append(made.alive)

    def watch(block: Any, arguments: Any, output: torch.Tensor) -> None:
        output.register_hook(begin)
        handle.remove()

    handle = model.blocks[-1].register_forward_hook(watch)
    return found


def test_input_of_a_linear_without_an_adapter_is_not_saved(tmp_path: Path) -> None:
    model, costs, _ = load(tmp_path, "llama", NARROW, target_modules=["q_proj", "down_proj"])
    assert [costs.ranks.reading(tensor) for tensor in INPUTS] == [4, 0, 0, 4]
    set_mode(model, "none", None)
    assert costs.kept("none") == pytest.approx(kept_by_a_block(model), rel=0.03)


@pytest.mark.parametrize(("family", "has"), [("mistral", False), ("qwen2", True), ("llama", True)])
def test_queries_have_a_bias_where_transformers_gives_them_one(family: str, has: bool) -> None:
    """Mistral's never have, Qwen2's always; of its output's linear Qwen2 has none either way."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 1001}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "attention_bias": True}
    settings = sizes | heads | {"model_type": family}
    decoder = Decoder.of(architecture_of(settings, family))
    assert (decoder.qkv_bias, decoder.o_bias) == (has, family == "llama")
