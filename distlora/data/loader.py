"""The last stage: rows to the batches of a rank. Any step by random access, so the data position is the step number.

Letters: B rows of a micro-batch, L tokens of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distlora.config import TrainConfig, UserError
from distlora.data.images import ImageTensors
from distlora.data.images_ahead import ImagesAhead, RowImages
from distlora.data.packing import mismatched_rows
from distlora.data.rows import BAD, EMPTY, IMAGE, JUDGED, RIGHT, STARTS, TRAINED, PackedRows, RowOrder, open_split
from distlora.parallel import Ranks

IGNORED = -100
"""The label of a position that is not trained, as torch's and transformers' losses have it."""


_VERDICTS = np.zeros(1 + (JUDGED | BAD), np.int64)
_VERDICTS[JUDGED], _VERDICTS[JUDGED | BAD] = 1, -1
"""Values of MicroBatch.judged by the bits of a flag."""


class MicroBatch(NamedTuple):
    """Rows that a rank runs at once. All are int64 CPU tensors unless they say otherwise, the first three (B, L)."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    """Already shifted: the target at this position, or the class of a step that ends there; -100 for none."""
    position_ids: torch.Tensor
    """0 at the first token of each document, and of the padding."""
    rows: torch.Tensor
    """(B,) the number of each row in the packed data, -1 for an empty row."""
    slots: torch.Tensor | None = None
    """(B,) which adapter each row uses, where trials share a base; None: the only one."""
    logps: torch.Tensor | None = None
    """(B, L) fp32: log-probability of each label as it was sampled; None where nothing is, as in the next two."""
    advantages: torch.Tensor | None = None
    """(B, L) fp32: advantage of the answer that each label belongs to."""
    weights: torch.Tensor | None = None
    """(B, L) fp32: weight of each label's loss in the sum that is divided by the step's labels."""
    margins: torch.Tensor | None = None
    """(B, M) fp32: the margin of each pair of a row; None if no record has one."""
    judged: torch.Tensor | None = None
    """(B, L): at the first token of each judged answer's document 1 if it is good, -1 if it is bad, else 0; None: no
    answer is judged."""
    is_image: torch.Tensor | None = None
    """(B, L) bool: True where an embedding of an image replaces the token; None: text alone."""
    images: tuple[RowImages, ...] | None = None
    """The tensors of each row's images, on the CPU, in the order of their tokens; None: text alone."""


def joined(micro_batches: Sequence[MicroBatch]) -> MicroBatch:
    """Return the rows of micro-batches as one, in their order."""
    columns: Any = zip(*micro_batches, strict=True)
    return MicroBatch._make(
        torch.cat(column) if isinstance(column[0], torch.Tensor) else column[0] and tuple(itertools.chain(*column))
        for column in columns
    )


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A rank's sequences of one optimizer step."""

    micro_batches: list[MicroBatch]
    """The same number on every rank and in every step."""
    global_targets: int
    """Trained targets in the rows of all ranks: what the step's loss sum is divided by."""
    global_pairs: int
    """Pairs of a chosen and a rejected answer, or judged answers, in the rows of all ranks; 0 where the data has none.
    """
    global_rows: int
    """Rows of all ranks that are not empty."""
    rows: tuple[int, ...]
    """This rank's rows in order of the micro-batches; -1 = an empty row."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the step that are known before it, the same on every rank."""
    mismatched: Sequence[MicroBatch] = ()
    """The step's prompts with answers to other prompts, packed anew (StepLoader.mismatched): as many on every rank."""


