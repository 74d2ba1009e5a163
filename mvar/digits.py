"""scikit-learn's 1,797 handwritten digits (8×8, from the UCI repository): the data and the checks of the demo."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.checkpoint import load_model, load_tokenizer
from mvar.evaluate import frechet_distance
from mvar.model import Model
from mvar.tokenizer import Tokenizer

SIDE, UPSCALED = 8, 32
HELD_OUT = 450
NUM_CLASSES = 10


class Digits(NamedTuple):
    """images: (n, 3, 32, 32) float32 in [−1, 1], three equal channels; labels: (n,) int64."""

    images: Tensor
    labels: Tensor


@cache
def load() -> tuple[Digits, Digits]:
    """The training and the held-out digits (1,347 and 450, equal shares of every class), always the same split.

    Raises ImportError, with what to install, where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'mvar[demo]'") from error
    data = load_digits()
    pixels = torch.from_numpy(data.images).float() / 8 - 1  # 0 … 16 → [−1, 1]
    labels = torch.from_numpy(data.target).long()
    train, held_out = train_test_split(range(len(labels)), test_size=HELD_OUT, random_state=0, stratify=labels)
    images = F.interpolate(pixels[:, None], size=(UPSCALED, UPSCALED), mode="bilinear").expand(-1, 3, -1, -1)
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


def features(images: Tensor) -> Tensor:
    """The fixed feature map of the checks: the 8×8 means of the picture's grey values, (n, 3, 32, 32) → (n, 64).

    For images in [−1, 1]; the features lie in [0, 1]. 64 numbers are what the original digits have.
    """
    return (F.adaptive_avg_pool2d(images.float().mean(1), SIDE).flatten(1) + 1) / 2


@dataclass(frozen=True)
class Quality:
    """How good a set of generated digits is, and the same figure on real ones where it has one."""

    classifier_accuracy: float
    """of the support-vector classifier on the held-out real digits"""
    agreement: float
    """share of generated digits that the classifier takes for the class asked for"""
    frechet: float
    """Fréchet distance between generated and held-out digits"""
    frechet_real: float
    """the same between two disjoint halves of the real digits (mean of 20 splits)"""
    variance: float
    """smallest share, over the classes, of the real digits' summed pixel variance that the generated ones have"""
    nearest: float
    """median distance of a generated digit to the nearest training digit, relative to that of a held-out one"""

    @property
    def frechet_ratio(self) -> float:
        return self.frechet / self.frechet_real

    def checks(self) -> list[tuple[str, bool]]:
        """Each check in words, and whether it holds."""
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
    """Check generated digits, (n, 3, 32, 32) in [−1, 1], against the classes asked for and the real digits."""
    train, held_out = load()
    real = features(torch.cat([train.images, held_out.images]))
    real_labels = torch.cat([train.labels, held_out.labels])
    made, trained, held = features(images), features(train.images), features(held_out.images)
    return Quality(
        classifier_accuracy=_share_right(held, held_out.labels),
        agreement=_share_right(made, labels),
        frechet=frechet_distance(made, held),
        frechet_real=_halves_distance(),
        variance=min(float(_spread(made[labels == c]) / _spread(real[real_labels == c])) for c in labels.unique()),
        nearest=float(_nearest(made, trained).median() / _nearest(held, trained).median()),
    )


def _share_right(rows: Tensor, labels: Tensor) -> float:
    return float(_classifier().score(rows.numpy(), labels.numpy()))


@cache
def _classifier():  # type: ignore[no-untyped-def]  # scikit-learn has no types
    from sklearn.svm import SVC

    train, _ = load()
    return SVC(gamma=0.25).fit(features(train.images).numpy(), train.labels.numpy())


@cache
def _halves_distance() -> float:
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


def _spread(rows: Tensor) -> Tensor:
    return rows.var(0).sum()


def _nearest(rows: Tensor, others: Tensor) -> Tensor:
    return torch.cdist(rows.double(), others.double()).min(1).values  # in float32 it would follow torch's settings


SAMPLING = {"cfg": 0.0, "top_k": 0, "top_p": 1.0}
"""How the demo draws: no filter and no guidance, which would narrow the classes."""


def pretrained(*, bidirectional: bool = False) -> tuple[Model, Tokenizer]:
    """The model and the tokenizer inside the package, as `mvar train --preset digits` made them."""
    assets = files("mvar") / "assets"
    with as_file(assets / f"digits{'_bidirectional' if bidirectional else ''}.safetensors") as weights:
        model = load_model(weights)
    with as_file(assets / "digits_tokenizer.safetensors") as weights:
        return model, load_tokenizer(weights)
