"""Measure the tiles of every Triton kernel on this GPU and write mvar_kernels/tiles.json: `python -m benchmarks.tune`.

Each kernel that the ops' GPU cases launch is timed with each of its candidates, the others at their first one. The
first candidate is kept unless another is faster by more than the noise; what other architectures have stays.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from unittest import mock

import torch

from benchmarks.measure import DEVICE, graphed, interleaved, use_own_stream
from benchmarks.ops import SPECS, gradients
from mvar.files import replacing
from mvar_kernels import tiling
from mvar_kernels.backends import BackendError, architecture
from mvar_kernels.specs import Case, Spec
from mvar_kernels.tiling import Tile

NOISE = 0.02  # a candidate has to win by more than two runs of the same one differ
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


def calls(spec: Spec, case: Case) -> Iterator[Callable[[], object]]:
    """The op's forward, and its backward alone, on random inputs in bfloat16."""
    inputs = {
        n: t.to(DEVICE, torch.float32 if n in spec.keeps_dtype else torch.bfloat16)
        for n, t in spec.inputs(case, torch.Generator().manual_seed(0)).items()
    }
    yield lambda: spec.call(inputs, case, "triton")
    if spec.grads:
        outs = spec.call(inputs, case, "triton")
        yield gradients(spec, inputs, lambda t: spec.call(t, case, "triton"), tuple(torch.randn_like(o) for o in outs))


def measure(run: Callable[[], object], found: dict[Key, Found]) -> None:
    seen: dict[Key, Sequence[Tile]] = {}
    with using({}, seen):
        run()
    for key, candidates in seen.items():
        sides: dict[str, Callable[[], object]] = {}
        for i in range(len(candidates)):
            with using({key: i}, {}):
                sides[str(i)] = graphed(run)
        times = interleaved(sides, rounds=15, seconds=0)
        entry = found.setdefault(key, Found(candidates))
        entry.ms = [total + times[str(i)] for i, total in enumerate(entry.ms)]


@torch.no_grad()
def main() -> None:
    if DEVICE.type != "cuda":
        raise SystemExit("tiles are measured on a GPU, and there is none here")
    use_own_stream()
    found: dict[Key, Found] = {}
    for spec in SPECS.values():
        for case in spec.bench_cuda:
            try:
                for run in calls(spec, case):
                    measure(run, found)
            except BackendError as error:
                print(f"{spec.op}, {case.name}: {error}")
    kernels: dict[str, dict[str, dict[str, object]]] = {}
    for (kernel, shape_class), entry in sorted(found.items()):
        best = entry.best()
        kernels.setdefault(kernel, {})[shape_class] = asdict(best)
        print(f"{kernel}, {shape_class}: {best}; ms {', '.join(f'{ms:.4f}' for ms in entry.ms)}")
    table = json.loads(tiling.TABLE.read_text()) | {architecture(DEVICE): kernels}
    with replacing(tiling.TABLE) as aside:
        aside.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
