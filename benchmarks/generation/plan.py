"""The configurations that bench_generation measures: a plan for each device, or those of the command line."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from benchmarks.generation.methods import METHODS, Method
from mvar.models.config import SCHEDULES
from mvar_kernels.dispatch import NAMES, PREFERENCE

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Configuration(NamedTuple):
    """dtype: as torch names it. rounds: None for as many as fit into a few seconds. profile: mvar's time by part."""

    depth: int
    resolution: int
    batch: int
    dtype: str
    methods: tuple[Method, ...]
    rounds: int | None = None
    profile: bool = False

    @property
    def name(self) -> str:
        return f"d{self.depth} at {self.resolution}×{self.resolution}, batch {self.batch}, {self.dtype}"

    def sizes(self) -> dict[str, Any]:
        return {"depth": self.depth, "resolution": self.resolution, "batch": self.batch, "dtype": self.dtype}


def _methods(*names: str) -> tuple[Method, ...]:
    return tuple(METHODS[name] for name in names)


OURS, OURS_AND_VAR, ALL = _methods("mvar"), _methods("mvar", "var"), _methods("mvar", "var", "public")
TOKENS = _methods("tokens", "var-tokens")
WITHOUT_GRAPH = METHODS["no-graph"]

GPU = (
    Configuration(16, 256, 25, "bfloat16", (*ALL, *TOKENS, WITHOUT_GRAPH), profile=True),
    Configuration(16, 256, 64, "bfloat16", (*OURS_AND_VAR, *TOKENS), profile=True),
    Configuration(16, 256, 1, "bfloat16", (*ALL, WITHOUT_GRAPH), profile=True),
    Configuration(30, 256, 8, "bfloat16", (*OURS_AND_VAR, *TOKENS), profile=True),
    *(Configuration(depth, 256, 64, "bfloat16", (*OURS_AND_VAR, *TOKENS)) for depth in (24, 30, 20)),
    Configuration(16, 256, 8, "bfloat16", ALL),
    Configuration(16, 256, 64, "bfloat16", _methods("mvar", "public")),
    *(Configuration(depth, 256, 25, "bfloat16", ALL) for depth in (24, 30)),
    Configuration(16, 512, 8, "bfloat16", ALL),
    Configuration(16, 1024, 1, "bfloat16", ALL),  # where growing caches are largest
    Configuration(16, 256, 25, "bfloat16", (*OURS, *(METHODS["mvar"].on(name) for name in PREFERENCE["cuda"]))),
    Configuration(16, 256, 25, "bfloat16", (*OURS, *_methods("compiled-decoder", "public-compiled"))),
    *(Configuration(24, 256, batch, "bfloat16", OURS_AND_VAR) for batch in (1, 8)),
    Configuration(30, 256, 1, "bfloat16", OURS_AND_VAR),
    *(Configuration(16, 512, batch, "bfloat16", OURS_AND_VAR) for batch in (1, 25, 64)),
    *(Configuration(depth, 512, batch, "bfloat16", OURS) for depth in (24, 30) for batch in (8, 1, 25, 64)),
)

ONE_IMAGE = (*ALL, METHODS["mvar"].on("reference"), METHODS["public-compiled"])  # "auto" is "cpu" here
CPU = (
    Configuration(16, 256, 1, "float32", (*ONE_IMAGE, METHODS["public-default"]), rounds=3, profile=True),
    Configuration(16, 256, 1, "bfloat16", ONE_IMAGE, rounds=5, profile=True),
    *(Configuration(16, 256, 8, dtype, _methods("mvar", "public"), rounds=2) for dtype in ("bfloat16", "float32")),
    *(Configuration(12, 256, 1, dtype, ALL, rounds=3) for dtype in ("float32", "bfloat16")),
    Configuration(16, 512, 1, "float32", ALL, rounds=2),
    Configuration(16, 1024, 1, "float32", ALL, rounds=1),
)

REHEARSAL = (Configuration(1, 256, 1, "float32", (*OURS_AND_VAR, *TOKENS), rounds=1, profile=True),)

PLANS: Mapping[str, Sequence[Configuration]] = {"cuda": GPU, "cpu": CPU, "rehearsal": REHEARSAL}
"""The most important first."""


def add_flags(parser: ArgumentParser) -> None:
    """Of a plan other than the device's."""
    parser.add_argument("--depths", type=_positive, nargs="+", help="of the models (16)")
    parser.add_argument("--resolutions", type=int, nargs="+", choices=SCHEDULES, help="of the images (256)")
    parser.add_argument("--batches", type=_positive, nargs="+", help="batch sizes (1)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="of the matmuls (bf16)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="engine and baselines (mvar var public)")
    parser.add_argument("--backends", nargs="+", choices=NAMES, help="of mvar (auto)")
    parser.add_argument("--rounds", type=_positive, help="in each of which every method generates once")
    parser.add_argument("--profile", action="store_true", help="mvar's time by part as well")


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def configurations(options: Namespace, device: str) -> Sequence[Configuration]:
    """All combinations of the requested values and the defaults of the rest; the device's plan without any."""
    wanted = (options.depths, options.resolutions, options.batches, options.dtypes, options.methods, options.backends)
    if not any(wanted):
        return [each._replace(rounds=options.rounds or each.rounds) for each in PLANS[device]]
    methods: list[Method] = []
    for name in options.methods or ("mvar", "var", "public"):
        backends = options.backends or ("auto",)
        methods += [METHODS[name].on(backend) for backend in (backends if name == "mvar" else ("auto",))]
    sizes = product(
        options.depths or (16,),
        options.resolutions or (256,),
        options.batches or (1,),
        [DTYPES[name] for name in options.dtypes or ("bf16",)],
    )
    return [Configuration(*each, tuple(methods), options.rounds, options.profile) for each in sizes]
