"""RUN/eval_documents.json: the held-out loss of a run by document, for a comparison of runs that are near each other.

Two runs that were evaluated on the same rows differ by much less than either of them varies from document to document,
so what tells their difference from noise is a comparison document by document. Needs neither torch nor numpy.

Letters: D held-out documents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distlora.config import UserError, require
from distlora.config.json_files import Shape, check_shape, read_object
from distlora.system import atomic_io

EVAL_DOCUMENTS_NAME = "eval_documents.json"

_SHAPE: Shape = {"step": int, "rows": str, "documents": [int], "losses": [(float, type(None))], "units": [int]}


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRecord:
    """What one evaluation found, document by document. The held-out loss is sum(losses) / sum(units)."""

    step: int
    """Optimizer steps behind it."""
    rows: str
    """SHA-256 of the packed rows that it ran: equal where the same documents were cut and packed alike."""
    documents: Sequence[int]
    """(D,) their numbers in the data, ascending: all sources in order, what is not held out counted too."""
    losses: Sequence[float | None]
    """(D,) loss sums over a document's target tokens (a pair's: of the pair), all of its pieces; None: not finite."""
    units: Sequence[int]
    """(D,) how many target tokens, or pairs."""

    @property
    def loss(self) -> float | None:
        """The held-out loss; None where that of some document is not finite."""
        known = [loss for loss in self.losses if loss is not None]
        return sum(known) / sum(self.units) if len(known) == len(self.losses) else None


def write_documents(run_dir: Path, record: DocumentRecord) -> None:
    """RUN/eval_documents.json, in one step; the evaluation before loses its place."""
    atomic_io.write_text(run_dir / EVAL_DOCUMENTS_NAME, json.dumps(asdict(record)) + "\n")


def read_documents(run_dir: Path) -> DocumentRecord:
    """Raises UserError for a run that has no such record, and for a damaged one."""
    path = run_dir / EVAL_DOCUMENTS_NAME
    if not path.is_file():
        raise UserError(f"{run_dir} says nothing of its held-out documents; it needs train.eval_documents=true")
    remedy = "train the run again, in a folder of its own"
    values = read_object(path, remedy)
    check_shape(values, _SHAPE, path, remedy)
    record = DocumentRecord(**{name: values[name] for name in _SHAPE})
    lengths = {len(record.documents), len(record.losses), len(record.units)}
    require(
        len(lengths) == 1 and len(record.units) > 0 and min(record.units) > 0,
        f"{path} is damaged: it does not give each document a loss and its units; {remedy}",
    )
    return record


def check_paired(one: DocumentRecord, other: DocumentRecord, names: tuple[str, str]) -> None:
    """Raises UserError where two evaluations are not of the same documents, cut alike."""
    require(
        one.rows == other.rows and one.documents == other.documents and one.units == other.units,
        f"{names[0]} and {names[1]} were evaluated on different held-out rows, so their losses cannot be compared "
        "document by document; give both the same data settings, train.seed and data.sequence_length",
    )
