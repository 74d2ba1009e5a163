"""Measure generated emoji against the real ones: are they of the class asked for, and are they new?

    python examples/emoji/evaluate.py emoji --out emoji-quality                       # the model in the package
    python examples/emoji/evaluate.py emoji --weights ar.safetensors --tokenizer vae.safetensors --out emoji-quality
    python examples/emoji/evaluate.py emoji --images samples --out emoji-quality      # from `mvar sample --out samples`

The first argument is the folder of `prepare.py`. The output folder gets `evaluation.json`, `samples.png` (10 × 12
images, sorted by class) and `copies.png` (the eight images that are closest to a training image, above that image).

**Classifier.** A small convolutional network, trained on the real training images with the crops of mvar's training. It
sees images at 32×32. Its accuracy is reported on held-out images, on their reconstructions by the tokenizer and on
generated images; each accuracy also as the mean of the accuracies of the classes, as most held-out images are people.
Training images are reported too: the network has memorized them, and a copy of one counts as right.

**Copies.** The distance of an image to a training image is the RMS difference of their pixels (from 0 to 255), the
smallest over all crops of the training image. The held-out images show how far an image that is no copy is from the
training images. They are of other emoji, though: a new combination of a skin tone and a known emoji is closer.

**Fréchet distance** of the features of the classifier, every class with the same weight. It is not FID.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import mvar
from mvar import emoji
from mvar.data.crops import center_crop, read_image
from mvar.data.folder import ImageFolder
from mvar.data.listing import images_by_class
from mvar.evaluate.features import Moments, frechet
from mvar.utils.files import check_writable, make_folder, write_json
from mvar.utils.images import grid, save_image, to_bytes
from mvar.utils.machine import cpu_model

MARGIN = 1.125
"""The stored images are 1.125 times as large as the model's, see `prepare.py`."""
RATIO = 0.85
"""Generated images are of the class asked for if the classifier is right at least this often, relative to held-out."""
SAMPLE_NAME = re.compile(r"(\d{6,})_(\d{4,})\.png")  # <index>_<class>.png of `mvar sample`
CANDIDATES = 32
"""Training images, the closest at 16×16, of which the distance to an image is computed."""
BATCH = 256


class Images(NamedTuple):
    pixels: Tensor
    """(n, 3, S, S) in [0, 1]"""
    labels: Tensor
    """(n,) int64"""


class Classifier(nn.Module):
    """Four convolutions on 32×32 pixels. (n, 3, S, S) in [0, 1] → (n, C)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 192)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
                for i, o in zip(widths, widths[1:], strict=False)
            )
        )
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(4 * widths[-1], num_classes))

    def _layers(self, images: Tensor) -> Tensor:
        return self.layers(F.adaptive_avg_pool2d(images * 2 - 1, 32))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self._layers(images).flatten(1))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(n, 192), the mean over the positions of the last layer."""
        return torch.cat([self._layers(part).mean((2, 3)) for part in images.split(BATCH)])

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        return torch.cat([self(part).argmax(1) for part in images.split(BATCH)])


def read(folder: Path, side: int, classes: Sequence[str] | None = None) -> tuple[Images, tuple[str, ...]]:
    """All images of `folder`, resized to `side`, and the names of the classes."""
    source = ImageFolder(folder, side, mid_resolution=1.0, classes=classes)
    batches = list(source.once(batch=BATCH))
    pixels = torch.cat([batch.images for batch in batches if batch.images is not None])
    return Images((pixels + 1) / 2, torch.cat([batch.labels for batch in batches])), source.classes


def read_samples(folder: Path) -> Images:
    """The images of `mvar sample --out`; their names hold the labels.

    Raises:
        ValueError: there are none.
    """
    found = sorted(
        (match[1], int(match[2]), path) for path in folder.iterdir() if (match := SAMPLE_NAME.fullmatch(path.name))
    )
    if not found:
        raise ValueError(f"--images: expected files of `mvar sample --out` (000000_0000.png, …), got none in {folder}")
    labels = torch.tensor([label for _, label, _ in found], dtype=torch.int64)
    with Image.open(found[0][2]) as first:
        side = min(first.size)
    pixels = torch.stack([center_crop(read_image(path, side), side) for _, _, path in found])
    return Images((pixels + 1) / 2, labels)


