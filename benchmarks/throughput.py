"""Generation by size and side: `mvar bench --suite throughput`, or `python -m benchmarks.throughput`.

Depth × resolution × batch × dtype × side: images a second, latency, peak memory, FLOPs and share of peak, of random
weights, seeded, with guidance 1.5, top-k 900 and top-p 0.96. The sides: the engine, on its own choice of backends and
on each by name; the public algorithm in eager PyTorch and under torch.compile; a VAR of the same width in the engine;
all from the same float32 weights. A side whose greedy tokens are wrong is not timed. The sides of a size take turns;
results are written after each size; what fails is left out and named, and so is what the time does not suffice for.
Without sizes or sides it is the device's plan (plan.py), the most important first.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch

from benchmarks.agreement import check, fault_of_compiled, reason_against
from benchmarks.growth import PUBLIC
from benchmarks.limits import MIN_SECONDS, NO_TIME, Failures, limited
from benchmarks.measure import DEVICE, REHEARSAL, kept, latencies, machine, require_allocator, write
from benchmarks.memory import give_back, in_a_process_of_its_own, peak_gib, touch
from benchmarks.parts import breakdown
from benchmarks.plan import Size, add_flags, asked_for, flags
from benchmarks.products import best_tflops
from benchmarks.sides import (
    CHUNKS,
    SIDES,
    Build,
    Pair,
    Side,
    fastest_chunk,
    flops_per_image,
    generate,
    parameters,
    public_attention,
    random_pair,
    weights_gib,
)
from benchmarks.timeline import timeline
from mvar.engine import prepared_model, prepared_tokenizer, release
from mvar_kernels.precision import float32_matmuls

NAME = "throughput"
ALL_SECONDS = {"cpu": 3600.0, "cuda": 200.0}
COMPILE_SECONDS = {"cpu": 300.0, "cuda": 45.0}  # for the first call of what torch.compile makes
TIMING_SECONDS = {"cpu": 60.0, "cuda": 4.0}  # for the rounds of one size
ROUNDS = range(2, 51)  # so many of one size where nobody says how many
TOUCHED_GIB = 8  # of memory beforehand, for sizes that are not warmed up
Row = dict[str, Any]


class Suite:
    """What has been found, and the time there is for more.

    found: "agreement" of each side with another; "sizes", each with a row for every side; "by_part", where the engine's
    time goes.
    """

    def __init__(self, build: Build, seconds: float, before: Row | None = None) -> None:
        self.build, self.end = build, time.monotonic() + seconds
        self.found: Row = before or {"agreement": {}, "sizes": [], "by_part": []}

    @torch.no_grad()
    def run(self, plan: Sequence[Size]) -> None:
        """Every size that is not there already; then the peaks that take a process of their own."""
        todo = [size for size in plan if not self.is_there(size)]
        if DEVICE.type == "cpu" and not all(size.warm_up for size in todo):
            touch(TOUCHED_GIB)
        for _, sizes in groupby(todo, key=lambda size: size[:2]):
            self.group(list(sizes))
        if DEVICE.type == "cpu":
            give_back()
            for size in plan:
                self.peaks(size)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def limit(self, side: Side) -> float:
        return min(self.left, COMPILE_SECONDS[DEVICE.type]) if side.compiled else self.left

    def group(self, sizes: Sequence[Size]) -> None:
        """The sizes of one depth and resolution, which share their models."""
        pairs: dict[str, Pair] = {}

        def pair_of(architecture: str) -> Pair:
            if architecture not in pairs:
                pairs[architecture] = self.build(*sizes[0][:2], architecture)
            return pairs[architecture]

        for size in sizes:
            if self.left < MIN_SECONDS:
                self.enter(size, [], dict.fromkeys((side.name for side in size.sides), NO_TIME))
                continue
            self.found["agreement"] |= check(size.sides, self.found["agreement"], pair_of)
            self.enter(size, *self.measured(size, pair_of))
            if size.by_part and not reason_against(SIDES["mvar"], self.found["agreement"]):
                self.divide(size, pair_of("mvar"))
        for module in (module for pair in pairs.values() for module in pair):
            release(module)

    def measured(self, size: Size, pair_of: Callable[[str], Pair]) -> tuple[list[Row], dict[str, str]]:
        """A row for each side, and why others have none."""
        labels, dtype = (torch.arange(size.batch) * 37 % 1000).to(DEVICE), getattr(torch, size.dtype)
        wrong = {side: reason_against(side, self.found["agreement"]) for side in size.sides}
        failures = Failures(size.name, {side.name: reason for side, reason in wrong.items() if reason})
        pairs = {side: pair_of(side.architecture) for side, reason in wrong.items() if not reason}
        chunk, peaks, seconds = CHUNKS[-1], dict[Side, float | None](), 0.0
        if theirs := [side for side in pairs if side.algorithm == PUBLIC]:
            search = partial(fastest_chunk, pairs[theirs[0]], size.batch, dtype)
            chunk = failures.attempt([side.name for side in theirs], self.left, search) or chunk
        runs = {side: partial(generate, side, pair, labels, dtype, chunk=chunk) for side, pair in pairs.items()}

        def still() -> list[Side]:
            return [side for side in runs if side.name not in failures.reasons]

        for side in still():
            peak = partial(first_peak, runs[side], side, pairs[side], dtype)
            peaks[side] = failures.attempt([side.name], self.limit(side), peak)
        for side in still() if size.warm_up else ():  # after all peaks, which are without what others prepared
            start = time.monotonic()
            failures.attempt([side.name], self.limit(side), runs[side])
            seconds += time.monotonic() - start
        for side in (side for side in theirs if side.compiled and side in still()):
            look = partial(fault_of_compiled, pairs[side], size.batch, dtype, chunk)
            if fault := failures.attempt([side.name], self.limit(side), look):
                failures.reasons[side.name] = fault
        fitting = int(TIMING_SECONDS[DEVICE.type] / max(seconds, 1e-3))
        rounds = size.rounds or min(max(fitting, ROUNDS[0]), ROUNDS[-1])
        ready = {side.name: runs[side] for side in still()}
        turns = partial(latencies, ready, rounds=rounds, seconds=0, warm_up=False)
        times = (failures.attempt(list(ready), self.left, turns) if ready else None) or {}
        rows = [row(size, s, pairs[s], times[s.name], peaks[s], chunk) for s in still() if times]
        return rows, failures.reasons

    def divide(self, size: Size, pair: Pair) -> None:
        """Where the engine's time goes. A profiler that may not look does not stop the rest."""
        labels, dtype = torch.arange(size.batch, device=DEVICE), getattr(torch, size.dtype)
        if DEVICE.type == "cuda":
            look = partial(timeline, *pair, labels, dtype)
        else:
            run = partial(generate, SIDES["mvar"], pair, labels, dtype)
            look = partial(breakdown, run, pair[1], size.batch, dtype)
        if parts := Failures(size.name, {}).attempt(["time by part"], self.left, look):
            others = [known for known in self.found["by_part"] if not known.items() >= size.described().items()]
            self.found["by_part"] = [*others, size.described() | parts]
            self.save()

    def peaks(self, size: Size) -> None:
        """Of the sides that were timed, each in a process of its own."""
        sides = {side.name: side for side in size.sides}
        for known in self.entry(size)["rows"]:
            if known["peak_gib"] is None:
                chosen = [*flags(size, sides[known["side"]]), "--chunk", str(known["scan_chunk"] or CHUNKS[-1])]
                peak = partial(in_a_process_of_its_own, f"benchmarks.{NAME}", "--peak", *chosen)
                what = f"peak memory, {known['side']}"
                known["peak_gib"] = Failures(size.name, {}).attempt([what], self.left, peak)
                print(f"{size.name}: {what}: {known['peak_gib']} GiB", flush=True)
                self.save()

    def is_there(self, size: Size) -> bool:
        """Whether nothing but a side that cannot be measured is missing."""
        entry = self.entry(size)
        measured = {known["side"] for known in entry["rows"]}
        measured |= {side for side, reason in entry["left_out"].items() if not reason.startswith("TimeoutError")}
        return measured >= {side.name for side in size.sides}

    def entry(self, size: Size) -> Row:
        """What is known of a size with these sides."""
        empty = size.described() | {"sides": [side.name for side in size.sides], "rows": [], "left_out": {}}
        same = (e for e in self.found["sizes"] if all(e[name] == empty[name] for name in (*size.described(), "sides")))
        return next(same, empty)

    def enter(self, size: Size, rows: list[Row], left_out: dict[str, str]) -> None:
        """In the place of what was known of it."""
        entry = self.entry(size)
        others = [other for other in self.found["sizes"] if other is not entry]
        self.found["sizes"] = [*others, entry | {"rows": rows, "left_out": left_out}]
        for measured in rows:
            print(json.dumps(measured), flush=True)
        self.save()

    def save(self) -> None:
        write(NAME, self.found)


