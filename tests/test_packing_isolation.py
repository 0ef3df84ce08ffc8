"""Documents packed into one row are as if alone: no attention across them, no shifted positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from closeness import relative_error
from distlora.config import AdapterConfig
from distlora.model.build import CausalLM, materialize_buffers
from test_loading import loaded

LENGTHS = (17, 1, 30, 9)


def model_with_adapters(folder: Path) -> CausalLM:
    """All-linear adapters with a B that is not zero."""
    model, backend = loaded(folder, adapter={"target_modules": "all-linear"})
    materialize_buffers(model, backend.ranks.device)
    generator = torch.Generator().manual_seed(0)
    for _, linear in model.adapted_linears():
        for name, pair in linear.adapters.items():
            pair.reset(AdapterConfig(), seed=0, name=name)  # type: ignore[operator, union-attr]
            pair.B.data.normal_(0, 0.02, generator=generator)  # type: ignore[operator, union-attr]
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3"])
def test_loss_and_gradients_of_packed_documents_equal_those_alone(
    folders: Path, name: str, checkpointing: bool
) -> None:
    model = model_with_adapters(folders / name)
    for block in model.blocks:
        block.checkpointing = checkpointing
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(5, 1000, (1, length), generator=generator) for length in LENGTHS]
    labels = [torch.randint(5, 1000, (1, length), generator=generator) for length in LENGTHS]
    positions = [torch.arange(length)[None] for length in LENGTHS]
    parameters = [p for p in model.parameters() if p.requires_grad]

    packed = model(torch.cat(documents, dim=1), torch.cat(positions, dim=1), torch.cat(labels, dim=1)).sum()
    packed_gradients = torch.autograd.grad(packed, parameters)
    alone = sum(model(*document).sum() for document in zip(documents, positions, labels, strict=True))
    alone_gradients = torch.autograd.grad(alone, parameters)  # type: ignore[arg-type]

    assert abs(packed - alone) / alone <= 1e-6
    together = [torch.cat([g.flatten() for g in gradients]) for gradients in (packed_gradients, alone_gradients)]
    assert relative_error(*together) <= 2e-6


def test_a_batch_of_packed_rows_keeps_each_row_to_itself(folders: Path) -> None:
    """Rows with different boundaries in one batch: the mask is one a row, not the first row's for all."""
    model = model_with_adapters(folders / "llama")
    tokens = torch.randint(5, 1000, (3, 40), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(cut), torch.arange(40 - cut)]) for cut in (40, 13, 27)])
    with torch.no_grad():
        together = model(tokens, positions, tokens)
        alone = torch.cat([model(tokens[i : i + 1], positions[i : i + 1], tokens[i : i + 1]) for i in range(3)])
    assert relative_error(together, alone) <= 1e-6
