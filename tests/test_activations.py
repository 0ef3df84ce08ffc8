"""What a row is calculated to cost in memory is what autograd keeps and operations make, in every mode, within 5 %."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accounting import Kept, Made, flash_like
from distlora import activations, head
from distlora.activations import AdaptedRanks, Costs, Decoder, Mode
from distlora.attention import Documents
from distlora.families import FAMILIES, read_config
from distlora.mlp import MLP, place_mlps
from distlora.model import CausalLM
from distlora.offload import HostInputs
from family_models import load_ours, tokens
from small_models import write_model_folder

TOKENS = 512
POSITIONS = torch.arange(16).repeat(1, TOKENS // 16)
"""Documents so short that the scores of the attention that stands in are small."""
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
NARROW = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6, "head_dim": 48}
"""Queries of 288 columns, keys of 96."""


def load(folder: Path, family: str, sizes: dict[str, int], **adapter: Any) -> tuple[CausalLM, Costs]:
    write_model_folder(folder, family, **sizes)
    sections = {
        "data": {"path": "none.jsonl", "sequence_length": TOKENS},
        "adapter": {"target_modules": "all-linear", "r": 4, **adapter},
    }
    # In 4 bits the CPU makes a dense weight for each product, which on a GPU is one scratch.
    model, _ = load_ours(folder, quant={"method": "none"}, train={"dtype": "bf16"}, **sections)
    model.attend_by_documents(flash_like)
    # The first block's norm would keep nothing of an input without gradient; a leaf would be kept by its own node.
    nothing = torch.zeros(sizes["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    model.embedding.register_forward_hook(lambda module, arguments, output: output + nothing)
    for parameter in model.parameters():
        if parameter.requires_grad:  # Adapters' gradients are not of what is counted.
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    ranks = {path: linear.pairs[0].rank for path, linear in model.adapted_linears() if ".layers.0." in path}
    decoder = Decoder.of(read_config(folder), model.family)
    return model, Costs(decoder=decoder, ranks=AdaptedRanks.of(ranks))


class Host(HostInputs):
    """The inputs of a model's blocks in memory that stands for the host's, all of it taken at the start."""

    def __init__(self, num_inputs: int, nbytes: int) -> None:
        super().__init__(torch.device("cpu"))
        self.reserve(num_inputs, nbytes)
        self.memory = [place for places in self._free.values() for place in places]


def set_mode(model: CausalLM, mode: Mode, tile: int | None, num_micro: int = 1) -> list[Tensor]:
    """Returns the host's memory that the mode keeps inputs in."""
    if (mode == "selective" or tile is not None) and not isinstance(model.blocks[0].inner.mlp, MLP):
        place_mlps(model.blocks, model.family, tile=tile)
    model.set_num_micro(num_micro)
    nbytes = 2 * TOKENS * model.embedding.weight.shape[1]
    host = Host(len(model.blocks) * num_micro, nbytes) if mode == "offload" else None
    for block in model.blocks:
        block.checkpointing = mode in ("block", "offload")
        block.host_inputs = host
        if isinstance(block.inner.mlp, MLP):
            block.inner.mlp.tile = tile
    return [] if host is None else host.memory


def loss(model: CausalLM, rows: int = 1) -> torch.Tensor:
    ids, positions = tokens(rows, TOKENS), POSITIONS.expand(rows, -1)
    return model(ids, positions, ids.roll(-1, 1), documents=Documents.of(positions)).sum()


