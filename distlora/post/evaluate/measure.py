"""Measure models on the same rows of text one after the other, and the forms in which a merged one could be stored."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distlora.architecture.tokens import load_tokenizer
from distlora.config import ModelConfig, UserError
from distlora.data.prepare import check_vocabulary, prepare
from distlora.data.rows import STARTS, PackedRows, open_split
from distlora.model.build import CausalLM
from distlora.parallel import Backend, Ranks, from_rank_0
from distlora.post.divergence import Readings, compare, evenly, let_go
from distlora.post.evaluate.request import Dtype, Merged, Subject, Text
from distlora.post.load_trained import load_in_fp32, load_trained
from distlora.post.merge.merge import DTYPES, merge_to
from distlora.post.merge.request import Onto, Receipt, check_mergeable, written
from distlora.post.trained import Trained
from distlora.system.progress import say, still


def measure(
    subjects: Sequence[Subject], dtype: Dtype, rows: PackedRows, ranks: Ranks, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return the figures of each model in order, with one in memory at a time; a non-finite value is None.

    Every rank must call it alike. Divergences and differences are those from the first model: the largest of a logit
    over all targets, and the share of the targets whose likeliest token differs.
    """
    targets = torch.from_numpy(rows.targets.astype(np.float64))
    first: Readings | None = None
    measured = []
    for number, subject in enumerate(subjects, start=1):
        say(f"loading {subject.label} ({number} of {len(subjects)})")
        with still("loading") if ranks.rank == 0 else contextlib.nullcontext():
            model, _ = load(subject, dtype, ranks)
        readings = Readings(rows, ranks, say, first)
        readings.take(model, subject.label)
        del model
        let_go(ranks.device)
        first = first or readings
        loss = compare(readings.losses, first.losses, readings.divergences, targets)
        figures = {
            "loss": loss.loss,
            "perplexity": loss.perplexity,
            "loss_difference": loss.difference,
            "loss_standard_error": loss.standard_error,
            "divergence": loss.divergence,
            "largest_logit_difference": float(readings.largest.max()),
            "changed_tokens": float(readings.changed.sum() / targets.sum()),
        }
        finite = {name: value if value is None or math.isfinite(value) else None for name, value in figures.items()}
        measured.append({"label": subject.label, "kind": subject.kind, **finite})
    return measured


@torch.no_grad()
def load(subject: Subject, dtype: Dtype, ranks: Ranks) -> tuple[CausalLM, Backend]:
    """Load the model of a subject on these ranks, and its backend."""
    computes_in = subject.dtype or dtype
    if subject.name is not None and computes_in == "fp32":
        return load_in_fp32(subject.name.read(), ranks)
    trained = subject.read()
    model, backend = load_trained(replace(trained, spec=replace(trained.spec, dtype=computes_in)), ranks)
    if subject.rounded is not None:  # As a checkpoint in 16 bits would be.
        for parameter in model.parameters():
            parameter.copy_(parameter.to(DTYPES[subject.rounded]))
        backend.watch_weights(model)
    return model, backend


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
    if (folder, other.new_tokens, other.special_tokens) == (Path(first.path), first.new_tokens, first.special_tokens):
        return
    ours, theirs = (load_tokenizer(Path(m.path), m.new_tokens, m.special_tokens) for m in (first, other))
    for row in range(min(64, len(rows))):
        for piece in pieces(rows, row):
            # Retokenize the decoded text with both.
            text = ours.decode(piece, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if ours.encode(text, add_special_tokens=False) != theirs.encode(text, add_special_tokens=False):
                raise UserError(
                    f"{label} has another tokenizer than {first.path}: it makes other tokens of {text[:40]!r}, "
                    "and a loss a token of one cannot be compared with that of the other; evaluate them one at a time"
                )


def pieces(rows: PackedRows, row: int) -> list[list[int]]:
    """Return the documents of a row, padding included."""
    tokens, flags = rows.read(np.array([row]))
    starts = np.flatnonzero(flags[0] & STARTS)
    return [part.tolist() for part in np.split(tokens[0], starts) if len(part)]


TOO_FAR = 1e-2
"""Largest expected logit difference between an exact fp32 sum and the trained model; deep models reach 1e-3."""


@contextlib.contextmanager
def other_forms(merged: Merged | None, ranks: Ranks, tell: Callable[[str], None]) -> Iterator[list[Subject]]:
    """Yield the forms that a merge is compared with; remove the folders made for it afterwards.

    The forms are the exact sum in fp32, rounded to bf16 and fp16, quantized to NF4 again, and the sum on the stored
    base. The trained model computed in bf16 is added as a yardstick.
    """
    if merged is None or not merged.compares:
        yield []
        return
    folder = Path(merged.folder)
    scratch = folder.with_name(f".{folder.name}-compared")
    try:
        trained, receipt = merged.name.read(), Receipt.read(folder)
        yield _forms(merged, trained, receipt, scratch, ranks, tell)
    finally:
        from_rank_0(0, ranks)
        if ranks.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _forms(
    merged: Merged, trained: Trained, receipt: Receipt, scratch: Path, ranks: Ranks, tell: Callable[[str], None]
) -> list[Subject]:
    def exact_sum(onto: Onto) -> str:
        """Return the folder of the sum: the merge itself, or a new one."""
        if (receipt.onto, receipt.dtype) == (onto, "fp32"):
            return merged.folder
        if ranks.rank == 0:
            scratch.mkdir(exist_ok=True)
            merge_to(trained, scratch / onto, onto=onto, dtype=torch.float32, say=tell)
        from_rank_0(0, ranks)
        return str(scratch / onto)

    if ranks.rank == 0 and scratch.is_dir():
        shutil.rmtree(scratch)  # Left by a comparison that was killed.
    exact = exact_sum("trained")
    forms = [
        Subject(label="exact sum in fp32", kind="form", model=exact),
        Subject(label="exact sum in bf16", kind="form", model=exact, rounded="bf16"),
        Subject(label="exact sum in fp16", kind="form", model=exact, rounded="fp16"),
        Subject(label="exact sum in NF4 again", kind="form", model=exact, quant="nf4"),
    ]
    if receipt.onto == "trained":
        own = {"fp32": 0, "bf16": 1, "fp16": 2}.get(receipt.dtype)
        forms = [form for number, form in enumerate(forms) if number != own]
    if trained.spec.quant.is_nf4 and receipt.onto == "trained":
        try:
            check_mergeable(trained, "original")
        except UserError:
            pass  # The adapter belongs to the NF4 base alone.
        else:
            on_disk = exact_sum("original")
            forms.append(Subject(label="sum on the base on disk, fp32", kind="form", model=on_disk))
    forms.append(Subject(label="as trained, computed in bf16", kind="adapted", name=merged.name, dtype="bf16"))
    return forms


def add_to_receipt(merged: Merged, figures: dict[str, Any]) -> None:
    """Write the section `measured` of merge.json, and merge.md."""
    folder = Path(merged.folder)
    receipt = Receipt.read(folder)
    dataclasses.replace(receipt, measured=figures).write(folder)
    (own,) = (model for model in figures["models"] if model["kind"] == "merged")
    furthest = own["largest_logit_difference"]
    if (receipt.onto, receipt.dtype) == ("trained", "fp32") and (furthest is None or furthest > TOO_FAR):
        say(
            f"WARNING: a logit of {merged.folder} is {written(furthest, '.2g')} from the model as it was trained, more "
            "than rounding explains; do not use it, and report this"
        )
