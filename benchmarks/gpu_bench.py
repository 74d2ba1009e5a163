"""The benchmarks of a GPU within 150 s: `python -m benchmarks.gpu_bench` (`make gpu-bench`).

Without a build, one step after the other with nothing beside it: generation (d16 at batch 25, 64 and 1, d30 at batch 8,
each with a profile, then the configurations that papers report), a training step, the ops and their baselines, and in
the time that is left the ops under torch.compile. Results are written row by row under the GPU's name, so a run that is
cut leaves what it measured; `python -m benchmarks.report` makes tables of them. At the end it prints images per second
beside published figures. Exits with 1 if any step but the last was not done.

Without a GPU, MVAR_REHEARSAL=1 TRITON_INTERPRET=1 rehearses it.
"""

import sys

from benchmarks import bench_generation
from benchmarks.common import kernel_cache
from benchmarks.common.environment import argument_parser, require_gpu
from benchmarks.common.processes import Step, run_steps
from benchmarks.common.results import load
from benchmarks.report import published

SECONDS = 150.0
MIN_SECONDS = 8.0  # with less left no step is started
SHARES = {"generation": 0.41, "training step": 0.16, "ops": 0.33, "compiled ops": 0.1}
OPS = (
    "scale_attention",
    "mamba2_mixer",
    "gated_adaln",
    "group_norm_silu",
    "adaln",
    "ssd_scan",
    "sample_tokens",
    "soft_embedding",
)
"""The most important first."""
COMPILED = ("gated_adaln", "scale_attention")


def plan(seconds: float) -> list[Step]:
    limits = {name: share * seconds for name, share in SHARES.items()}
    commands = {
        "generation": ["bench_generation", "--seconds", f"{limits['generation'] - MIN_SECONDS:.0f}"],
        "training step": ["bench_training_step", "--dtypes", "bfloat16", "--rounds", "3", "--eager"],
        "ops": ["bench_ops", *OPS, "--seconds", "0", "--eager"],
        "compiled ops": ["bench_ops", *COMPILED, "--seconds", "0"],
    }
    return [
        Step(name, [sys.executable, "-m", f"benchmarks.{module}", *arguments], limits[name])
        for name, (module, *arguments) in commands.items()
    ]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default: {SECONDS:.0f})")
    options = parser.parse_args()
    require_gpu()
    kernel_cache.use_precompiled()
    steps = plan(options.seconds)
    limits = ", ".join(f"{step.name} {step.seconds:.0f} s" for step in steps)
    print(f"{options.seconds:.0f} s at most: {limits}; ops: {', '.join(OPS)}", flush=True)
    missing = run_steps(steps, options.seconds, MIN_SECONDS)
    sizes = (load(bench_generation.NAME) or {"sizes": []})["sizes"]
    print(published.comparison([row for size in sizes for row in size["rows"]]))
    raise SystemExit(1 if set(missing) - {steps[-1].name} else 0)


if __name__ == "__main__":
    main()