def kept_by_a_block(model: CausalLM) -> float:
    """Bytes a token that autograd keeps in a block, with its share of the rotary tables."""
    kept = Kept()
    with kept.within(list(model.blocks)):
        loss(model)
    return kept.nbytes / TOKENS / len(model.blocks)


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


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        pytest.param("llama", NARROW, id="llama, narrow"),
        pytest.param("qwen3", WIDE, id="qwen3, wide"),
        pytest.param("llama", WIDE, id="llama, wide", marks=pytest.mark.slow),
        pytest.param("qwen3", NARROW, id="qwen3, narrow", marks=pytest.mark.slow),
        pytest.param("gemma3", NARROW, id="gemma3, narrow", marks=pytest.mark.slow),
        pytest.param("gemma3", WIDE, id="gemma3, wide", marks=pytest.mark.slow),
    ],
)
def test_what_is_kept_and_the_peak_of_a_step_are_calculated_within_5_percent(
    family: str, sizes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert activations.LOGITS_AT_ONCE == head.LOGITS_PER_CHUNK
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", 2**14)
    monkeypatch.setattr(activations, "LOGITS_AT_ONCE", 2**14)
    model, costs = load(tmp_path, family, sizes)
    for mode, tile, num_micro in MODES:
        host, cell = set_mode(model, mode, tile, num_micro), (mode, tile, num_micro)
        if mode != "offload" and num_micro == 1:
            assert costs.kept(mode) == pytest.approx(kept_by_a_block(model), rel=0.03), cell
        with Made(model, host) as made:
            loss(model, num_micro).backward()
        assert made.alive <= 16 * TOKENS, "more than the row's ids is left behind by a step"
        kept_tokens = None if num_micro == 1 else num_micro * TOKENS
        step = costs.step(mode, at_once=TOKENS, kept_tokens=kept_tokens, tile=tile)
        assert step.peak == pytest.approx(made.peak, rel=0.05), cell
        assert step.kept_on_host == sum(place.nbytes for place in host)


def test_in_slices_a_step_has_the_gradients_of_all_once_each_way_whatever_their_number(tmp_path: Path) -> None:
    model, costs = load(tmp_path, "llama", NARROW)
    set_mode(model, "block", None)
    # Those of the adapters are added up from slice to slice.
    of_adapters = sum(p.nbytes for p in model.blocks[-1].parameters() if p.requires_grad)
    for slices in (4, 32):
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


def test_what_a_linear_without_an_adapter_reads_is_not_kept(tmp_path: Path) -> None:
    model, costs = load(tmp_path, "llama", NARROW, target_modules=["q_proj", "down_proj"])
    assert costs.ranks == AdaptedRanks(qkv=4, down=4)
    set_mode(model, "none", None)
    assert costs.kept("none") == pytest.approx(kept_by_a_block(model), rel=0.03)


def test_the_head_has_as_many_logits_at_once_as_is_calculated() -> None:
    assert activations.LOGITS_AT_ONCE == head.LOGITS_PER_CHUNK


def test_a_mixture_of_experts_is_not_calculated() -> None:
    with pytest.raises(ValueError, match="mixtral keeps depends on where its router"):
        Decoder.of({}, FAMILIES["mixtral"])


LLAMA = {"8B": (4096, 14_336, 32, 32), "70B": (8192, 28_672, 80, 64)}
COLUMNS: list[tuple[Mode, int | None]] = [
    ("none", None),
    ("selective", None),
    ("block", None),
    ("selective", 4096),
    ("block", 4096),
    ("offload", 4096),
]


def table() -> list[str]:
    """The lines of "A row of T tokens costs" in distlora/README.md."""
    lines = []
    for name, (hidden, inner, layers, heads) in LLAMA.items():
        sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128_256}
        ranks = AdaptedRanks(qkv=48, o=16, gate_up=32, down=16)
        costs = Costs(decoder=Decoder.of(sizes, FAMILIES["llama"]), ranks=ranks, fused=True)
        for length in (8192, 32_768, 131_072):
            cells = []
            for mode, tile in COLUMNS:
                made = costs.step(mode, at_once=length, tile=tile)
                host = f" + {made.kept_on_host / 1e9:.1f}" if made.kept_on_host else ""
                cells.append(f"{made.peak / 1e9:.1f}{host}")
            shares = [f"{100 * costs.recomputed(mode, length):.0f} %" for mode in ("selective", "block")]
            lines.append(f"| {name} | {length:,} | {' | '.join([*cells, *shares])} |")
    return lines


def test_the_table_of_what_a_row_costs_is_what_is_calculated() -> None:
    text = (Path(__file__).parents[1] / "distlora" / "README.md").read_text()
    assert "\n".join(table()) in text
