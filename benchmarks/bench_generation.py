"""Generation, by configuration and method: `python -m benchmarks.bench_generation`.

Depth × resolution × batch × dtype × method: images per second, latency, peak memory, FLOPs and share of the peak rate,
with random weights from one seed, guidance 1.5, top-k 900 and top-p 0.96. Methods: the engine, with its choice of
backends and with each by name; the public algorithm in eager PyTorch and under torch.compile; VAR of the same width in
the engine; all from the same float32 weights. A method whose greedy tokens are wrong is not timed. The methods of a
configuration take turns; results are written after each configuration; what fails, or has no time left, is left out
with its reason. Without arguments it runs the device's plan (generation/plan.py), the most important first.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch

from benchmarks.analysis.flops import PUBLIC
from benchmarks.analysis.profile import profile_cpu, profile_gpu
from benchmarks.analysis.roofline import peak_tflops
from benchmarks.common.environment import DEVICE, REHEARSAL, argument_parser, set_allocator
from benchmarks.common.limits import MIN_SECONDS, NO_TIME, Failures
from benchmarks.common.memory import in_subprocess, peak_gib, trim
from benchmarks.common.results import load, save
from benchmarks.common.timing import latencies
from benchmarks.generation.checks import check, compiled_fault, reason_against
from benchmarks.generation.methods import (
    CHUNKS,
    METHODS,
    Build,
    Method,
    Pair,
    fastest_chunk,
    flops_per_image,
    generate,
    public_attention,
    random_pair,
    weights_gib,
)
from benchmarks.generation.plan import Configuration, add_flags, configurations
from mvar.inference.prepare import prepared_model, prepared_tokenizer, release
from mvar_kernels.precision import float32_matmuls

NAME = "throughput"
ALL_SECONDS = {"cpu": 3600.0, "cuda": 200.0}
COMPILE_SECONDS = {"cpu": 300.0, "cuda": 45.0}  # for the first call of what torch.compile compiles
TIMING_SECONDS = {"cpu": 60.0, "cuda": 4.0}  # for the rounds of one configuration
ROUNDS = range(2, 51)  # of a configuration that does not say
RECOMPILE_LIMIT = 64  # a shape per scale
Row = dict[str, Any]
true_float32 = float32_matmuls(DEVICE, fast=DEVICE.type == "cpu")  # for all methods: on a GPU the fast ones are TF32


class Suite:
    """The results so far and the time that is left.

    found: "agreement", the check of each method; "sizes", each with a row for every method; "by_part", mvar's profiles.
    """

    def __init__(self, build: Build, seconds: float, before: Row | None = None) -> None:
        self.build, self.end = build, time.monotonic() + seconds
        self.found: Row = before or {"agreement": {}, "sizes": [], "by_part": []}

    @torch.no_grad()
    def run(self, plan: Sequence[Configuration]) -> None:
        """Every configuration that has no results; then the peaks that take a process each."""
        missing = [each for each in plan if not self.is_complete(each)]
        for _, group in groupby(missing, key=lambda each: each[:2]):
            self.run_group(list(group))
        if DEVICE.type == "cpu":
            trim()
            for each in plan:
                self.measure_peaks(each)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def limit(self, method: Method) -> float:
        return min(self.left, COMPILE_SECONDS[DEVICE.type]) if method.compiled else self.left

    def run_group(self, group: Sequence[Configuration]) -> None:
        """The configurations of one depth and resolution, which share their models."""
        pairs: dict[str, Pair] = {}

        def pair_of(architecture: str) -> Pair:
            if architecture not in pairs:
                pairs[architecture] = self.build(*group[0][:2], architecture)
            return pairs[architecture]

        for each in group:
            if self.left < MIN_SECONDS:
                self.enter(each, [], dict.fromkeys((method.name for method in each.methods), NO_TIME))
                continue
            self.found["agreement"] |= check(each.methods, self.found["agreement"], pair_of)
            self.enter(each, *self.measure(each, pair_of))
            if each.profile and not reason_against(METHODS["mvar"], self.found["agreement"]):
                self.profile(each, pair_of("mvar"))
        for module in (module for pair in pairs.values() for module in pair):
            release(module)

    def measure(self, configuration: Configuration, pair_of: Callable[[str], Pair]) -> tuple[list[Row], dict[str, str]]:
        """A row for each method, and why others have none."""
        batch, dtype = configuration.batch, getattr(torch, configuration.dtype)
        labels = (torch.arange(batch) * 37 % 1000).to(DEVICE)
        wrong = {method: reason_against(method, self.found["agreement"]) for method in configuration.methods}
        failures = Failures(configuration.name, {method.name: reason for method, reason in wrong.items() if reason})
        pairs = {method: pair_of(method.architecture) for method, reason in wrong.items() if not reason}
        chunk, peaks, seconds = CHUNKS[-1], dict[Method, float | None](), 0.0
        if public := [method for method in pairs if method.algorithm == PUBLIC]:
            search = partial(fastest_chunk, pairs[public[0]], batch, dtype)
            chunk = failures.attempt([method.name for method in public], self.left, search) or chunk
        runs = {method: partial(generate, method, pair, labels, dtype, chunk=chunk) for method, pair in pairs.items()}

        def remaining() -> list[Method]:
            return [method for method in runs if method.name not in failures.reasons]

        for method in remaining():
            peak = partial(first_peak, runs[method], method, pairs[method], dtype)
            peaks[method] = failures.attempt([method.name], self.limit(method), peak)
        for method in remaining():  # to warm up, after all peaks, which are without what others prepared
            start = time.monotonic()
            failures.attempt([method.name], self.limit(method), runs[method])
            seconds += time.monotonic() - start
        for method in (method for method in public if method.compiled and method in remaining()):
            compare = partial(compiled_fault, pairs[method], batch, dtype, chunk)
            if fault := failures.attempt([method.name], self.limit(method), compare):
                failures.reasons[method.name] = fault
        fitting = int(TIMING_SECONDS[DEVICE.type] / max(seconds, 1e-3))
        rounds = configuration.rounds or min(max(fitting, ROUNDS[0]), ROUNDS[-1])
        ready = {method.name: runs[method] for method in remaining()}
        timing = partial(latencies, ready, rounds=rounds, seconds=0, warm_up=False)
        times = (failures.attempt(list(ready), self.left, timing) if ready else None) or {}
        rows = [
            row(configuration, method, pairs[method], times[method.name], peaks[method], chunk)
            for method in remaining()
            if times
        ]
        return rows, failures.reasons

    def profile(self, configuration: Configuration, pair: Pair) -> None:
        """mvar's time by part. Where the profiler is not permitted, the rest continues."""
        labels, dtype = torch.arange(configuration.batch, device=DEVICE), getattr(torch, configuration.dtype)
        profiling = partial(profile_gpu if DEVICE.type == "cuda" else profile_cpu, *pair, labels, dtype)
        if parts := Failures(configuration.name, {}).attempt(["time by part"], self.left, profiling):
            sizes = configuration.sizes()
            others = [known for known in self.found["by_part"] if not known.items() >= sizes.items()]
            self.found["by_part"] = [*others, sizes | parts]
            self.save()

    def measure_peaks(self, configuration: Configuration) -> None:
        """Of the methods that were timed, each in a process of its own."""
        methods = {method.name: method for method in configuration.methods}
        for known in self.entry(configuration)["rows"]:
            if known["peak_gib"] is None:
                chunk = known["scan_chunk"] or CHUNKS[-1]
                peak = partial(in_subprocess, peak_of, configuration, methods[known["side"]], chunk)
                what = f"peak memory, {known['side']}"
                known["peak_gib"] = Failures(configuration.name, {}).attempt([what], self.left, peak)
                print(f"{configuration.name}: {what}: {known['peak_gib']} GiB", flush=True)
                self.save()

    def is_complete(self, configuration: Configuration) -> bool:
        """Whether nothing is missing but methods that cannot be measured."""
        entry = self.entry(configuration)
        measured = {known["side"] for known in entry["rows"]}
        measured |= {name for name, reason in entry["left_out"].items() if not reason.startswith("TimeoutError")}
        return measured >= {method.name for method in configuration.methods}

    def entry(self, configuration: Configuration) -> Row:
        """The results of a configuration with these methods."""
        wanted = configuration.sizes() | {"sides": [method.name for method in configuration.methods]}
        same = (entry for entry in self.found["sizes"] if entry.items() >= wanted.items())
        return next(same, wanted | {"rows": [], "left_out": {}})

    def enter(self, configuration: Configuration, rows: list[Row], left_out: dict[str, str]) -> None:
        """Replace the results of a configuration."""
        entry = self.entry(configuration)
        others = [other for other in self.found["sizes"] if other is not entry]
        self.found["sizes"] = [*others, entry | {"rows": rows, "left_out": left_out}]
        for measured in rows:
            print(json.dumps(measured), flush=True)
        self.save()

    def save(self) -> None:
        save(NAME, self.found)


