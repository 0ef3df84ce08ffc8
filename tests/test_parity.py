"""The same run on 1 to 4 ranks, however it is checkpointed and accumulated, is the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from closeness import assert_adapters_close, assert_losses_close
from distlora import startup, train
from distlora.config import Config
from distlora.parallel import Ranks
from small_models import make_run, read_metrics
from worlds import World


def run_once(ranks: Ranks, *, run_dir: Path) -> list[dict[str, Any]]:
    """A whole run of the worker on this rank."""
    train.run(run_dir, ranks)
    return read_metrics(run_dir)


def outcome(world: World, size: int, run_dir: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Losses (training and held out, in order) and the final adapter of a prepared run."""
    metrics = world.run(size, run_once, run_dir=run_dir)[0]
    losses = [line["loss"] if "loss" in line else line["eval_loss"] for line in metrics]
    return losses, safetensors.torch.load_file(run_dir / "adapter" / "adapter_model.safetensors")


CELLS = [
    # (model, ranks, train settings, parallel settings); the reference is one rank with one micro-batch of all rows.
    ("llama", 1, {"micro_batch": 4, "checkpointing": "none"}, {}),
    ("llama", 1, {"micro_batch": 4, "accumulate": "block"}, {}),
    ("llama", 2, {"micro_batch": 6}, {}),
    ("llama", 2, {"micro_batch": 2, "checkpointing": "none"}, {}),
    ("llama", 2, {"micro_batch": 2, "accumulate": "block"}, {}),
    ("llama", 2, {"micro_batch": 2, "accumulate": "block", "checkpointing": "none"}, {"prefetch": False}),
    ("llama", 2, {"micro_batch": 2, "accumulate": "block", "keep_dequantized": True}, {}),
    ("llama", 3, {"micro_batch": 4, "checkpointing": "none"}, {}),
    ("llama", 3, {"micro_batch": 5}, {"bucket_mb": 0.01}),
    ("llama", 4, {"micro_batch": 1}, {"prefetch": False}),
    ("llama", 4, {"micro_batch": 1, "accumulate": "block"}, {}),
    ("llama-tied", 1, {"micro_batch": 4}, {}),
    ("llama-tied", 2, {"micro_batch": 2}, {}),
    ("llama-tied", 3, {"micro_batch": 2, "accumulate": "block"}, {}),
    ("llama-tied", 4, {"micro_batch": 3, "checkpointing": "none"}, {}),
    ("qwen3", 2, {"micro_batch": 2}, {}),
    ("qwen3", 3, {"micro_batch": 2, "accumulate": "block"}, {}),
]


