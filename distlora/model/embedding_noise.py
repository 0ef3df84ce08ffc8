"""NEFTune (arXiv 2310.05914): uniform noise on the input embeddings in training.

x + e * alpha / sqrt(L d) with e uniform on (-1, 1) per element, for a document of L tokens and hidden size d. L is the
document's length, as in the authors' code, which counts a sequence without its padding; transformers and TRL take the
length of the padded or packed row, so that packing weakens their noise. Noise is added to the output of the embedding
module, as there. It is a pure function of (seed, step, row, position, column), like dropout, so it does not depend on
ranks, micro-batches or resumes.

Letters: B rows, T tokens per row, H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distlora.model.adapters import StepRows
from distlora.system import randomness
from distlora_kernels.dropout import MASK, random_halves

_HALF = 2**15


class EmbeddingNoise(NamedTuple):
    """NEFTune's noise of one run."""

    alpha: float
    key: tuple[int, int]
    """Two 32-bit words, from the run's seed."""

    @classmethod
    def of(cls, alpha: float, seed: int) -> EmbeddingNoise:
        """Return the noise of a run with train.seed `seed`."""
        return cls(alpha, randomness.key_of(seed, "embed_tokens.noise"))

    def add(self, embedded: Tensor, position_ids: Tensor, places: StepRows) -> Tensor:
        """Return embeddings (B, T, H) with noise, summed in fp32, in their dtype. Nothing is read on the host."""
        assert isinstance(places.step, int), "trials that train together have no noise"
        batch, tokens, hidden = embedded.shape
        magnitude = self.alpha / (document_lengths(position_ids) * hidden).float().sqrt()
        halves = random_halves(self.key, places.step & MASK, places.rows, batch * tokens, hidden)
        noise = halves.view(batch, tokens, hidden).float().add_(0.5).mul_((magnitude / _HALF)[..., None])
        return (embedded + noise).to(embedded.dtype)


def document_lengths(position_ids: Tensor) -> Tensor:
    """Return (B, T) int64: the length in its row of each token's document. Positions (B, T) restart at 0 with each."""
    tokens = position_ids.shape[1]
    index = torch.arange(tokens, device=position_ids.device).expand_as(position_ids)
    starts_next = torch.nn.functional.pad(position_ids[:, 1:] == 0, (0, 1), value=True)
    last = torch.where(starts_next, index, tokens).flip(1).cummin(dim=1).values.flip(1)
    return last - index + position_ids + 1
