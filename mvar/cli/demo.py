"""`mvar demo`: digits from the model in the package, and checks of their quality."""

import argparse
import sys
import time
from pathlib import Path

from mvar.cli.options import add_execution, add_sampling, path

HELP = "generate handwritten digits with the model in the package, and check them"
EXAMPLES = "mvar demo\nmvar demo --bidirectional --out digits"
COLUMNS = 10
BATCH = 100
MAX_CHECKED = 100_000  # all images are kept in memory, 12 KiB each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output and checks")
    group.add_argument(
        "--out", type=path, default=Path("demo"), help="folder for samples.png and scales.png (default: demo)"
    )
    group.add_argument("--bidirectional", action="store_true", help="use the model with the bidirectional mixer")
    group.add_argument(
        "--checked", type=int, default=1000, metavar="N", help="digits to generate for the checks (default: 1000)"
    )
    add_sampling(parser, cfg=None, top_k=None, top_p=None)
    add_execution(parser)


def run(options: argparse.Namespace) -> None:
    """Write samples.png and scales.png, print speed and checks. Exits with 1 if a check fails."""
    import torch
    from tqdm import tqdm

    from mvar import digits
    from mvar.cli.resolve import generate_arguments
    from mvar.inference.api import generate
    from mvar.utils.distributed import local_device
    from mvar.utils.files import check_writable
    from mvar.utils.images import grid, save_image
    from mvar_kernels.dispatch import backends, fastest_dtype

    if not 2 * digits.NUM_CLASSES <= options.checked <= MAX_CHECKED:
        expected = f"from {2 * digits.NUM_CLASSES} to {MAX_CHECKED}"
        raise ValueError(f"--checked: expected {expected}, got {options.checked}")
    check_writable(options.out / "samples.png")
    device = local_device(options.device)
    for name, value in digits.SAMPLING.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    model, tokenizer = digits.pretrained(bidirectional=options.bidirectional)
    model.to(device)
    tokenizer.to(device)
    arguments = generate_arguments(options)

    count = max(options.checked, COLUMNS * digits.NUM_CLASSES)
    labels = torch.arange(count, dtype=torch.int64, device="cpu") % digits.NUM_CLASSES
    images, start_time = [], time.perf_counter()
    for start in tqdm(range(0, count, BATCH), desc="digits", unit="batch", disable=None):
        out = generate(model, tokenizer, labels[start : start + BATCH], first_index=start, **arguments)
        images.append(out.images.cpu())
    seconds = time.perf_counter() - start_time
    pixels = torch.cat(images)

    rows = [pixels[labels == digit][:COLUMNS] for digit in range(digits.NUM_CLASSES)]
    save_image(options.out / "samples.png", grid(torch.cat(rows), COLUMNS, enlarge=2))
    scales = generate(model, tokenizer, [3], return_scales=True, **arguments).scales
    assert scales is not None
    save_image(options.out / "scales.png", grid(torch.cat(scales), len(scales), enlarge=4))

    quality = digits.quality(pixels[: options.checked] * 2 - 1, labels[: options.checked])
    available = ", ".join(name for name, reason in backends().items() if reason is None)
    print(f"images: {options.out / 'samples.png'}, {options.out / 'scales.png'}")
    dtype = arguments["dtype"] or fastest_dtype(device)
    print(f"backend: {options.backend} on {device} (available: {available}), {dtype}")
    print(f"speed: {1000 * seconds / count:.2f} ms per image, {count} images in batches of {BATCH}")
    checks = quality.checks()
    for text, passed in checks:
        print(f"{'ok  ' if passed else 'FAIL'} {text}")
    print(f"     nearest training digit {quality.nearest:6.2f}  times as far as from a held-out one (1: no copying)")
    if not all(passed for _, passed in checks):
        sys.exit(1)
