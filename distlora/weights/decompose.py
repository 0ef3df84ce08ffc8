"""Initial A and B from the principal part of a weight: PiSSA (arXiv 2404.02948) and LoftQ (arXiv 2310.08659).

With W = U S V^T and the adapter's scale s, the first R parts become A = sqrt(S/s) V^T and B = U sqrt(S/s), PEFT's
convention, so that s B A is the best rank-R approximation of W.

Sums are in fp64 on one thread and are rounded once, to fp32, so the bits depend neither on the number of ranks nor on
which rank computes. Letters: O out features, I in features, R rank; X is W or its transpose, whichever is tall: T rows,
N columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from distlora.system import randomness
from distlora_kernels.dispatch import one_thread
from distlora_kernels.formats import nf4

BLOCK_ELEMENTS = 2**17
"""Elements of s B A computed at once: always the same whole rows, so that a product does not depend on the shard."""


class LowRankFactors(NamedTuple):
    """Initial values of an adapter: A (R, I) and B (O, R), fp32."""

    A: Tensor
    B: Tensor


class Sketch(NamedTuple):
    """Settings of a randomized decomposition."""

    seed: int
    name: str
    """Name of the random stream: the linear's path."""
    iterations: int
    """Subspace iterations: each multiplies with the weight and with its transpose once more."""


@torch.no_grad()
def principal_part(weight_OI: Tensor, rank: int, *, scaling: float, sketch: Sketch | None = None) -> LowRankFactors:
    """Return A and B such that scaling * B A is the best approximation of `weight_OI` (fp32, bf16, fp16) of this rank.

    Without a sketch the result is exact: the eigenvectors of X^T X in fp64, which needs 4 N^2 numbers. With one: Halko
    et al. 2009 (arXiv 0909.4061), algorithms 4.4 and 5.1 with R columns, as torch.svd_lowrank for PEFT. `rank` is at
    most min(O, I).
    """
    out_features, in_features = weight_OI.shape
    tall_TN = weight_OI if out_features >= in_features else weight_OI.T
    with one_thread():
        if sketch is None:
            left_TR, values_R, right_NR = _exact(tall_TN, rank)
        else:
            left_TR, values_R, right_NR = _randomized(tall_TN, rank, sketch)
    # The sign of a pair of singular vectors is arbitrary.
    largest_R = right_NR.abs().argmax(dim=0, keepdim=True)
    sign_R = torch.where(right_NR.gather(0, largest_R)[0] < 0, -1.0, 1.0)
    root_R = (values_R / scaling).sqrt()
    left_TR, right_NR = left_TR * (sign_R * root_R), right_NR * (sign_R * root_R)
    if out_features < in_features:
        left_TR, right_NR = right_NR, left_TR
    return LowRankFactors(A=right_NR.T.float().contiguous(), B=left_TR.float().contiguous())


def _exact(tall_TN: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular values, descending (R,), and their vectors (T, R) and (N, R), all fp64."""
    columns = tall_TN.shape[1]
    right_NR = torch.linalg.eigh(gram(tall_TN)).eigenvectors[:, columns - rank :].flip(1).contiguous()
    left_TR = times(tall_TN, right_NR)
    values_R = left_TR.norm(dim=0)
    # If the weight has a lower rank, the remaining parts of A and B are zero.
    return left_TR / values_R.clamp_min(torch.finfo(torch.float64).tiny), values_R, right_NR


def _randomized(tall_TN: Tensor, rank: int, sketch: Sketch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as `_exact`, to the accuracy of the sketch."""
    shape = (tall_TN.shape[1], rank)
    start_NR = randomness.normal(shape, seed=sketch.seed, name=sketch.name).to(tall_TN.device)
    basis_TR = torch.linalg.qr(times(tall_TN, start_NR)).Q
    for _ in range(sketch.iterations):
        other_NR = torch.linalg.qr(transposed_times(tall_TN, basis_TR)).Q
        basis_TR = torch.linalg.qr(times(tall_TN, other_NR)).Q
    inside_RR, values_R, right_RN = torch.linalg.svd(transposed_times(tall_TN, basis_TR).T, full_matrices=False)
    return basis_TR @ inside_RR, values_R, right_RN.T


@torch.no_grad()
def quantization_error(weight_OI: Tensor) -> Tensor:
    """Return W - dequantize(NF4(W)), (O, I) fp32."""
    parts = nf4.nf4_quantize(weight_OI)
    restored = nf4.NF4.dequantize(parts, shape=tuple(weight_OI.shape), dtype=torch.float32)
    return torch.sub(weight_OI.float(), restored, out=restored)


class Residual:
    """W - s B A for flat ranges of W, which may begin and end inside a row. The bits do not depend on the ranges."""

    def __init__(self, start: LowRankFactors, scaling: float) -> None:
        self.start, self.scaling = start, scaling
        self._width = start.A.shape[1]
        self._rows = max(1, BLOCK_ELEMENTS // self._width)

    @torch.no_grad()
    def of(self, chunk: Tensor, first: int) -> Tensor:
        """Return a flat `chunk` of W, beginning with element `first`, minus those elements of s B A; fp32."""
        chunk = chunk.to(self.start.A.device, torch.float32)
        rest = torch.empty_like(chunk)
        done, per_block = 0, self._rows * self._width
        while done < chunk.numel():
            block, inside = divmod(first + done, per_block)
            taken = self._block(block)[inside : inside + chunk.numel() - done]
            torch.sub(chunk[done : done + len(taken)], taken, out=rest[done : done + len(taken)])
            done += len(taken)
        return rest

    def _block(self, block: int) -> Tensor:
        """Return a fixed group of rows of s B A, flat, computed as one product on one thread."""
        rows = slice(block * self._rows, (block + 1) * self._rows)
        with one_thread():
            return ((self.scaling * self.start.B[rows]) @ self.start.A).view(-1)


ELEMENTS = 2**22
"""Elements of a weight widened to fp64 at once: 32 MiB."""


def gram(tall_TN: Tensor) -> Tensor:
    """Return X^T X, (N, N) fp64."""
    columns = tall_TN.shape[1]
    gram_NN = torch.zeros(columns, columns, dtype=torch.float64, device=tall_TN.device)
    for _, part_cN in _parts(tall_TN):
        gram_NN.addmm_(part_cN.T, part_cN)
    return gram_NN


def times(tall_TN: Tensor, other_NR: Tensor) -> Tensor:
    """Return X @ other, (T, R) fp64."""
    product_TR = torch.empty(tall_TN.shape[0], other_NR.shape[1], dtype=torch.float64, device=tall_TN.device)
    for rows, part_cN in _parts(tall_TN):
        torch.mm(part_cN, other_NR, out=product_TR[rows])
    return product_TR


def transposed_times(tall_TN: Tensor, other_TR: Tensor) -> Tensor:
    """Return X^T @ other, (N, R) fp64."""
    product_NR = torch.zeros(tall_TN.shape[1], other_TR.shape[1], dtype=torch.float64, device=tall_TN.device)
    for rows, part_cN in _parts(tall_TN):
        product_NR.addmm_(part_cN.T, other_TR[rows])
    return product_NR


def _parts(tall_TN: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, ELEMENTS // tall_TN.shape[1])
    for first in range(0, len(tall_TN), step):
        rows = slice(first, first + step)
        yield rows, tall_TN[rows].double()
