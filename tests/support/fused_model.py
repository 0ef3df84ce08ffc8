"""A model with fused modules, run beside transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from distlora.architecture.shapes import AdapterShape
from distlora.model.attention import Documents
from distlora.model.build import CausalLM
from distlora.parallel import Ranks
from distlora.planner.decoder_sizes import Decoder, linears_of
from distlora.planner.memory.activations import Costs
from support.accounting import Kept, flash_like
from support.family_models import tokens

ONE_EACH = ("llama-biases", "mistral-window", "qwen2-tied-window", "qwen3", "gemma2", "gemma3-text", "gemma3", "phi3")
PARTIAL_ROTARY = "phi3-longrope-tied"
FUSED = frozenset({"norms", "mlps", "rotary", "loss"})
RANKS = Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"), None)


def run(model: CausalLM, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    losses = model(input_ids, positions, input_ids.roll(-1, dims=1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return losses.detach(), list(torch.autograd.grad(losses.sum() / input_ids.numel(), parameters))


def check_kept(model: CausalLM, folder: Path, kept: Kept, *, remakes: bool) -> None:
    model.attend_by_documents(flash_like)
    model.embedding.register_forward_hook(lambda module, arguments, output: output.requires_grad_())
    ids, positions = tokens(1, 16).to(RANKS.device), torch.arange(16)[None]
    with kept.within(list(model.blocks)):
        model(ids, positions.to(RANKS.device), ids, documents=Documents.of(positions).to(RANKS.device))
    adapters: dict[str, AdapterShape] = {}
    for path, linear in model.adapted_linears():
        _, _, place = path.partition(".layers.0.")
        rank, (out, inner) = linear.pairs[0].rank, (linear.out_features, linear.in_features)
        adapters[place] = AdapterShape(path, (rank, inner), (out, rank))
    decoder = Decoder.of(model.architecture)
    linears = linears_of(decoder, model.architecture.largest, adapters=[adapters])
    costs = Costs(decoder=decoder, linears=linears, itemsize=4, fused=FUSED, remakes=remakes, is_gpu=not remakes)
    # The rotary tables are the blocks' together.
    assert costs.kept("none") == pytest.approx(kept.nbytes / 16 / 3, rel=0.03)
