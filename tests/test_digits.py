"""The demo's data and checks: the checks tell good digits from bad ones."""

import pytest
import torch
from scipy.linalg import sqrtm

from mvar import digits
from mvar.evaluate import frechet_distance


def test_split_is_fixed_disjoint_and_stratified() -> None:
    train, held_out = digits.load()
    assert train.images.shape == (1347, 3, 32, 32) and held_out.images.shape == (450, 3, 32, 32)
    assert train.images.min() == -1 and train.images.max() <= 1
    assert held_out.labels.bincount().min() >= 43
    distance = torch.cdist(train.images.flatten(1), held_out.images.flatten(1))
    assert distance.min() > 0


def test_real_digits_pass_and_spoilt_ones_fail() -> None:
    train, held_out = digits.load()
    good = digits.quality(train.images[:1000], train.labels[:1000])
    assert all(holds for _, holds in good.checks()) and good.nearest == 0  # they are the training digits themselves

    wrong_class = digits.quality(held_out.images, (held_out.labels + 1) % 10)
    collapsed_images = torch.stack([train.images[train.labels == c].mean(0) for c in held_out.labels])
    collapsed = digits.quality(collapsed_images, held_out.labels)
    noisy = digits.quality((held_out.images + 0.6 * torch.randn(450, 3, 32, 32)).clamp(-1, 1), held_out.labels)
    failed = [
        [text.split(" ", 2)[0] for text, holds in q.checks() if not holds] for q in (wrong_class, collapsed, noisy)
    ]
    assert wrong_class.agreement < 0.05
    assert {"Fréchet", "smallest"} <= set(failed[1])
    assert "Fréchet" in failed[2]


def test_frechet_distance_of_known_normals() -> None:
    """Two sets with exact moments: means 0 and m, covariances diag(s²) and diag(t²): |m|² + Σ(s−t)²."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    rows = rows - rows.mean(0)
    rows = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.T.cov()).T)  # covariance exactly the identity
    s, t, m = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 0.0, 2.0])
    expected = float((m**2).sum() + ((s - t) ** 2).sum())
    assert frechet_distance(rows * s, rows * t + m) == pytest.approx(expected, abs=1e-9)


def test_frechet_distance_against_scipy() -> None:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    a = torch.randn(200, 6, generator=generator, dtype=torch.float64) @ mix
    b = torch.randn(300, 6, generator=generator, dtype=torch.float64) + 0.3
    cross = torch.from_numpy(sqrtm((a.T.cov() @ b.T.cov()).numpy()).real).trace()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)
    with pytest.raises(ValueError, match="b: expected"):
        frechet_distance(a, b[:, :3])
    with pytest.raises(ValueError, match="a: not all features are finite"):
        frechet_distance(a * torch.nan, b)
