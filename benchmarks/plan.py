"""What the throughput suite measures: sizes and their sides, by device or as the command line asks."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from benchmarks.sides import SIDES, Side
from mvar.config import SCHEDULES
from mvar_kernels.dispatch import NAMES, PREFERENCE

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Size(NamedTuple):
    """dtype: as torch names it. rounds: None for as many as a few seconds hold. by_part: also where the time goes.

    warm_up: a call of each side before it is timed; without it, what the engine prepares is prepared and no more.
    """

    depth: int
    resolution: int
    batch: int
    dtype: str
    sides: tuple[Side, ...]
    rounds: int | None = None
    warm_up: bool = True
    by_part: bool = False

    @property
    def name(self) -> str:
        return f"d{self.depth} at {self.resolution}×{self.resolution}, batch {self.batch}, {self.dtype}"

    def described(self) -> dict[str, Any]:
        return {"depth": self.depth, "resolution": self.resolution, "batch": self.batch, "dtype": self.dtype}


def _sides(*names: str) -> tuple[Side, ...]:
    return tuple(SIDES[name] for name in names)


OURS, OURS_AND_VAR, ALL = _sides("mvar"), _sides("mvar", "var"), _sides("mvar", "var", "public")
TOKENS = _sides("tokens", "var-tokens")
TO_COMPILE = _sides("compiled-decoder", "public-compiled")

GPU = (
    Size(16, 256, 25, "bfloat16", (*ALL, *TOKENS, SIDES["no-graph"]), by_part=True),
    Size(16, 256, 64, "bfloat16", (*OURS_AND_VAR, *TOKENS), by_part=True),
    Size(16, 256, 1, "bfloat16", (*ALL, SIDES["no-graph"]), by_part=True),
    Size(30, 256, 8, "bfloat16", (*OURS_AND_VAR, *TOKENS), by_part=True),
    *(Size(depth, 256, 64, "bfloat16", (*OURS_AND_VAR, *TOKENS)) for depth in (24, 30, 20)),
    Size(16, 256, 8, "bfloat16", ALL),
    Size(16, 256, 64, "bfloat16", (*OURS, SIDES["public"])),
    *(Size(depth, 256, 25, "bfloat16", ALL) for depth in (24, 30)),
    Size(16, 512, 8, "bfloat16", ALL),
    Size(16, 1024, 1, "bfloat16", ALL),  # what the growing caches hold
    Size(16, 256, 25, "bfloat16", (*OURS, *(SIDES["mvar"].on(name) for name in PREFERENCE["cuda"]))),
    Size(16, 256, 25, "bfloat16", (*OURS, *TO_COMPILE)),
    *(Size(24, 256, batch, "bfloat16", OURS_AND_VAR) for batch in (1, 8)),
    Size(30, 256, 1, "bfloat16", OURS_AND_VAR),
    *(Size(16, 512, batch, "bfloat16", OURS_AND_VAR) for batch in (1, 25, 64)),
    *(Size(depth, 512, batch, "bfloat16", OURS) for depth in (24, 30) for batch in (8, 1, 25, 64)),
)

ONE_IMAGE = (*ALL, SIDES["mvar"].on("reference"), SIDES["public-compiled"])  # "auto" is "cpu" here
CPU = (
    Size(16, 256, 1, "float32", (*ONE_IMAGE, SIDES["public-default"]), rounds=3, by_part=True),
    Size(16, 256, 1, "bfloat16", ONE_IMAGE, rounds=5, by_part=True),
    Size(16, 256, 8, "bfloat16", _sides("mvar", "public"), rounds=2, warm_up=False),
    Size(16, 256, 8, "float32", _sides("mvar", "public"), rounds=2, warm_up=False),
    *(Size(12, 256, 1, dtype, ALL, rounds=3) for dtype in ("float32", "bfloat16")),
    Size(16, 512, 1, "float32", ALL, rounds=2, warm_up=False),
    Size(16, 1024, 1, "float32", ALL, rounds=1, warm_up=False),
)

REHEARSAL = (Size(1, 256, 1, "float32", (*OURS_AND_VAR, *TOKENS), rounds=1, by_part=True),)

PLANS: Mapping[str, Sequence[Size]] = {"cuda": GPU, "cpu": CPU, "rehearsal": REHEARSAL}
"""The most important first."""


def add_flags(parser: ArgumentParser) -> None:
    """Of a plan other than the device's."""
    parser.add_argument("--depths", type=_positive, nargs="+", help="of the models (16)")
    parser.add_argument("--resolutions", type=int, nargs="+", choices=SCHEDULES, help="of the images (256)")
    parser.add_argument("--batches", type=_positive, nargs="+", help="images (1)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="of the products (bf16)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="who generates (mvar var public)")
    parser.add_argument("--backends", nargs="+", choices=NAMES, help="that mvar runs on (auto)")
    parser.add_argument("--rounds", type=_positive, help="in which every side generates once")
    parser.add_argument("--by-part", action="store_true", help="also where mvar's time goes")


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def asked_for(options: Namespace, device: str) -> Sequence[Size]:
    """The product of what is asked for and the defaults of the rest; the device's plan if nothing is."""
    wanted = (options.depths, options.resolutions, options.batches, options.dtypes, options.sides, options.backends)
    if not any(wanted):
        return [size._replace(rounds=options.rounds or size.rounds) for size in PLANS[device]]
    sides: list[Side] = []
    for name in options.sides or ("mvar", "var", "public"):
        sides += [SIDES[name].on(b) for b in options.backends or ("auto",)] if name == "mvar" else [SIDES[name]]
    sizes = product(
        options.depths or (16,),
        options.resolutions or (256,),
        options.batches or (1,),
        [DTYPES[name] for name in options.dtypes or ("bf16",)],
    )
    return [Size(*size, tuple(sides), rounds=options.rounds, by_part=options.by_part) for size in sizes]


def flags(size: Size, side: Side) -> list[str]:
    """That ask for one side of one size."""
    dtype = next(name for name, full in DTYPES.items() if full == size.dtype)
    name = next(name for name, known in SIDES.items() if known.on(side.backend) == side)
    sizes = {"--depths": size.depth, "--resolutions": size.resolution, "--batches": size.batch}
    chosen = sizes | {"--dtypes": dtype, "--sides": name, "--backends": side.backend}
    return [str(part) for flag in chosen.items() for part in flag]
