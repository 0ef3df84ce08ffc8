"""Open the adapter to merge and check that it fits the base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from distlora.architecture.safetensors_headers import Segment, read_header
from distlora.config import UserError
from distlora.loading.peft_format import adaptable_shapes
from distlora.loading.plain_adapter import plain_form
from distlora.post.adapter_factors import AdapterFile, Factors
from distlora.post.base_weights import Base
from distlora.post.load_trained import check_base, weights_in
from distlora.post.merge.request import Onto
from distlora.post.trained import Trained
from distlora.weights.decompose import LowRankFactors
from distlora.weights.peft_folder import WEIGHTS_NAME, check_fits
from distlora.weights.peft_tokens import check_modules, check_rows
from distlora.weights.reader import Reader


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """An adapter that fits a base."""

    folder: Path
    """Folder it was read from; for a folder of checkpoints, the newest complete one."""
    file: AdapterFile
    header: Mapping[str, Segment]
    starts: Mapping[str, LowRankFactors]
    """PiSSA's initial adapters by path if the base lacks them, else empty. The file is then a plain LoRA of twice
    the rank: its first half is the trained adapter, its second half the negated initial one."""

    def factors(self, path: str, reader: Reader, *, experts: int | None = None) -> Factors:
        """Return the factors of one weight for the form of the base that is merged onto."""
        factors = self.file.factors(path, reader, experts=experts)
        if not self.starts:
            return factors
        half, start = factors.rank // 2, self.starts[path]
        if not (torch.equal(factors.A[half:], start.A) and torch.equal(factors.B[:, half:], -start.B)):
            raise UserError(
                f"{self.folder} was trained from another start: the second half of {path} is not that of this run; put "
                "back the folder that this run made"
            )
        return replace(factors, A=factors.A[..., :half, :], B=factors.B[..., :half].contiguous())

    def has(self, matrix: str) -> bool:
        """Return True if rows of the embedding or head, or all of it, were trained."""
        return matrix in self.file.token_rows or matrix in self.file.modules

    def rows(self, matrix: str, reader: Reader) -> dict[int, Tensor]:
        """Return the trained rows of the embedding or head, (H,) fp32 by token id."""
        of = self.file.token_rows.get(matrix)
        if of is None:
            return {}
        rows = self.file.tensor(self.header[of.name], of.name, reader)
        return dict(zip(of.ids, rows, strict=True))

    def module(self, matrix: str) -> Segment | None:
        """Return the segment of an embedding or head that was trained whole."""
        of = self.file.modules.get(matrix)
        return None if of is None else self.header[of.name]

    def module_rows(self, segment: Segment, first: int, count: int, reader: Reader) -> Tensor:
        """Return rows of it in fp32, fewer at its end. Raises UserError for NaN and Inf."""
        width = segment.shape[1]
        last = min(first + count, segment.shape[0])
        rows = reader.read([segment], min(first, last) * width, last * width).view(-1, width).float()
        if not bool(torch.isfinite(rows).all()):
            raise UserError(f"{segment.file} holds NaN or Inf; the adapter is damaged, save it again")
        return rows


@contextlib.contextmanager
def open_adapter(trained: Trained, base: Base, onto: Onto) -> Iterator[Adapter | None]:
    """Open the adapter of `trained`; yield None for the base alone.

    Raises UserError if it is damaged or belongs to another base.
    """
    spec, place = trained.spec, trained.weights
    if place is None:
        yield None
        return
    folder = weights_in(place)
    if not trained.foreign:
        check_base(folder, trained)
    with plain_form(folder, spec.adapter, trained.initial_adapter_dir) as file:
        adapter = AdapterFile.open(file)
        residuals = {name.removesuffix(".weight"): weight.residual for name, weight in base.weights.items()}
        starts = {path: residual.start for path, residual in residuals.items() if residual is not None}
        _check_belongs(adapter, base)
        yield Adapter(
            folder=folder,
            file=adapter,
            header=read_header(file / WEIGHTS_NAME),
            starts=starts if onto == "trained" else {},
        )


def _check_belongs(adapter: AdapterFile, base: Base) -> None:
    """Raise UserError if the adapter does not fit the model exactly."""
    model, file = base.model, adapter.read.folder / WEIGHTS_NAME
    check_fits(adapter.read, adapter.settings, adaptable_shapes(model))
    hidden = int(model.hf_config.hidden_size)
    check_rows(adapter.token_rows, file, stored=model.vocabulary.stored, hidden=hidden)
    rows = (model.vocabulary.stored, model.vocabulary.rows)
    check_modules(adapter.modules, file, rows=rows, hidden=hidden)
