"""From two weights to the LoRaD adapter between them: the angle of every pair, and the best low rank of all angles.

A change of a two-vector from `w0` to `w1` is a turn and a change of length. The best angle is the one between the two;
turned by any other angle, the pair misses its target by `n0^2 + n1^2 - 2 n0 n1 cos(error)`, so what a layer loses is
`sum n0 n1 (2 - 2 cos(theta - A B))`: low-rank approximation in which every pair counts by the product of its lengths.
With such weights there is no closed form. The start is a singular value decomposition with weights that factor into
rows and columns, and rounds of alternating weighted least squares follow, each of which can only lower the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_wadi.lorad.rotation import check_pairs, rotate_weight

__all__ = ["LayerFit", "check_rank_and_energy", "fit_layer", "low_rank_angles", "pair_angles", "truncated_svd"]

# Steps of conjugate gradients per least-squares problem; orthonormal factors make them well-conditioned.
_CG_STEPS = 4


@dataclass(frozen=True)
class LayerFit:
    """What `fit_layer` found.

    Args:
        A, B: factors of the angles, (out, r) and (r, in/2), float32.
        change: squared norm of the difference of the two weights.
        left: squared norm of what the turned base still lacks.
        left_by_lengths: the part of `left` that no turn of the pairs can reach, their changes of length.
    """

    A: Tensor
    B: Tensor
    change: float
    left: float
    left_by_lengths: float


def check_rank_and_energy(rank: int | None, energy: float | None) -> None:
    """Refuse a choice of rank that means nothing.

    Raises:
        ValueError: neither is given, a rank below 1, or an energy outside (0, 1].
    """
    if rank is None and energy is None:
        raise ValueError("Pass `rank` (usual: 64 to 256), or `energy` (such as 0.9) to choose the rank of each layer.")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"`rank` has to be an integer of at least 1, got {rank!r}.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"`energy` is a share, above 0 and at most 1 (such as 0.9), got {energy!r}.")


def pair_angles(base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
    """The angle from every pair of adjacent columns of `base` to that of `tuned`, and the product of their lengths.

    Args:
        base, tuned: (out, in).

    Returns:
        Angles in (-pi, pi] and products, both (out, in/2).

    Raises:
        ValueError: two shapes, or an odd number of columns.
    """
    check_pairs(base.shape[-1])
    if base.shape != tuned.shape:
        raise ValueError(f"Base {tuple(base.shape)} and tuned weight {tuple(tuned.shape)} are not of one shape.")
    (even0, odd0), (even1, odd1) = (w.unflatten(-1, (-1, 2)).unbind(-1) for w in (base, tuned))
    cross, dot = even0 * odd1 - odd0 * even1, even0 * even1 + odd0 * odd1
    return torch.atan2(cross, dot), torch.hypot(cross, dot)


def fit_layer(
    base: Tensor, tuned: Tensor, rank: int | None = None, energy: float | None = None, rounds: int = 8
) -> LayerFit:
    """The adapter of one layer that turns `base` nearest to `tuned`.

    Args:
        base, tuned: (out, in), or (out, in/groups, *kernel) of a convolution, whose pairs run along the flattened axes
            and whose last number of a row has no partner where their number is odd. Computed in float32.
        rank, energy, rounds: see `low_rank_angles`.

    Raises:
        ValueError: see `pair_angles` and `check_rank_and_energy`.
    """
    check_rank_and_energy(rank, energy)
    base, tuned = base.float(), tuned.float()
    paired = base[0].numel() // 2 * 2
    rows = [w.flatten(1)[:, :paired] for w in (base, tuned)]
    A, B = low_rank_angles(*pair_angles(*rows), rank, energy, rounds)
    lengths = [w.unflatten(-1, (-1, 2)).norm(dim=-1) for w in rows]
    unpaired = _square(tuned.flatten(1)[:, paired:] - base.flatten(1)[:, paired:])
    return LayerFit(
        A,
        B,
        change=_square(tuned - base),
        left=_square(tuned - rotate_weight(base, A @ B)),
        left_by_lengths=_square(lengths[1] - lengths[0]) + unpaired,
    )


def low_rank_angles(
    theta: Tensor, weight: Tensor, rank: int | None = None, energy: float | None = None, rounds: int = 8
) -> tuple[Tensor, Tensor]:
    """Factors `A` (out, r) and `B` (r, in/2) that minimise `sum weight * (1 - cos(theta - A @ B))`.

    Exact where the rank is full and where `theta` has that rank and lies in (-pi, pi).

    Args:
        theta: (out, in/2), radians.
        weight: (out, in/2), not negative.
        rank: rank of the factors, or the highest one if `energy` is given too; at most min(out, in/2) is used.
        energy: take the smallest rank whose weighted singular values hold this share of their sum of squares.
        rounds: rounds of refinement. Default 8.
    """
    check_rank_and_energy(rank, energy)
    full = min(theta.shape)
    if energy is None and rank >= full:
        return _full_rank(theta)
    p, q = _separable(weight)
    first = truncated_svd(theta * p * q, rank, energy)
    if len(first[1]) == full:
        return _full_rank(theta)
    # Heavy-tailed weights mislead the plain start: pairs that count for little pull as much as their neighbours. The
    # second start damps those. It is not exact for angles of low rank, which the first is.
    relative = weight * _inverse(p * p) * _inverse(q * q)
    second = truncated_svd(torch.sin(theta) * relative.clamp(max=1) * p * q, len(first[1]))
    problem = _Problem(theta, p, q, relative)
    starts = [problem.improve(*start) for start in (first[:2], second[:2])]
    A, B = min(starts, key=lambda factors: problem.loss(*factors))
    loss = problem.loss(A, B)
    for _ in range(rounds - 1):
        before, (A, B) = loss, problem.improve(A, B)
        loss = problem.loss(A, B)
        if before - loss <= 1e-5 * before:
            break
    return _balanced(A * _inverse(p), B * _inverse(q))


def truncated_svd(
    matrix: Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[Tensor, Tensor, float, float]:
    """The best approximation `left @ right` of low rank, by eigenvectors of the smaller Gram matrix in float64.

    Args:
        matrix: (m, n).
        rank, energy: as in `low_rank_angles`.

    Returns:
        left (m, r), right (r, n), both float32, and the squared norms of the approximation and of the matrix.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    work = (matrix if tall else matrix.T).double()
    values, vectors = torch.linalg.eigh(work.T @ work)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    held, total = values.cumsum(0), values.sum().item()
    count = len(values) if rank is None else min(rank, len(values))
    if energy is not None:
        # The last digits of the sum are rounding: an energy of 1 is not to ask for them.
        count = min(count, int((held < (energy - 1e-9) * total).sum()) + 1)
    basis = vectors[:, :count]
    left, right = (work @ basis).float(), basis.T.float().contiguous()
    if not tall:
        left, right = right.T.contiguous(), left.T.contiguous()
    return left, right, held[count - 1].item(), total


