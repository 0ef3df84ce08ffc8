"""Measure models on the same rows of text one after the other: losses and divergences from the first model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distlora.architecture.tokens import load_tokenizer
from distlora.config import ModelConfig, UserError
from distlora.data.prepare import check_vocabulary, open_split, prepare
from distlora.data.rows import STARTS, PackedRows
from distlora.model.build import CausalLM
from distlora.parallel import Backend, Ranks, from_rank_0
from distlora.post.divergence import Loss, Readings, compare, evenly, let_go
from distlora.post.evaluate.request import Dtype, Subject, Text
from distlora.post.load_trained import load_in_fp32, load_trained
from distlora.post.trained import Trained
from distlora.system.progress import still_loading

ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The figures of one model beside the first."""

    subject: Subject
    loss: Loss
    largest_logit_difference: float
    """Largest absolute difference over all logits of all targets."""
    changed_tokens: float
    """Share of the targets whose likeliest token differs."""


def measure(
    subjects: Sequence[Subject], dtype: Dtype, rows: PackedRows, ranks: Ranks, say: Callable[[str], None]
) -> list[Measured]:
    """Measure each model in order, with one in memory at a time. Every rank must call it alike."""
    targets = torch.from_numpy(rows.targets.astype(np.float64))
    first: Readings | None = None
    measured = []
    for number, subject in enumerate(subjects, start=1):
        say(f"loading {subject.label} ({number} of {len(subjects)})")
        with still_loading() if ranks.rank == 0 else contextlib.nullcontext():
            model = load(subject, dtype, ranks)
        readings = Readings(rows, ranks, say, first)
        readings.take(model, subject.label)
        del model
        let_go(ranks.device)
        first = first or readings
        measured.append(
            Measured(
                subject=subject,
                loss=compare(readings.losses, first.losses, readings.divergences, targets),
                largest_logit_difference=float(readings.largest.max()),
                changed_tokens=float(readings.changed.sum() / targets.sum()),
            )
        )
    return measured


def load(subject: Subject, dtype: Dtype, ranks: Ranks) -> CausalLM:
    """Load the model of a subject on these ranks."""
    return load_shared(subject, dtype, ranks)[0]


def load_shared(subject: Subject, dtype: Dtype, ranks: Ranks) -> tuple[CausalLM, Backend]:
    """Load the model of a subject and its backend."""
    computes_in = subject.dtype or dtype
    if subject.name is not None and computes_in == "fp32":
        return load_in_fp32(subject.name.read(), ranks)
    trained = subject.read()
    model, backend = load_trained(replace(trained, spec=replace(trained.spec, dtype=computes_in)), ranks)
    if subject.rounded is not None:
        round_to(model, ROUNDED[subject.rounded])
        backend.watch_weights(model)
    return model, backend


@torch.no_grad()
def round_to(model: CausalLM, dtype: torch.dtype) -> None:
    """Round the unquantized weights to `dtype`, as a checkpoint in it would."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


COMPARED_ROWS = 64
"""Rows on which two tokenizers must agree."""


def open_rows(text: Text, first: Trained, ranks: Ranks) -> tuple[PackedRows, int]:
    """Return (rows to read, number of all rows) in tokens of the first model. Every rank must call it.

    Raises UserError for unreadable text and for missing rows.
    """
    if text.run is not None:
        rows = open_split(text.run, "eval")
        assert rows is not None, "refused when the request was made"
    else:
        arguments = (first.spec.model, text.data(), first.train)
        if ranks.rank == 0:
            prepare(*arguments)
        from_rank_0(0, ranks)  # The other ranks use the cache that rank 0 made.
        rows = PackedRows.open(prepare(*arguments), "train")
    return evenly(rows, text.most_rows), len(rows)


def check_same_tokens(rows: PackedRows, first: ModelConfig, other: ModelConfig, label: str) -> None:
    """Raise UserError if a model's tokenizer differs on this text, as losses per token would not be comparable."""
    folder = Path(other.path)
    check_vocabulary(other, int(np.max(rows.tokens, initial=0)))
    if (folder, other.new_tokens) == (Path(first.path), first.new_tokens):
        return
    ours, theirs = (load_tokenizer(Path(m.path), m.new_tokens) for m in (first, other))
    for row in range(min(COMPARED_ROWS, len(rows))):
        for piece in pieces(rows, row):
            # Retokenize the decoded text with both.
            text = ours.decode(piece, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if _tokens(ours, text) != _tokens(theirs, text):
                raise UserError(
                    f"{label} has another tokenizer than {first.path}: it makes other tokens of {text[:40]!r}, "
                    "and a loss a token of one cannot be compared with that of the other; evaluate them one at a time"
                )


def pieces(rows: PackedRows, row: int) -> list[list[int]]:
    """Return the documents of a row, padding included."""
    tokens, flags = rows.read(np.array([row]))
    starts = np.flatnonzero(flags[0] & STARTS)
    return [part.tolist() for part in np.split(tokens[0], starts) if len(part)]


def _tokens(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens
