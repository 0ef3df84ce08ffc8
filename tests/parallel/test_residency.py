"""The base is gathered no more often than it must: once for all micro-batches of a step, never again where it stays."""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from distlora.architecture.config_checks import read_config
from distlora.architecture.shapes import shapes_of
from distlora.config import Config
from distlora.config.file import load_config
from distlora.parallel import Ranks, fsdp2
from distlora.parallel.integrity import DamagedWeightsError
from distlora.planner.workload import padded
from distlora.system import host_memory
from distlora.training import worker
from distlora.training.reporter import Reporter
from distlora.training.setup import start_run_model
from support.family_models import positions_of, tokens
from support.planned import block_bytes, traffic_of
from support.runs import outcome, result_of, run_once, started
from support.small_models import make_run, read_metrics
from support.tiers import ci
from support.worlds import World


def gathered(metrics: list[dict[str, Any]]) -> list[int]:
    """Bytes of each step."""
    return [line["gathered_bytes"] for line in metrics if "loss" in line]


@pytest.mark.ci
def test_inside_the_block_eight_micro_batches_gather_what_one_does(world: World, folders: Path, tmp_path: Path) -> None:
    bytes_of = {}
    for name, micro_batches, accumulate, prefetch in (
        ("one", 1, "step", True),
        ("block", 8, "block", True),
        ("step", 8, "step", False),
    ):
        rows = {"global_batch": micro_batches * 2, "micro_batch": 1, "accumulate": accumulate}
        config = make_run(tmp_path / name, folders, train={"max_steps": 2, **rows}, parallel={"prefetch": prefetch})
        bytes_of[name] = gathered(world.run(2, run_once, run_dir=tmp_path / name)[0])
        if name == "one":
            once = traffic_of(config, world=2).gathered
    # The evaluation before the first step leaves the final norm (96 fp32) gathered.
    norm = 4 * padded((96,), 2)
    assert bytes_of["one"] == bytes_of["block"] == [once - norm, once]
    assert bytes_of["step"] == [8 * once - norm, 8 * once]


def bytes_of_a_block(config: Config, size: int) -> int:
    shapes = shapes_of(read_config(Path(config.model.path)), "config.json")
    return block_bytes(shapes.block, size, format="nf4", itemsize=4)


