"""Compute singular values and vectors of one matrix, and find intruder dimensions.

All singular triples are computed where the matrix is small, the largest by a Krylov space where it is not. Everything
is fp64; the matrix itself stays as it is, and a few of its rows are widened at a time.

Intruder dimensions (Shuttleworth et al. 2024, arXiv 2410.21228) are the left singular vectors of W' = W + dW, among the
first K, whose largest |cosine| with any left singular vector of W is below a threshold.

Where W is decomposed whole, that is a product of two bases. Where only the first of its vectors are known, the cosine
with each of these is known, and the rest is bounded without the others. Let y be the component of a unit vector
outside of the known ones. Its spectral measure puts the mass (u_i^T y)^2 / ||y||^2 on s_i^2. m Lanczos steps of W W^T
from y give the Jacobi matrix of that measure, and with it the nodes and weights of Gauss's quadrature; and the mass on
one point is at most the weights of the nodes on both sides of it (Chebyshev, Markov, Stieltjes; Akhiezer 1965, The
Classical Moment Problem, chapter 2). A vector that is spread over the base's spectrum, as an intruder is, is seen to be
one after some steps; what is not decided is said to be undecided.

That presumes that the Krylov spaces missed no vector of W or W' before the last that they found: the errors of the
known ones are by gaps to what was found.

Letters: O out features, I in features, R singular values that are wanted, or known of W; K vectors of W' or columns of
a basis; m Lanczos steps. X is the matrix or its transpose, whichever is tall: T rows, N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def first(self, count: int) -> Singular:
        """Return the first `count` triples."""
        return Singular(self.left[:, :count], self.values[:count], self.right[:, :count], self.errors[:count])


def of_factors(A: Tensor, B: Tensor, scaling: float) -> Singular:
    """Decompose scaling * B A, (R, I) and (O, R), without forming it.

    With B = Q_b R_b and A^T = Q_a R_a, it is the SVD of the (R, R) matrix scaling * R_b R_a^T.
    """
    left, upper = torch.linalg.qr(B.double())
    right, lower = torch.linalg.qr(A.double().T)
    inner_left, values, inner_right = torch.linalg.svd(scaling * upper @ lower.T)
    count = len(values)
    return Singular(left @ inner_left[:, :count], values, right @ inner_right[:count].T, torch.zeros_like(values))


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
    return _placed(matrix_OI, left_TR, values, right_NR, torch.zeros_like(values))


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
    basis = torch.linalg.qr(start).Q
    for _ in range(CYCLES):
        left_TR, values, right_NR, residuals, below = _cycle(tall_TN, basis, width)
        errors = _angles(values, residuals, below)
        if bool((errors[:count] <= SINE).all()):
            break
        basis = right_NR
    return _placed(matrix_OI, left_TR, values, right_NR, errors)


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


def _placed(matrix_OI: Tensor, left_TR: Tensor, values: Tensor, right_NR: Tensor, errors: Tensor) -> Singular:
    """X's triples as the matrix's."""
    if matrix_OI.shape[0] < matrix_OI.shape[1]:
        left_TR, right_NR = right_NR, left_TR
    return Singular(left_TR, values, right_NR, errors)


STEPS = 64
"""Most Lanczos steps."""
ENDED = 1e-10
"""Share of s_1^2 at which a Lanczos coefficient is rounding."""
GRADIENTS = 300
"""Steps of conjugate gradients, at most."""
MISSED = 1e-2
"""Largest missing part of a component."""
GOOD = 1e-2
"""Sine of the error up to which a vector of W from a Krylov space is taken for one of the known."""


@dataclass(frozen=True, slots=True)
class Similarity:
    """Bounds [lower, upper] of the largest |cosine| of each of W' first K vectors with a left singular vector of W."""

    values: Tensor
    """(K,) fp64: the singular values of W'."""
    lower: Tensor
    upper: Tensor
    """(K,) each. Where W was decomposed whole they are equal."""
    own: Tensor
    """(K,): the index of the vector of W that the lower one is with; -1: none is known."""

    def counts(self, threshold: float) -> tuple[int, int]:
        """(intruders for certain, undecided)."""
        certain = int((self.upper < threshold).sum())
        return certain, int((self.lower < threshold).sum()) - certain


