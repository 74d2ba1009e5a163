"""`mvar train --preset digits` from start to end: `python -m benchmarks.bench_training_run`.

From scikit-learn's images to a trained model and its grid of images, each run a process of its own: with mvar's
kernels, with the model in eager PyTorch, and with that under torch.compile; same seed, order and drops. They take
turns; torch.compile finds its graphs in a cache on disk, as from a second run on.

No time is written unless the losses of all runs are correct: their distance from the float64 reference's is at most ten
times that of eager PyTorch in the same dtype. Roundings differ, and training amplifies every one of them.

By default a share of the epochs, in minutes, of which the start-up is a larger part. `--shorten 1 --rounds 1` runs the
whole preset.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mvar
from benchmarks.analysis.roofline import peak_tflops
from benchmarks.baselines.eager_training import COMPILED, EAGER, EXACT, OBJECTIVES, OURS
from benchmarks.common.environment import argument_parser, set_allocator
from benchmarks.common.results import load, save
from mvar import digits
from mvar.models.transformer import Model
from mvar.train import run
from mvar.train.digits_tokenizer import train_digits_tokenizer
from mvar.train.flags import PRESETS, add_arguments, parse_flags
from mvar.train.metrics import MetricLogger, flops_per_image
from mvar.train.trainer import Trainer
from mvar_kernels.precision import float32_matmuls

IMPLEMENTATIONS = (OURS, EAGER, COMPILED)
FP16 = {"float32": 0, "bfloat16": 2}  # --fp16
MAX_DISTANCE = 10  # of losses from the exact ones, in those of eager PyTorch: as in the tests of training
LOG_EVERY = 10
FIRST = "first step"
ONE_EPOCH = 1e-3  # of the epochs
SAMPLES = 500


class Run(NamedTuple):
    """Wall clock, seconds by phase, and losses by name and iteration."""

    seconds: float
    parts: Mapping[str, float]
    losses: Mapping[str, float]


class Phases:
    """Seconds of each phase of a run. A phase inside another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start, inner = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            taken = time.perf_counter() - start - (sum(self.seconds.values()) - inner)
            self.seconds[name] = self.seconds.get(name, 0.0) + taken


def trainer_type(name: str, phases: Phases) -> type[Trainer]:
    """The trainer of an implementation, which records its phases; of the first step forward and backward, in which
    torch.compile compiles."""

    class TimedTrainer(Trainer):
        objective_type = OBJECTIVES[name]

        def __init__(self, flags: Any, model: Model, *args: Any, **options: Any) -> None:
            super().__init__(flags, model.double() if name == EXACT else model, *args, **options)

        def run(self) -> None:
            with phases.phase("steps"):
                super().run()

        def _forward_backward(self, *args: Any) -> None:
            if FIRST in phases.seconds:
                return super()._forward_backward(*args)
            with phases.phase(FIRST):
                super()._forward_backward(*args)

        def _validate(self, logger: MetricLogger) -> None:
            with phases.phase("validation"):
                super()._validate(logger)

        def _save(self) -> None:
            with phases.phase("checkpoints"):
                super()._save()

    return TimedTrainer


def train(name: str, folder: str, *arguments: str) -> None:
    """One run in this process; the seconds of each phase go to `parts.json` in its folder.

    arguments: of `mvar train`; without --tokenizer one is trained first, as there.
    """
    out, parser, phases = Path(folder), argparse.ArgumentParser(), Phases()
    add_arguments(parser)
    options = [f"--out={out}", *["--backend=reference"] * (name == EXACT), *arguments]
    flags = parse_flags(parser.parse_args(options))
    if flags.tokenizer is None:
        device = torch.device(flags.device or "cpu")
        with phases.phase("tokenizer"), float32_matmuls(device, fast=flags.tf32):
            out.mkdir(parents=True, exist_ok=True)
            train_digits_tokenizer(out / "tokenizer.safetensors", seed=flags.seed or 0, shorten=flags.shorten)
        flags = parse_flags(parser.parse_args([*options, f"--tokenizer={out / 'tokenizer.safetensors'}"]))
    with phases.phase("data and grid"):
        run.train(flags, trainer_type(name, phases))
    (out / "parts.json").write_text(json.dumps(phases.seconds))


