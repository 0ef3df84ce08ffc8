"""RUN/eval_documents.json: the held-out loss by document, to compare runs document by document. Needs no torch.

Two runs evaluated on the same sequences differ much less than either varies between documents, so only a paired
comparison separates their difference from noise. Letters: D held-out documents.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distlora.config import UserError, require
from distlora.config.json_files import Shape, read_object
from distlora.system import atomic_io

EVAL_DOCUMENTS_NAME = "eval_documents.json"

_SHAPE: Shape = {"step": int, "rows": str, "documents": [int], "losses": [(float, type(None))], "units": [int]}


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRecord:
    """One evaluation by document. The held-out loss is sum(losses) / sum(units)."""

    step: int
    """Optimizer steps done."""
    rows: str
    """SHA-256 of the packed sequences: equal if the same documents were split and packed alike."""
    documents: Sequence[int]
    """(D,) document numbers, ascending, over all sources in order, including documents that are not held out."""
    losses: Sequence[float | None]
    """(D,) loss sums over a document's target tokens (or over a preference pair); None if not finite."""
    units: Sequence[int]
    """(D,) numbers of target tokens, or of pairs."""

    @property
    def loss(self) -> float | None:
        """Held-out loss; None if some document's is not finite."""
        known = [loss for loss in self.losses if loss is not None]
        return sum(known) / sum(self.units) if len(known) == len(self.losses) else None


def write_documents(run_dir: Path, record: DocumentRecord) -> None:
    """Replace RUN/eval_documents.json atomically."""
    atomic_io.write_text(run_dir / EVAL_DOCUMENTS_NAME, json.dumps(asdict(record)) + "\n")


def read_documents(run_dir: Path) -> DocumentRecord:
    """Read RUN/eval_documents.json. Raises UserError if it is missing or damaged."""
    path = run_dir / EVAL_DOCUMENTS_NAME
    if not path.is_file():
        raise UserError(f"{run_dir} has no held-out losses by document; train it with train.eval_documents=true")
    remedy = "train the run again in another folder"
    values = read_object(path, remedy, _SHAPE)
    record = DocumentRecord(**{name: values[name] for name in _SHAPE})
    lengths = {len(record.documents), len(record.losses), len(record.units)}
    require(
        len(lengths) == 1 and len(record.units) > 0 and min(record.units) > 0,
        f"{path} is damaged: it does not have a loss and units for each document; {remedy}",
    )
    return record


def check_paired(one: DocumentRecord, other: DocumentRecord, names: tuple[str, str]) -> None:
    """Raise UserError unless two evaluations are of the same documents, split and packed alike."""
    require(
        one.rows == other.rows and one.documents == other.documents and one.units == other.units,
        f"{names[0]} and {names[1]} were evaluated on different held-out sequences, so their losses cannot be compared "
        "document by document; give both runs the same data settings, train.seed and data.sequence_length",
    )
