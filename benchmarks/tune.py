"""Measure the tiles of every Triton kernel on this GPU and write mvar_kernels/tiles.json: `python -m benchmarks.tune`.

Each kernel that the ops' GPU cases launch and that has several candidates is timed with each of them, the others at
their first one. The first candidate is kept unless another is faster by more than the noise, gives the same bits in 50
launches, and an answer within a few roundings of the first one's (sums in another order). `--seconds` ends it: what was
not reached keeps its tile, as does what other architectures have. What was measured is also in the GPU's results.

Without a GPU, MVAR_REHEARSAL=1 TRITON_INTERPRET=1 rehearses it, and leaves the table as it is.
"""

import argparse
import faulthandler
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from unittest import mock

import torch

from benchmarks import carried, measure
from benchmarks.measure import DEVICE, REHEARSAL, graphed, interleaved, require_gpu, results, use_own_stream
from benchmarks.ops import SPECS, Results, benchmarked, first_line, gradients
from mvar.files import replacing
from mvar_kernels import tiling
from mvar_kernels.dispatch import architecture
from mvar_kernels.testing.check import device_works
from mvar_kernels.testing.contract import prepared
from mvar_kernels.testing.spec import Case, Spec
from mvar_kernels.tiling import Tile

NOISE = 0.02  # a candidate has to win by more than two runs of the same one differ
GRACE_SECONDS = 10.0  # after the time is over, for the case that is being measured
LAUNCHES, ROUNDINGS = 2 if REHEARSAL else 50, 4  # of bfloat16, in which it is tuned
DTYPE = torch.float32 if REHEARSAL else torch.bfloat16  # the interpreter has no bfloat16
Key = tuple[str, str]  # kernel, shape class


@dataclass
class Found:
    """A kernel's candidates, and the milliseconds of the calls it takes part in, added up over all cases."""

    candidates: Sequence[Tile]
    ms: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.ms = [0.0] * len(self.candidates)

    def best(self) -> Tile:
        fastest = min(range(len(self.ms)), key=self.ms.__getitem__)
        return self.candidates[fastest if self.ms[fastest] < (1 - NOISE) * self.ms[0] else 0]


@contextmanager
def using(forced: dict[Key, int], seen: dict[Key, Sequence[Tile]]) -> Iterator[None]:
    """Launch with the forced candidates and else the first; note every kernel that asks."""

    def chosen(kernel: str, shape_class: str, candidates: Sequence[Tile], device: torch.device) -> Tile:
        seen[kernel, shape_class] = candidates
        return candidates[forced.get((kernel, shape_class), 0)]

    with mock.patch.object(tiling, "chosen", chosen):
        yield


def calls(spec: Spec, case: Case) -> Iterator[Callable[[], Results]]:
    """The op's forward, and its backward alone, on random inputs."""
    inputs = prepared(spec, case, DTYPE, DEVICE, made_on=DEVICE.type)
    yield lambda: spec.call(inputs, case, "triton")
    if spec.grads:
        outs = spec.call(inputs, case, "triton")
        yield gradients(spec, inputs, lambda t: spec.call(t, case, "triton"), tuple(torch.randn_like(o) for o in outs))


def compare(run: Callable[[], Results], found: dict[Key, Found], end: float) -> None:
    seen: dict[Key, Sequence[Tile]] = {}
    with using({}, seen):
        first = run()
    for key, candidates in seen.items():
        if len(candidates) == 1 or time.monotonic() > end:
            continue
        entry = found.setdefault(key, Found(candidates))
        sides: dict[str, Callable[[], object]] = {}
        for i in range(len(candidates)):
            with using({key: i}, {}):
                try:
                    if i and (wrong := unlike(run, first)):
                        raise ValueError(wrong)
                    sides[str(i)] = graphed(run) if DEVICE.type == "cuda" else run
                except Exception as error:
                    print(f"{key[0]}, {key[1]}: {candidates[i]}: {first_line(error)}", flush=True)
                    entry.ms[i] = math.inf
                    check_answers()
        times = interleaved(sides, rounds=2 if REHEARSAL else 15, seconds=0, warm_up=not REHEARSAL)
        entry.ms = [total + times.get(str(i), math.inf) for i, total in enumerate(entry.ms)]


def check_answers() -> None:
    """End the program where the GPU answers no more: what was measured is written."""
    if not device_works():
        raise SystemExit("the GPU answers no more")


def unlike(run: Callable[[], Results], first: Results) -> str | None:
    """What is wrong with a tile's answers beside those of the first tile, or None."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all of it (default: no limit)")
    options = parser.parse_args()
    require_gpu()
    carried.use()
    end = time.monotonic() + options.seconds
    if math.isfinite(options.seconds):  # also where a kernel hangs: what was measured is written
        faulthandler.dump_traceback_later(options.seconds + GRACE_SECONDS, exit=True)
    print(f"{options.seconds:.0f} s at most: kernels with several tiles of {len(SPECS)} ops", flush=True)
    use_own_stream()
    found: dict[Key, Found] = {}
    for spec in SPECS.values():
        for case in benchmarked(spec):
            if time.monotonic() > end:
                break
            try:
                for run in calls(spec, case):
                    compare(run, found, end)
                    write(found)
            except Exception as error:
                print(f"{spec.op}, {case.name}: {first_line(error)}", flush=True)
                check_answers()
    for (kernel, shape_class), entry in sorted(found.items()):
        print(f"{kernel}, {shape_class}: {entry.best()}; ms {', '.join(f'{ms:.4f}' for ms in entry.ms)}")


def write(found: Mapping[Key, Found]) -> None:
    """All times into the results, and the best tiles into the table, which is written whole; other kernels' stay."""
    table, rows = json.loads(tiling.TABLE.read_text()), []
    here = table.setdefault(architecture(DEVICE), {})
    for (kernel, shape_class), entry in sorted(found.items()):
        here.setdefault(kernel, {})[shape_class] = asdict(entry.best())
        for tile, ms in zip(entry.candidates, entry.ms, strict=True):
            right = math.isfinite(ms)
            rows.append({"kernel": kernel, "shape_class": shape_class, "ms": ms if right else None, **asdict(tile)})
    measure.write("tune", rows)
    path = results() / "tiles.json" if REHEARSAL else tiling.TABLE
    with replacing(path) as aside:
        aside.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