def row(
    configuration: Configuration, method: Method, pair: Pair, times: Sequence[float], peak: float | None, chunk: int
) -> Row:
    """All that a figure depends on besides the machine. FLOPs are of one image; memory is in GiB, with the weights."""
    dtype, public = getattr(torch, configuration.dtype), method.algorithm == PUBLIC
    flops, p50_ms = flops_per_image(method, pair), float(np.quantile(times, 0.5))
    tflops, (limit, source) = flops * configuration.batch / p50_ms / 1e9, peak_tflops(dtype)
    return {
        "side": method.name,
        **configuration.sizes(),
        "tokens": pair[0].config.num_tokens,
        "backend": None if public else method.backend,
        "parameters": sum(p.numel() for p in pair[0].parameters()),
        "rounds": len(times),
        "images_per_second": 1e3 * configuration.batch / p50_ms,
        "p50_ms": p50_ms,
        "p90_ms": float(np.quantile(times, 0.9)),
        "peak_gib": peak,
        "weights_gib": weights_gib(pair),
        "flops": flops,
        "tflops_per_second": tflops,
        "peak_tflops_per_second": limit,
        "peak_is": source,
        "share_of_peak": tflops / limit,
        "scan_chunk": chunk if public else None,
        "attention": public_attention(dtype)[0] if public else None,
    }