@pytest.fixture(scope="module")
def references(world: World, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, one micro-batch of the whole step, no checkpointing, by model."""
    results = {}
    for model in ("llama", "llama-tied", "qwen3"):
        run_dir = tmp_path_factory.mktemp("reference") / model
        make_run(run_dir, folders, model, train={"micro_batch": 12, "checkpointing": "none"})
        results[model] = outcome(world, 1, run_dir)
    return results


@pytest.mark.parametrize(("model", "size", "settings", "parallel"), CELLS, ids=str)
def test_losses_and_adapters_do_not_depend_on_ranks_checkpointing_or_accumulation(
    world: World,
    folders: Path,
    tmp_path: Path,
    references: dict[str, Any],
    model: str,
    size: int,
    settings: dict,
    parallel: dict,
) -> None:
    make_run(tmp_path / "run", folders, model, train=settings, parallel=parallel)
    losses, adapter = outcome(world, size, tmp_path / "run")
    expected_losses, expected_adapter = references[model]
    assert_losses_close(losses, expected_losses)
    assert_adapters_close(adapter, expected_adapter)
    assert losses[-1] < losses[0] - 0.05, "the run learned nothing, so the comparison says nothing"


def adapters_after(ranks: Ranks, *, run_dir: Path) -> dict[str, Tensor]:
    """Train, and return this rank's own adapters."""
    kept: dict[str, Tensor] = {}
    build = startup.build_model

    def keep(config: Config, **options: Any) -> Any:
        model = build(config, **options)
        kept["model"] = model  # type: ignore[assignment]
        return model

    startup.build_model = keep
    try:
        train.run(run_dir, ranks)
    finally:
        startup.build_model = build
    return {name: p.detach() for name, p in train.trained_parameters(kept["model"]).items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_adapters_are_bit_identical_on_every_rank(world: World, folders: Path, tmp_path: Path, size: int) -> None:
    make_run(tmp_path / "run", folders, train={"max_steps": 3})
    first, *others = world.run(size, adapters_after, run_dir=tmp_path / "run")
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_bf16_runs_on_two_ranks_equal_one_rank_within_bf16_rounding(
    world: World, folders: Path, tmp_path: Path
) -> None:
    losses = {}
    for size in (1, 2):
        make_run(tmp_path / str(size), folders, train={"dtype": "bf16", "micro_batch": 2})
        losses[size] = outcome(world, size, tmp_path / str(size))[0]
    # Two ranks add the same micro-batch gradients in another order; rounding of activations to bf16 is the same.
    assert_losses_close(losses[2], losses[1], relative=1e-4)


def traffic_of_a_step(ranks: Ranks, *, run_dir: Path) -> dict[str, Any]:
    train.run(run_dir, ranks)
    return read_metrics(run_dir)[-2]


def planned_gather(config: Config, model_dir: Path, size: int) -> tuple[int, int]:
    """(bytes of gathering all blocks once, of the embedding, the head and the norm once), from the shapes alone."""
    from distlora.loading.segments import read_headers

    blocks = rest = 0
    for name, segment in read_headers(model_dir).items():
        padded_rows = size * -(-segment.shape[0] // size)
        if len(segment.shape) == 2 and ".layers." in name:
            groups = -(-segment.numel // 16384)
            blocks += size * -(-groups // size) * (8192 + 256 + 4)
        elif ".layers." in name:
            blocks += 4 * padded_rows
        else:
            rest += 4 * padded_rows * (segment.numel // segment.shape[0])
    return blocks, rest


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("model", ["llama", "llama-tied"])
@pytest.mark.parametrize("accumulate", ["step", "block"])
def test_bytes_on_the_wire_are_the_packed_base_once_a_pass_and_each_adapter_byte_once_a_step(
    world: World, folders: Path, tmp_path: Path, size: int, model: str, accumulate: str
) -> None:
    settings = {"max_steps": 2, "micro_batch": 1, "global_batch": 12, "accumulate": accumulate}
    config = make_run(tmp_path / "run", folders, model, train=settings)
    line = world.run(size, traffic_of_a_step, run_dir=tmp_path / "run")[0]
    blocks, rest = planned_gather(config, folders / model, size)
    runs_of_the_model = 12 // size if accumulate == "step" else 1
    # Forward and backward gather the blocks; only forward reads the embedding, the head and the final norm.
    assert line["gathered_bytes"] == runs_of_the_model * (2 * blocks + rest)
    adapter = safetensors.torch.load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert line["reduced_bytes"] == sum(tensor.nbytes for tensor in adapter.values())


def test_evaluations_are_not_counted_as_training_traffic(world: World, folders: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", folders, train={"max_steps": 6, "eval_every": 2, "micro_batch": 6})
    metrics = world.run(2, run_once, run_dir=tmp_path / "run")[0]
    gathered = [line["gathered_bytes"] for line in metrics if "loss" in line]
    # An evaluation leaves the root's final norm gathered (96 fp32), which the step after it need not gather again.
    assert max(gathered) - min(gathered) <= 4 * 96, gathered


def collectives_of_a_step(ranks: Ranks, *, run_dir: Path) -> dict[str, int]:
    """Every c10d collective of one training step by name, counted by the profiler, not by our own counters."""
    config = train.load_config(run_dir)
    loader, _ = train.open_data(run_dir, config, ranks)
    model, backend, _ = startup.start_model(config, ranks)
    backend.reduce_gradients_of(list(train.trained_parameters(model).values()), config.parallel.bucket_mb)

    def step(number: int) -> None:
        batch = loader.batch(number)
        for index, micro in enumerate(batch.micro_batches):
            loss = model(micro.input_ids, micro.position_ids, micro.labels).sum() / batch.global_targets
            backend.backward(loss, last=index == len(batch.micro_batches) - 1)
        backend.finish_gradients()

    step(0)  # Its first forward checks what was gathered of the base, which ends with a sum over the ranks.
    backend.zero_gradients()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(1)
    return {event.key: event.count for event in profile.key_averages() if event.key.startswith("gloo:")}


def test_a_step_has_no_reduce_scatter_and_one_all_reduce_a_bucket(world: World, folders: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", folders, train={"micro_batch": 2}, parallel={"bucket_mb": 64.0})
    counts = world.run(2, collectives_of_a_step, run_dir=tmp_path / "run")[0]
    assert not any("scatter" in name for name in counts), counts
    assert sum(count for name, count in counts.items() if "reduce" in name) == 1, counts
    # Three micro-batches; in each 3 blocks forward and backward, and the embedding, the head and the norm forward.
    assert sum(count for name, count in counts.items() if "gather" in name) == 3 * (3 + 3 + 3), counts


@pytest.mark.parametrize("size", [2, 3])
def test_bf16_adapters_on_an_unquantized_base_are_one_ranks_and_gather_two_bytes_a_weight(
    world: World, folders: Path, tmp_path: Path, size: int
) -> None:
    from distlora.loading.segments import read_headers

    losses, last = {}, {}
    for ranks in (1, size):
        settings = {"dtype": "bf16", "micro_batch": 2, "max_steps": 5}
        make_run(tmp_path / str(ranks), folders, quant={"method": "none"}, train=settings)
        metrics = world.run(ranks, run_once, run_dir=tmp_path / str(ranks))[0]
        losses[ranks] = [line["loss"] if "loss" in line else line["eval_loss"] for line in metrics]
        last[ranks] = [line for line in metrics if "loss" in line][-1]
    assert_losses_close(losses[size], losses[1], relative=1e-4)
    elements = 0
    for name, segment in read_headers(folders / "llama").items():
        padded = size * -(-segment.shape[0] // size) * (segment.numel // segment.shape[0])
        elements += padded * (2 if ".layers." in name else 1)
    # A forward and a backward pass for each micro-batch of two of the twelve rows.
    assert last[size]["gathered_bytes"] == 12 // size // 2 * 2 * elements
    assert last[size]["scattered_bytes"] == 0
