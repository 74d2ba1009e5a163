"""Interleaved timing: the implementations take turns, so that a slow moment of the machine affects all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.common.environment import DEVICE

TURN_MS = {"cpu": 20.0, "cuda": 5.0}[DEVICE.type]
CALLS = 10  # per CUDA graph, so that the gap between two launches weighs a tenth


def interleaved(
    implementations: Mapping[str, Callable[[], Any]], *, rounds: int, seconds: float, warm_up: bool = True
) -> dict[str, float]:
    """Median milliseconds of each implementation, measured as in :func:`latencies`."""
    times = latencies(implementations, rounds=rounds, seconds=seconds, warm_up=warm_up)
    return {name: statistics.median(of_one) for name, of_one in times.items()}


def latencies(
    implementations: Mapping[str, Callable[[], Any]], *, rounds: int, seconds: float, warm_up: bool = True
) -> dict[str, list[float]]:
    """Milliseconds of each implementation in every round.

    At least `rounds` rounds after one to warm up, and more until `seconds` have passed. A turn is as many calls as
    fill `TURN_MS`, so that a implementation mostly finds its own data in the caches; without a warm-up it is one call.
    """
    calls = dict.fromkeys(implementations, 1)
    for name, run in implementations.items() if warm_up else ():
        run()
        calls[name] = max(1, round(TURN_MS / max(_ms(run, 1), 1e-4)))
    times: dict[str, list[float]] = {name: [] for name in implementations}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < rounds or time.perf_counter() < end:
        for name, run in implementations.items():
            times[name].append(_ms(run, calls[name]))
    return times


def _ms(run: Callable[[], Any], calls: int) -> float:
    """Milliseconds per call. Several calls on a GPU follow an untimed one, so that it never waits for the host."""
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return 1e3 * (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if calls > 1:
        run()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def use_side_stream() -> None:
    """Make a new stream the current one: the default stream cannot be captured, and a backward runs on the stream of
    its forward."""
    if DEVICE.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """Replays a CUDA graph of `CALLS` calls on the current stream. RuntimeError where they cannot be captured."""
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(CALLS):
            run()
    return graph.replay
