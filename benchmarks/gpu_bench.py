"""How fast this GPU is with our kernels, within 150 s: `python -m benchmarks.gpu_bench` (`make gpu-bench`).

From the tree, nothing is built, one step after the other with nothing beside it: generation (d16 at batch 25, 1 and 64,
d30 at batch 8, each with where its time goes), the ops beside their baselines, and a training step. Results are written
row by row under the GPU's name, so that what a cut leaves stands; `python -m benchmarks.report` makes tables of them.
What torch.compile would take minutes to compile is left to `mvar bench`. Exits with 1 if any step was not done.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.steps import Step, together

SECONDS = 150.0
MIN_SECONDS = 8.0  # that a step is begun with
GENERATION_SECONDS = 70.0
OPS = ("scale_attention", "mamba2_mixer", "gated_adaln", "adaln", "ssd_scan", "sample_tokens", "soft_embedding")
"""What matters most goes first."""


def plan() -> list[Step]:
    python = sys.executable
    generation = [python, "-m", "benchmarks.throughput", "--seconds", str(GENERATION_SECONDS - 10)]
    ops = [python, "-m", "benchmarks.ops", *OPS, "--seconds", "0.3", "--eager"]
    training = [python, "-m", "benchmarks.train", "--dtypes", "bfloat16", "--rounds", "3", "--eager"]
    return [
        Step("generation", generation, GENERATION_SECONDS),
        Step("ops", ops, 55),
        Step("training step", training, 25),
    ]


def run(steps: Sequence[Step], seconds: float) -> bool:
    """One after the other within so many seconds; True if all were done."""
    end, done = time.monotonic() + seconds, []
    for step in steps:
        if end - time.monotonic() < MIN_SECONDS:
            print(f"{step.name:40s} no time left", flush=True)
            done.append(False)
            continue
        for outcome in together([step], end):
            print(outcome.line(), flush=True)
            done.append(outcome.result == "done")
    return all(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all of it (default: {SECONDS:.0f})")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    steps = plan()
    limits = ", ".join(f"{step.name} {step.seconds:.0f} s" for step in steps)
    print(f"{options.seconds:.0f} s at most: {limits}; ops: {', '.join(OPS)}", flush=True)
    raise SystemExit(0 if run(steps, options.seconds) else 1)


if __name__ == "__main__":
    main()
