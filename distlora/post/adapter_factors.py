"""Read an adapter one weight at a time, and add it to the base's weight.

LoRA (Hu et al. 2021, arXiv 2106.09685): W + s B A. DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5): m (W + s B A)
/ ||W + s B A||, the norm per row. Letters: O out features, I in features, R rank, E experts.
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
    """The LoRA factors of one weight, and with DoRA the norm that each row gets."""

    A: Tensor
    """(R, I) fp32; of experts (E, R, I)."""
    B: Tensor
    """(O, R) fp32; of experts (E, O, R)."""
    scaling: float
    magnitude: Tensor | None = None
    """(O,) fp32."""

    @property
    def rank(self) -> int:
        """Return the rank."""
        return self.A.shape[-2]

    def delta(self) -> Tensor:
        """Return scaling * B A, dense: (O, I) or (E, O, I) fp32."""
        return (self.scaling * self.B) @ self.A


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFile:
    """A LoRA or DoRA adapter in PEFT's format, for the base as its checkpoint has it."""

    read: PeftAdapter
    """Its config and the header of its file."""
    settings: AdapterConfig
    """Its rank, scale and targets."""
    paths: tuple[str, ...]
    """Hugging Face paths of the adapted linears and fused expert weights, in order."""

    @classmethod
    def open(cls, folder: Path) -> AdapterFile:
        """Open a folder.

        Raises UserError for what `read_peft_adapter` refuses: damage, a pickle, another kind of adapter.
        """
        read = read_peft_adapter(folder)
        return cls(read=read, settings=read.adapter_config, paths=tuple(read.paths))

    @property
    def token_rows(self) -> Mapping[str, PeftTokenRows]:
        """Return the trained rows of the embedding or head, by matrix."""
        return self.read.token_rows

    @property
    def modules(self) -> Mapping[str, PeftWholeModule]:
        """Return the modules that were trained whole, by last name."""
        return self.read.modules

    def factors(self, path: str, reader: Reader, *, experts: int | None = None) -> Factors:
        """Return the factors of one weight; `experts` is their number if it is fused.

        Raises UserError for NaN and Inf.
        """
        segments = {part: self.read.tensors[path, part] for part in ("A", "B", "magnitude") if self._has(path, part)}
        parts = {part: self.tensor(segment, self.read.names[path, part], reader) for part, segment in segments.items()}
        a, b = parts["A"], parts["B"]
        if experts is not None:  # PEFT's layout (experts.ExpertPair): row e * R + j of A, column j * E + e of B.
            a = a.view(experts, -1, a.shape[1])
            b = b.view(b.shape[0], -1, experts).permute(2, 0, 1).contiguous()
        return Factors(A=a, B=b, scaling=self.settings.scaling_of(path), magnitude=parts.get("magnitude"))

    def tensor(self, segment: Segment, name: str, reader: Reader) -> Tensor:
        """Return a tensor of the file in fp32."""
        whole = reader.read([segment], 0, segment.numel).view(segment.shape).float()
        if not bool(torch.isfinite(whole).all()):
            raise UserError(f"{segment.file}: {name} holds NaN or Inf; the adapter is damaged, save it again")
        return whole

    def _has(self, path: str, part: str) -> bool:
        return (path, part) in self.read.tensors


@torch.no_grad()
def adapted_rows(rows: Tensor, first: int, factors: Factors) -> Tensor:
    """Return rows `first` and on of a linear's weight (n, I) fp32 with the adapter added, in new memory."""
    own = slice(first, first + len(rows))
    adapted = torch.addmm(rows, factors.B[own], factors.A, alpha=factors.scaling)
    if factors.magnitude is not None:
        norms = torch.linalg.vector_norm(adapted, dim=1)
        # As in training, a row of zeros stays zero.
        adapted *= torch.where(norms > 0, factors.magnitude[own] / norms, 0.0)[:, None]
    return adapted


@torch.no_grad()
def adapted_expert_rows(rows: Tensor, first: int, factors: Factors, *, transposed: bool) -> Tensor:
    """Return rows of a fused expert weight (E x n, columns) with the adapter added.

    The rows may begin and end inside an expert. With `transposed` each expert's weight is stored as (I, O).
    """
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
