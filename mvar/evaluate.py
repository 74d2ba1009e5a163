"""Comparing two sets of images by their features."""

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between normal distributions fitted to two sets of features (Dowson & Landau, 1982).

        ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½)

    With Inception features this is FID (arXiv 1706.08500); with any other features it is not, and should not
    be called so.

    Args:
        a, b: (n, F) and (m, F) features; at least two rows each. Computed in float64.

    Raises:
        ValueError: a shape that does not fit, or values that are not finite.
    """
    for name, features in (("a", a), ("b", b)):
        if features.dim() != 2 or len(features) < 2 or features.shape[1] != a.shape[-1]:
            raise ValueError(f"{name}: expected (at least 2, F={a.shape[-1]}) features, got {tuple(features.shape)}")
        if not bool(features.isfinite().all()):
            raise ValueError(f"{name}: not all features are finite")
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    # The trace of (Σ_a Σ_b)^½ is that of (Σ_a^½ Σ_b Σ_a^½)^½, which is symmetric: real eigenvalues, no matrix root.
    values, vectors = torch.linalg.eigh(torch.atleast_2d(cov_a))
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ torch.atleast_2d(cov_b) @ root).clamp_min(0).sqrt().sum()
    traces = torch.atleast_2d(cov_a).trace() + torch.atleast_2d(cov_b).trace()
    return float((a.mean(0) - b.mean(0)).square().sum() + traces - 2 * cross)