@pytest.fixture(scope="module")
def moving(world: World, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """Return losses and adapter of a run without resident layers on some ranks, made at the first use."""

    @functools.cache
    def result(size: int) -> Any:
        run_dir = tmp_path_factory.mktemp("moving") / str(size)
        make_run(run_dir, folders, train=SETTINGS[size])
        return outcome(world, size, run_dir)

    return result


SETTINGS: dict[int, dict[str, Any]] = {
    2: {"max_steps": 4, "eval_every": 2, "micro_batch": 3},
    3: {"max_steps": 4, "eval_every": 2, "micro_batch": 2, "accumulate": "block"},
}


@pytest.mark.parametrize(
    ("size", "dense", "resident", "prefetch"),
    [(2, 0, 1, True), (2, 2, 0, True), ci(3, 0, 2, False)],
)
def test_blocks_that_stay_are_gathered_no_more_and_change_no_bit(
    world: World,
    folders: Path,
    tmp_path: Path,
    moving: Callable[[int], Any],
    size: int,
    dense: int,
    resident: int,
    prefetch: bool,
) -> None:
    """Layers with dense copies (quant.dense_layers) stay too."""
    parallel = {"resident_blocks": resident, "prefetch": prefetch}
    # Their memory is checked at every save like what is gathered.
    config = make_run(
        tmp_path / "run",
        folders,
        train={**SETTINGS[size], "save_every": 2, "verify": True},
        parallel=parallel,
        quant={"dense_layers": dense},
    )
    metrics = world.run(size, run_once, run_dir=tmp_path / "run")[0]
    losses, adapter = result_of(tmp_path / "run")
    assert losses == moving(size)[0]
    assert all(torch.equal(adapter[name], tensor) for name, tensor in moving(size)[1].items())
    step, passes = traffic_of(config, world=size).gathered, 2 if size == 2 else 1
    all_move = traffic_of(make_run(tmp_path / "all", folders, train=SETTINGS[size]), world=size).gathered
    assert all_move - step == passes * 2 * max(dense, resident) * bytes_of_a_block(config, size)
    norm = 4 * padded((96,), size)  # As above: evaluations leave it gathered, as the first leaves the blocks.
    assert gathered(metrics) == [step - norm, step, step - norm, step]


def run_with_memory(ranks: Ranks, *, run_dir: Path, free: tuple[float, ...]) -> tuple[list[dict[str, Any]], list[str]]:
    """Run on ranks that have so many bytes free each."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_memory, "available_bytes", lambda: int(free[ranks.rank]))
        patch.setattr(Reporter, "event", lambda self, text: said.append(text))
        worker.run(run_dir, ranks)
    return read_metrics(run_dir), [line for line in said if "resident" in line]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.ci)])
def test_auto_keeps_what_fits_on_the_rank_with_the_least_memory(
    world: World,
    folders: Path,
    tmp_path: Path,
    moving: Callable[[int], Any],
    size: int,
) -> None:
    config = make_run(tmp_path / "run", folders, train=SETTINGS[size], parallel={"resident_blocks": "auto"})
    block = bytes_of_a_block(config, size)
    # Half of what is free is the reserve: memory for every block, and on the last rank for one and nearly another.
    free = (*[2.0**40] * (size - 1), 2 * (2 * block - 1))
    results = world.run(size, run_with_memory, run_dir=tmp_path / "run", free=free)
    metrics = results[0][0]
    for rank, (_, said) in enumerate(results):
        assert said == [
            f"parallel.resident_blocks=auto: 1 of 3 layers stay gathered, which needs {block / 2**30:,.2f} GiB on each "
            f"rank; rank {rank} has {free[rank] / 2**31:,.2f} GiB for them"
        ]
    losses, adapter = result_of(tmp_path / "run")
    assert losses == moving(size)[0]
    assert all(torch.equal(adapter[name], tensor) for name, tensor in moving(size)[1].items())
    step, passes = traffic_of(config, world=size).gathered, 2 if size == 2 else 1
    saved, norm = passes * 2 * block, 4 * padded((96,), size)
    # Found out after the first step, gathered for good in the second.
    assert gathered(metrics) == [step - norm, step - saved + block, step - saved - norm, step - saved]


def rotten_in_memory(ranks: Ranks, *, run_dir: Path) -> str:
    """Return the save's message when a byte of a gathered block changes on rank 0."""
    model, backend, batch = started(ranks, run_dir)
    model(*batch)
    assert backend.residency.count == 1
    codes = model.blocks[0].inner.get_parameter("mlp.up_proj.codes").data
    assert not isinstance(codes, DTensor), "gathered"
    if ranks.rank == 0:
        codes.view(-1)[5] ^= 1
    backend.check_weights()
    with pytest.raises(DamagedWeightsError) as caught:
        model(*batch)
    return str(caught.value)


def test_memory_of_a_block_that_stays_is_watched(world: World, folders: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", folders, parallel={"resident_blocks": 1})
    messages = world.run(2, rotten_in_memory, run_dir=tmp_path / "run")
    assert messages[0] == messages[1]
    # Rank 1 has its own copy of rank 0's rows, which is sound.
    assert re.search(
        r"model.layers.0.mlp.up_proj.codes, rows 0 to \d+, those of rank 0, are not what rank 0 loaded; the "
        "memory of rank 0 has changed",
        messages[0],
    )


def read_from_a_rank_without_model(ranks: Ranks, *, run_dir: Path, keeps: str) -> str:
    """Delete rank 1's model except its rows or gathers. Returns how rank 0 then reads: same, else, or an error."""
    model, backend, _ = start_run_model(load_config(run_dir), ranks)
    ids, answer, kept = tokens(2, 8), "same", []
    with torch.no_grad():
        first = model(ids, positions_of(ids), None)
        if ranks.rank == 1:
            if keeps == "rows":
                kept += [each.data.to_local() for each in model.parameters() if isinstance(each.data, DTensor)]
            else:
                kept += [each for each in gc.get_objects() if isinstance(each, fsdp2._CountedAllGather)]
            assert kept
            del model, backend
            gc.collect()
        dist.barrier(ranks.group)
        if ranks.rank == 0:
            try:
                answer = "same" if torch.equal(model(ids, positions_of(ids), None), first) else "else"
            except RuntimeError as error:
                answer = str(error)
        dist.barrier(ranks.group)  # Rank 1 keeps them until then.
    return answer


@pytest.mark.parametrize(("keeps", "answer"), [("rows", "same"), ("gathers", ".*another rank.* freed its shards")])
def test_rows_are_read_as_long_as_their_memory_is_there(
    world: World, folders: Path, tmp_path: Path, keeps: str, answer: str
) -> None:
    """The memory of rows may go after the objects that gather them, or before."""
    make_run(tmp_path / "run", folders)
    answers = world.run(2, read_from_a_rank_without_model, run_dir=tmp_path / "run", keeps=keeps)
    assert re.fullmatch(answer, answers[0]), answers[0]
