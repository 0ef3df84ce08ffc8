"""The base is gathered no more often than it must: once for all micro-batches of a step, never again where it stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distlora import wire
from small_models import make_run
from test_parity import run_once
from worlds import World


def gathered(metrics: list[dict[str, Any]]) -> list[int]:
    """Bytes of each step."""
    return [line["gathered_bytes"] for line in metrics if "loss" in line]


@pytest.mark.parametrize(("size", "prefetch"), [(2, False), (3, True)])
def test_inside_the_block_eight_micro_batches_gather_what_one_does(
    world: World, folders: Path, tmp_path: Path, size: int, prefetch: bool
) -> None:
    bytes_of = {}
    for name, micro_batches, accumulate, prefetches in (
        ("one", 1, "step", prefetch),
        ("block", 8, "block", prefetch),
        ("step", 8, "step", prefetch),
        *([("block, prefetched", 8, "block", True)] if not prefetch else []),
    ):
        rows = {"global_batch": micro_batches * size, "micro_batch": 1, "accumulate": accumulate}
        settings = {"max_steps": 3, "eval_every": 2, **rows}
        config = make_run(tmp_path / name, folders, train=settings, parallel={"prefetch": prefetches})
        bytes_of[name] = gathered(world.run(size, run_once, run_dir=tmp_path / name)[0])
        if name == "one":
            once = wire.of_run(config, world=size).gathered
    # An evaluation, before the first step and after the second, leaves the final norm (96 fp32) gathered.
    norm = 4 * wire.padded((96,), size)
    assert bytes_of["one"] == [once - norm, once, once - norm]
    assert bytes_of["block"] == bytes_of.get("block, prefetched", bytes_of["block"]) == bytes_of["one"]
    assert bytes_of["step"] == [8 * once - norm, 8 * once, 8 * once - norm]