def bounded(before_OI: Tensor, known: Singular, after: Singular, thresholds: Sequence[float]) -> Similarity:
    """Return the cosines, given the first vectors of W: run Lanczos until each threshold is decided, or for STEPS."""
    if not len(known.values):
        return _none_known(after, 0.0)
    good = known.errors <= GOOD
    if not bool(good.any()):
        return _none_known(after, 1.0)
    base_OR, index = known.left[:, good], torch.nonzero(good).flatten()
    cosines = base_OR.T @ after.left
    top = cosines.abs().max(dim=0)
    # A vector of W outside of the known space lies in it by the root of the sum of its vectors' squared errors at most.
    error = after.errors + torch.linalg.vector_norm(known.errors[good])
    rest_OK = _without(base_OR, after.left)
    lower = (top.values - error).clamp_min(0)
    upper = (torch.maximum(top.values, torch.linalg.vector_norm(rest_OK, dim=0)) + error).clamp_max(1)

    def undecided(columns: Tensor) -> Tensor:
        return torch.stack([(lower < t) & (upper >= t) for t in thresholds]).any(dim=0)[columns]

    candidates = torch.arange(len(lower), device=lower.device)
    candidates = candidates[undecided(candidates)]
    if len(candidates):
        start_OK, missed = in_range(before_OI, base_OR, rest_OK[:, candidates], known.values[0])
        spread = Spread(before_OI, base_OR, start_OK, missed, ended=ENDED * float(known.values[0]) ** 2)
        while spread.steps < STEPS and bool(undecided(candidates).any()):
            spread.go_on(2 * spread.steps or 8)
            remaining = torch.maximum(top.values[candidates], spread.largest_component())
            upper[candidates] = torch.minimum(upper[candidates], remaining + error[candidates])
    return Similarity(after.values, lower, upper, index[top.indices])


def _none_known(after: Singular, upper: float) -> Similarity:
    """Return bounds where W has no singular vector (it is 0: nothing is like any, 0), or none was found well (1)."""
    zeros = torch.zeros_like(after.values)
    return Similarity(after.values, zeros, torch.full_like(zeros, upper), torch.full_like(zeros, -1, dtype=torch.long))


def in_range(before_OI: Tensor, base_OR: Tensor, rest_OK: Tensor, largest_value: Tensor) -> tuple[Tensor, Tensor]:
    """Return each vector's part in the space of W's left singular vectors, and (K,) bounds of the missing part.

    If O <= I that space is everything. Else X (X^T X)^-1 X^T y by conjugate gradients: with the residual r of the
    normal equations, the missing part along u_i is at most |r| / s_i, and s_i is at least SMALLEST. A vector with too
    large r is left unchanged, which weakens its bound.
    """
    norms = torch.linalg.vector_norm(rest_OK, dim=0)
    nothing = torch.zeros_like(norms)
    if before_OI.shape[0] <= before_OI.shape[1]:
        return rest_OK, nothing
    solution = torch.zeros(before_OI.shape[1], rest_OK.shape[1], dtype=torch.float64, device=rest_OK.device)
    residual = transposed_times(before_OI, rest_OK)
    direction, square = residual, (residual**2).sum(dim=0)
    least = float(SMALLEST * largest_value)
    for _ in range(GRADIENTS):
        if bool((square.sqrt() <= MISSED * least).all()):
            break
        image = times(before_OI, direction)
        step = square / (image**2).sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        solution = solution + step * direction
        residual = residual - step * transposed_times(before_OI, image)
        following = (residual**2).sum(dim=0)
        direction = residual + following / square.clamp_min(torch.finfo(torch.float64).tiny) * direction
        square = following
    inside = _without(base_OR, times(before_OI, solution))
    # The residual as it is, not as it was carried along.
    missing = torch.linalg.vector_norm(transposed_times(before_OI, rest_OK - inside), dim=0) / least
    is_good = missing <= 0.1
    return torch.where(is_good, inside, rest_OK), torch.where(is_good, missing, nothing)


