"""16-bit copies of fp32 masters: how many are kept for backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from distlora import startup
from distlora.config_file import load_config
from distlora.parallel import Ranks
from small_models import VOCABULARY
from test_full import SINGLE, prepare

ROWS, LENGTH = 12, 64


def batch(ranks: Ranks, *, start: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs, positions, labels): this rank's part of `rows` rows from `start`; few tokens are most of the text."""
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.rand(ROWS, LENGTH + 1, generator=generator) ** 4 * VOCABULARY).long()[start : start + rows]
    own = tokens.chunk(ranks.world)[ranks.rank]
    return own[:, :-1], torch.arange(LENGTH).expand(len(own), LENGTH), own[:, 1:]


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_what_is_kept_for_backward_has_each_weight_once_however_many_slices(
    folders: Path, tmp_path: Path, checkpointing: str
) -> None:
    prepare(tmp_path / "run", folders, dtype="bf16", checkpointing=checkpointing, accumulate="block", micro_batch=12)
    model, _, _ = startup.start_model(load_config(tmp_path / "run"), SINGLE)
    kept = {}
    for num_micro in (1, 3):
        model.set_num_micro(num_micro)
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor, storages: dict[int, torch.UntypedStorage] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(*batch(SINGLE)).sum()
        kept[num_micro] = sum(storage.nbytes() for storage in storages.values())
        del loss
    weights = 2 * sum(parameter.numel() for block in model.blocks for parameter in block.parameters())
    assert kept[1] > (weights if checkpointing == "none" else 0)
    assert kept[3] - kept[1] < 0.01 * weights
