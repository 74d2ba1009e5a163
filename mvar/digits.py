"""The digits model in the package, and quality checks of generated digits."""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.checkpoint import load_packaged
from mvar.data.digits import NUM_CLASSES, Digits, load
from mvar.evaluate import frechet_distance
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model

__all__ = ["NUM_CLASSES", "SAMPLING", "Digits", "Quality", "agreement", "features", "load", "pretrained", "quality"]

SIDE = 8


def features(images: Tensor) -> Tensor:
    """Features of the checks: grayscale images downsampled to 8×8, the size of the original digits.

    (n, 3, 32, 32) in [−1, 1] → (n, 64) in [0, 1].
    """
    return (F.adaptive_avg_pool2d(images.float().mean(1), SIDE).flatten(1) + 1) / 2


@dataclass(frozen=True)
class Quality:
    """Quality metrics of generated digits, with reference values of real digits."""

    classifier_accuracy: float
    """Accuracy of the support-vector classifier on held-out real digits."""
    agreement: float
    """Fraction of generated digits that the classifier assigns to the requested class."""
    frechet: float
    """Fréchet distance between generated and held-out digits."""
    frechet_real: float
    """Fréchet distance between two disjoint halves of the real digits (mean of 20 splits)."""
    variance: float
    """Summed pixel variance of generated digits relative to real ones, minimum over the classes."""
    nearest: float
    """Median distance of generated digits to the nearest training digit, relative to that of held-out digits."""

    @property
    def frechet_ratio(self) -> float:
        return self.frechet / self.frechet_real

    def checks(self) -> list[tuple[str, bool]]:
        """Description and result of each check."""
        accuracy, agreement, ratio, variance = (
            self.classifier_accuracy,
            self.agreement,
            self.frechet_ratio,
            self.variance,
        )
        return [
            (f"classifier on held-out real digits   {accuracy:6.1%}  (at least 97 %)", accuracy >= 0.97),
            (f"classifier on generated digits       {agreement:6.1%}  (at least 92 %)", agreement >= 0.92),
            (f"Fréchet distance to held-out digits  {ratio:6.2f}  times that of real halves (at most 3)", ratio <= 3),
            (f"smallest pixel variance of a class   {variance:6.1%}  of the real one (at least 60 %)", variance >= 0.6),
        ]


def quality(images: Tensor, labels: Tensor) -> Quality:
    """Evaluate generated digits, (n, 3, 32, 32) in [−1, 1], against the requested classes (n,) and real digits."""
    train, held_out = load()
    real = features(torch.cat([train.images, held_out.images]))
    real_labels = torch.cat([train.labels, held_out.labels])
    generated, trained, held = features(images), features(train.images), features(held_out.images)
    ratios = [float(_variance(generated[labels == c]) / _variance(real[real_labels == c])) for c in labels.unique()]
    return Quality(
        classifier_accuracy=_accuracy(held, held_out.labels),
        agreement=agreement(images, labels),
        frechet=frechet_distance(generated, held),
        frechet_real=_frechet_of_halves(),
        variance=min(ratios),
        nearest=float(_nearest_distance(generated, trained).median() / _nearest_distance(held, trained).median()),
    )


def agreement(images: Tensor, labels: Tensor) -> float:
    """Fraction of images (n, 3, 32, 32) in [−1, 1] that the classifier of real digits assigns to their labels (n,)."""
    return _accuracy(features(images), labels)


def _accuracy(rows: Tensor, labels: Tensor) -> float:
    return float(_classifier().score(rows.numpy(), labels.numpy()))


@cache
def _classifier():  # type: ignore[no-untyped-def]  # scikit-learn has no types
    from sklearn.svm import SVC

    train, _ = load()
    return SVC(gamma=0.25).fit(features(train.images).numpy(), train.labels.numpy())


@cache
def _frechet_of_halves() -> float:
    train, held_out = load()
    rows = features(torch.cat([train.images, held_out.images]))
    generator = torch.Generator().manual_seed(0)
    distances = []
    for _ in range(20):
        first, second = rows[
            torch.randperm(len(rows), generator=generator, dtype=torch.int64, device="cpu")
        ].tensor_split(2)
        distances.append(frechet_distance(first, second))
    return sum(distances) / len(distances)


def _variance(rows: Tensor) -> Tensor:
    return rows.var(0).sum()


def _nearest_distance(rows: Tensor, others: Tensor) -> Tensor:
    return torch.cdist(rows.double(), others.double()).min(1).values  # float32 would depend on torch's matmul precision


SAMPLING = {"cfg": 0.0, "top_k": 0, "top_p": 1.0}
"""Sampling options of the demo: no truncation and no guidance, which would reduce the diversity within a class."""


def pretrained(*, bidirectional: bool = False) -> tuple[Model, Tokenizer]:
    """Load the model and the tokenizer of the package, trained by `mvar train --preset digits`."""
    return load_packaged(f"digits{'_bidirectional' if bidirectional else ''}", "digits_tokenizer")