def first_peak(run: Callable[[], Any], method: Method, pair: Pair, dtype: torch.dtype) -> float | None:
    """GiB of a method's first call on a GPU, with the float32 weights and all that is prepared of them.

    On a CPU, where it takes a process of its own, None: the inference copies are made, so that they are not timed.
    """
    if DEVICE.type == "cuda":
        for module in pair:
            release(module)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        return weights_gib(pair) + peak_gib(run) - before / 2**30
    if method.algorithm != PUBLIC:
        prepared_model(pair[0], dtype)
        prepared_tokenizer(pair[1], dtype, method.compiled)
    return None


@true_float32
def peak_of(configuration: Configuration, method: Method, chunk: int) -> float:
    """GiB of one method in this process, with the float32 weights."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    pair = random_pair(configuration.depth, configuration.resolution, method.architecture)
    labels, dtype = torch.arange(configuration.batch), getattr(torch, configuration.dtype)
    run = partial(generate, method, pair, labels, dtype, chunk=chunk)
    if method.compiled:
        run()  # without the compiler's own memory
    return peak_gib(run)


@true_float32
def main() -> None:
    parser = argument_parser(__doc__)
    add_flags(parser)
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS[DEVICE.type], help="for everything (%(default)g)")
    parser.add_argument("--resume", action="store_true", help="keep what this commit measured on this machine")
    options = parser.parse_args()
    plan = configurations(options, "rehearsal" if REHEARSAL else DEVICE.type)
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    set_allocator()
    Suite(random_pair, options.seconds, load(NAME) if options.resume else None).run(plan)


if __name__ == "__main__":
    main()
