"""Shortcuts of generation, a refiner and guidance on the first scales alone: `python -m benchmarks.bench_shortcuts`.

    speed             random weights at 256×256, beside the public algorithm: counted and measured
    quality MODEL     a model in the package, digits or emoji: time, and how much farther from real images than those of
                      complete generation with the same seeds are, by the Fréchet distance, with a bootstrap interval

A shortcut is named by the number of fine scales, the last ones, on which it applies. All variants of a configuration
take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mvar
from benchmarks.analysis import frechet
from benchmarks.analysis.flops import OURS, PUBLIC, decoder_flops, model_flops
from benchmarks.common.environment import DEVICE, argument_parser, set_allocator
from benchmarks.common.results import load, save
from benchmarks.common.timing import latencies
from benchmarks.generation import methods
from benchmarks.generation.checks import check, reason_against
from benchmarks.generation.plan import DTYPES
from mvar import digits, emoji
from mvar.models.tokenizer import Tokenizer
from mvar.utils.files import expanded
from mvar.utils.images import to_bytes
from mvar_kernels.precision import float32_matmuls

SPEED = "shortcuts"
MVAR = methods.METHODS["mvar"]
CFG = 1.5
Row = dict[str, Any]


class Shortcut(NamedTuple):
    """Numbers of fine scales without guidance, and of those that the refiner generates."""

    unguided: int = 0
    refined: int = 0

    def options(self, scales: int, refiner: mvar.Model) -> dict[str, Any]:
        """Arguments of :func:`mvar.generate`."""
        options: dict[str, Any] = {"guidance_until": scales - self.unguided}
        if self.refined:
            options |= {"refiner": refiner, "refine_from": scales - self.refined}
        return options


COMPLETE = Shortcut()


def flops(config: mvar.ModelConfig, refiner: mvar.ModelConfig, shortcut: Shortcut, decoder: float) -> float:
    """Per image, with the decoder: matmuls, scans and convolutions."""
    scales = len(config.scales)
    guided, first = scales - shortcut.unguided, scales - shortcut.refined
    found = model_flops(OURS, config, last=first, guided=guided)
    return found + (model_flops(OURS, refiner, first=first, guided=guided) if shortcut.refined else 0) + decoder


@torch.no_grad()
def speed(options: argparse.Namespace) -> None:
    """Write rows of one depth, refiner, batch and dtype; those of others stay."""
    set_allocator()
    rows: list[Row] = load(SPEED) or []
    pair = methods.random_pair(options.depth, 256, "mvar")
    refiner, _ = methods.random_pair(options.refiner_depth, 256, "mvar")
    scales, configs = len(pair[0].config.scales), (pair[0].config, refiner.config)
    shortcuts = [Shortcut(*given) for given in options.shortcuts]
    if options.public and (wrong := reason_against(MVAR, check([MVAR], {}, lambda _: pair))):
        raise SystemExit(wrong)
    for batch, name in product(options.batches, options.dtypes):
        dtype = getattr(torch, DTYPES[name])
        labels = (torch.arange(batch) * 37 % 1000).to(DEVICE)
        runs: dict[Any, Callable[..., Any]] = {
            shortcut: partial(mvar.generate, *pair, cfg=CFG, dtype=dtype, **shortcut.options(scales, refiner))
            for shortcut in shortcuts
        }
        if options.public:
            chunk = methods.fastest_chunk(pair, batch, dtype)
            runs[PUBLIC] = partial(methods.generate, methods.METHODS["public"], pair, dtype=dtype, chunk=chunk)
        with float32_matmuls(DEVICE, fast=DEVICE.type == "cpu"):
            for run in runs.values():
                run(labels=labels[:1] if DEVICE.type == "cpu" else labels)  # on a CPU, one image packs the weights
            timed = {method: partial(run, labels=labels) for method, run in runs.items()}
            times = latencies(timed, rounds=options.rounds, seconds=0, warm_up=False)
        case = {"depth": options.depth, "refiner_depth": options.refiner_depth, "batch": batch, "dtype": DTYPES[name]}
        rows = [row for row in rows if not row.items() >= case.items()]
        decoder = decoder_flops(pair[1].config, batch) / batch
        for method, of_one in times.items():
            if isinstance(method, Shortcut):
                of_method = method._asdict() | {"flops": flops(*configs, method, decoder)}
            else:
                published = decoder_flops(pair[1].config, 1, prepared=False)
                of_method = {"flops": model_flops(PUBLIC, configs[0]) + published}
            rows.append(
                case
                | {"method": "mvar" if isinstance(method, Shortcut) else method, "rounds": options.rounds}
                | of_method
                | {"seconds": [ms / 1e3 for ms in of_one]}
            )
            print(rows[-1], flush=True)
        print(save(SPEED, rows), flush=True)


def packaged(options: argparse.Namespace) -> tuple[mvar.Model, Tokenizer, dict[str, Any], frechet.FeatureSpace]:
    """Model, tokenizer, sampling options and features of real images."""
    if options.model == "digits":
        return *digits.pretrained(), dict(digits.SAMPLING), frechet.digit_features()
    model, tokenizer = emoji.pretrained()
    return model, tokenizer, dict(emoji.SAMPLING), frechet.emoji_features(options.images, tokenizer.resolution)


def quality(options: argparse.Namespace) -> None:
    model, tokenizer, sampling, space = packaged(options)
    refiner = mvar.load_model(options.refiner)
    for module in (model, tokenizer, refiner):
        module.to(DEVICE)
    scales = len(model.config.scales)
    guided = range(1, scales) if sampling["cfg"] else ()
    shortcuts = [
        COMPLETE,
        *(Shortcut(unguided=n) for n in guided),
        *(Shortcut(refined=n) for n in range(1, scales + 1)),
        *(Shortcut(unguided=n, refined=m) for n, m in ((1, 1), (2, 2), (3, 3)) if n in guided),
    ]
    labels = torch.arange(options.count * model.config.num_classes) % model.config.num_classes
    variants = {shortcut: sampling | shortcut.options(scales, refiner) for shortcut in shortcuts}
    found, seconds = generated(model, tokenizer, labels, variants)
    features = {shortcut: space.features(pixels) for shortcut, pixels in found.items()}
    decoder = decoder_flops(tokenizer.config, frechet.BATCH) / frechet.BATCH
    complete = flops(model.config, refiner.config, COMPLETE, decoder)
    rows = [
        shortcut._asdict()
        | {"ratio": statistics.median(a / b for a, b in zip(seconds[COMPLETE], seconds[shortcut], strict=True))}
        | {"counted_ratio": complete / flops(model.config, refiner.config, shortcut, decoder)}
        | frechet.compare(space, features[shortcut], features[COMPLETE], labels)
        for shortcut in shortcuts
    ]
    setup = {
        "model": options.model,
        "images": len(labels),
        "sampling": sampling,
        "features": space.name,
        "parameters": [sum(p.numel() for p in one.parameters()) for one in (model, refiner)],
        "seconds_per_image": statistics.median(seconds[COMPLETE]) / frechet.BATCH,
    }
    print(*rows, sep="\n")
    print(save(f"{SPEED}_{options.model}", setup | {"rows": rows}))


def generated(
    model: mvar.Model, tokenizer: Tokenizer, labels: Tensor, variants: Mapping[Shortcut, Mapping[str, Any]]
) -> tuple[dict[Shortcut, Tensor], dict[Shortcut, list[float]]]:
    """Pixels (n, H, W, 3) uint8 and seconds per batch of every variant, which take turns batch by batch."""
    pixels: dict[Shortcut, list[Tensor]] = {shortcut: [] for shortcut in variants}
    seconds: dict[Shortcut, list[float]] = {shortcut: [] for shortcut in variants}
    for options in variants.values():
        mvar.generate(model, tokenizer, labels[: frechet.BATCH], **options)
    for start in range(0, len(labels), frechet.BATCH):
        for shortcut, options in variants.items():
            begin = time.perf_counter()
            out = mvar.generate(model, tokenizer, labels[start : start + frechet.BATCH], first_index=start, **options)
            pixels[shortcut].append(to_bytes(out.images).cpu())
            seconds[shortcut].append(time.perf_counter() - begin)
    return {shortcut: torch.cat(parts) for shortcut, parts in pixels.items()}, seconds


def _shortcut(text: str) -> Sequence[int]:
    unguided, _, refined = text.partition(",")
    return int(unguided), int(refined or 0)


def main() -> None:
    parser = argument_parser(__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("speed")
    command.set_defaults(run=speed)
    command.add_argument("--depth", type=int, default=16)
    command.add_argument("--refiner-depth", type=int, default=12)
    command.add_argument("--batches", type=int, nargs="+", default=[1])
    command.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument(
        "--public", action=argparse.BooleanOptionalAction, default=True, help="time the public algorithm"
    )
    command.add_argument(
        "--shortcuts",
        type=_shortcut,
        nargs="+",
        metavar="UNGUIDED,REFINED",
        default=[(0, 0), *((n, 0) for n in (1, 2, 3)), *((0, n) for n in (1, 2, 3, 4)), (1, 1), (2, 2), (3, 3)],
        help="numbers of fine scales (default: 0,0 1,0 2,0 3,0 0,1 0,2 0,3 0,4 1,1 2,2 3,3)",
    )
    command = commands.add_parser("quality")
    command.set_defaults(run=quality)
    command.add_argument("model", choices=("digits", "emoji"))
    command.add_argument("--refiner", type=expanded, required=True, help="its weights")
    command.add_argument("--images", type=Path, help="emoji: the folder of examples/emoji/prepare.py")
    command.add_argument("--count", type=int, default=100, help="images per class (default: 100)")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