def row(
    size: Size, side: Side, pair: Pair, times: Sequence[float], peak_gib: float | None, chunk: int
) -> dict[str, Any]:
    """All that a figure depends on besides the machine. FLOPs are of one image; memory is in GiB, with the weights."""
    dtype, config = getattr(torch, size.dtype), pair[0].config
    flops, p50_ms = flops_per_image(side, pair), float(np.quantile(times, 0.5))
    tflops, (peak_tflops, origin) = flops * size.batch / p50_ms / 1e9, best_tflops(dtype)
    theirs = side.algorithm == PUBLIC
    return (
        {"side": side.name}
        | size.described()
        | {
            "tokens": config.num_tokens,
            "backend": None if theirs else side.backend,
            "parameters": parameters(pair),
            "rounds": len(times),
            "images_per_second": 1e3 * size.batch / p50_ms,
            "p50_ms": p50_ms,
            "p90_ms": float(np.quantile(times, 0.9)),
            "peak_gib": peak_gib,
            "weights_gib": weights_gib(pair),
            "flops": flops,
            "tflops_per_second": tflops,
            "peak_tflops_per_second": peak_tflops,
            "peak_is": origin,
            "share_of_peak": tflops / peak_tflops,
            "scan_chunk": chunk if theirs else None,
            "attention": public_attention(dtype)[0] if theirs else None,
        }
    )