class _Problem:
    """`sum weight * (1 - cos(theta - A B))` in coordinates where the weights are about 1.

    With `weight = relative * p^2 q^2`, rows scaled by `p` and columns by `q`, so that `A B` stands for
    `p * angles * q`. The cosine lies below a parabola through the present angles whose gradient is the sine of what
    is missing, which makes each half of a round a weighted least-squares problem and its solution a step down.
    """

    def __init__(self, theta: Tensor, p: Tensor, q: Tensor, relative: Tensor) -> None:
        self.theta, self.scale, self.relative = theta, p * q, relative
        self.unscale = _inverse(p) * _inverse(q)

    def loss(self, A: Tensor, B: Tensor) -> float:
        missing = self.theta - (A @ B) * self.unscale
        # 1 - cos, without the cancellation that hides small angles.
        return ((missing / 2).sin().square() * self.relative * self.scale.square()).sum(dtype=torch.float64).item()

    def improve(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """One round: `A` with `B` fixed, then `B` with `A` fixed."""
        basis, mixing = torch.linalg.qr(B.T)
        B, A = basis.T, A @ mixing.T
        A = A + _solve(lambda x: (self.relative * (x @ B)) @ B.T, self._pull(A, B) @ B.T)
        basis, mixing = torch.linalg.qr(A)
        A, B = basis, mixing @ B
        return A, B + _solve(lambda x: A.T @ (self.relative * (A @ x)), A.T @ self._pull(A, B))

    def _pull(self, A: Tensor, B: Tensor) -> Tensor:
        return self.relative * self.scale * torch.sin(self.theta - (A @ B) * self.unscale)


def _solve(operator: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """A few steps of conjugate gradients from zero; every one of them lowers the quadratic."""
    x, rest = torch.zeros_like(wanted), wanted.clone()
    direction, size = rest.clone(), _square(rest)
    for _ in range(_CG_STEPS):
        if size == 0:
            break
        image = operator(direction)
        curvature = (direction * image).sum(dtype=torch.float64).item()
        if curvature <= 0:
            break
        x += size / curvature * direction
        rest -= size / curvature * image
        size, before = _square(rest), size
        direction = rest + size / before * direction
    return x


def _separable(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of the row and column factors, (out, 1) and (in/2,), whose outer product is nearest to `weight`."""
    mean = weight.mean()
    return weight.mean(1, keepdim=True).sqrt(), (weight.mean(0) * _inverse(mean)).sqrt()


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0: rows and columns without weight are left alone."""
    return torch.where(x > 0, 1 / x, 0)


def _full_rank(theta: Tensor) -> tuple[Tensor, Tensor]:
    identity = torch.eye(min(theta.shape), dtype=theta.dtype, device=theta.device)
    return (theta, identity) if theta.shape[0] >= theta.shape[1] else (identity, theta)


def _balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns of `A` and rows of `B` of equal norm, which 16-bit files round least."""
    ratio = (B.norm(dim=1) * _inverse(A.norm(dim=0))).sqrt()
    return A * ratio, B * _inverse(ratio)[:, None]


def _square(x: Tensor) -> float:
    return x.square().sum(dtype=torch.float64).item()
