"""The same run on 1 to 4 ranks, however it is sharded, checkpointed and accumulated, is the same run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distlora.parallel import Ranks
from distlora_kernels import native
from support.closeness import assert_adapters_close, assert_losses_close
from support.runs import adapters_after, outcome, result_of
from support.small_models import TYPES, make_run
from support.tiers import ci
from support.worlds import World

CELLS = [
    # (model, ranks, train settings, parallel settings); the reference is one rank with one micro-batch of all rows.
    ("llama", 3, {"micro_batch": 2, "accumulate": "block", "checkpointing": "offload", "mlp_tile": 24}, {}),
    ci("llama", 4, {"micro_batch": 3}, {"prefetch": False}),
    ci("llama", 1, {"micro_batch": 4, "accumulate": "block"}, {}),
    ci("llama", 2, {"micro_batch": 2, "checkpointing": "none"}, {}),
    ci("llama", 3, {"micro_batch": 5}, {"bucket_mb": 0.01}),
    ci("qwen3", 2, {"micro_batch": 2, "accumulate": "block", "checkpointing": "selective", "mlp_tile": 30}, {}),
    # Two replicas of the base, each sharded over two ranks; the rest in test_hsdp.py.
    ci("llama-tied", 4, {"micro_batch": 1, "accumulate": "block"}, {"shard_degree": 2}),
    ci("llama-tied", 2, {"micro_batch": 3, "checkpointing": "offload"}, {"resident_blocks": 1}),
    # Recurrent states and experts; stored buffers; convolutions; a scaled head; text decoders of models of images.
    ci("qwen3_next", 3, {"micro_batch": 2, "accumulate": "block", "checkpointing": "offload"}, {}),
    ci("glm4_moe", 4, {"micro_batch": 1, "accumulate": "block"}, {"shard_degree": 2}),
    ci("lfm2", 2, {"micro_batch": 3}, {"resident_blocks": 1}),
    ci("granite@scaled", 3, {"micro_batch": 2, "accumulate": "block"}, {}),
    ci("qwen3_5", 2, {"micro_batch": 2, "accumulate": "block"}, {"resident_blocks": 1}),
    ci("mistral3", 3, {"micro_batch": 2, "checkpointing": "none"}, {}),
]
MORE_CELLS = [
    ("llama", 1, {"micro_batch": 4, "checkpointing": "none"}, {}),
    ("llama", 2, {"micro_batch": 2, "accumulate": "block", "checkpointing": "none"}, {"prefetch": False}),
    ("llama", 2, {"micro_batch": 3, "checkpointing": "selective"}, {}),
    ("llama", 4, {"micro_batch": 1, "accumulate": "block"}, {}),
    ("llama-tied", 3, {"micro_batch": 2, "accumulate": "block"}, {}),
    ("llama-tied", 4, {"micro_batch": 3, "checkpointing": "none"}, {}),
]
ZERO3, OFFLOADED = {"backend": "zero3"}, {"backend": "zero3", "offload_base": True}
CELLS += [
    ("llama", 3, {"micro_batch": 2, "accumulate": "block", "checkpointing": "none"}, OFFLOADED),
    ci("llama", 2, {"micro_batch": 2}, ZERO3),
    ci("qwen3_next", 2, {"micro_batch": 2, "accumulate": "block"}, ZERO3),
    ci("glm4_moe", 3, {"micro_batch": 2, "checkpointing": "none"}, OFFLOADED),
    ci("qwen3_5", 3, {"micro_batch": 2}, ZERO3),
]
MORE_CELLS += [
    ("llama", size, {"micro_batch": 12 // size // parts, "checkpointing": kept, "accumulate": accumulate}, parallel)
    for size in (2, 3)
    for parts, accumulate in ((1, "step"), (3 if size == 2 else 4, "step"), (3 if size == 2 else 4, "block"))
    for kept in ("block", "none")
    for parallel in (ZERO3, OFFLOADED)
]
MORE_CELLS += [
    ("llama-tied", 2, {"micro_batch": 2, "accumulate": "block"}, ZERO3),
    ("llama-tied", 3, {"micro_batch": 4, "checkpointing": "none"}, ZERO3 | {"prefetch": False}),
    ("qwen3", 3, {"micro_batch": 2}, ZERO3 | {"prefetch": False}),
    ("llama", 2, {"micro_batch": 2, "checkpointing": "offload", "accumulate": "block"}, ZERO3),
    ("llama", 3, {"micro_batch": 2, "checkpointing": "selective", "mlp_tile": 24}, ZERO3),
]


@pytest.fixture(scope="module")
def reference(world: World, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Train a model on one rank with one micro-batch and no checkpointing, at the first use."""

    @functools.cache
    def result(model: str) -> Any:
        run_dir = tmp_path_factory.mktemp("reference") / model
        make_run(run_dir, folders, model, train={"micro_batch": 12, "checkpointing": "none"})
        return outcome(world, 1, run_dir)

    return result


@pytest.mark.parametrize(
    ("model", "size", "settings", "parallel"),
    [*CELLS, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in MORE_CELLS)],
    ids=str,
)
def test_losses_and_adapters_do_not_depend_on_ranks_backend_checkpointing_or_accumulation(
    request: pytest.FixtureRequest,
    folders: Path,
    tmp_path: Path,
    reference: Callable[[str], Any],
    model: str,
    size: int,
    settings: dict,
    parallel: dict,
) -> None:
    make_run(tmp_path / "run", folders, model, train=settings, parallel=parallel, cluster={"gpus_per_node": size})
    ranks = request.getfixturevalue("alone" if "backend" in parallel else "world")
    first, *others = ranks.run(size, adapters_after, run_dir=tmp_path / "run")
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first), "adapters differ between ranks"
    losses, adapter = result_of(tmp_path / "run")
    expected_losses, expected_adapter = reference(model)
    assert_losses_close(losses, expected_losses)
    assert_adapters_close(adapter, expected_adapter)
    learned = 0 if model.partition("@")[0] in TYPES else 0.05
    assert losses[-1] < losses[0] - learned, "the run learned nothing, so the comparison says nothing"


def compiled_run(ranks: Ranks, *, run_dir: Path) -> dict[str, Tensor]:
    """`adapters_after` with a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CXX", raising=False)  # The tests' is none.
        return adapters_after(ranks, run_dir=run_dir)


@pytest.mark.ci
@pytest.mark.skipif(native.unavailable_reason() is not None, reason=f"not compiled: {native.unavailable_reason()}")
def test_compiled_ranks_have_one_adapter_and_the_losses_of_one_rank_that_is_not(
    world: World, folders: Path, tmp_path: Path, reference: Callable[[str], Any]
) -> None:
    settings = {"micro_batch": 2, "accumulate": "block", "compile": True}
    make_run(tmp_path / "run", folders, train=settings, cluster={"gpus_per_node": 3})
    first, *others = world.run(3, compiled_run, run_dir=tmp_path / "run")
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert_losses_close(result_of(tmp_path / "run")[0], reference("llama")[0])


@pytest.mark.ci
def test_bf16_runs_on_two_ranks_equal_one_rank_within_bf16_rounding(
    world: World, folders: Path, tmp_path: Path
) -> None:
    losses = {}
    for size in (1, 2):
        make_run(tmp_path / str(size), folders, train={"dtype": "bf16", "micro_batch": 3, "max_steps": 4})
        losses[size] = outcome(world, size, tmp_path / str(size))[0]
    # Two ranks add the same micro-batch gradients in another order; rounding of activations to bf16 is the same.
    assert_losses_close(losses[2], losses[1], relative=1e-4)
