"""`mvar demo`: digits from the model inside the package, and the checks that they are good."""

import argparse
import sys
import time

import torch
from tqdm import tqdm

from mvar import digits
from mvar.arguments import sampling_params
from mvar.files import check_writable
from mvar.generate import generate
from mvar.pictures import grid, save_picture
from mvar.processes import own_device
from mvar_kernels.dispatch import backends, fastest_dtype

COLUMNS = 10
BATCH = 100
MAX_CHECKED = 100_000  # all of them are kept in memory, 12 KiB each


def demo(options: argparse.Namespace) -> None:
    """Write samples.png and scales.png, print speed and checks; exit code 1 where a check fails."""
    if not 2 * digits.NUM_CLASSES <= options.checked <= MAX_CHECKED:
        expected = f"from {2 * digits.NUM_CLASSES} to {MAX_CHECKED}"
        raise ValueError(f"--checked: expected {expected}, got {options.checked}")
    check_writable(options.out / "samples.png")
    device = own_device(options.device)
    for name, value in digits.SAMPLING.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    model, tokenizer = digits.pretrained(bidirectional=options.bidirectional)
    model.to(device)
    tokenizer.to(device)
    shared = sampling_params(options)

    count = max(options.checked, COLUMNS * digits.NUM_CLASSES)
    labels = torch.arange(count, dtype=torch.int64, device="cpu") % digits.NUM_CLASSES
    images, started = [], time.perf_counter()
    for start in tqdm(range(0, count, BATCH), desc="digits", unit="batch", disable=None):
        out = generate(model, tokenizer, labels[start : start + BATCH], first_index=start, **shared)
        images.append(out.images.cpu())
    seconds = time.perf_counter() - started
    pixels = torch.cat(images)

    rows = [pixels[labels == digit][:COLUMNS] for digit in range(digits.NUM_CLASSES)]
    save_picture(options.out / "samples.png", grid(torch.cat(rows), COLUMNS, enlarge=2))
    steps = generate(model, tokenizer, [3], return_scales=True, **shared).scales
    assert steps is not None
    save_picture(options.out / "scales.png", grid(torch.cat(steps), len(steps), enlarge=4))

    quality = digits.quality(pixels[: options.checked] * 2 - 1, labels[: options.checked])
    available = ", ".join(name for name, reason in backends().items() if reason is None)
    print(f"pictures: {options.out / 'samples.png'}, {options.out / 'scales.png'}")
    dtype = shared["dtype"] or fastest_dtype(device)
    print(f"backend: {options.backend} on {device} (available: {available}), {dtype}")
    print(f"speed: {1000 * seconds / count:.2f} ms an image, {count} images in batches of {BATCH}")
    checks = quality.checks()
    for text, holds in checks:
        print(f"{'ok  ' if holds else 'FAIL'} {text}")
    print(f"     nearest training digit {quality.nearest:6.2f}  times as far as from a held-out one (1: no copying)")
    if not all(holds for _, holds in checks):
        sys.exit(1)