@dataclass(eq=False)
class StepLoader(RowOrder):
    """Batches of a rank: a pure function from the step."""

    slot: int | None = None
    """Adapter that the rows use, where trials share a base."""
    mismatched: bool = False
    """Give each step the prompts of its judged answers a second time, each with the answer before it in the order of
    the rows, the first with the last one. What is then longer than a row is cut. A step's only answer has no labels."""
    image_tensors: ImageTensors | None = None
    """Makes the tensors of the rows' images; None: the rows have none."""
    _ahead: ImagesAhead | None = field(default=None, init=False)
    _are_judged: bool = field(default=False, init=False)
    """True if the answers of the data are judged; then every row has some."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._are_judged = bool((self.rows.flags[0] & JUDGED).any())
        if self.rows.images is not None:
            if self.image_tensors is None:
                raise UserError(f"{self.rows.folder} holds images, which only training reads; name data without images")
            self._ahead = ImagesAhead(self.rows.images, self.image_tensors, rows=self.micro_batch)

    def batch(self, step: int) -> StepBatch:
        """Return this rank's micro-batches of step `step` (from 0; epochs follow each other without end)."""
        assert step >= 0, f"step {step}"
        step_rows = self.rows_of_step(step)
        own = self.rows_of_ranks(step)[:, self.rank]
        micro_batches = [self._assemble(indices, self.rows.read) for indices in own]
        if self._ahead is not None:
            following = self.rows_of_ranks(step + 1)[:, self.rank]
            images = self._ahead.step(step, own.reshape(-1).tolist(), following.reshape(-1).tolist())
            micro_batches = [
                batch._replace(images=tuple(itertools.islice(images, len(batch.rows)))) for batch in micro_batches
            ]
        return StepBatch(
            micro_batches=micro_batches,
            global_rows=len(step_rows),
            global_targets=int(self.rows.targets[step_rows].sum(dtype=np.int64)),
            global_pairs=int(self.rows.pairs[step_rows].sum(dtype=np.int64)),
            rows=tuple(own.reshape(-1).tolist()),
            mismatched=self._mismatched(step_rows) if self.mismatched else (),
        )

    def largest_image(self) -> Mapping[str, torch.Tensor] | None:
        """Return the tensors of an image with the most tokens, on the CPU; None if the rows have none."""
        if self.rows.images is None or self.image_tensors is None:
            return None
        return self.image_tensors(self.rows.images.largest())

    def _mismatched(self, step_rows: np.ndarray) -> list[MicroBatch]:
        """Return this rank's micro-batches of mismatched prompts and answers. Every rank packs those of all ranks."""
        # Where every row holds one answer, so do these: the model may mix documents, and the number of rows is known.
        single = bool(self.rows.pairs.max() == 1)
        columns = mismatched_rows(*self.rows.read(step_rows), self.rows.pad_token_id, single=single)
        own = self.deal(np.arange(len(columns[0])))[:, self.rank]
        return [self._assemble(indices, lambda rows: tuple(column[rows] for column in columns)) for indices in own]

    def _assemble(self, indices: np.ndarray, read: Callable[[np.ndarray], tuple[np.ndarray, ...]]) -> MicroBatch:
        """Return the tensors of B rows, whose tokens and flags `read` returns; an index of -1 gives an empty row."""
        length = self.rows.sequence_length
        tokens = np.full((len(indices), length), self.rows.pad_token_id, np.int64)
        flags = np.zeros((len(indices), length), np.uint8)
        flags[:, 0] = STARTS
        real = np.flatnonzero(indices != EMPTY)
        if len(real):
            tokens[real], flags[real] = read(indices[real])
        following = np.full_like(tokens, IGNORED)
        following[:, :-1] = tokens[:, 1:]
        if self.rows.classifies:
            following = (flags & RIGHT != 0).astype(np.int64)
        position = np.arange(length)
        start = np.maximum.accumulate(np.where(flags & STARTS, position, 0), axis=1)
        return MicroBatch(
            input_ids=torch.from_numpy(tokens),
            labels=torch.from_numpy(np.where(flags & TRAINED, following, IGNORED)),
            position_ids=torch.from_numpy(position - start),
            rows=torch.from_numpy(indices.astype(np.int64)),
            slots=None if self.slot is None else torch.full((len(indices),), self.slot),
            margins=self._margins(indices),
            judged=torch.from_numpy(_VERDICTS[flags & (JUDGED | BAD)]) if self._are_judged else None,
            is_image=None if self._ahead is None else torch.from_numpy(flags & IMAGE != 0),
        )

    def _margins(self, indices: np.ndarray) -> torch.Tensor | None:
        """Return the margins of the pairs of B rows; 0 in an empty row."""
        if self.rows.margins is None:
            return None
        return torch.from_numpy(np.where((indices == EMPTY)[:, None], np.float32(0), self.rows.margins[indices]))


def open_data(
    run_dir: Path,
    train: TrainConfig,
    ranks: Ranks,
    slot: int | None = None,
    image_tensors: ImageTensors | None = None,
) -> tuple[StepLoader, StepLoader | None]:
    """Return the loaders of the training rows and of the held-out rows, if there are any."""
    rows, held_out = open_split(run_dir, "train"), open_split(run_dir, "eval")
    assert rows is not None, "a preparation without training rows is refused"
    opened: dict[str, Any] = {"slot": slot, "image_tensors": image_tensors}
    evaluation = None if held_out is None else step_loader(held_out, train, ranks, shuffle=False, **opened)
    return step_loader(rows, train, ranks, shuffle=True, **opened), evaluation


def step_loader(
    rows: PackedRows,
    train: TrainConfig,
    ranks: Ranks,
    *,
    shuffle: bool,
    slot: int | None = None,
    image_tensors: ImageTensors | None = None,
) -> StepLoader:
    """Return the loader of this rank's rows of each step."""
    return StepLoader(
        rows,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        rank=ranks.rank,
        world=ranks.world,
        seed=train.seed,
        shuffle=shuffle,
        slot=slot,
        mismatched=train.needs.mismatched,
        image_tensors=image_tensors,
    )
