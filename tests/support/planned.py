"""Compare the planner's prediction for a finished run with what the run left behind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from distlora.architecture.config_checks import read_config
from distlora.architecture.shapes import KEEP, ModelShapes, Weight, shapes_of
from distlora.config import Config
from distlora.config.file import load_config
from distlora.planner import Plan, plan_of, traffic
from distlora.planner.model import model_in
from distlora.planner.traffic import StepBytes, step_traffic
from distlora.planner.workload import Workload
from distlora.run_folder.layout import BEST_NAME, CHECKPOINTS, PUBLISHED, steps
from support.plan_inputs import cpu_machine

WITHIN = 0.02


def plan_of_run(run_dir: Path, ranks: int) -> Plan:
    """From its settings and its model's config.json, as `distlora plan` makes it."""
    config = load_config(run_dir)
    model = model_in(Path(config.model.path), new_tokens=len(config.model.new_tokens))
    return plan_of(config, model, cpu_machine(ranks))


def assert_disk_as_planned(run_dir: Path, ranks: int = 1) -> None:
    """Every checkpoint and result, file by file together, is as large as the plan says."""
    plan = plan_of_run(run_dir, ranks)
    disk, method = plan.disk, plan.config.adapter.method
    checkpoints = steps(run_dir / CHECKPOINTS)
    assert checkpoints
    for folder in checkpoints:
        assert_close(size_of(folder), disk.checkpoint, folder)
    results = [run_dir / PUBLISHED[method], *([run_dir / BEST_NAME] if (run_dir / BEST_NAME).exists() else [])]
    assert len(results) <= disk.results_kept
    for folder in results:  # A model's folder, and an adapter's with new tokens, has the tokenizer too.
        assert_close(sum(file.stat().st_size for file in folder.glob("*.safetensors")), disk.result, folder)


def assert_close(found: int, planned: int, what: object) -> None:
    assert abs(found - planned) <= WITHIN * found, f"{what} has {found:,} bytes, and {planned:,} were planned"


def size_of(folder: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def traffic_of(config: Config, *, world: int) -> StepBytes:
    """Return the traffic of a step of a run, from its settings and its model's config.json."""
    folder, work = Path(config.model.path), Workload.of(config)
    shapes = shapes_of(read_config(folder), folder / "config.json")
    return step_traffic(work, shapes, world=world, accumulation=work.train.accumulation(world))


def held_bytes(shapes: ModelShapes, shards: int, *, format: str | None, itemsize: int) -> int:
    """Return the most bytes of the frozen base per rank, without replicated parts of weights (NF4: 4 bytes)."""
    tokens = shapes.kept_tokens if format == KEEP else (None, None)
    matrices = traffic.matrix_bytes(shapes, shards, tokens, itemsize)[: 1 if shapes.tied else 2]
    rest = sum(matrices) + itemsize * traffic.outside_numel(shapes, shards)
    return (traffic.layers_bytes(shapes, shards, format=format, itemsize=itemsize) + rest) // shards


def block_bytes(block: Iterable[Weight], ranks: int, *, format: str, itemsize: int) -> int:
    """Return the bytes of gathering one decoder layer whose large weights are in one format.

    `itemsize`: bytes per element that is not quantized.
    """
    return sum(
        traffic.weight_bytes(weight.shape, ranks, format=format if weight.packs else None, itemsize=itemsize)
        for weight in block
    )
