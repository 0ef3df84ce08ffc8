"""Sum what was trained beside the adapters: rows of the embedding or head, or all of it.

The sum is exact: base + sum w_i (module_i - base). A new token's row has no base value, so only one adapter may bring
such rows, with the weight 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distlora.architecture.safetensors_headers import Segment
from distlora.architecture.tokens import EMBEDDING, HEAD
from distlora.config import UserError
from distlora.loading.tensor_files import READ_ELEMENTS, DeferredTensor
from distlora.post.adapter_factors import AdapterFile
from distlora.post.base_weights import HEAD_NAME, Base, BaseWeight
from distlora.weights.reader import Reader


@dataclass(frozen=True, slots=True)
class Weighted:
    """A member with its opened file."""

    place: str
    weight: float
    file: AdapterFile
    header: Mapping[str, Segment]
    """Header of the file, by tensor name."""


def matrix_of(base: Base, matrix: str) -> BaseWeight:
    """Return the base's embedding or head; a tied head is the embedding."""
    embedding = base.weights[base.embedding_name]
    return embedding if matrix == EMBEDDING else base.weights.get(HEAD_NAME, embedding)


def _path(base: Base, matrix: str) -> str:
    return f"{base.model.family.decoder}.{EMBEDDING}" if matrix == EMBEDDING else HEAD


def row_ids(members: Sequence[Weighted]) -> dict[str, list[int]]:
    """Return the rows that any member trained, by matrix."""
    found: dict[str, set[int]] = {}
    for member in members:
        for matrix, rows in member.file.token_rows.items():
            found.setdefault(matrix, set()).update(rows.ids)
    return {matrix: sorted(ids) for matrix, ids in found.items()}


def combined_rows(members: Sequence[Weighted], base: Base, reader: Reader) -> dict[str, Tensor]:
    """Return the summed rows by PEFT's names. Raises UserError for new tokens without an exact sum."""
    tensors = {}
    for matrix, ids in row_ids(members).items():
        weight = matrix_of(base, matrix)
        stored, width = weight.shape
        _check_new(members, matrix, stored)
        rows = torch.zeros(len(ids), width)
        for at, id in enumerate(ids):
            if id < stored:
                rows[at] = reader.read(weight.source.segments, id * width, (id + 1) * width).float()
        start = rows.clone()
        for member in members:
            of = member.file.token_rows.get(matrix)
            if of is None:
                continue
            mine = member.file.tensor(member.header[of.name], of.name, reader)
            places = [ids.index(id) for id in of.ids]
            rows[places] += member.weight * (mine - start[places])
        tensors[f"base_model.model.{_path(base, matrix)}.token_adapter.trainable_tokens_delta"] = rows
    return tensors


def _check_new(members: Sequence[Weighted], matrix: str, stored: int) -> None:
    owners = [
        member
        for member in members
        if matrix in member.file.token_rows and max(member.file.token_rows[matrix].ids) >= stored
    ]
    if owners and (len(owners) > 1 or owners[0].weight != 1):
        raise UserError(
            f"{' and '.join(member.place for member in owners)} trained new tokens (rows of {matrix} from {stored:,} "
            "on), which the base has no value of, so a share of them means nothing; one adapter with new tokens can "
            f"be in a sum, with the weight 1: {owners[0].place}=1"
        )


def combined_modules(members: Sequence[Weighted], base: Base, reader: Reader) -> dict[str, DeferredTensor]:
    """Return the summed modules by PEFT's names, computed as they are written.

    Raises UserError for another size than the base's.
    """
    tensors = {}
    for matrix in sorted({name for member in members for name in member.file.modules}):
        weight = matrix_of(base, matrix)
        mine = [member for member in members if matrix in member.file.modules]
        for member in mine:
            if member.file.modules[matrix].shape != weight.shape:
                raise UserError(
                    f"{member.place} has {matrix} of {list(member.file.modules[matrix].shape)}, and the base's is "
                    f"{list(weight.shape)}: rows of new tokens have no exact sum; leave it out"
                )
        name = f"base_model.model.{_path(base, matrix)}.weight"
        make = _maker(mine, matrix, weight, reader)
        tensors[name] = DeferredTensor(shape=torch.Size(weight.shape), dtype=torch.float32, make=make)
    return tensors


def _maker(members: Sequence[Weighted], matrix: str, weight: BaseWeight, reader: Reader) -> Callable[[], Tensor]:
    def make() -> Tensor:
        whole = torch.empty(weight.numel)
        for first in range(0, weight.numel, READ_ELEMENTS):
            stop = min(first + READ_ELEMENTS, weight.numel)
            start = reader.read(weight.source.segments, first, stop).float()
            whole[first:stop] = start
            for member in members:
                segment = member.header[member.file.modules[matrix].name]
                whole[first:stop] += member.weight * (reader.read([segment], first, stop).float() - start)
        if not bool(torch.isfinite(whole).all()):
            raise UserError(
                f"{matrix} holds NaN or Inf in the base or in {', '.join(m.place for m in members)}; leave it out "
                "(`distlora verify` finds it in a run)"
            )
        return whole.view(weight.shape)

    return make


def new_token_owner(members: Sequence[Weighted], base: Base) -> Weighted | None:
    """Return the member whose tokenizer the sum needs."""
    for member in members:
        for matrix, rows in member.file.token_rows.items():
            if max(rows.ids) >= matrix_of(base, matrix).shape[0]:
                return member
    return None
