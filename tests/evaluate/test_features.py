"""Tests of Fréchet distance, precision and recall against closed forms, SciPy and brute force."""

import pytest
import torch
from scipy.linalg import sqrtm

from mvar.evaluate import features, frechet_distance, precision_recall


def test_frechet_distance_of_known_normals() -> None:
    """For means 0 and m and covariances diag(s²) and diag(t²), the distance is |m|² + Σ(s−t)²."""
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


def test_frechet_distance_of_fewer_images_than_features() -> None:
    """Rank-deficient covariances, as for 2,048 features of 1,000 images; a set has distance 0 to itself."""
    rows = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(rows, rows + 1) == pytest.approx(50, rel=1e-6)
    assert frechet_distance(rows[:, :1], rows[:, :1] + 2) == pytest.approx(4)


def test_precision_and_recall_on_a_line() -> None:
    """With one neighbor, every ball around a real point has radius 1."""
    real = torch.arange(10.0)[:, None]
    made = torch.tensor([0.5, 0.6, 12.0, 20.0])[:, None]  # radii 0.1, 0.1, 8, 8
    found = precision_recall(made, real, neighbors=1)
    assert found.precision == 0.5  # 12 is 3 away from the nearest real point
    assert found.recall == pytest.approx(0.6)  # 4 … 9 are within 8 of 12, inclusive; none within 0.1 of the others
    far = made.double() + 2**28, real.double() + 2**28  # whose squares are not exact
    assert precision_recall(*far, neighbors=1) == found
    assert precision_recall(real, real, neighbors=1) == (1.0, 1.0)
    assert precision_recall(real + 100, real, neighbors=1) == (0.0, 0.0)


def test_precision_and_recall_against_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    made, real = torch.randn(40, 5, generator=generator), torch.randn(60, 5, generator=generator) + 1

    def inside(points: torch.Tensor, of: torch.Tensor) -> float:
        hits = 0
        for point in points.double():
            for i, center in enumerate(of.double()):
                others = sorted(float((center - o).norm()) for j, o in enumerate(of.double()) if j != i)
                if float((point - center).norm()) <= others[2]:
                    hits += 1
                    break
        return hits / len(points)

    expected = pytest.approx((inside(made, real), inside(real, made)))
    assert 0 < expected.expected[0] < 1 and 0 < expected.expected[1] < 1
    assert precision_recall(made, real) == expected
    monkeypatch.setattr(features, "BLOCK", 7)
    assert precision_recall(made, real) == expected
    with pytest.raises(ValueError, match="generated: expected"):
        precision_recall(made[:3], real)
    with pytest.raises(ValueError, match="neighbors"):
        precision_recall(made, real, neighbors=0)
