"""Measure the forms in which a merged model could be stored, for the receipt of a merge."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from distlora.config import UserError
from distlora.parallel import Ranks, from_rank_0
from distlora.post.evaluate.request import Merged, Subject
from distlora.post.merge.merge import merge_to
from distlora.post.merge.receipt import Receipt, written
from distlora.post.merge.request import Onto, check_mergeable
from distlora.post.trained import Trained
from distlora.system.progress import say

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
        own = {"fp32": 0, "bf16": 1, "fp16": 2}[receipt.dtype]
        del forms[own]
    if trained.spec.quant.is_nf4 and receipt.onto == "trained" and may_merge_onto_original(trained):
        on_disk = exact_sum("original")
        forms.append(Subject(label="sum on the base on disk, fp32", kind="form", model=on_disk))
    forms.append(Subject(label="as trained, computed in bf16", kind="adapted", name=merged.name, dtype="bf16"))
    return forms


def may_merge_onto_original(trained: Trained) -> bool:
    """Return True if the adapter can be merged onto the original, unquantized base."""
    try:
        check_mergeable(trained, "original")
    except UserError:
        return False
    return True


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
