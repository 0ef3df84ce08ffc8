"""Preference pairs, prepared for a run."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

from torch import Tensor

from distlora.config import Config
from distlora.data.loader import MicroBatch
from support.small_models import make_run


def write_preferences(path: Path) -> Path:
    """Write 60 pairs of uneven length: a text as it continues, and in capitals.

    Even a model without knowledge can tell these apart in texts that it has not seen.
    """
    topics = [topic.split() for topic in sorted(pydoc_data.topics.topics.values(), key=len)[20:80]]
    lines = []
    for number, words in enumerate(topics):
        answer = " " + " ".join(words[5 : 8 + number % 6])
        pair = {"prompt": " ".join(words[:5]), "chosen": answer.lower(), "rejected": answer.upper()}
        lines.append(json.dumps(pair) + "\n")
    path.write_text("".join(lines))
    return path


def prepare(
    run_dir: Path, folders: Path, preferences: Path, model: str = "llama", **sections: dict[str, Any]
) -> Config:
    """Prepare a run of six steps of six rows, with one to several pairs in each."""
    sections["data"] = {"path": str(preferences), "sequence_length": 160, "eval_fraction": 0.2}
    sections["train"] = {"objective": "dpo", "max_steps": 6, "global_batch": 6} | sections.get("train", {})
    return make_run(run_dir, folders, model, **sections)


def documents_of(batch: MicroBatch) -> list[tuple[Tensor, Tensor]]:
    """(tokens, labels) of every document that has a label, in order."""
    found = []
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if (labels[start:end] >= 0).any():
                found.append((ids[start:end], labels[start:end]))
    return found
