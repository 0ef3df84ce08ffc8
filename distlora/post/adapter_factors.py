"""An adapter on disk, a weight at a time: its factors, and what was trained whole beside them.

Letters: O out features, I in features, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distlora.architecture.safetensors_headers import Segment
from distlora.config import AdapterConfig, UserError
from distlora.weights.peft_folder import PeftAdapter, read_peft_adapter
from distlora.weights.peft_tokens import PeftTokenRows, PeftWholeModule
from distlora.weights.reader import Reader


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """What an adapter adds to one weight: scaling * B A, and with DoRA the norm that each row then has."""

    A: Tensor
    """(R, I) fp32; of experts (E, R, I)."""
    B: Tensor
    """(O, R) fp32; of experts (E, O, R)."""
    scaling: float
    magnitude: Tensor | None = None
    """(O,) fp32."""

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def delta(self) -> Tensor:
        """scaling * B A, (O, I) or (E, O, I) fp32: dense."""
        return (self.scaling * self.B) @ self.A


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFile:
    """A LoRA or DoRA in PEFT's format that belongs to the base as its checkpoint has it."""

    read: PeftAdapter
    """What its config and the file's header say."""
    settings: AdapterConfig
    """Rank, scale and targets: its own."""
    paths: tuple[str, ...]
    """The adapted linears and fused weights of experts by Hugging Face path, in order."""

    @classmethod
    def open(cls, folder: Path) -> AdapterFile:
        """Raises UserError for what `read_peft_adapter` refuses: damaged, a pickle, another kind of adapter."""
        read = read_peft_adapter(folder)
        return cls(read=read, settings=read.own, paths=tuple(read.paths))

    @property
    def token_rows(self) -> Mapping[str, PeftTokenRows]:
        """Trained rows of the embedding or head, by matrix."""
        return self.read.token_rows

    @property
    def modules(self) -> Mapping[str, PeftWholeModule]:
        """What was trained whole, by last name."""
        return self.read.modules

    def factors(self, path: str, reader: Reader, *, experts: int | None = None) -> Factors:
        """Those of one weight; `experts`: their number, where it is fused. Raises UserError for NaN and Inf."""
        segments = {part: self.read.tensors[path, part] for part in ("A", "B", "magnitude") if self._has(path, part)}
        parts = {part: self.tensor(segment, self.read.names[path, part], reader) for part, segment in segments.items()}
        a, b = parts["A"], parts["B"]
        if experts is not None:  # Row e * R + j of A, column j * E + e of B: PEFT's layout (experts.ExpertPair).
            a = a.view(experts, -1, a.shape[1])
            b = b.view(b.shape[0], -1, experts).permute(2, 0, 1).contiguous()
        return Factors(A=a, B=b, scaling=self.settings.scaling_of(path), magnitude=parts.get("magnitude"))

    def tensor(self, segment: Segment, name: str, reader: Reader) -> Tensor:
        """A tensor of the file, widened to fp32."""
        whole = reader.read([segment], 0, segment.numel).view(segment.shape).float()
        if not bool(torch.isfinite(whole).all()):
            raise UserError(f"{segment.file}: {name} holds NaN or Inf; the adapter is damaged, save it again")
        return whole

    def _has(self, path: str, part: str) -> bool:
        return (path, part) in self.read.tensors


@torch.no_grad()
def adapted_rows(rows: Tensor, first: int, factors: Factors) -> Tensor:
    """Rows `first` and on of a linear's weight (n, I) fp32, with what `factors` adds to them; new memory."""
    own = slice(first, first + len(rows))
    adapted = torch.addmm(rows, factors.B[own], factors.A, alpha=factors.scaling)
    if factors.magnitude is not None:
        norms = torch.linalg.vector_norm(adapted, dim=1)
        # A row of zeros stays one, as in training.
        adapted *= torch.where(norms > 0, factors.magnitude[own] / norms, 0.0)[:, None]
    return adapted


@torch.no_grad()
def adapted_expert_rows(rows: Tensor, first: int, factors: Factors, *, transposed: bool) -> Tensor:
    """The same of a fused weight of experts, (E x n, columns), which may begin and end inside an expert; `transposed`:
    each expert's weight lies as (I, O)."""
    adapted, done = torch.empty_like(rows), 0
    per_expert = factors.A.shape[2] if transposed else factors.B.shape[1]
    while done < len(rows):
        expert, inside = divmod(first + done, per_expert)
        count = min(per_expert - inside, len(rows) - done)
        left, right = factors.B[expert], factors.A[expert]
        if transposed:
            left, right = right.T, left.T
        own = slice(inside, inside + count)
        part = slice(done, done + count)
        torch.addmm(rows[part], left[own], right, alpha=factors.scaling, out=adapted[part])
        done += count
    return adapted
