"""Tune the tiles of every Triton kernel on this GPU and write mvar_kernels/tiles.json.

Each kernel that the ops' GPU cases launch and that has several candidates is timed with each of them, and the other
kernels with their first. The first candidate stays unless another is faster by more than the noise, gives the same bits
in 50 launches, and an answer within a few roundings of the first one's (sums in another order). `--seconds` limits it:
what was not reached keeps its tile, as do other architectures. All times are written to the GPU's results.

Without a GPU, MVAR_REHEARSAL=1 TRITON_INTERPRET=1 rehearses it and leaves the table as it is.
"""

import faulthandler
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from benchmarks.common import kernel_cache
from benchmarks.common.environment import DEVICE, REHEARSAL, argument_parser, require_gpu
from benchmarks.common.limits import first_line
from benchmarks.common.op_calls import Call, Results, Run, benchmark_cases, call_of
from benchmarks.common.results import folder, save
from benchmarks.common.timing import graphed, interleaved, use_side_stream
from mvar.utils.files import atomic_write
from mvar_kernels import tiling
from mvar_kernels.dispatch import architecture
from mvar_kernels.testing.check import device_works
from mvar_kernels.testing.contract import differentiable
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.tiling import Tile

NOISE = 0.02  # the share by which two runs of the same candidate differ
GRACE_SECONDS = 10.0  # after the time limit, for the case that is being measured
LAUNCHES, ROUNDINGS = 2 if REHEARSAL else 50, 4  # roundings of bfloat16
DTYPE = torch.float32 if REHEARSAL else torch.bfloat16  # the interpreter has no bfloat16
Key = tuple[str, str]  # kernel, shape class


@dataclass
class Timings:
    """A kernel's candidates, and the milliseconds of the calls that launch it, summed over all cases."""

    candidates: Sequence[Tile]
    ms: list[float]

    def best(self) -> Tile:
        fastest = min(range(len(self.ms)), key=self.ms.__getitem__)
        return self.candidates[fastest if self.ms[fastest] < (1 - NOISE) * self.ms[0] else 0]


@contextmanager
def using(forced: dict[Key, int], seen: dict[Key, Sequence[Tile]]) -> Iterator[None]:
    """Launch with the forced candidates, and the first of others; record every kernel that is launched."""

    def chosen(kernel: str, shape_class: str, candidates: Sequence[Tile], device: torch.device) -> Tile:
        seen[kernel, shape_class] = candidates
        return candidates[forced.get((kernel, shape_class), 0)]

    with tiling.override(chosen):
        yield


def compare(run: Call, found: dict[Key, Timings], end: float) -> None:
    """Time a call with every candidate of each kernel that it launches."""
    seen: dict[Key, Sequence[Tile]] = {}
    with using({}, seen):
        first = run()
    for key, candidates in seen.items():
        if len(candidates) == 1 or time.monotonic() > end:
            continue
        entry = found.setdefault(key, Timings(candidates, [0.0] * len(candidates)))
        implementations: dict[str, Callable[[], object]] = {}
        for i in range(len(candidates)):
            with using({key: i}, {}):
                try:
                    if i and (wrong := fault(run, first)):
                        raise ValueError(wrong)
                    implementations[str(i)] = graphed(run) if DEVICE.type == "cuda" else run
                except Exception as error:
                    print(f"{key[0]}, {key[1]}: {candidates[i]}: {first_line(error)}", flush=True)
                    entry.ms[i] = math.inf
                    check_answers()
        times = interleaved(implementations, rounds=2 if REHEARSAL else 15, seconds=0, warm_up=not REHEARSAL)
        entry.ms = [total + times.get(str(i), math.inf) for i, total in enumerate(entry.ms)]


def check_answers() -> None:
    """End the program where the GPU no longer answers; what was measured is written."""
    if not device_works():
        raise SystemExit("the GPU no longer answers")


def fault(run: Call, first: Results) -> str | None:
    """What is wrong with a tile's answers compared with those of the first tile, or None."""
    got = run()
    for launch in range(2, LAUNCHES + 1):
        if not all(torch.equal(a, b) for a, b in zip(run(), got, strict=True)):
            return f"another answer in launch {launch}"
    for a, b in zip(got, first, strict=True):
        if not a.is_floating_point() and not torch.equal(a, b):
            return "another answer than the first tile's"
        if a.is_floating_point():
            off = float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30))
            if not off <= ROUNDINGS * max(torch.finfo(a.dtype).eps, torch.finfo(torch.bfloat16).eps):
                return f"off from the first tile's answer by {off:.1e} of the largest value"
    return None


@torch.no_grad()
def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for everything (default: no limit)")
    options = parser.parse_args()
    require_gpu()
    kernel_cache.use_precompiled()
    end = time.monotonic() + options.seconds
    if math.isfinite(options.seconds):  # also where a kernel hangs
        faulthandler.dump_traceback_later(options.seconds + GRACE_SECONDS, exit=True)
    print(f"{options.seconds:.0f} s at most: kernels with several tiles of {len(SPECS)} ops", flush=True)
    use_side_stream()
    found: dict[Key, Timings] = {}
    for spec in SPECS.values():
        for case in benchmark_cases(spec):
            if time.monotonic() > end:
                break
            try:
                for backward in (False, True)[: 1 + bool(differentiable(spec, "triton"))]:
                    compare(call_of(Run(spec, case, DTYPE, backward), "triton"), found, end)
                    write(found)
            except Exception as error:
                print(f"{spec.op}, {case.name}: {first_line(error)}", flush=True)
                check_answers()
    for (kernel, shape_class), entry in sorted(found.items()):
        print(f"{kernel}, {shape_class}: {entry.best()}; ms {', '.join(f'{ms:.4f}' for ms in entry.ms)}")


def write(found: Mapping[Key, Timings]) -> None:
    """Write all times to the results, and the best tiles to the table; those of other kernels stay."""
    table, rows = json.loads(tiling.TABLE.read_text()), []
    here = table.setdefault(architecture(DEVICE), {})
    for (kernel, shape_class), entry in sorted(found.items()):
        here.setdefault(kernel, {})[shape_class] = asdict(entry.best())
        for tile, ms in zip(entry.candidates, entry.ms, strict=True):
            finite = ms if math.isfinite(ms) else None
            rows.append({"kernel": kernel, "shape_class": shape_class, "ms": finite, **asdict(tile)})
    save("tune", rows)
    path = folder() / "tiles.json" if REHEARSAL else tiling.TABLE
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
