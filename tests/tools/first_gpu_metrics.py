"""Read the metrics of a run for first_gpu.py."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


def lines_of(run: Path) -> list[Figures]:
    """Return the lines of a run's metrics, one per step; a running one may have written half of the last."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run: Path) -> list[float]:
    """Return the losses of a run by step; a repeated step counts once."""
    return list({line["step"]: line["loss"] for line in lines_of(run) if "loss" in line}.values())


def speed(run: Path) -> Figures:
    """Return a run's tokens per second, MFU, and memory beside the plan, by category."""
    lines = lines_of(run)
    figures: Figures = {}
    for name in ("tokens_per_second", "mfu"):
        values = [line[name] for line in lines if name in line][1:] or [line[name] for line in lines if name in line]
        figures[name] = statistics.median(values) if values else None
    measured = next((line for line in reversed(lines) if "memory/peak" in line), {})
    peaks = [line["peak_memory_bytes"] for line in lines if "peak_memory_bytes" in line]
    figures["peak_bytes"] = max(peaks, default=None)
    figures["memory"] = {name: value for name, value in measured.items() if name.startswith("memory")}
    return figures


def memory_table(memory: Mapping[str, int]) -> str:
    """Return the memory of a step by category beside the plan."""
    rows = [
        (name, f"memory/{name}", f"memory_planned/{name}")
        for name in dict.fromkeys(key.partition("/")[2] for key in memory)
        if name not in ("peak", "planned")
    ]
    rows.append(("peak", "memory/peak", "memory/planned"))
    lines = [f"| {name} | {memory.get(a, 0) / 1e9:.3f} | {memory.get(b, 0) / 1e9:.3f} |" for name, a, b in rows]
    return "\n".join(["| category | measured, GB | planned, GB |", "|--|--|--|", *lines])
