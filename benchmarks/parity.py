"""Does a kernel or a dtype cost quality? `mvar bench --suite parity`, or `python -m benchmarks.parity`.

The same seeds through the reference in float32 and through every backend and dtype that there is here: how many tokens
are the same, how far logits and pixels are apart, and how far the sets are from one another and from real images, with
a bootstrap interval. One token that differs changes all that come after it, so that sets of equal seeds may differ in
every image and yet be as good as one another: another seed of the reference shows how far two equally good sets are
apart.

Without weights: the digits inside the package, by features of a classifier that is trained on real digits first. That
is no FID. With weights, Inception's and ADM's reference npz: FID.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import mvar
from benchmarks.measure import DEVICE, write
from mvar import digits
from mvar.arguments import load
from mvar.engine import prepared_model, prepared_tokenizer
from mvar.evaluate import Moments, frechet, moments
from mvar.evaluate.inception import FEATURES, Inception, sources
from mvar.files import expanded
from mvar.pictures import to_bytes
from mvar.tokenizer import Tokenizer
from mvar_kernels.dispatch import BackendError, backends

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
BATCH = 50
RESAMPLES = 200
Draw = Callable[[torch.Generator | None], Moments]


class Set(NamedTuple):
    """tokens (n, L); pixels (n, H, W, 3) uint8."""

    tokens: Tensor
    pixels: Tensor


class Judge(NamedTuple):
    """features: (n, H, W, 3) uint8 → (n, F). real: moments of the real images, resampled where given a generator."""

    name: str
    features: Callable[[Tensor], Tensor]
    real: Draw


def drawn(model: mvar.Model, tokenizer: Tokenizer, labels: Tensor, drawing: dict[str, Any], **options: Any) -> Set:
    tokens, pixels = [], []
    for start in range(0, len(labels), BATCH):
        rows = labels[start : start + BATCH]
        out = mvar.generate(model, tokenizer, rows, first_index=start, **drawing, **options)
        tokens.append(out.tokens.cpu())
        pixels.append(to_bytes(out.images).cpu())
    return Set(torch.cat(tokens), torch.cat(pixels))


@torch.no_grad()
def teacher_forced(
    model: mvar.Model, tokenizer: Tokenizer, labels: Tensor, tokens: Tensor, backend: str, dtype: torch.dtype
) -> Tensor:
    """(B, L, V) float32 logits, the tokens so far given."""
    inputs = tokenizer.teacher_forcing_inputs(tokens.to(DEVICE))
    return prepared_model(model, dtype)(labels.to(DEVICE), inputs, backend=backend).cpu()


@torch.no_grad()
def decoded(tokenizer: Tokenizer, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return prepared_tokenizer(tokenizer, dtype).decode(tokens.to(DEVICE)).float().cpu()


def psnr_db(a: Tensor, b: Tensor, span: float) -> float | None:
    """Of all pixels together; None where they are the same."""
    error = float((a.double() - b.double()).square().mean())
    return 10 * float(np.log10(span**2 / error)) if error else None


def interval(estimate: float, resamples: Tensor, least: float = -math.inf) -> list[float]:
    """The middle 95 % of resamples, moved so that their mean is the estimate.

    A resampled set has fewer different images, which moves it away from all others: as they are, the resamples of a
    distance seldom hold its expected value (8 % of the time for a Gaussian of 16 dimensions and 1,000 images; 100 %
    and, between paired sets, 92 % when moved).
    """
    low, high = (resamples.quantile(resamples.new_tensor((0.025, 0.975))) - resamples.mean() + estimate).tolist()
    return [max(low, least), high]


def resampled(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Rows drawn with replacement inside each class: how many there are of each is no chance."""
    rows = torch.empty_like(labels)
    for label in labels.unique():
        (at,) = torch.nonzero(labels == label, as_tuple=True)
        rows[at] = at[torch.randint(len(at), (len(at),), generator=generator)]
    return rows


def compare_features(judge: Judge, made: Tensor, reference: Tensor, labels: Tensor) -> dict[str, Any]:
    """Fréchet distances, and how the two sets' distances to the real images differ, with their intervals.

    Image i of both sets has the same class, labels[i], and noise, so resampling takes the same i of both: what is left
    is what the side costs.
    """
    generator = torch.Generator().manual_seed(0)
    # A distance of Inception's 2,048 features takes seconds.
    resamples = RESAMPLES if made.shape[1] <= 256 else RESAMPLES // 10
    taken = [resampled(labels, generator) for _ in range(resamples)]
    found = torch.tensor(
        [distances(made[rows], reference[rows], judge.real(generator)) for rows in taken], dtype=torch.float64
    )
    to_reference, to_real, costs = distances(made, reference, judge.real(None))
    return {
        "frechet_to_reference": to_reference,
        "frechet_to_reference_interval": interval(to_reference, found[:, 0], least=0),
        "frechet_to_real": to_real,
        "frechet_to_real_interval": interval(to_real, found[:, 1], least=0),
        "costs": costs,
        "costs_interval": interval(costs, found[:, 2]),
    }