def center(pixels: Tensor, side: int) -> Tensor:
    """Center crop, (n, 3, S, S) → (n, 3, side, side)."""
    start = round((pixels.shape[-1] - side) / 2)
    return pixels[..., start : start + side, start : start + side]


def random_crops(pixels: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A random crop of each image, (n, 3, S, S) → (n, 3, side, side)."""
    starts = torch.randint(pixels.shape[-1] - side + 1, (len(pixels), 2), generator=generator)
    crops = zip(pixels, starts.tolist(), strict=True)
    return torch.stack([image[:, top : top + side, left : left + side] for image, (top, left) in crops])


def train_classifier(
    images: Images, num_classes: int, side: int, *, seed: int, steps: int, batch: int = 64
) -> Classifier:
    """Train on random side×side crops; every class is drawn equally often."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(num_classes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
        weights = 1 / torch.bincount(images.labels, minlength=num_classes).float()[images.labels]
        for _ in range(steps):
            rows = torch.multinomial(weights, batch, replacement=True, generator=generator)
            logits = model(random_crops(images.pixels[rows], side, generator))
            loss = F.cross_entropy(logits, images.labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> dict[str, Any]:
    """Over images, the mean over classes, and of each class (None without an image of it)."""
    right = (predicted == labels).double()
    of_class = [right[labels == c].mean().item() if (labels == c).any() else None for c in range(num_classes)]
    present = [value for value in of_class if value is not None]
    return {"images": right.mean().item(), "balanced": sum(present) / len(present), "of_class": of_class}


def nearest(pixels: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest training image over all its crops, and its index.

    The distance is exact for the 32 training images that are closest at a quarter of the resolution, where crops are
    one pixel apart.

    Args:
        pixels: (n, 3, R, R) in [0, 1].
        train: (m, 3, S, S) in [0, 1], S ≥ R.

    Returns:
        RMS difference of pixels from 0 to 255, (n,), and indices (n,).
    """
    side = pixels.shape[-1]
    room = train.shape[-1] - side
    small = F.avg_pool2d(pixels, 4).flatten(1)
    starts = sorted({0, room // 2, room})
    coarse = torch.full((len(pixels), len(train)), torch.inf)
    for top in starts:
        for left in starts:
            crops = F.avg_pool2d(train[..., top : top + side, left : left + side], 4).flatten(1)
            coarse = torch.minimum(coarse, torch.cdist(small, crops))
    candidates = coarse.topk(min(CANDIDATES, len(train)), largest=False).indices
    # |image − crop|² for all crops at once: their inner products are a correlation, computed by FFT.
    size = train.shape[-2:]
    distances, indices = [], []
    for image, rows in zip(pixels.double(), candidates, strict=True):
        others = train[rows].double()
        spectrum = (torch.fft.rfft2(others) * torch.fft.rfft2(image, s=size).conj()).sum(1)
        products = torch.fft.irfft2(spectrum, s=size)[:, : room + 1, : room + 1]
        squares = F.avg_pool2d(others.square().sum(1), side, stride=1) * side**2 - 2 * products
        best, row = squares.flatten(1).min(1).values.min(0)
        distances.append(best + image.square().sum())
        indices.append(rows[row])
    mean = torch.stack(distances).clamp_min(0) / pixels[0].numel()
    return (mean.sqrt() * 255).float(), torch.stack(indices)


def balanced_moments(features: Tensor, labels: Tensor) -> Moments:
    """Mean and covariance of features (n, F) with the same weight for every class."""
    rows = features.double()
    weights = 1 / torch.bincount(labels).double()[labels]
    weights = weights / weights.sum()
    mean = weights @ rows
    centered = rows - mean
    return Moments(mean, (centered.T * weights) @ centered / (1 - weights.square().sum()))


def spread(values: Tensor) -> dict[str, float]:
    return {"median": values.median().item(), "quantile_05": values.quantile(0.05).item()}


def measure(
    train: Images, held_out: Images, generated: Images, reconstructed: Tensor | None, model: Classifier
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """All figures; and for every generated image its distance to the nearest training image and the index of this.

    Args:
        train: (n, 3, S, S) with the border that random crops need.
        held_out, generated: center crops, (n, 3, R, R).
        reconstructed: the held-out images after the tokenizer, or None.
    """
    side, classes = generated.pixels.shape[-1], int(train.labels.max()) + 1
    centered = Images(center(train.pixels, side), train.labels)
    sets = {"training": centered, "held_out": held_out, "generated": generated}
    if reconstructed is not None:
        sets["reconstructed"] = Images(reconstructed, held_out.labels)
    accuracies = {name: accuracy(model.predict(s.pixels), s.labels, classes) for name, s in sets.items()}
    ratios = {name: a["balanced"] / max(accuracies["held_out"]["balanced"], 1e-9) for name, a in accuracies.items()}
    moments = {name: balanced_moments(model.features(s.pixels), s.labels) for name, s in sets.items()}
    distances, indices = nearest(generated.pixels, train.pixels)
    real, _ = nearest(held_out.pixels, train.pixels)
    limit = real.quantile(0.05)
    result = {
        "images": {name: len(s.labels) for name, s in sets.items()},
        "accuracy": accuracies,
        "ratio_to_held_out": ratios,
        "distance_to_training": {
            "held_out": spread(real),
            "generated": {**spread(distances), "below_held_out_05": (distances < limit).double().mean().item()},
        },
        "frechet_to_held_out": {n: frechet(m, moments["held_out"]) for n, m in moments.items() if n != "held_out"},
    }
    return result, distances, indices


def generate(options: argparse.Namespace, model: mvar.Model, tokenizer: mvar.Tokenizer) -> Images:
    """--count images of each class, in order.

    Raises:
        ValueError: the model's classes are not those of the folder.
    """
    classes = tuple(images_by_class(options.folder / "train")[0])
    names = model.class_names or classes
    if model.config.num_classes != len(classes) or names != classes:
        raise ValueError(
            f"--weights: expected a model of the {len(classes)} classes in {options.folder}, got "
            f"{model.config.num_classes} classes ({', '.join(names[:3])}, …)"
        )
    labels = torch.arange(len(classes)).repeat_interleave(options.count)
    batches = []
    for first in range(0, len(labels), 50):
        out = mvar.generate(
            model,
            tokenizer,
            labels[first : first + 50],
            cfg=options.cfg,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            first_index=first,
        )
        batches.append(out.images)
    return Images(rounded(torch.cat(batches)), labels)


def reconstruct(images: Tensor, tokenizer: mvar.Tokenizer) -> Tensor:
    """Images (n, 3, R, R) in [0, 1] after the tokenizer."""
    parts = [tokenizer.decode(tokenizer.encode(part * 2 - 1)) for part in images.split(50)]
    return rounded((torch.cat(parts) + 1) / 2)


def rounded(images: Tensor) -> Tensor:
    """As read from a PNG."""
    return to_bytes(images).permute(0, 3, 1, 2).float() / 255


def sample_page(generated: Images, columns: int = 12, rows: int = 10) -> Tensor:
    """Images from all classes, sorted by class."""
    by_class = generated.labels.argsort(stable=True)
    places = torch.linspace(0, len(by_class) - 1, min(columns * rows, len(by_class))).round().long()
    return grid(generated.pixels[by_class[places]], columns)


def copies_page(generated: Tensor, train: Tensor, distances: Tensor, indices: Tensor) -> Tensor:
    """The eight images closest to a training image, above that image."""
    worst = distances.argsort()[:8]
    return grid(torch.cat([generated[worst], train[indices[worst]]]), len(worst), enlarge=2)


def report(result: dict[str, Any], classes: Sequence[str]) -> str:
    accuracy, names = result["accuracy"], ("training", "held_out", "reconstructed", "generated")
    lines = [f"{'classifier accuracy':<20} {'images':>7} {'balanced':>9} {'ratio':>6}"]
    for name in names:
        if name in accuracy:
            a, ratio = accuracy[name], result["ratio_to_held_out"][name]
            lines.append(f"{name:<20} {a['images']:>7.1%} {a['balanced']:>9.1%} {ratio:>6.2f}")
    lines.append(
        f"generated / held-out, balanced: {result['ratio_to_held_out']['generated']:.2f} (at least {RATIO}: "
        f"{'yes' if result['passed'] else 'NO'})"
    )
    lines.append(f"\n{'distance to training':<20} {'median':>7} {'5 % quantile':>13}")
    for name, d in result["distance_to_training"].items():
        lines.append(f"{name:<20} {d['median']:>7.2f} {d['quantile_05']:>13.2f}")
    below = result["distance_to_training"]["generated"]["below_held_out_05"]
    lines.append(f"generated images closer than the 5 % quantile of held-out images: {below:.1%}")
    lines.append("\nFréchet distance to held-out images, in features of the classifier")
    lines += [f"{name:<20} {value:>7.3f}" for name, value in result["frechet_to_held_out"].items()]
    lines.append(f"\n{'class':<20} {'held-out':>9} {'generated':>10}")
    for c, name in enumerate(classes):
        values = (accuracy[s]["of_class"][c] for s in ("held_out", "generated"))
        lines.append(f"{name:<20} " + " ".join(f"{'–' if v is None else f'{v:.0%}':>9}" for v in values))
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    if options.images is not None and options.weights is not None:
        raise ValueError("--images and --weights: give at most one of them")
    if options.images is None and (options.weights is None) != (options.tokenizer is None):
        raise ValueError("--weights and --tokenizer: give both, or neither for the model in the package")
    make_folder(options.out)
    check_writable(options.out / "evaluation.json")
    tokenizer: mvar.Tokenizer | None
    if options.images is not None:
        tokenizer = None if options.tokenizer is None else mvar.load_tokenizer(options.tokenizer)
        samples = read_samples(options.images)
    else:
        if options.weights is None:
            model, tokenizer = emoji.pretrained()
        else:
            model, tokenizer = mvar.load_model(options.weights), mvar.load_tokenizer(options.tokenizer)
        samples = generate(options, model, tokenizer)
    side = samples.pixels.shape[-1]
    stored = round(MARGIN * side)
    train, classes = read(options.folder / "train", stored)
    held_out, _ = read(options.folder / "val", stored, classes)
    held_out = Images(center(held_out.pixels, side), held_out.labels)
    found = set(samples.labels.tolist())
    if found != set(range(len(classes))):
        raise ValueError(
            f"--images: expected images of the classes 0 to {len(classes) - 1}, got {len(found)} classes from "
            f"{min(found)} to {max(found)}"
        )
    reconstructed = None if tokenizer is None else reconstruct(held_out.pixels, tokenizer)
    classifier = train_classifier(train, len(classes), side, seed=options.seed, steps=options.steps)
    result, distances, indices = measure(train, held_out, samples, reconstructed, classifier)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    result = {
        "passed": result["ratio_to_held_out"]["generated"] >= RATIO,
        **result,
        "classes": classes,
        "settings": settings,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
    }
    save_image(options.out / "samples.png", sample_page(samples))
    save_image(options.out / "copies.png", copies_page(samples.pixels, center(train.pixels, side), distances, indices))
    write_json(options.out / "evaluation.json", result)
    print(report(result, classes))
    print(f"\n{options.out}/evaluation.json, samples.png and copies.png after {time.perf_counter() - started:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure generated emoji against real ones.", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder of prepare.py, with train and val")
    parser.add_argument("--images", type=Path, help="measure the images of `mvar sample --out` instead of a model's")
    parser.add_argument("--weights", help="file of the model")
    parser.add_argument("--tokenizer", help="file of its tokenizer; with --images, for the reconstructions alone")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, which are replaced")
    parser.add_argument("--count", type=int, default=25, help="generated images per class (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the generation and of the classifier (default: 0)")
    for name, kind, meaning in (
        ("cfg", float, "classifier-free guidance"),
        ("top_k", int, "keep the k most likely codes; 0 for all"),
        ("top_p", float, "keep the most likely codes up to this cumulative probability"),
    ):
        default = emoji.SAMPLING[name]
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=default, help=f"{meaning} (default: {default})")
    parser.add_argument("--steps", type=int, default=400, help="training steps of the classifier (default: 400)")
    try:
        run(parser.parse_args())
    except (OSError, ValueError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
