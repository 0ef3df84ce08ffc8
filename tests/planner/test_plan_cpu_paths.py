"""Compare a step's planned and measured memory on each path of this machine's processor, in a process limited to it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from distlora.planner.model import model_in
from support import cpu_paths
from support.measured import llama, write_random_checkpoint

pytestmark = pytest.mark.ci
SEED = 37
PRIMES = (1009, 2003, 4001, 8009)
"""Vocabularies."""
SMOLLM2 = llama(vocabulary=49_152, hidden=576, inner=1536, layers=6, heads=9, kv_heads=3) | {
    "tie_word_embeddings": True
}
"""SmolLM2-135M with 6 of its 30 layers; docs/benchmarks.md has all of them."""


def random_size(draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config.json of a Llama of odd sizes with a prime vocabulary, and settings of a step.

    Heads of other sizes attend by tiles, which are planned for one document per row: more than a step here has.
    """
    kv_heads = draw.choice((1, 3))
    heads = kv_heads * draw.choice((1, 3, 5))
    sizes = llama(
        vocabulary=draw.choice(PRIMES),
        hidden=heads * (2 * (draw.randrange(40, 160) // heads) + 1),
        inner=2 * draw.randrange(100, 400) + 1,
        layers=draw.randrange(2, 6),
        heads=heads,
        kv_heads=kv_heads,
    )
    sizes |= {"head_dim": 16 * draw.randrange(1, 5), "tie_word_embeddings": draw.random() < 0.5}
    step = {
        "length": draw.randrange(150, 400),
        "rows": draw.randrange(1, 5),
        "r": draw.randrange(1, 20),
        "checkpointing": draw.choice(("none", "block")),
    }
    return sizes, step


def settings(folder: Path, *, length: int, rows: int, r: int, checkpointing: str, compiles: bool) -> dict[str, Any]:
    return {
        "model": {"path": str(folder)},
        "data": {"path": "none.jsonl", "sequence_length": length},
        "adapter": {"target_modules": "all-linear", "r": r},
        "quant": {"cache": False},
        "train": {"micro_batch": rows, "global_batch": rows, "checkpointing": checkpointing, "compile": compiles},
    }


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return settings of steps of three random sizes, compiled and not."""
    draw, root = random.Random(SEED), tmp_path_factory.mktemp("sizes")
    steps = []
    for number in range(3):
        sizes, step = random_size(draw)
        write_random_checkpoint(root / str(number), sizes, num_shards=1)
        model_in(root / str(number))  # Derived here, where models are not proved (conftest.py): a fifth of the time.
        steps += [settings(root / str(number), **step, compiles=compiles) for compiles in (True, False)]
    return steps


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return settings of a step of the demo, and of one of the benchmarks, of random weights."""
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    write_random_checkpoint(folder, SMOLLM2, num_shards=1)
    model_in(folder)
    given = {"r": 16, "checkpointing": "none", "compiles": True}
    return [settings(folder, length=length, rows=rows, **given) for length, rows in ((256, 2), (512, 4))]


@pytest.mark.parametrize("path", cpu_paths.limited_to_each())
def test_random_sizes_have_the_planned_memory(steps: list[dict[str, Any]], path: str) -> None:
    for step, (planned, measured) in zip(steps, cpu_paths.run_limited(path, "steps", steps), strict=True):
        assert planned == pytest.approx(measured, rel=0.04), step


@pytest.mark.parametrize("path", cpu_paths.limited_to_each())
def test_the_size_of_the_demo_and_the_benchmark_has_the_planned_memory(
    smollm2: list[dict[str, Any]], path: str
) -> None:
    for step, (planned, measured) in zip(smollm2, cpu_paths.run_limited(path, "steps", smollm2), strict=True):
        assert planned == pytest.approx(measured, rel=0.05), step
