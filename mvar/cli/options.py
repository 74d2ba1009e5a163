"""Command-line arguments that several commands share."""

import argparse
import os
from pathlib import Path

from mvar.utils.files import expanded

DTYPE_NAMES = ("auto", "fp32", "bf16", "fp16")
MAX_IMAGES = 10**8  # per run: 20 TB at 256×256
WEIGHTS = "a file, a folder of save_pretrained, hf://owner/repository or hf://owner/repository/file"
REFINERS = ("digits_refiner",)
"""Models in the package for --refiner."""
WORKERS = min(8, os.cpu_count() or 1)
"""Default number of processes that read images."""
Group = argparse._ArgumentGroup


def source(text: str) -> str:
    """A path, or an hf:// address, which pathlib would alter."""
    if not text:  # for example an unset shell variable; Path("") is the current folder
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return text


def path(text: str) -> Path:
    return expanded(source(text))


def add_weights(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("weights", "give both, or --weights alone for a model in the package")
    group.add_argument("--weights", type=source, help=f"the model: digits (default), emoji, or {WEIGHTS}")
    group.add_argument("--tokenizer", type=source, help=f"its tokenizer: {WEIGHTS}")


def add_token_maps(group: Group) -> None:
    maps = group.add_mutually_exclusive_group()
    maps.add_argument("--resolution", type=int, help="256, 512 or 1024 (default: as stored in the tokenizer's file)")
    maps.add_argument("--patch_nums", type=int, nargs="+", metavar="N", help="side lengths of other token maps")


def add_sampling(parser: argparse.ArgumentParser, cfg: float | None, top_k: int | None, top_p: float | None) -> Group:
    def default(value: float | None) -> str:
        return f"(default: {'depends on the model' if value is None else value})"

    group = parser.add_argument_group("sampling")
    group.add_argument("--cfg", type=float, default=cfg, help=f"classifier-free guidance; 0 for none {default(cfg)}")
    group.add_argument(
        "--top-k", type=int, default=top_k, help=f"keep the k most likely codes; 0 for all {default(top_k)}"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=top_p,
        help=f"keep the most likely codes up to this cumulative probability {default(top_p)}",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="the random numbers of image i depend on (seed, i) only (default: 0)"
    )
    return group


def add_shortcuts(group: Group) -> None:
    """Options that save multiplications, and change the images."""
    group.add_argument(
        "--guidance-until",
        type=int,
        metavar="K",
        help="guidance on the K coarsest scales only (default: on all)",
    )
    group.add_argument(
        "--refiner",
        type=source,
        help=f"a smaller model for the fine scales: {', '.join(REFINERS)}, or {WEIGHTS}",
    )
    group.add_argument(
        "--refine-from", type=int, metavar="K", help="number of coarsest scales that --weights generates"
    )


def add_execution(parser: argparse.ArgumentParser) -> Group:
    group = parser.add_argument_group("execution")
    group.add_argument(
        "--dtype", choices=DTYPE_NAMES, default="auto", help="dtype of the model (default: the fastest on the device)"
    )
    group.add_argument("--backend", default="auto", help="backend of every op, see `mvar info` (default: auto)")
    group.add_argument(
        "--graph",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run each batch as one CUDA graph (default: on a GPU)",
    )
    add_device(group)
    return group


def add_device(group: Group) -> None:
    group.add_argument("--device", default=None, help="such as cpu or cuda:1 (default: cuda if available)")


def add_compile_decoder(group: Group) -> None:
    group.add_argument(
        "--compile-decoder",
        action="store_true",
        help="run the decoder with torch.compile; worthwhile for thousands of images",
    )


def check_images(options: argparse.Namespace, classes: int) -> None:
    """Raise ValueError unless --count and --batch are in range for this number of classes."""
    for name in ("count", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if classes * options.count > MAX_IMAGES:
        raise ValueError(f"--count: expected at most {MAX_IMAGES} images of all classes, got {classes * options.count}")