class Spread:
    """Distribution of vectors over W's left singular vectors orthogonal to `base_OR`.

    It is built by Lanczos with full orthogonalization.
    """

    def __init__(self, before_OI: Tensor, base_OR: Tensor, rest_OK: Tensor, missed: Tensor, *, ended: float) -> None:
        """Start without a step.

        `missed`: by how much a component can exceed what `rest_OK` shows; `ended`: the coefficient below which the
        Krylov space is complete.
        """
        self._before_OI, self._base_OR, self._missed, self._ended = before_OI, base_OR, missed, ended
        self._norms = torch.linalg.vector_norm(rest_OK, dim=0)
        self._vectors = [rest_OK / self._norms.clamp_min(torch.finfo(torch.float64).tiny)]
        self._alphas: list[Tensor] = []
        self._betas: list[Tensor] = []

    @property
    def steps(self) -> int:
        """Return the number of Lanczos steps made."""
        return len(self._alphas)

    def go_on(self, steps: int) -> None:
        """Continue until `steps` are made."""
        is_tall = self._before_OI.shape[0] >= self._before_OI.shape[1]
        tall_TN = self._before_OI if is_tall else self._before_OI.T
        while self.steps < steps:
            last = self._vectors[-1]
            if is_tall:
                product = times(tall_TN, transposed_times(tall_TN, last))
            else:
                product = transposed_times(tall_TN, times(tall_TN, last))
            self._alphas.append((last * product).sum(dim=0))
            for _ in range(2):
                product = _without(self._base_OR, product)
                for earlier in self._vectors:
                    product = product - earlier * (earlier * product).sum(dim=0)
            beta = torch.linalg.vector_norm(product, dim=0)
            self._betas.append(beta)
            self._vectors.append(product / beta.clamp_min(torch.finfo(torch.float64).tiny))

    def largest_component(self) -> Tensor:
        """(K,): what the |component| along one singular vector is at most."""
        masses = [
            _largest_mass(alphas_m, betas_m, self._ended)
            for alphas_m, betas_m in zip(torch.stack(self._alphas, 1), torch.stack(self._betas, 1), strict=True)
        ]
        return self._norms * torch.stack(masses).sqrt() + self._missed


def _largest_mass(alphas_m: Tensor, betas_m: Tensor, ended: float) -> Tensor:
    """Return the largest mass of a unit measure at one point.

    The masses are the squared first components of its Jacobi matrix's eigenvectors (Gauss weights). The bound holds for
    any number of steps.
    """
    over = torch.nonzero(betas_m <= ended).flatten()
    steps = len(alphas_m) if not len(over) else int(over[0]) + 1
    beside = betas_m[: steps - 1]
    jacobi = torch.diag(alphas_m[:steps]) + torch.diag(beside, 1) + torch.diag(beside, -1)
    weights = torch.linalg.eigh(jacobi).eigenvectors[0] ** 2
    outside = weights.new_zeros(1)
    return (torch.cat([weights, outside]) + torch.cat([outside, weights])).max().clamp_max(1.0)


def _without(base_OR: Tensor, vectors_OK: Tensor) -> Tensor:
    """Less their parts in the base, twice: once leaves rounding."""
    for _ in range(2):
        vectors_OK = vectors_OK - base_OR @ (base_OR.T @ vectors_OK)
    return vectors_OK


@torch.no_grad()
def similarity(
    before_OI: Tensor, after_OI: Tensor, top: int, thresholds: Sequence[float], *, exact_up_to: int
) -> tuple[Similarity, Singular, Singular]:
    """Bound the similarity of the first `top` left singular vectors of W' to all of W's."""
    if min(before_OI.shape) <= exact_up_to:
        after, before = whole(after_OI, top), whole(before_OI)
        if not len(before.values):
            return _none_known(after, 0.0), before, after
        largest_cosines = (before.left.T @ after.left).abs().max(dim=0)
        cosines = largest_cosines.values
        return Similarity(after.values, cosines, cosines, largest_cosines.indices), before, after
    before, after = largest(before_OI, top), largest(after_OI, top).first(top)
    return bounded(before_OI, before, after, thresholds), before, after