def first_peak(run: Callable[[], Any], side: Side, pair: Pair, dtype: torch.dtype) -> float | None:
    """GiB of the side's first call on a GPU, with the float32 weights it is given and all that it makes of them.

    On a CPU None, for that takes a process of its own: what the side makes of the weights is made.
    """
    if DEVICE.type == "cuda":
        for module in pair:
            release(module)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        return weights_gib(pair) + peak_gib(run) - before / 2**30
    if side.algorithm != PUBLIC:
        prepared_model(pair[0], dtype)
        prepared_tokenizer(pair[1], dtype, side.compiled)
    return None


def peak_of(size: Size, chunk: int) -> float:
    """GiB of the size's one side in this process: the float32 weights, and all that the side makes."""
    (side,) = size.sides
    pair = random_pair(size.depth, size.resolution, side.architecture)
    run = partial(generate, side, pair, torch.arange(size.batch), getattr(torch, size.dtype), chunk=chunk)
    if side.compiled:
        run()  # the compiler's own memory is not the side's
    return peak_gib(run)


def compile_ahead(plan: Sequence[Size], build: Build, seconds: float) -> None:
    """What the plan has compiled, beside other work: the timed run then finds it on disk."""
    size = next((size for size in plan if SIDES["public-compiled"] in size.sides), None)
    if size is None:
        raise SystemExit("--untimed: no size has the side public-compiled")
    pair, labels = build(size.depth, size.resolution, "mvar"), torch.arange(size.batch, device=DEVICE)
    for chunk in CHUNKS[::-1]:  # the largest first: it is the likeliest, and has the fewest operators
        with limited(seconds):
            for side in (side for side in size.sides if side.compiled):
                generate(side, pair, labels, getattr(torch, size.dtype), chunk=chunk)
                print(f"{side.name}, scan in chunks of {chunk}", flush=True)


def stored() -> Row | None:
    """What is there, if this commit measured it on this machine: of code with changes nobody knows which."""
    return None if machine()["commit"].endswith("with changes") else kept(NAME)


@float32_matmuls(DEVICE, fast=DEVICE.type == "cpu")  # true float32, for all sides: on a GPU the fast ones are TF32
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS[DEVICE.type], help="for everything (%(default)g)")
    parser.add_argument("--resume", action="store_true", help="keep what this commit measured on this machine")
    parser.add_argument("--untimed", action="store_true", help="only fill torch.compile's cache on disk")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--chunk", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    plan = asked_for(options, "rehearsal" if REHEARSAL else DEVICE.type)
    torch._dynamo.config.recompile_limit = 64  # a scale is a size
    if options.peak:
        print(peak_of(plan[0], options.chunk))
    elif options.untimed:
        compile_ahead(plan, random_pair, options.seconds)
    else:
        require_allocator()
        Suite(random_pair, options.seconds, stored() if options.resume else None).run(plan)


if __name__ == "__main__":
    main()
