"""Generation on a GPU, every size against its rivals in the same run: `python -m benchmarks.generation`.

Random weights, seeded; bfloat16, guidance 1.5, top-k 900, top-p 0.96. The rivals: the public algorithm in eager PyTorch
with varlen attention, the same under torch.compile, and a VAR of the same width in this project's engine, all from the
same float32 weights on the device. One size at a time, results written after each; what fails is left out and named,
and so is what the time does not suffice for: the first rows matter most.
"""

import argparse
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from itertools import groupby
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import mvar
from benchmarks import public
from benchmarks.measure import DEVICE, interleaved, write
from benchmarks.timeline import timeline
from mvar.engine import release
from mvar.layers import Mamba2
from mvar.tokenizer import Tokenizer
from mvar_kernels.ops.mamba2 import reference

DTYPE = torch.bfloat16
CHUNKS = (32, 64, 256)  # of the baseline's scan: the faster one of every size; mamba_ssm's kernels take 256
OURS, NO_GRAPH, COMPILED_DECODER = "mvar", "mvar without a graph", "mvar with a compiled decoder"
VAR, PUBLIC, COMPILED = "VAR in this engine", "public algorithm", "public algorithm, torch.compile"
AGREE = 0.9  # one token of a coarse scale may fall the other way by rounding; a wrong kernel agrees on next to none
MIN_SECONDS = 5.0  # left to begin another side with
COMPILE_SECONDS = 45.0  # for the first call of what torch.compile makes
TIMING_SECONDS = 4.0  # for the rounds of one size, of which there are 2 to 7


class Size(NamedTuple):
    depth: int
    resolution: int
    batch: int
    sides: tuple[str, ...] = (OURS,)
    with_timeline: bool = False


ALL = (OURS, VAR, PUBLIC)
TO_COMPILE = (COMPILED_DECODER, COMPILED)
PLAN = (
    Size(16, 256, 25, (*ALL, NO_GRAPH), with_timeline=True),
    Size(16, 256, 1, (*ALL, NO_GRAPH), with_timeline=True),
    Size(16, 256, 64, ALL, with_timeline=True),
    Size(16, 256, 8, ALL),
    *(Size(depth, 256, 25, ALL) for depth in (24, 30)),
    Size(16, 512, 8, ALL),
    Size(16, 1024, 1, ALL),  # what the growing caches hold
    Size(16, 256, 25, (OURS, *TO_COMPILE)),
    *(Size(24, 256, batch, (OURS, VAR)) for batch in (1, 8, 64)),
    *(Size(30, 256, batch, (OURS, VAR)) for batch in (1, 8, 64)),
    *(Size(16, 512, batch, (OURS, VAR)) for batch in (1, 25, 64)),
    *(Size(depth, 512, batch) for depth in (24, 30) for batch in (8, 1, 25, 64)),
)

Pair = tuple[mvar.Model, Tokenizer]
Build = Callable[[int, int, str], Pair]


@torch.no_grad()
def random_pair(depth: int, resolution: int, architecture: str) -> Pair:
    """A model and its tokenizer in float32, made on the device: `mvar.build` draws on the host, minutes for d30."""
    torch.manual_seed(0)
    maps = mvar.SCHEDULES[resolution]
    with DEVICE:
        tokenizer = Tokenizer(mvar.TokenizerConfig(maps))
        model = mvar.from_config(mvar.ModelConfig(depth=depth, patch_nums=maps, architecture=architecture))
    for parameter in (model.pos_start, model.pos_1LC):
        parameter.normal_(std=0.02)
    for mixer in (module for module in model.modules() if isinstance(module, Mamba2)):
        mixer.A_log.uniform_(0, 2.7)  # decays of 1 to 16, as Mamba-2's
        mixer.dt_bias.uniform_(-7, -2)
    return model.eval(), tokenizer.eval()