def distances(made: Tensor, reference: Tensor, real: Moments) -> tuple[float, float, float]:
    """From made to reference and to real, and how much farther it is to real than from reference."""
    ours, theirs = moments(made), moments(reference)
    to_real = frechet(ours, real)
    return frechet(ours, theirs), to_real, to_real - frechet(theirs, real)


def digit_judge() -> Judge:
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
    right = classifier(digits.features(held_out.images)).argmax(1) == held_out.labels
    if (accuracy := float(right.float().mean())) < 0.95:
        raise SystemExit(f"the classifier knows only {accuracy:.1%} of the held-out digits: its features mean nothing")
    held = hidden(digits.features(held_out.images))

    def real(generator: torch.Generator | None) -> Moments:
        return moments(held if generator is None else held[resampled(held_out.labels, generator)])

    def features(pixels: Tensor) -> Tensor:
        found: Tensor = hidden(digits.features(pixels.permute(0, 3, 1, 2) / 127.5 - 1))
        return found

    return Judge(f"classifier of real digits ({accuracy:.1%} of held-out ones right); no FID", features, real)


def inception_judge(weights: Path | None, reference: Path | None) -> Judge:
    found = sources(weights, reference)
    wanted = [*found.missing, *([found.unreferenced] if found.unreferenced else [])]
    if wanted or found.reference is None:
        raise SystemExit("for FID there is missing:\n" + "\n".join(wanted))
    network = Inception(found.weights, DEVICE)
    with np.load(found.reference) as stored:
        if "mu" not in stored:
            raise SystemExit(f"{found.reference}: expected mu and sigma, as in ADM's reference")
        fixed = Moments(*(torch.from_numpy(stored[name]).double() for name in ("mu", "sigma")))

    def features(pixels: Tensor) -> Tensor:
        return torch.cat([network(batch.numpy())[FEATURES] for batch in pixels.split(BATCH)])

    return Judge("Inception: FID", features, lambda generator: fixed)


def sides() -> Iterator[tuple[str, torch.dtype]]:
    """What there is on this machine; the first one is what all others are held against."""
    there = ["reference", *(name for name, reason in backends().items() if reason is None and name != "reference")]
    yield from product(there, DTYPES[DEVICE.type])


def measure(
    model: mvar.Model, tokenizer: Tokenizer, labels: Tensor, drawing: dict[str, Any], judge: Judge, seed: int
) -> list[dict[str, Any]]:
    def draw(backend: str, dtype: torch.dtype, seed: int) -> Set:
        return drawn(model, tokenizer, labels, drawing, seed=seed, backend=backend, dtype=dtype)

    first = draw("reference", torch.float32, seed)
    features = judge.features(first.pixels)
    forced = labels[:BATCH], first.tokens[:BATCH]
    logits = teacher_forced(model, tokenizer, *forced, "reference", torch.float32)
    spread = (logits - logits.mean(-1, keepdim=True)).square().mean().sqrt()
    pictures = decoded(tokenizer, forced[1], torch.float32)
    scales = model.config.scales
    rows: list[dict[str, Any]] = []
    for backend, dtype in sides():
        start = time.perf_counter()
        name = {"backend": backend, "dtype": str(dtype)[6:], "seed": seed}
        try:
            made = draw(backend, dtype, seed)
            error = teacher_forced(model, tokenizer, *forced, backend, dtype) - logits
        except BackendError as objection:
            rows.append(name | {"objection": str(objection)})
            continue
        equal = (made.tokens == first.tokens).float()
        rows.append(
            name
            | {
                "equal_tokens": float(equal.mean()),
                "equal_tokens_by_scale": [float(part.mean()) for part in equal.split(scales, 1)],
                "logit_error_rms": float(error.square().mean().sqrt() / spread),
                "logit_error_max": float(error.abs().max() / spread),
                "psnr_db": psnr_db(made.pixels, first.pixels, 255),
                "psnr_of_same_tokens_db": psnr_db(decoded(tokenizer, forced[1], dtype), pictures, 2),
            }
            | compare_features(judge, judge.features(made.pixels), features, labels)
        )
        print(rows[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    other = draw("reference", torch.float32, seed + 1)
    another = {"backend": "reference", "dtype": "float32", "seed": seed + 1}
    rows.append(another | compare_features(judge, judge.features(other.pixels), features, labels))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights")
    parser.add_argument("--tokenizer")
    parser.add_argument("--inception", type=expanded)
    parser.add_argument("--reference", type=expanded)
    parser.add_argument("--count", type=int, default=100, help="images a class (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, tokenizer = load(options.weights, options.tokenizer, DEVICE)
    ours = options.weights is None
    judge = digit_judge() if ours else inception_judge(options.inception, options.reference)
    drawing: dict[str, Any] = dict(digits.SAMPLING if ours else {"cfg": 1.5, "top_k": 900, "top_p": 0.96})
    labels = torch.arange(options.count * model.config.num_classes) % model.config.num_classes
    rows = measure(model, tokenizer, labels, drawing, judge, options.seed)
    setup = {"model": options.weights or "digits", "images": len(labels), "drawing": drawing, "judge": judge.name}
    print(write(f"parity_{'digits' if ours else Path(options.weights).stem}", setup | {"sides": rows}))


if __name__ == "__main__":
    main()
