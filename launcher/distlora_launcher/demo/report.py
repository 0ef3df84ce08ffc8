"""What the demo says at its end: a short table, one answer before and after, what to try next. Pure text."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out question and three answers."""

    question: str
    reference: str
    before: str
    after: str


def read_summary(run_dir: Path) -> dict[str, float]:
    """RUN/summary.json, as the worker wrote it."""
    return json.loads((run_dir / "summary.json").read_text())


def table(figures: Mapping[str, float], ranks: int, seconds: float) -> str:
    """The figures of the run, a line each. `seconds`: the whole demo."""
    gathered, as_bf16 = figures["gathered_bytes_per_step"], figures["gathered_bytes_per_step_bf16"]
    # One process holds the whole base and gathers nothing.
    as_16_bit = (
        f"{size(as_bf16)} ({as_bf16 / gathered:.1f}x) if the blocks were bf16, as the embedding is" if gathered else ""
    )
    wire = f"{size(gathered)}; {as_16_bit}" if gathered else "none"
    rows = {
        "held-out loss, base": f"{figures['base_eval_loss']:.3f} nats a token",
        "held-out loss, tuned": f"{figures['eval_loss']:.3f} nats a token",
        "4-bit weights": f"{figures['bits_per_parameter']:.3f} bits a parameter (16 in bf16)",
        f"base gathered a step ({ranks} ranks)": wire,
        "adapter gradients reduced a step": size(figures["reduced_bytes_per_step"]),
        "peak memory of a rank": f"{size(figures['peak_memory_bytes'])} (most of it Python and torch themselves)",
        "adapter": f"{figures['trainable_parameters']:,.0f} parameters, {size(figures['adapter_bytes'])}",
        "fine-tuning": f"{figures['train_seconds']:.0f} s at {figures['tokens_per_second']:,.0f} tokens/s",
        "the whole demo": f"{seconds:.0f} s",
    }
    width = max(map(len, rows))
    return "\n".join(f"  {name:{width}}  {value}" for name, value in rows.items())


def size(count: float) -> str:
    """`1.2 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def verdict(figures: Mapping[str, float]) -> str:
    """What did and did not improve, in words."""
    before, after = figures["base_eval_loss"], figures["eval_loss"]
    if after >= before:
        return "Fine-tuning did not lower the held-out loss here, which it should: please report it."
    return (
        f"The held-out loss fell by {before - after:.2f} nats: the tuned model gives the words of the true answers\n"
        f"{math.exp(before - after):,.1f} times the probability, token by token, on documents it never saw.\n"
        "A base of 2.5 million parameters that read for two minutes still answers in broken English."
    )


def sample_text(sample: Sample) -> str:
    """Four lines; a long answer is cut, as a small model that has lost its thread repeats itself."""
    rows = {
        "question": sample.question,
        "docstring": sample.reference,
        "base": sample.before or "(nothing)",
        "tuned": sample.after or "(nothing)",
    }
    return "\n".join(f"  {name:9}  {textwrap.shorten(text, 160, placeholder=' ...')}" for name, text in rows.items())


def next_commands(base: Path, run_dir: Path) -> str:
    """What to type next; each line works as it stands, or with the reader's own files."""
    return "\n".join(
        [
            f"  distlora train model.path={base}/model data.path={base}/pairs.jsonl recipe=qlora adapter.r=4",
            "  distlora train model.path=YOUR_MODEL data.path=YOUR.jsonl recipe=qlora cluster.gpus_per_node=2",
            f"  distlora generate {run_dir}",
            f"  less {run_dir}/metrics.jsonl",
            "  distlora train --help",
        ]
    )