def command(implementation: str, dtype: str, shorten: float, out: Path) -> Run:
    """One run. CalledProcessError where it fails."""
    flags = ["--preset=digits", f"--fp16={FP16[dtype]}", f"--shorten={shorten}", f"--log_every={LOG_EVERY}", "--tb=0"]
    code = "import sys; from benchmarks.bench_training_run import train; train(*sys.argv[1:])"
    arguments = [sys.executable, "-c", code, implementation, str(out), *flags]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(out.parent / "compiled")}  # of these runs alone
    start = time.perf_counter()
    subprocess.run(arguments, check=True, env=environment)
    seconds = time.perf_counter() - start
    parts = json.loads((out / "parts.json").read_text())
    return Run(seconds, parts | {"start and end": seconds - sum(parts.values())}, losses(out))


def losses(out: Path) -> dict[str, float]:
    """In training the means since the last line of the log; in validation those of the held-out digits."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {f"{name} {row['iteration']}": row[name] for row in rows for name in ("loss", "val_loss") if name in row}


def distances(exact: Run, runs: Mapping[str, Iterable[Run]]) -> dict[str, float]:
    """The largest distance of each implementation's losses from the exact ones.

    SystemExit where one is wrong: farther than `MAX_DISTANCE` times eager PyTorch.
    """
    found = {
        name: max(abs(each.losses[key] - loss) for each in of_one for key, loss in exact.losses.items())
        for name, of_one in runs.items()
    }
    if wrong := {name: far for name, far in found.items() if not far <= MAX_DISTANCE * found[EAGER]}:
        raise SystemExit(f"the losses are wrong: at most {MAX_DISTANCE} × {found[EAGER]:.2g} off expected, got {wrong}")
    return found


def measure(exact: Run, dtype: str, shorten: float, rounds: int, root: Path) -> dict[str, Any]:
    """A row of the result: every implementation in turns, and its losses checked."""
    cold = command(COMPILED, dtype, ONE_EPOCH, root / f"{dtype} cold")  # fills torch.compile's cache
    runs: dict[str, list[Run]] = {name: [] for name in IMPLEMENTATIONS}
    for i in range(rounds):
        for name in IMPLEMENTATIONS:
            runs[name].append(command(name, dtype, shorten, root / f"{dtype} {name} {i}"))
            print(dtype, name, f"{runs[name][-1].seconds:.1f} s", runs[name][-1].parts, flush=True)
    far, steps = distances(exact, runs), max(int(name.split()[1]) for name in exact.losses)
    models = {name: mvar.load_model(root / f"{dtype} {name} 0" / "model.safetensors") for name in IMPLEMENTATIONS}
    tokenizer = mvar.load_tokenizer(root / f"{dtype} {OURS} 0" / "tokenizer.safetensors")
    gflop = steps * PRESETS["digits"]["bs"] * flops_per_image(models[OURS]) / 1e9
    gflops = 1e3 * peak_tflops(getattr(torch, dtype))[0]
    return {
        "dtype": dtype,
        "shorten": shorten,
        "steps": steps,
        "rounds": rounds,
        "median_s": {name: statistics.median(each.seconds for each in runs[name]) for name in IMPLEMENTATIONS},
        "parts_s": {name: median_parts([each.parts for each in runs[name]]) for name in IMPLEMENTATIONS},
        "first_step_without_cache_s": cold.parts[FIRST],
        "gflop": gflop,
        "peak_gflops": gflops,
        "floor_s": gflop / gflops,
        "loss_distances": far,
        "val_loss": {name: runs[name][0].losses[f"val_loss {steps}"] for name in IMPLEMENTATIONS},
        "drawn": SAMPLES,
        "agreement": {name: recognised(model, tokenizer) for name, model in models.items()},
    }


def median_parts(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in parts) for name in parts[0]}


def recognised(model: mvar.Model, tokenizer: mvar.Tokenizer) -> float:
    """Share of generated digits that a classifier of real ones recognises as the requested class."""
    labels = torch.arange(SAMPLES) % digits.NUM_CLASSES
    sampling: Mapping[str, Any] = digits.SAMPLING
    out = mvar.generate(model, tokenizer, labels, dtype=torch.float32, **sampling)
    return digits.quality(out.images * 2 - 1, labels).agreement


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--shorten", type=float, default=0.1, help="share of the epochs (default: 0.1)")
    parser.add_argument("--rounds", type=int, default=3)
    added = "added to those that this machine and commit have"
    parser.add_argument("--dtypes", nargs="+", choices=FP16, default=[*FP16], help=added)
    options = parser.parse_args(arguments)
    set_allocator()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        exact = command(EXACT, "float32", options.shorten, root / "exact")
        for dtype in options.dtypes:
            row = measure(exact, dtype, options.shorten, options.rounds, root)
            rows = {(other["dtype"], other["shorten"]): other for other in [*(load("digits") or []), row]}
            print(row, save("digits", list(rows.values())), flush=True)


if __name__ == "__main__":
    main()
