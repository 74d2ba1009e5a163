"""Digits end to end: `mvar bench --suite digits`, or `python -m benchmarks.digits`.

From scikit-learn's pictures to a trained model and its grid of pictures, `mvar train --preset digits`: whole commands,
each a process of its own, from start to end; with mvar's kernels, with the model in eager PyTorch, and with the same
under torch.compile. Same seed, order and drops on all sides. The sides take turns; torch.compile finds its graphs in a
cache on the disk, as from a second run on.

No time is written unless the losses of all runs agree: against the reference in float64, with at most ten times the
distance that eager PyTorch has in the same dtype. Roundings differ, and training carries on every one of them.

A share of the epochs by default, so that it takes minutes; there what does not grow with them weighs more.
`--shorten 1 --rounds 1` is the whole preset.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import mvar
from benchmarks.measure import kept, require_allocator, write
from benchmarks.products import best_tflops
from benchmarks.training_run import COMPILED, EAGER, EXACT, FIRST, OURS
from mvar import digits
from mvar.train.flags import PRESETS
from mvar.train.metrics import flops_per_image

SIDES = (OURS, EAGER, COMPILED)
FP16 = {"float32": 0, "bfloat16": 2}  # --fp16
TIMES_EAGER = 10  # as far from the exact losses as eager PyTorch, at most: as in the tests of training
EVERY = 10  # steps a line of the log
LEAST = 1e-3  # of the epochs: a single one
DRAWN = 500


class Run(NamedTuple):
    """One command: its wall clock, the seconds of its parts, and its log's losses by what and where."""

    seconds: float
    parts: Mapping[str, float]
    losses: Mapping[str, float]


def command(side: str, dtype: str, shorten: float, out: Path) -> Run:
    """Run it. CalledProcessError where it fails."""
    flags = ["--preset=digits", f"--fp16={FP16[dtype]}", f"--shorten={shorten}", f"--log_every={EVERY}", "--tb=0"]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "benchmarks.training_run", side, str(out), *flags], check=True)
    seconds = time.perf_counter() - start
    parts = json.loads((out / "parts.json").read_text())
    return Run(seconds, parts | {"start and end": seconds - sum(parts.values())}, losses(out))


def losses(out: Path) -> dict[str, float]:
    """Means since the line before in training, and over the held-out digits."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {f"{name} {row['iteration']}": row[name] for row in rows for name in ("loss", "val_loss") if name in row}


def distances(exact: Run, runs: Mapping[str, Iterable[Run]]) -> dict[str, float]:
    """How far the losses of each side's runs are from the exact ones, at most.

    SystemExit where a side is wrong: further away than `TIMES_EAGER` times eager PyTorch.
    """
    found = {
        side: max(abs(run.losses[name] - loss) for run in of_side for name, loss in exact.losses.items())
        for side, of_side in runs.items()
    }
    if wrong := {side: far for side, far in found.items() if not far <= TIMES_EAGER * found[EAGER]}:
        raise SystemExit(f"the losses are wrong: at most {TIMES_EAGER} × {found[EAGER]:.2g} off expected, got {wrong}")
    return found


def measure(exact: Run, dtype: str, shorten: float, rounds: int, root: Path) -> dict[str, Any]:
    """Every side in turns, checked; a row of the result."""
    cold = command(COMPILED, dtype, LEAST, root / f"{dtype} cold")  # fills torch.compile's cache
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for round_ in range(rounds):
        for side in SIDES:
            runs[side].append(command(side, dtype, shorten, root / f"{dtype} {side} {round_}"))
            print(dtype, side, f"{runs[side][-1].seconds:.1f} s", runs[side][-1].parts, flush=True)
    far, steps = distances(exact, runs), max(int(name.split()[1]) for name in exact.losses)
    made = {side: mvar.load_model(root / f"{dtype} {side} 0" / "model.safetensors") for side in SIDES}
    tokenizer = mvar.load_tokenizer(root / f"{dtype} {OURS} 0" / "tokenizer.safetensors")
    gflop = steps * PRESETS["digits"]["bs"] * flops_per_image(made[OURS]) / 1e9
    rate = 1e3 * best_tflops(getattr(torch, dtype))[0]
    return {
        "dtype": dtype,
        "shorten": shorten,
        "steps": steps,
        "rounds": rounds,
        "median_s": {side: statistics.median(run.seconds for run in runs[side]) for side in SIDES},
        "parts_s": {side: median_parts([run.parts for run in runs[side]]) for side in SIDES},
        "first_step_without_cache_s": cold.parts[FIRST],
        "gflop": gflop,
        "peak_gflops": rate,
        "floor_s": gflop / rate,
        "loss_distances": far,
        "val_loss": {side: runs[side][0].losses[f"val_loss {steps}"] for side in SIDES},
        "drawn": DRAWN,
        "agreement": {side: agreement(model, tokenizer) for side, model in made.items()},
    }


def median_parts(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in parts) for name in parts[0]}


def agreement(model: mvar.Model, tokenizer: mvar.Tokenizer) -> float:
    """Share of digits drawn that a classifier of real ones takes for the class asked for."""
    labels = torch.arange(DRAWN) % digits.NUM_CLASSES
    drawing: Mapping[str, Any] = digits.SAMPLING
    out = mvar.generate(model, tokenizer, labels, dtype=torch.float32, **drawing)
    return digits.quality(out.images * 2 - 1, labels).agreement


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shorten", type=float, default=0.1, help="share of the epochs (default: 0.1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=FP16,
        default=[*FP16],
        help="added to those that this machine and commit have",
    )
    options = parser.parse_args(arguments)
    require_allocator()
    with (
        tempfile.TemporaryDirectory() as root,
        # empty, and for these runs alone
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(Path(root, "compiled"))),
    ):
        exact = command(EXACT, "float32", options.shorten, Path(root, "exact"))
        for dtype in options.dtypes:
            row = measure(exact, dtype, options.shorten, options.rounds, Path(root))
            rows = {(other["dtype"], other["shorten"]): other for other in [*(kept("digits") or []), row]}
            print(row, write("digits", list(rows.values())), flush=True)


if __name__ == "__main__":
    main()
