"""Steps of a family's small model, and its saved adapter."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from distlora.loading.peft_format import adapter_config, adapter_tensors
from distlora.model.adapters import adapter_parameters
from distlora.model.build import CausalLM
from distlora.parallel import Ranks
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME
from support.family_models import (
    config_for,
    load_ours,
    tokens,
)


def shifted(input_ids: Tensor) -> Tensor:
    """Labels of plain text: the next token, nothing at the end."""
    return torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)], dim=1)


def save_adapter(folder: Path, model: CausalLM, base: Path) -> None:
    """RUN/adapter of a finished run, without the run."""
    folder.mkdir()
    config = config_for(base, adapter={"target_modules": "all-linear", "r": 4})
    (folder / CONFIG_NAME).write_text(json.dumps(adapter_config(config.spec, model)))
    tensors = {name: parameter.detach().clone() for name, parameter in adapter_tensors(model).items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME)


def three_steps(
    ranks: Ranks, *, folder: Path, router_aux_loss: float | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """Three AdamW steps on six rows, cut over the ranks; checkpointed, blocks gathered once for all micro-batches."""
    train = {"dtype": "fp32", "checkpointing": "block", "router_aux_loss": router_aux_loss}
    model, backend = load_ours(folder, ranks, train=train)
    parameters = adapter_parameters(model)
    backend.reduce_gradients_of(list(parameters.values()), 4.0)
    # eps as in the parity tests: 1e-8 would turn the rounding of a gradient near zero into a step of full size.
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-3, eps=1e-5, weight_decay=0.0)
    rows = tokens(6, 48)
    positions = torch.cat([torch.arange(31), torch.arange(17)]).expand_as(rows)
    own = slice(ranks.rank * (6 // ranks.world), (ranks.rank + 1) * (6 // ranks.world))
    model.set_num_micro(6 // ranks.world)
    losses = []
    for _ in range(3):
        loss = model(rows[own], positions[own], shifted(rows)[own]).sum() / (6 * 47)
        backend.backward(loss, last=True)
        backend.finish_gradients()
        losses.append(float(backend.sum_over_ranks(loss.detach().clone())))
        optimizer.step()
        backend.zero_gradients()
    return losses, {name: parameter.detach().clone() for name, parameter in parameters.items()}
