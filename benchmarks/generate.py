"""Generation of d16 at 256×256 against the public algorithm: `python -m benchmarks.generate`.

Random weights, seeded; guidance 1.5, top-k 900, top-p 0.96. Both sides in one process, in turns; peak memory
each in a process of its own. Before anything is timed, greedy tokens in float32 must agree.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mvar
import mvar.model
from benchmarks import public
from benchmarks.measure import interleaved, require_allocator, write
from mvar.packed import PackedLinear
from mvar.tokenizer import Tokenizer

AGREE = 0.999  # of greedy float32 tokens: ties within a rounding may fall either way
PARTS = ("linear layers", "attention", "mixer", "adaLN", "drawing", "quantizer", "decoder")


def ours(model: mvar.MVAR, tokenizer: Tokenizer, labels: Tensor, dtype: torch.dtype, **options: Any) -> mvar.Generated:
    return mvar.generate(model, tokenizer, labels, dtype=dtype, **options)


def theirs(
    model: mvar.MVAR, tokenizer: Tokenizer, labels: Tensor, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return public.generate(model, tokenizer, labels, **options)


def check(model: mvar.MVAR, tokenizer: Tokenizer, labels: Tensor) -> dict[str, float]:
    """Greedy tokens of both sides in float32, and of ours in bfloat16; pictures of the same tokens by PSNR."""
    exact = ours(model, tokenizer, labels, torch.float32, top_k=1)
    _, public_tokens = theirs(model, tokenizer, labels, torch.float32, top_k=1)
    agreement = float((exact.tokens == public_tokens).float().mean())
    if agreement < AGREE:
        raise SystemExit(f"only {agreement:.2%} of the greedy tokens agree with the public algorithm")
    rough = ours(model, tokenizer, labels, torch.bfloat16, top_k=1)
    features = torch.randn(1, model.config.code_dim, *2 * model.config.patch_nums[-1:])
    pictures = [mvar.engine.prepared_decoder(tokenizer, d)(features) for d in (torch.float32, torch.bfloat16)]
    squared_error = float((pictures[0] - pictures[1]).square().mean()) / 4  # pixels span 2
    return {
        "greedy_tokens_equal_to_public": agreement,
        "greedy_tokens_bf16_equal_to_fp32": float((rough.tokens == exact.tokens).float().mean()),
        "decoder_bf16_psnr_db": -10 * torch.tensor(squared_error).log10().item(),
    }


@contextmanager
def timed_parts(seconds: dict[str, float], flops: dict[str, float]) -> Iterator[None]:
    """Add up, by part, where a generation spends its time; the linear layers' FLOPs too."""
    undo: list[Callable[[], None]] = []

    def wrap(owner: Any, name: str, part: str) -> None:
        original = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start
                if part == "linear layers":
                    layer, x = args[0], args[1]
                    flops[part] = flops.get(part, 0.0) + 2 * x.numel() * layer.features

        setattr(owner, name, run)
        undo.append(lambda: setattr(owner, name, original))

    wrap(PackedLinear, "forward", "linear layers")
    kernels = mvar.model.mk
    for name, part in (
        ("scale_attention", "attention"),
        ("mamba2_mixer", "mixer"),
        ("adaln", "adaLN"),
        ("gated_adaln", "adaLN"),
        ("sample_tokens", "drawing"),
    ):
        wrap(kernels, name, part)
    for name in ("scale_features", "next_input", "embed"):
        wrap(Tokenizer, name, "quantizer")
    wrap(Tokenizer, "decode_features", "decoder")
    try:
        yield
    finally:
        for back in undo:
            back()


def breakdown(model: mvar.MVAR, tokenizer: Tokenizer, labels: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds by part of the median of three generations, and what the linear layers and the decoder must do."""
    runs = []
    for _ in range(3):
        seconds: dict[str, float] = {}
        flops: dict[str, float] = {}
        start = time.perf_counter()
        with timed_parts(seconds, flops):
            ours(model, tokenizer, labels, dtype)
        runs.append((time.perf_counter() - start, seconds, flops))
    total, seconds, flops = sorted(runs, key=lambda run: run[0])[1]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        copy = Tokenizer(tokenizer.config)
        copy.decode_features(torch.empty(len(labels), copy.code_dim, *2 * copy.patch_nums[-1:]))
    peak = peak_gflops(dtype)
    flops["decoder"] = float(counter.get_total_flops())
    parts = {part: 1e3 * seconds.get(part, 0.0) for part in PARTS}
    return {
        "total_ms": 1e3 * total,
        "parts_ms": parts | {"rest": 1e3 * total - sum(parts.values())},
        "gflop": {part: value / 1e9 for part, value in flops.items()},
        "peak_gflops": peak,
        "floor_ms": {part: value / peak / 1e6 for part, value in flops.items()},
    }


def peak_gflops(dtype: torch.dtype) -> float:
    """The best rate of a large packed linear layer here: what the floors are counted with."""
    layer = PackedLinear(torch.nn.Linear(2048, 4096).to(dtype))
    x = torch.randn(2048, 2048).to(dtype)
    ms = interleaved({"linear": lambda: layer(x)}, rounds=9, seconds=1.0)["linear"]
    return 2 * 2048 * 2048 * 4096 / ms / 1e6


def peak_memory_gib(side: str, dtype: torch.dtype, batch: int, depth: int) -> float:
    """Of one generation in a process of its own, weights included."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.generate",
        "--memory-of",
        side,
        "--batch",
        str(batch),
        "--depth",
        str(depth),
    ]
    done = subprocess.run([*command, "--dtype", str(dtype)[6:]], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model, tokenizer = mvar.build(options.depth)
    mvar.initialise(model, alng=1e-2, hd=1.0)  # so that every branch and every logit counts
    if options.memory_of:
        {"ours": ours, "theirs": theirs}[options.memory_of](
            model, tokenizer, torch.arange(options.batch), getattr(torch, options.dtype)
        )
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    require_allocator()
    torch.set_float32_matmul_precision("medium")  # the baseline's better float32 products
    agreement = check(model, tokenizer, torch.tensor([207]))
    print(agreement)
    rows = []
    for batch in options.batches:
        labels = torch.arange(batch) * 100 + 7
        for dtype in (torch.float32, torch.bfloat16):
            sides = {
                "mvar": lambda: ours(model, tokenizer, labels, dtype),  # noqa: B023 (called in this turn of the loop)
                "public algorithm": lambda: theirs(model, tokenizer, labels, dtype),  # noqa: B023
            }
            median_ms = interleaved(sides, rounds=max(options.rounds // batch, 2), seconds=0)
            rows.append(
                {
                    "batch": batch,
                    "dtype": str(dtype)[6:],
                    "median_ms": median_ms,
                    "ratio": median_ms["public algorithm"] / median_ms["mvar"],
                    "peak_memory_gib": {
                        side: peak_memory_gib(side, dtype, batch, options.depth) for side in ("ours", "theirs")
                    },
                    "breakdown": breakdown(model, tokenizer, labels, dtype) if batch == 1 else None,
                }
            )
            print(rows[-1])
    print(write(f"cpu/generate_d{options.depth}", {"agreement": agreement, "runs": rows}))


if __name__ == "__main__":
    main()
