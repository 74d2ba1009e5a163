"""`mvar demo`: emoji and digits from the models in the package, and checks of the digits' quality."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar.cli.options import add_execution, add_sampling, path

if TYPE_CHECKING:
    import torch

    from mvar.models.tokenizer import Tokenizer
    from mvar.models.transformer import Model

HELP = "generate emoji and handwritten digits with the models in the package, and check the digits"
EXAMPLES = "mvar demo\nmvar demo --bidirectional --out digits"
EMOJI_ROWS, EMOJI_COLUMNS = 10, 12
EMOJI_BATCH = 40
SCALES_OF, EDIT_OF = "heart", "face"  # classes of scales.png and edit.png
EDITS = 8
DIGIT_COLUMNS = 10
DIGIT_BATCH = 100
MAX_CHECKED = 100_000  # all images are kept in memory, 12 KiB each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output and checks")
    group.add_argument(
        "--out",
        type=path,
        default=Path("demo"),
        help="folder for emoji.png, scales.png (an image after each scale), edit.png (in-painting) and digits.png "
        "(default: demo)",
    )
    group.add_argument("--bidirectional", action="store_true", help="use the digits model with the bidirectional mixer")
    group.add_argument(
        "--checked", type=int, default=1000, metavar="N", help="digits to generate for the checks (default: 1000)"
    )
    add_sampling(parser, cfg=None, top_k=None, top_p=None)
    add_execution(parser)


def run(options: argparse.Namespace) -> None:
    """Write the images, print speed and checks. Exits with 1 if a check fails."""
    from mvar import digits
    from mvar.cli.resolve import DTYPES
    from mvar.inference.dtypes import fastest_dtype
    from mvar.utils.distributed import local_device
    from mvar.utils.files import check_writable
    from mvar_kernels.dispatch import backends

    if not 2 * digits.NUM_CLASSES <= options.checked <= MAX_CHECKED:
        expected = f"from {2 * digits.NUM_CLASSES} to {MAX_CHECKED}"
        raise ValueError(f"--checked: expected {expected}, got {options.checked}")
    check_writable(options.out / "emoji.png")
    device = local_device(options.device)
    available = ", ".join(name for name, reason in backends().items() if reason is None)
    dtype = DTYPES.get(options.dtype) or fastest_dtype(device)
    print(f"backend: {options.backend} on {device} (available: {available}), {dtype}", flush=True)
    _emoji(options, device)
    if not _digits(options, device):
        sys.exit(1)


def _arguments(options: argparse.Namespace, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `mvar.generate`, with a model's sampling options where none were given."""
    from mvar.cli.resolve import generate_arguments

    chosen = {name: value for name, value in sampling.items() if getattr(options, name) is None}
    return generate_arguments(options) | chosen


def _generate(
    model: "Model", tokenizer: "Tokenizer", labels: Sequence[int], batch: int, name: str, **arguments: Any
) -> "torch.Tensor":
    """Images of these labels, (n, 3, R, R) in [0, 1] on the CPU; prints the time per image."""
    import torch
    from tqdm import tqdm

    from mvar.inference.api import generate

    images, start_time = [], time.perf_counter()
    for start in tqdm(range(0, len(labels), batch), desc=name, unit="batch", disable=None):
        out = generate(model, tokenizer, labels[start : start + batch], first_index=start, **arguments)
        images.append(out.images.cpu())
    seconds = (time.perf_counter() - start_time) / len(labels)
    side = tokenizer.resolution
    print(f"{name}: {len(labels)} images of {side}×{side}, {seconds:.4f} seconds per image in batches of {batch}")
    return torch.cat(images)


def _emoji(options: argparse.Namespace, device: "torch.device") -> None:
    """Write emoji.png with images of all classes, scales.png and edit.png."""
    import torch

    from mvar import emoji
    from mvar.inference.api import generate
    from mvar.inference.edit import edit
    from mvar.utils.images import grid, save_image

    model, tokenizer = emoji.pretrained()
    model.to(device)
    tokenizer.to(device)
    assert model.class_names is not None
    arguments = _arguments(options, emoji.SAMPLING)
    classes = model.config.num_classes
    count = EMOJI_ROWS * EMOJI_COLUMNS
    labels = [i * classes // count for i in range(count)]
    images = _generate(model, tokenizer, labels, EMOJI_BATCH, "emoji", **arguments)
    save_image(options.out / "emoji.png", grid(images, EMOJI_COLUMNS))

    label = model.class_names.index(SCALES_OF)
    scales = generate(model, tokenizer, [label], return_scales=True, **arguments).scales
    assert scales is not None
    save_image(options.out / "scales.png", grid(torch.cat(scales), len(scales), enlarge=2))

    label = model.class_names.index(EDIT_OF)
    image = images[labels.index(label)]
    mask = torch.zeros(image.shape[1:], dtype=torch.bool, device="cpu")
    mask[image.shape[1] // 2 :] = True
    edited = edit(
        model, tokenizer, image.expand(EDITS, -1, -1, -1), mask, label, fill=True, first_index=count, **arguments
    )
    shown = torch.stack([image, image.masked_fill(mask, 0.5)])
    save_image(options.out / "edit.png", grid(torch.cat([shown, edited.images.cpu()]), EDITS + 2, enlarge=2))
    written = ", ".join(str(options.out / name) for name in ("emoji.png", "scales.png", "edit.png"))
    print(f"images: {written}", flush=True)


def _digits(options: argparse.Namespace, device: "torch.device") -> bool:
    """Write digits.png, print the checks of --checked digits; True if all pass."""
    import torch

    from mvar import digits
    from mvar.utils.images import grid, save_image

    model, tokenizer = digits.pretrained(bidirectional=options.bidirectional)
    model.to(device)
    tokenizer.to(device)
    classes = digits.NUM_CLASSES
    count = max(options.checked, DIGIT_COLUMNS * classes)
    labels = [i % classes for i in range(count)]
    images = _generate(model, tokenizer, labels, DIGIT_BATCH, "digits", **_arguments(options, digits.SAMPLING))
    page = images[: DIGIT_COLUMNS * classes].unflatten(0, (DIGIT_COLUMNS, classes)).transpose(0, 1).flatten(0, 1)
    save_image(options.out / "digits.png", grid(page, DIGIT_COLUMNS, enlarge=2))
    print(f"images: {options.out / 'digits.png'}")

    checked = torch.tensor(labels[: options.checked], dtype=torch.int64, device="cpu")
    quality = digits.quality(images[: options.checked] * 2 - 1, checked)
    checks = quality.checks()
    for text, passed in checks:
        print(f"{'ok  ' if passed else 'FAIL'} {text}")
    print(f"     nearest training digit {quality.nearest:6.2f}  times as far as from a held-out one (1: no copying)")
    return all(passed for _, passed in checks)