def runs(sides: Sequence[str], pair: Pair, var: Pair | None, labels: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The sides by name, ready to be called."""
    engine = partial(mvar.generate, labels=labels, dtype=DTYPE)
    for side in sides:
        if side in (PUBLIC, COMPILED):
            yield side, partial(_theirs, *pair, labels, compiled=side == COMPILED)
        elif side == VAR:
            assert var is not None
            yield side, partial(engine, *var)
        elif side == COMPILED_DECODER:
            yield side, partial(engine, *pair, compile_decoder=True)
        else:
            yield side, partial(engine, *pair, graph=False if side == NO_GRAPH else None)


def _theirs(model: mvar.Model, tokenizer: Tokenizer, labels: Tensor, *, compiled: bool) -> None:
    _, attend = public_attention()
    run_block = _compiled_block() if compiled else None
    with torch.autocast(DEVICE.type, DTYPE):
        public.generate(model, tokenizer, labels, attend=attend, run_block=run_block)


@cache
def public_attention() -> tuple[str, public.Attend]:
    """Varlen attention where torch has one that runs here, else the one over a batch."""
    q = torch.ones(2, 4, 1, 64, device=DEVICE, dtype=DTYPE)
    try:
        public.attend_varlen(q, q, q, 1.0)
    except Exception as error:
        print(f"no varlen attention: {error}", flush=True)
        return "scaled_dot_product_attention", public.attend_batch
    return "varlen_attn", public.attend_varlen


@cache
def _compiled_block() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(public.block, dynamic=False)


def check(pair: Pair) -> dict[str, Any]:
    """What the engine draws, held against the public algorithm and against itself without a graph.

    Greedy tokens in float32: the share that is equal, up to the first scale that differs anywhere, as all that comes
    after one token that fell the other way is another picture.
    """
    labels = torch.tensor([7], device=DEVICE)
    ours = mvar.generate(*pair, labels, top_k=1, dtype=torch.float32).tokens
    _, theirs = public.generate(*pair, labels, top_k=1)
    end = 0
    for length in pair[0].config.scales:
        end += length
        if not torch.equal(ours[:, :end], theirs[:, :end]):
            break
    three = torch.tensor([1, 2, 3], device=DEVICE)  # a batch that is padded
    with_and_without = [mvar.generate(*pair, three, dtype=DTYPE, graph=graph).tokens for graph in (None, False)]
    for module in pair:
        release(module)
    return {
        "greedy_tokens_equal_to_public": float((ours[:, :end] == theirs[:, :end]).float().mean()),
        "same_tokens_without_a_graph": torch.equal(*with_and_without),
    }


def fault(pair: Pair) -> tuple[dict[str, Any], str | None]:
    """What :func:`check` found, and why the engine is not to be timed, or None."""
    try:
        found = check(pair)
    except Exception as error:
        return {}, f"not checked: {type(error).__name__}: {error}"[:200]
    agreement = found["greedy_tokens_equal_to_public"]
    wrong = agreement < AGREE and f"wrong: {agreement:.1%} of its greedy tokens are the public algorithm's"
    return found, wrong or None


def measure(
    size: Size, pair: Pair, var: Pair | None, end: float, chunks: dict[bool, int], wrong: str | None
) -> dict[str, Any]:
    """One row: milliseconds and peak memory of each side, and why some have none.

    chunks: of the baseline's scan, for one image and for several; found at the first size. wrong: what the engine is.
    """
    labels = (torch.arange(size.batch) * 37 % 1000).to(DEVICE)
    sides, several = dict(runs(size.sides, pair, var, labels)), size.batch > 1
    known = chunks.get(several, CHUNKS[-1])
    peaks: dict[str, float] = {}
    seconds: dict[str, float] = {}
    median_ms: dict[str, float] = {}
    left_out = {side: wrong for side in sides if wrong and side not in (PUBLIC, COMPILED)}

    def leave_out(names: Sequence[str], error: Exception) -> None:
        for name in names:
            left_out[name] = f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0][:200]}"
            print(f"{size}: {name}: {left_out[name]}", flush=True)
        error.__traceback__ = None  # whose frames hold memory, which may be just what is missing

    for side, run in sides.items():  # whatever fails, the other sides are measured
        if side in left_out:
            continue
        try:
            seconds_left = end - time.monotonic()
            with limited(min(seconds_left, COMPILE_SECONDS) if side in TO_COMPILE else seconds_left), in_chunks(known):
                peaks[side] = peak_gib(run, var if side == VAR and var else pair)
                if side == PUBLIC and several not in chunks:
                    known = chunks[several] = fastest_chunk(run)
        except Exception as error:
            leave_out([side], error)
    with in_chunks(known):
        for side in peaks:  # once more: a peak is measured without what the sides before have prepared
            try:
                with limited(end - time.monotonic()):
                    start = time.monotonic()
                    sides[side]()
                    seconds[side] = time.monotonic() - start
            except Exception as error:
                leave_out([side], error)
        rounds = min(max(int(TIMING_SECONDS / max(sum(seconds.values()), 1e-3)), 2), 7)
        try:
            with limited(end - time.monotonic()):
                ready = {side: sides[side] for side in seconds}
                median_ms = interleaved(ready, rounds=rounds, seconds=0, warm_up=False) if ready else {}
        except Exception as error:
            leave_out(list(seconds), error)
    return {
        "depth": size.depth,
        "resolution": size.resolution,
        "batch": size.batch,
        "median_ms": median_ms,
        "images_per_second": {side: 1e3 * size.batch / ms for side, ms in median_ms.items()},
        "peak_gib": peaks,
        "weights_gib": {"mvar": gib(pair)} | ({VAR: gib(var)} if var else {}),
        "public_attention": public_attention()[0] if PUBLIC in size.sides else None,
        "scan_chunk_of_public": chunks.get(several),
        "rounds": rounds,
        "left_out": left_out,
    }


def in_chunks(chunk: int) -> AbstractContextManager[Any]:
    """The baseline's scan in chunks of so many tokens."""
    return mock.patch.object(reference, "CHUNK", chunk)


def fastest_chunk(run: Callable[[], Any]) -> int:
    """The baseline's best chunk for this size, as a favour to it."""

    def with_chunk(chunk: int) -> None:
        with in_chunks(chunk):
            run()

    times = interleaved({str(c): partial(with_chunk, c) for c in CHUNKS}, rounds=1, seconds=0, warm_up=False)
    return int(min(times, key=times.__getitem__))


def gib(pair: Pair) -> float:
    return sum(t.nbytes for module in pair for t in (*module.parameters(), *module.buffers())) / 2**30


def peak_gib(run: Callable[[], Any], pair: Pair) -> float:
    """Of the side's first call, with the float32 weights it is given, and all that it makes of them."""
    for module in pair:
        release(module)
    if DEVICE.type != "cuda":
        run()
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return gib(pair) + (torch.cuda.max_memory_allocated() - before) / 2**30


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds: a compilation may take longer than all the rest."""
    if seconds < MIN_SECONDS:
        raise TimeoutError("no time left")

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_plan(plan: Sequence[Size], build: Build, seconds: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and timelines; both files are written anew after every size. The engine is checked at the first one."""
    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    timelines: list[dict[str, Any]] = []
    chunks: dict[bool, int] = {}
    agreement: dict[str, Any] = {}
    wrong: str | None = None

    def save() -> None:
        write("generation", {"agreement": agreement, "sizes": rows})
        write("timeline", timelines)

    for (depth, resolution), sizes in groupby(plan, key=lambda size: size[:2]):
        if end - time.monotonic() < MIN_SECONDS:
            rows += [_skipped(size) for size in sizes]
            continue
        group = list(sizes)
        pair = build(depth, resolution, "mvar")
        var = build(depth, resolution, "var") if any(VAR in size.sides for size in group) else None
        if not rows:
            agreement, wrong = fault(pair)
            print(agreement, wrong or "", flush=True)
        for size in group:
            rows.append(measure(size, pair, var, end, chunks, wrong))
            print(rows[-1], flush=True)
            if size.with_timeline and not wrong:
                try:
                    with limited(end - time.monotonic()):
                        labels = torch.arange(size.batch, device=DEVICE)
                        timelines.append({"depth": depth, "resolution": resolution} | timeline(*pair, labels, DTYPE))
                    print(timelines[-1], flush=True)
                except Exception as error:  # a profiler that may not look does not stop the rest
                    print(f"{size}: no timeline: {error}", flush=True)
            save()
        for module in (*pair, *(var or ())):
            release(module)
        del pair, var
    save()
    return rows, timelines


def _skipped(size: Size) -> dict[str, Any]:
    left_out = dict.fromkeys(size.sides, "TimeoutError: no time left")
    return {"depth": size.depth, "resolution": size.resolution, "batch": size.batch, "left_out": left_out} | {
        name: {} for name in ("median_ms", "images_per_second", "peak_gib", "weights_gib")
    }


def targets(rows: Sequence[dict[str, Any]], timelines: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """What was aimed at on an H200 for d16 at 256×256 with guidance, and what was found."""

    def ms(batch: int, side: str) -> float | None:
        times = [r["median_ms"] for r in rows if (r["depth"], r["resolution"], r["batch"]) == (16, 256, batch)]
        return next((t[side] for t in times if side in t), None)

    ours, theirs, one = ms(25, OURS), ms(25, PUBLIC), ms(1, OURS)
    shares = [t["linear_tflops"] / t["product_tflops"] for t in timelines if t["batch"] == 64 and t["linear_tflops"]]
    found = (
        ("batch 25: at least 4 times the public algorithm's speed", ours and theirs and f"{theirs / ours:.1f} times"),
        (
            "batch 25: less than the 0.303 s of VAR-d16 (Markov-VAR, arXiv 2511.23334, table 3)",
            ours and f"{ours / 1e3:.3f} s",
        ),
        ("batch 1: less than 25 ms", one and f"{one:.1f} ms"),
        (
            "batch 64: linear layers at 50 % or more of a large product's rate",
            f"{max(shares):.0%}" if shares else None,
        ),
    )
    return [(aim, value or "not measured") for aim, value in found]


def compile_ahead(build: Build, seconds: float) -> None:
    """What the plan has compiled, beside other work: the timed run then finds it on disk."""
    size = next(size for size in PLAN if COMPILED in size.sides)
    pair = build(size.depth, size.resolution, "mvar")
    for chunk in CHUNKS[::-1]:  # the largest first: it is the likeliest, and has the fewest operators
        with in_chunks(chunk), limited(seconds):
            for side, run in runs(size.sides, pair, None, torch.arange(size.batch, device=DEVICE)):
                run()
                print(f"{side}, scan in chunks of {chunk}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--untimed", action="store_true", help="only fill torch.compile's cache on disk")
    parser.add_argument("--seconds", type=float, default=200.0, help="for everything (default: 200)")
    options = parser.parse_args()
    if DEVICE.type != "cuda":
        raise SystemExit("no CUDA device; `python -m benchmarks.generate` measures the CPU engine")
    torch._dynamo.config.recompile_limit = 64  # a scale is a size
    if options.untimed:
        compile_ahead(random_pair, options.seconds)
        return
    for aim, value in targets(*run_plan(PLAN, random_pair, options.seconds)):
        print(f"{aim}: {value}")


if __name__ == "__main__":
    main()
