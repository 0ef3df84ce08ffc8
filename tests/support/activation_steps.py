"""Steps of small models, and what is calculated of them: what the tests of plan/memory/activations.py measure by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from distlora.architecture.config_checks import read_config
from distlora.architecture.shapes import shapes_of
from distlora.model.adapters import StepRows
from distlora.model.attention import attend_on_cpu
from distlora.model.build import CausalLM
from distlora.model.layer_wrapper import HostInputs
from distlora.model.lm_head import LossForm
from distlora.model.mlp import MLP, place_mlps
from distlora.planner.decoder_sizes import AttentionKind
from distlora.planner.memory.activations import Costs, Mode
from distlora.planner.memory.base import base_of
from distlora.planner.memory.gathered import CastCopies, copied_of
from distlora.planner.model import model_in
from distlora.planner.workload import Workload
from support.accounting import Kept, Made, flash_like
from support.family_models import config_for, load_ours, tokens
from support.plan_inputs import cpu_machine
from support.small_models import write_model_folder

TOKENS = 512


def positions(document: int) -> Tensor:
    """Return positions of a row with documents of so many tokens."""
    return torch.arange(document).repeat(1, TOKENS // document)


POSITIONS = positions(16)
"""Documents so short that the scores of the attention that stands in are small."""
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
NARROW = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6, "head_dim": 48}
"""Queries of 288 columns, keys of 96."""


class Loaded(NamedTuple):
    """A model, and what is calculated for it."""

    model: CausalLM
    costs: Costs
    copied: CastCopies
    """Of trained weights, in 16 bits."""


def load(
    folder: Path,
    family: str,
    sizes: dict[str, int],
    *,
    dtype: str = "bf16",
    quant: str = "none",
    checkpointing: str = "block",
    dense_layers: int | str = 0,
    attention: AttentionKind = "documents",
    document: int = 16,
    **adapter: Any,
) -> Loaded:
    """Load a random model, and the calculated activations for it on the CPU.

    Attention by documents keeps what the CUDA kernel keeps, without that kernel's work space, or what the CPU's keeps,
    in `tiles` with documents of so many tokens.
    """
    if not (folder / "config.json").exists():
        write_model_folder(folder, family, **sizes)
    sections = {
        "data": {"path": "none.jsonl", "sequence_length": TOKENS},
        "adapter": adapter if "method" in adapter else {"target_modules": "all-linear", "r": 4, **adapter},
        "quant": {"method": quant, "cache": False, "dense_layers": dense_layers},
        "train": {
            "dtype": dtype,
            "checkpointing": checkpointing,
            "attention": "sdpa" if attention == "sdpa" else "auto",
        },
    }
    model, _ = load_ours(folder, **sections)
    if attention in ("documents", "tiles"):
        model.attend_by_documents(flash_like if attention == "documents" else attend_on_cpu)
    # The first block's norm would keep nothing of an input without gradient; a leaf would be kept by its own node.
    weight = model.embedding.get_parameter("weight")
    if not weight.requires_grad:
        nothing = torch.zeros(weight.shape[1], dtype=weight.dtype, requires_grad=True)
        model.embedding.register_forward_hook(lambda module, arguments, output: output + nothing)
    for parameter in model.parameters():
        if parameter.requires_grad:  # What a step leaves of them is not of what is counted.
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    settings, config = read_config(folder), config_for(folder, **sections)
    shapes = shapes_of(settings, folder / "config.json")
    costs = Costs.of(Workload.of(config), model_in(folder), cpu_machine(1))
    if attention == "documents":
        costs = replace(costs, attention="documents")
    assert costs.attention == attention
    costs = replace(costs, document=document)
    return Loaded(model, costs, copied_of(Workload.of(config), base_of(Workload.of(config), shapes), 1))


class Host(HostInputs):
    """The inputs of a model's blocks in memory that stands for the host's, all of it taken at the start."""

    def __init__(self, num_inputs: int, nbytes: int) -> None:
        super().__init__(torch.device("cpu"))
        self.reserve(num_inputs, nbytes)
        self.memory = [place for places in self._free.values() for place in places]


def set_mode(model: CausalLM, mode: Mode, tile: int | None, num_micro: int = 1) -> list[Tensor]:
    """Return the host memory in which the mode keeps inputs."""
    if (mode == "selective" or tile is not None) and not isinstance(model.blocks[0].inner.mlp, MLP):
        place_mlps(model.blocks, model.architecture, tile=tile)
    model.set_num_micro(num_micro)
    weight = model.embedding.get_parameter("weight")
    itemsize = (model.compute_dtype or weight.dtype).itemsize
    nbytes = TOKENS * weight.shape[1] * itemsize
    host = Host(len(model.blocks) * num_micro, nbytes) if mode == "offload" else None
    for block in model.blocks:
        block.checkpointing = mode in ("block", "offload")
        block.host_inputs = host
        if isinstance(block.inner.mlp, MLP):
            block.inner.mlp.tile = tile
    return [] if host is None else host.memory


def loss(model: CausalLM, rows: int = 1, *, with_reference: bool = False, document: int | None = None) -> torch.Tensor:
    ids, places = tokens(rows, TOKENS), (positions(document) if document else POSITIONS).expand(rows, -1)
    documents = model.documents_of(places, places.device)
    place = StepRows(0, torch.arange(rows))
    labels = ids.roll(-1, 1)
    losses = model(
        ids, places, labels, step_rows=place, documents=documents, losses=LossForm(with_reference=with_reference)
    )
    return (losses[0] if with_reference else losses).sum()


def kept_by_a_block(model: CausalLM) -> float:
    """Bytes a token that autograd keeps in a block, with its share of the rotary tables."""
    kept = Kept()
    with kept.within(list(model.blocks)):
        loss(model)
    return kept.nbytes / TOKENS / len(model.blocks)


def check_steps(loaded: Loaded, modes: Sequence[tuple[Mode, int | None, int]], *, with_reference: bool = False) -> None:
    """Check what decoder layers keep, and a step's peak, in each (mode, tile, slices), within 5 %."""
    model, costs, copied = loaded
    for mode, tile, num_micro in modes:
        host, cell = set_mode(model, mode, tile, num_micro), (mode, tile, num_micro)
        if mode in ("none", "selective", "block") and num_micro == 1 and copied.kept == 0:
            assert costs.kept(mode, TOKENS) == pytest.approx(kept_by_a_block(model), rel=0.03), cell
        with Made(model, host) as made:
            loss(model, num_micro, with_reference=with_reference).backward()
        assert made.alive <= 16 * TOKENS, "more than the row's ids is left behind by a step"
        kept_tokens = None if num_micro == 1 else num_micro * TOKENS
        step = costs.step(mode, at_once=TOKENS, kept_tokens=kept_tokens, tile=tile, row=TOKENS)
        head = max(step.head_forward, step.head_backward) + copied.head
        peak = step.kept + copied.kept + max(head, step.working + copied.block)
        assert peak == pytest.approx(made.peak, rel=0.05), cell
