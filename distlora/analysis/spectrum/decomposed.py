"""Singular values and vectors of one matrix: all of them where it is small, the largest by a Krylov space where not.

Everything is fp64; the matrix itself stays as it is, and a few of its rows are widened at a time.

Letters: O out features, I in features, R singular values that are wanted; X is the matrix or its transpose, whichever
is tall: T rows, N columns. K columns of a basis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distlora.system import randomness
from distlora.weights.decompose import gram, times, transposed_times

SMALLEST = 1e-7
"""Share of the largest singular value below which X^T X in fp64 resolves none."""
MORE = 8
"""Directions of a Krylov block beyond the R that are wanted: what lies just below them converges too."""
BLOCKS = 6
"""Blocks of a Krylov space before a restart."""
CYCLES = 20
"""Most restarts."""
SINE = 1e-4
"""Sine of the error angle at which a singular vector is converged."""


@dataclass(frozen=True, slots=True)
class Singular:
    """Singular triples, the largest value first."""

    left: Tensor
    """(O, R) fp64."""
    values: Tensor
    """(R,) fp64."""
    right: Tensor
    """(I, R) fp64."""
    errors: Tensor
    """(R,): sine of the angle between a vector and the true one, at most (Davis and Kahan 1970). 0: decomposed
    whole."""
    products: int = 0
    """Times that the matrix, or its transpose, was multiplied with a block of vectors."""

    def first(self, count: int) -> Singular:
        """Return the first `count` triples."""
        return Singular(
            self.left[:, :count], self.values[:count], self.right[:, :count], self.errors[:count], self.products
        )


def of_factors(A: Tensor, B: Tensor, scaling: float) -> Singular:
    """Decompose scaling * B A, (R, I) and (O, R), without forming it.

    With B = Q_b R_b and A^T = Q_a R_a, it is the SVD of the (R, R) matrix scaling * R_b R_a^T.
    """
    left, upper = torch.linalg.qr(B.double())
    right, lower = torch.linalg.qr(A.double().T)
    inner_left, values, inner_right = torch.linalg.svd(scaling * upper @ lower.T)
    count = len(values)
    return Singular(left @ inner_left[:, :count], values, right @ inner_right[:count].T, torch.zeros_like(values))


def values_of(matrix_OI: Tensor) -> Tensor:
    """Return all singular values in fp64, the largest first, from the eigenvalues of X^T X.

    Those below SMALLEST times the first are 0.
    """
    values = torch.linalg.eigvalsh(gram(_tall(matrix_OI))).clamp_min(0).sqrt().flip(0)
    return torch.where(values > SMALLEST * values[0], values, 0.0)


def whole(matrix_OI: Tensor, count: int | None = None) -> Singular:
    """Return every triple, or the first `count`, by the eigenvectors of X^T X, (N, N).

    Singular values of 0 have no vectors and are left out. Beside X this takes at most 4 N^2 numbers in fp64 at once
    (the square, its eigenvectors, and the work space of LAPACK's dsyevd), or N (T + N) where these are more (the
    vectors).
    """
    tall_TN = _tall(matrix_OI)
    square, vectors = torch.linalg.eigh(gram(tall_TN))
    values = square.clamp_min(0).sqrt().flip(0)
    values = values[values > SMALLEST * values[0]][:count]
    right_NR = vectors[:, len(square) - len(values) :].flip(1)
    del vectors
    left_TR = times(tall_TN, right_NR).div_(values)
    return _placed(matrix_OI, left_TR, values, right_NR, torch.zeros_like(values), 1)


def largest(matrix_OI: Tensor, count: int, *, seed: int = 0) -> Singular:
    """Return the first `count` triples, and up to MORE beyond them with the errors that these have.

    A block Krylov space of X^T X from a random start (Musco and Musco 2015, arXiv 1504.05477) and Rayleigh-Ritz in it,
    begun again from its best vectors until the `count` are within SINE or CYCLES are over. It holds (T + 3 N) x 6
    (count + MORE) numbers beside X. X v = s u holds exactly; the residual r = ||X^T u - s v|| gives the error
    s_1 r / min |s^2 - s_i^2| over the other values that were found.
    """
    tall_TN = _tall(matrix_OI)
    width = min(count + MORE, tall_TN.shape[1])
    start = randomness.normal((tall_TN.shape[1], width), seed=seed, name="krylov").to(matrix_OI.device)
    basis, products = torch.linalg.qr(start).Q, 0
    for _ in range(CYCLES):
        triples = _cycle(tall_TN, basis, width)
        products += 2 * BLOCKS
        left_TR, values, right_NR, residuals, below = triples
        errors = _angles(values, residuals, below)
        if bool((errors[:count] <= SINE).all()):
            break
        basis = right_NR
    return _placed(matrix_OI, left_TR, values, right_NR, errors, products)


def _cycle(tall_TN: Tensor, basis_NK: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One Krylov space from a block: the best `width` (left, values, right, residuals), and the value below them."""
    bases, images, returns = [basis_NK], [], []
    for number in range(BLOCKS):
        images.append(times(tall_TN, bases[-1]))
        returns.append(transposed_times(tall_TN, images[-1]))
        if number + 1 < BLOCKS:
            following = _orthonormal(returns[-1], torch.cat(bases, dim=1))
            if following.shape[1] == 0:  # The space is invariant: all that the start can reach is in it.
                break
            bases.append(following)
    space, image, back = (torch.cat(parts, dim=1) for parts in (bases, images, returns))
    square, inner = torch.linalg.eigh(image.T @ image)
    inner = inner.flip(1)[:, :width]
    ritz = square.clamp_min(0).sqrt().flip(0)
    values, below = ritz[:width], ritz[width : width + 1]
    usable = values > SMALLEST * values[0]
    values, inner = values[usable], inner[:, usable]
    left, right = image @ inner / values, space @ inner
    residuals = torch.linalg.vector_norm(back @ inner / values - right * values, dim=0)
    return left, values, right, residuals, below


def _orthonormal(block: Tensor, against: Tensor) -> Tensor:
    """Return a basis of what the block adds to the space; twice, since once leaves rounding of the first."""
    scale = torch.linalg.vector_norm(block, dim=0).max()
    for _ in range(2):
        block = block - against @ (against.T @ block)
    basis, upper = torch.linalg.qr(block)
    basis = basis[:, upper.diagonal().abs() > 1e-12 * scale]
    return torch.linalg.qr(basis - against @ (against.T @ basis)).Q


def _angles(values: Tensor, residuals: Tensor, below: Tensor) -> Tensor:
    """(R,): sines of the angles that the residuals allow."""
    if not len(values):
        return values
    others = torch.cat([values, below]) ** 2
    gaps = (values[:, None] ** 2 - others[None, :]).abs()
    gaps[torch.arange(len(values)), torch.arange(len(values))] = torch.inf
    nearest = gaps.min(dim=1).values
    sines = values[0] * residuals / nearest.clamp_min(torch.finfo(torch.float64).tiny)
    return sines.clamp_max(1.0)


def _tall(matrix_OI: Tensor) -> Tensor:
    return matrix_OI if matrix_OI.shape[0] >= matrix_OI.shape[1] else matrix_OI.T


def _placed(
    matrix_OI: Tensor, left_TR: Tensor, values: Tensor, right_NR: Tensor, errors: Tensor, products: int
) -> Singular:
    """X's triples as the matrix's."""
    if matrix_OI.shape[0] < matrix_OI.shape[1]:
        left_TR, right_NR = right_NR, left_TR
    return Singular(left_TR, values, right_NR, errors, products)
