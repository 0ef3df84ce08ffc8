"""16-bit copies of fp32 masters: how many are kept for backward, and where their gradients are rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from distlora.config.file import load_config
from distlora.parallel import Ranks
from distlora.training import setup, worker
from support.closeness import relative_error
from support.family_models import SINGLE
from support.full_runs import prepare
from support.small_models import VOCABULARY
from support.worlds import World

ROWS, LENGTH = 12, 64


def batch(ranks: Ranks, *, start: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Return (inputs, positions, labels): this rank's part of `rows` rows from `start`, mostly of few tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.rand(ROWS, LENGTH + 1, generator=generator) ** 4 * VOCABULARY).long()[start : start + rows]
    own = tokens.chunk(ranks.world)[ranks.rank]
    return own[:, :-1], torch.arange(LENGTH).expand(len(own), LENGTH), own[:, 1:]


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_what_is_kept_for_backward_has_each_weight_once_however_many_slices(
    folders: Path, tmp_path: Path, checkpointing: str
) -> None:
    prepare(tmp_path / "run", folders, dtype="bf16", checkpointing=checkpointing, accumulate="block", micro_batch=12)
    model, _, _ = setup.start_run_model(load_config(tmp_path / "run"), SINGLE)
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


def step_gradients(ranks: Ranks, *, run_dir: Path, passes: int, num_micro: int) -> dict[str, Tensor]:
    """Every gradient of a step of ROWS rows in `passes` backwards; flat, on the rank that writes."""
    config = load_config(run_dir)
    model, backend, _ = setup.start_run_model(config, ranks)
    model.set_num_micro(num_micro)
    trained = worker.trained_parameters(model)
    backend.reduce_gradients_of(trained.values(), config.parallel.bucket_mb)
    rows = backend.updated(trained)
    backend.zero_gradients()
    for number in range(passes):
        part = batch(ranks, start=number * ROWS // passes, rows=ROWS // passes)
        backend.backward(model(*part).sum() / (ROWS * LENGTH), last=number == passes - 1)
    backend.finish_gradients()
    whole: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        gradient = rows[name].grad
        assert gradient is not None
        pieces: list[Tensor] = []
        backend.stream(backend.spread(gradient, parameter), pieces.append)
        if backend.writes:
            whole[name] = torch.cat(pieces)
    return whole


def test_gradients_in_bf16_are_those_of_one_process_but_for_sums_in_bf16(
    world: World, folders: Path, tmp_path: Path
) -> None:
    """A tied weight's two gradients on several ranks, and slices: parallel/README.md, Limits."""
    for dtype in ("fp32", "bf16"):
        prepare(tmp_path / dtype, folders, "llama-tied", dtype=dtype)

    def gradients(size: int, dtype: str = "bf16", passes: int = 1, num_micro: int = 1) -> dict[str, Tensor]:
        arguments = {"run_dir": tmp_path / dtype, "passes": passes, "num_micro": num_micro}
        return world.run(size, step_gradients, **arguments)[0]

    exact, one = gradients(1, "fp32"), gradients(1)
    eps = torch.finfo(torch.bfloat16).eps
    # Each gradient is rounded to nearest: eps / 2 at most for an element, less for a tensor. Sums of slices are, too.
    for actual, ulps in (
        (gradients(2, passes=3), 0.5),
        (gradients(3), 0.5),
        (gradients(2, num_micro=6), 1.0),
    ):
        for name, gradient in one.items():
            assert relative_error(actual[name], gradient) <= ulps * eps, name
            # 10 %: a CPU's products in bf16 sum in another order for another number of rows.
            assert relative_error(actual[name], exact[name]) <= 1.1 * relative_error(gradient, exact[name]), name
