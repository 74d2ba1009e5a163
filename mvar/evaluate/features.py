"""Two sets of images by their features: Fréchet distance, precision and recall. float64 throughout.

With Inception's features the first is FID (Heusel et al., arXiv 1706.08500); with others it is not, and should not be
called so.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1024  # rows whose distances to all others are in memory at a time


class Moments(NamedTuple):
    """mean (F,) and covariance (F, F) of a set of features, float64; the covariance divides by n − 1."""

    mean: Tensor
    covariance: Tensor


class PrecisionRecall(NamedTuple):
    precision: float
    """share of the made images that lie among the real ones"""
    recall: float
    """share of the real images that lie among the made ones"""


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between normal distributions fitted to two sets of features (Dowson & Landau, 1982).

    Args:
        a, b: (n, F) and (m, F) features; at least two rows each. Computed in float64.

    Raises:
        ValueError: a shape that does not fit, or values that are not finite.
    """
    _check(a, b, 2)
    return frechet(moments(a), moments(b))


def moments(features: Tensor) -> Moments:
    """(n, F) with n ≥ 2 → mean and covariance."""
    rows = features.double()
    return Moments(rows.mean(0), torch.atleast_2d(rows.T.cov()))


def frechet(a: Moments, b: Moments) -> float:
    """Of two normal distributions: ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½)."""
    # The trace of (Σ_a Σ_b)^½ is the sum of the singular values of Σ_a^½ Σ_b^½. They lose no digits where a covariance
    # has not full rank; roots of the eigenvalues of a product would lose half of them.
    cross = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    traces = a.covariance.trace() + b.covariance.trace()
    distance = (a.mean - b.mean).square().sum() + traces - 2 * cross
    return float(distance.clamp_min(0))  # of two equal ones, rounding leaves some 1e-15 on either side


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def precision_recall(made: Tensor, real: Tensor, *, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991).

    A set's manifold is the union of balls around its points, each as far as to its `neighbours`-th nearest other one,
    rim included. Precision is the share of `made` in the manifold of `real`; recall that of `real` in that of `made`.

    Args:
        made, real: (n, F) and (m, F) features with more rows than `neighbours`.

    Raises:
        ValueError: a shape that does not fit, or values that are not finite.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours: expected at least 1, got {neighbours}")
    _check(made, real, neighbours + 1, ("made", "real"))
    made, real = made.double(), real.double()
    return PrecisionRecall(_share_inside(made, real, neighbours), _share_inside(real, made, neighbours))


def _share_inside(points: Tensor, of: Tensor, neighbours: int) -> float:
    """The share of `points` that lie in the manifold of the set `of`."""
    # The smallest of these distances is the point's own, 0.
    radii = torch.cat([_distances(rows, of).kthvalue(neighbours + 1, 1).values for rows in of.split(BLOCK)])
    inside = torch.cat([(_distances(rows, of) <= radii).any(1) for rows in points.split(BLOCK)])
    return float(inside.double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # By differences: through a product, the distance of two equal points would not be 0, nor that of a pair the same in
    # both directions, and points on a rim would fall on either side.
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
