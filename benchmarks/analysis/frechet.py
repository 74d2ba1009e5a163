"""Fréchet distances between sets of images, with bootstrap intervals."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common.environment import DEVICE
from examples.emoji import evaluate
from mvar import digits
from mvar.evaluate import Moments, frechet, moments
from mvar.evaluate.inception import FEATURES, Inception, find_sources

RESAMPLES = 200
BATCH = 50
EMOJI_STEPS = 400
"""Training steps of the emoji's classifier."""


class FeatureSpace(NamedTuple):
    """features: (n, H, W, 3) uint8 → (n, F). real: moments of the real images, resampled if given a generator."""

    name: str
    features: Callable[[Tensor], Tensor]
    real: Callable[[torch.Generator | None], Moments]


def digit_features() -> FeatureSpace:
    """The last hidden layer of a small classifier, trained on the training digits; real ones are the held-out ones."""
    train, held_out = digits.load()
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    classifier = nn.Sequential(hidden, nn.Linear(64, digits.NUM_CLASSES))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    rows = digits.features(train.images)
    for _ in range(60):
        for batch in torch.randperm(len(rows)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(rows[batch]), train.labels[batch]).backward()
            optimizer.step()
    classifier.requires_grad_(False)
    correct = classifier(digits.features(held_out.images)).argmax(1) == held_out.labels
    if (accuracy := float(correct.float().mean())) < 0.95:
        raise SystemExit(
            f"the classifier recognises only {accuracy:.1%} of the held-out digits: its features are useless"
        )
    held = hidden(digits.features(held_out.images))

    def real(generator: torch.Generator | None) -> Moments:
        return moments(held if generator is None else held[resampled(held_out.labels, generator)])

    def features(pixels: Tensor) -> Tensor:
        found: Tensor = hidden(digits.features(pixels.permute(0, 3, 1, 2) / 127.5 - 1))
        return found

    return FeatureSpace(f"classifier of real digits ({accuracy:.1%} of held-out ones right); no FID", features, real)


def emoji_features(folder: Path, side: int) -> FeatureSpace:
    """The classifier of examples/emoji/evaluate.py, trained on the training images; real ones are the held-out ones."""
    train, classes = evaluate.read(folder / "train", round(evaluate.MARGIN * side))
    held_out, _ = evaluate.read(folder / "val", round(evaluate.MARGIN * side), classes)
    classifier = evaluate.train_classifier(train, len(classes), side, seed=0, steps=EMOJI_STEPS)
    pixels = evaluate.center(held_out.pixels, side)
    held = classifier.features(pixels)
    accuracy = float((classifier.predict(pixels) == held_out.labels).float().mean())

    def real(generator: torch.Generator | None) -> Moments:
        return moments(held if generator is None else held[resampled(held_out.labels, generator)])

    def features(pixels: Tensor) -> Tensor:
        return classifier.features(pixels.permute(0, 3, 1, 2) / 255)

    return FeatureSpace(f"classifier of real emoji ({accuracy:.1%} of held-out ones right); no FID", features, real)


def inception_features(weights: Path | None, reference: Path | None) -> FeatureSpace:
    found = find_sources(weights, reference)
    missing = found.all_missing
    if missing or found.reference is None:
        raise SystemExit("missing for FID:\n" + "\n".join(missing))
    network = Inception(found.weights, DEVICE)
    with np.load(found.reference) as stored:
        if "mu" not in stored:
            raise SystemExit(f"{found.reference}: expected mu and sigma, as in ADM's reference")
        fixed = Moments(*(torch.from_numpy(stored[name]).double() for name in ("mu", "sigma")))

    def features(pixels: Tensor) -> Tensor:
        return torch.cat([network(batch.numpy())[FEATURES] for batch in pixels.split(BATCH)])

    return FeatureSpace("Inception: FID", features, lambda generator: fixed)


def compare(space: FeatureSpace, generated: Tensor, reference: Tensor, labels: Tensor) -> dict[str, Any]:
    """Fréchet distances, and the difference of the two sets' distances to the real images, with their intervals.

    Image i of both sets has the same class, labels[i], and noise, so resampling takes the same i of both: what is left
    is the cost of the backend and the dtype.
    """
    generator = torch.Generator().manual_seed(0)
    # A distance of Inception's 2,048 features takes seconds.
    count = RESAMPLES if generated.shape[1] <= 256 else RESAMPLES // 10
    samples = [resampled(labels, generator) for _ in range(count)]
    found = torch.tensor(
        [distances(generated[rows], reference[rows], space.real(generator)) for rows in samples], dtype=torch.float64
    )
    to_reference, to_real, costs = distances(generated, reference, space.real(None))
    return {
        "frechet_to_reference": to_reference,
        "frechet_to_reference_interval": interval(to_reference, found[:, 0], least=0),
        "frechet_to_real": to_real,
        "frechet_to_real_interval": interval(to_real, found[:, 1], least=0),
        "costs": costs,
        "costs_interval": interval(costs, found[:, 2]),
    }


def distances(generated: Tensor, reference: Tensor, real: Moments) -> tuple[float, float, float]:
    """From generated to reference and to real, and how much farther from real it is than the reference."""
    ours, theirs = moments(generated), moments(reference)
    to_real = frechet(ours, real)
    return frechet(ours, theirs), to_real, to_real - frechet(theirs, real)


def interval(estimate: float, resamples: Tensor, least: float = -math.inf) -> list[float]:
    """The middle 95 % of resamples, shifted so that their mean is the estimate.

    A resampled set has fewer different images, which moves it away from all others: unshifted, the resamples of a
    distance seldom contain its expected value (8 % of the time for a Gaussian of 16 dimensions and 1,000 images; 100 %
    and, between paired sets, 92 % when shifted).
    """
    low, high = (resamples.quantile(resamples.new_tensor((0.025, 0.975))) - resamples.mean() + estimate).tolist()
    return [max(low, least), high]


def resampled(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Rows sampled with replacement inside each class, so that the size of each class stays."""
    rows = torch.empty_like(labels)
    for label in labels.unique():
        (at,) = torch.nonzero(labels == label, as_tuple=True)
        rows[at] = at[torch.randint(len(at), (len(at),), generator=generator)]
    return rows
