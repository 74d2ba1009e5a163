"""Fréchet distance, precision and recall of two sets of features, in float64.

The Fréchet distance of Inception features is FID (Heusel et al., arXiv 1706.08500); of other features it is not FID.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1024  # rows of the distance matrix in memory at a time


class Moments(NamedTuple):
    """Mean (F,) and covariance (F, F) of a set of features, float64; the covariance is normalized by n − 1."""

    mean: Tensor
    covariance: Tensor


class PrecisionRecall(NamedTuple):
    precision: float
    """fraction of the generated images in the manifold of the real images"""
    recall: float
    """fraction of the real images in the manifold of the generated images"""


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between normal distributions fitted to two sets of features (Dowson & Landau, 1982).

    Args:
        a, b: (n, F) and (m, F) features, at least two rows each.

    Raises:
        ValueError: wrong shapes, or values that are not finite.
    """
    _check(a, b, 2)
    return frechet(moments(a), moments(b))


def moments(features: Tensor) -> Moments:
    """Mean and covariance of features (n, F), n ≥ 2."""
    rows = features.double()
    return Moments(rows.mean(0), torch.atleast_2d(rows.T.cov()))


class MomentAccumulator:
    """:func:`moments` of features that come in batches and are not kept."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, features: Tensor) -> None:
        """Add features (n, F), n ≥ 1. Batches are merged as in Chan, Golub & LeVeque (1979)."""
        rows = features.double()
        n, mean = len(rows), rows.mean(0)
        scatter = (rows - mean).T @ (rows - mean)
        if not self.count:
            self.count, self._mean, self._scatter = n, mean, scatter
            return
        shift, total = mean - self._mean, self.count + n
        self._scatter += scatter + torch.outer(shift, shift) * (self.count * n / total)
        self._mean += shift * (n / total)
        self.count = total

    def result(self) -> Moments:
        """Moments of at least two rows."""
        return Moments(self._mean, self._scatter / (self.count - 1))


def frechet(a: Moments, b: Moments) -> float:
    """Fréchet distance of two normal distributions: ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½)."""
    # tr (Σ_a Σ_b)^½ is the sum of the singular values of Σ_a^½ Σ_b^½, which are accurate for rank-deficient
    # covariances. Square roots of the eigenvalues of Σ_a Σ_b would lose half of the digits.
    cross = torch.linalg.svdvals(_sqrtm(a.covariance) @ _sqrtm(b.covariance)).sum()
    traces = a.covariance.trace() + b.covariance.trace()
    distance = (a.mean - b.mean).square().sum() + traces - 2 * cross
    return float(distance.clamp_min(0))  # rounding: about ±1e-15 for equal distributions


def _sqrtm(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def precision_recall(generated: Tensor, real: Tensor, *, neighbors: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991).

    The manifold of a set is the union of closed balls around its points; the radius is the distance to the
    `neighbors`-th nearest neighbor. Precision is the fraction of `generated` in the manifold of `real`, recall the
    fraction of `real` in the manifold of `generated`.

    Args:
        generated, real: (n, F) and (m, F) features with more than `neighbors` rows.

    Raises:
        ValueError: wrong shapes, or values that are not finite.
    """
    if neighbors < 1:
        raise ValueError(f"neighbors: expected at least 1, got {neighbors}")
    _check(generated, real, neighbors + 1, ("generated", "real"))
    generated, real = generated.double(), real.double()
    return PrecisionRecall(_fraction_inside(generated, real, neighbors), _fraction_inside(real, generated, neighbors))


def _fraction_inside(points: Tensor, reference: Tensor, neighbors: int) -> float:
    """Fraction of `points` in the manifold of `reference`."""
    # neighbors + 1: the smallest distance is 0, the distance of the point to itself.
    kth = [_distances(rows, reference).kthvalue(neighbors + 1, 1).values for rows in reference.split(BLOCK)]
    radii = torch.cat(kth)
    inside = torch.cat([(_distances(rows, reference) <= radii).any(1) for rows in points.split(BLOCK)])
    return float(inside.double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Without a matmul, which would not give exactly 0 for equal points or symmetric distances, so that points on the
    # boundary of a ball could be outside.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _check(a: Tensor, b: Tensor, rows: int, names: tuple[str, str] = ("a", "b")) -> None:
    width = a.shape[-1] if a.dim() == 2 else None
    for name, features in zip(names, (a, b), strict=True):
        if features.dim() != 2 or len(features) < rows or features.shape[1] != width:
            raise ValueError(
                f"{name}: expected (at least {rows}, F={width}) features, got shape {tuple(features.shape)}"
            )
        if not bool(features.isfinite().all()):
            raise ValueError(f"{name}: not all features are finite")
