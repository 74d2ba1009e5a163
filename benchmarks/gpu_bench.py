"""How fast this GPU is with our kernels, within 150 s: `python -m benchmarks.gpu_bench` (`make gpu-bench`).

From the tree, nothing is built, one step after the other with nothing beside it: generation (d16 at batch 25, 64 and 1,
d30 at batch 8, each with where its time goes, then the sizes that papers report), a training step, the ops beside their
baselines, and for as long as there is time the ops beside what torch.compile makes. Results are written row by row
under the GPU's name, so that what a cut leaves stands; `python -m benchmarks.report` makes tables of them. Last it
prints images per second beside published figures. Exits with 1 if any step but the last was not done.

Without a GPU, MVAR_REHEARSAL=1 TRITON_INTERPRET=1 rehearses it.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from benchmarks import carried, published, throughput
from benchmarks.measure import kept, require_gpu
from benchmarks.steps import Step, together

SECONDS = 150.0
MIN_SECONDS = 8.0  # that a step is begun with
SHARES = {"generation": 0.41, "training step": 0.16, "ops": 0.33, "compiled ops": 0.1}
OPS = ("scale_attention", "mamba2_mixer", "gated_adaln", "adaln", "ssd_scan", "sample_tokens", "soft_embedding")
"""What matters most goes first."""
COMPILED = ("gated_adaln", "scale_attention")


def plan(seconds: float) -> list[Step]:
    limits = {name: share * seconds for name, share in SHARES.items()}
    commands = {
        "generation": ["throughput", "--seconds", f"{limits['generation'] - MIN_SECONDS:.0f}"],
        "training step": ["train", "--dtypes", "bfloat16", "--rounds", "3", "--eager"],
        "ops": ["ops", *OPS, "--seconds", "0", "--eager"],
        "compiled ops": ["ops", *COMPILED, "--seconds", "0"],
    }
    return [
        Step(name, [sys.executable, "-m", f"benchmarks.{module}", *rest], limits[name])
        for name, (module, *rest) in commands.items()
    ]


def run(steps: Sequence[Step], seconds: float) -> list[str]:
    """One after the other within so many seconds; the names of those that were not done."""
    end, missing = time.monotonic() + seconds, []
    for step in steps:
        if end - time.monotonic() < MIN_SECONDS:
            print(f"{step.name:40s} no time left", flush=True)
            missing.append(step.name)
            continue
        for outcome in together([step], end):
            print(outcome.line(), flush=True)
            if outcome.result != "done":
                missing.append(step.name)
    return missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all of it (default: {SECONDS:.0f})")
    options = parser.parse_args()
    require_gpu()
    carried.use()
    steps = plan(options.seconds)
    limits = ", ".join(f"{step.name} {step.seconds:.0f} s" for step in steps)
    print(f"{options.seconds:.0f} s at most: {limits}; ops: {', '.join(OPS)}", flush=True)
    missing = run(steps, options.seconds)
    sizes = (kept(throughput.NAME) or {"sizes": []})["sizes"]
    print(published.table([row for size in sizes for row in size["rows"]]))
    raise SystemExit(1 if set(missing) - {steps[-1].name} else 0)


if __name__ == "__main__":
    main()
