"""A training step of mvar, eager PyTorch and torch.compile: `python -m benchmarks.bench_training_step`.

Forward, loss, backward, clipping and fused AdamW of M-VAR at 256×256, on random tokens, without drops; all share
weights, optimizer and autocast. Gradients in float32 are compared before anything is timed. What the tokenizer's
encoder adds to a step that starts from images is timed by itself.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mvar
from benchmarks.analysis.roofline import peak_tflops
from benchmarks.baselines.eager_training import COMPILED, EAGER, EXACT, OBJECTIVES, OURS
from benchmarks.common.environment import DEVICE, REHEARSAL, argument_parser, set_allocator
from benchmarks.common.memory import in_subprocess, peak_gib
from benchmarks.common.results import load, save
from benchmarks.common.timing import interleaved
from benchmarks.generation.methods import random_pair
from mvar.models.config import HEAD_DIM
from mvar.train.metrics import flops_per_image
from mvar.train.optimizer import OptimizerStep, adamw, adamw8bit
from mvar_kernels.precision import float32_matmuls

DTYPES = ("float32", "bfloat16")
COMPARED = 2  # rows whose gradients are compared
MIN_NORM = 1e-4  # of the largest gradient's norm: the least that an error is relative to, for sums that cancel
MAX_ERROR = 1e-3  # of a gradient's norm, float32: sums in other orders over some ten thousand terms


class TrainingStep:
    """A model, a batch, an optimizer, and a step of each implementation."""

    def __init__(self, depth: int, batch: int, opt: str = "adamw") -> None:
        sizes: dict[str, Any] = {"width": HEAD_DIM * depth, "label_drop": 0.0, "drop_path": 0.0, "qk_norm": False}
        model, tokenizer = random_pair(depth, 256, "mvar", **sizes)
        assert isinstance(model, mvar.MVAR)
        self.model, self.tokenizer, self.batch = model.train(), tokenizer.cpu(), batch
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.num_codes, (batch, model.config.num_tokens), generator=generator)
        labels = torch.randint(model.config.num_classes, (batch,), generator=generator)
        inputs = self.tokenizer.teacher_forcing_inputs(tokens)
        self.data = [value.to(DEVICE) for value in (labels, inputs, tokens)]
        optimizer = adamw8bit(self.model) if opt == "adamw8bit" else adamw(self.model)
        self.stepper = OptimizerStep(optimizer, DEVICE, clip=2.0, float16=False, average=0.0)
        self.objectives = {name: OBJECTIVES[name](model) for name in OBJECTIVES if name != EXACT}

    def step(self, implementation: str, dtype: torch.dtype) -> None:
        self.stepper.backward(self.loss(implementation, dtype))
        self.optimize()

    def loss(self, implementation: str, dtype: torch.dtype) -> Tensor:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss: Tensor = self.objectives[implementation](*self.data).loss
        return loss

    def optimize(self) -> None:
        self.stepper.step(learning_rate=1e-6, weight_decay=0.05)

    def peak(self, implementation: str, dtype: torch.dtype) -> float:
        """GiB of a step after the first, which compiles and makes the optimizer's state."""
        self.step(implementation, dtype)
        return peak_gib(lambda: self.step(implementation, dtype))

    @float32_matmuls(DEVICE, fast=DEVICE.type == "cpu")
    def gradient_differences(self) -> dict[str, float]:
        """The largest difference of any weight's gradient from eager PyTorch's, relative to its norm.

        Of a few rows, for which a GPU has memory in float32, and in true float32: steps on a GPU use TF32. SystemExit
        where one is too large.
        """
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        rows = [value[:COMPARED] for value in self.data]
        objectives = self.objectives.items()
        gradients = {name: torch.autograd.grad(compute(*rows).loss, parameters) for name, compute in objectives}
        expected = gradients.pop(EAGER)
        least = MIN_NORM * max(float(g.norm()) for g in expected)
        worst = {
            implementation: max(
                (float((a - b).norm()) / max(float(b.norm()), least), name)
                for a, b, name in zip(found, expected, names, strict=True)
            )
            for implementation, found in gradients.items()
        }
        if wrong := {name: at for name, at in worst.items() if at[0] > MAX_ERROR}:
            raise SystemExit(f"gradients differ from eager PyTorch's by more than {MAX_ERROR}: {wrong}")
        return {name: difference for name, (difference, _) in worst.items()}

    def encode(self) -> dict[str, float]:
        """Milliseconds to encode the batch's images into tokens, with the published tokenizer's sizes, float32."""
        tokenizer, side = self.tokenizer.to(DEVICE), self.tokenizer.resolution
        images = torch.rand(self.batch, 3, side, side, device=DEVICE) * 2 - 1
        return interleaved({"encoder": lambda: tokenizer.encode(images)}, rounds=2, seconds=0)


@float32_matmuls(DEVICE, fast=True)  # as in mvar train
def peak_of(depth: int, batch: int, implementation: str, dtype: torch.dtype) -> float:
    return TrainingStep(depth, batch).peak(implementation, dtype)


def measure(options: argparse.Namespace) -> None:
    """Memory and time of every implementation in one dtype, and the time of the matmuls at the peak rate."""
    (name,) = options.dtypes
    dtype, result = getattr(torch, name), f"train_d{options.depth}"
    names = [OURS, EAGER, *[COMPILED] * (not options.eager)]
    peaks: dict[str, float] = {}
    if DEVICE.type == "cpu":  # first, in processes of their own, while this one holds next to nothing
        peaks = {each: in_subprocess(peak_of, options.depth, options.batch, each, dtype) for each in names}
    training = TrainingStep(options.depth, options.batch)
    if options.eager:
        del training.objectives[COMPILED]
    differences = training.gradient_differences()
    print(f"differences of gradients: {differences}", flush=True)
    peaks = peaks or {each: training.peak(each, dtype) for each in names}
    steps = {each: partial(training.step, each, dtype) for each in names}
    gflop, gflops = training.batch * flops_per_image(training.model) / 1e9, 1e3 * peak_tflops(dtype)[0]
    run = {
        "batch": training.batch,
        "dtype": name,
        "median_ms": interleaved(steps, rounds=options.rounds, seconds=0),
        "peak_gib": peaks,
        "gflop": gflop,
        "peak_gflops": gflops,
        "floor_ms": 1e3 * gflop / gflops,
    }
    before = [other for other in (load(result) or {"runs": []})["runs"] if other["batch"] == training.batch]
    runs = {other["dtype"]: other for other in (*before, run)}
    rows = {
        "gradient_differences": differences,
        "encode": training.encode(),
        "runs": [runs[name] for name in DTYPES if name in runs],
    }
    print(json.dumps(run), save(result, rows))


@float32_matmuls(DEVICE, fast=True)  # as in mvar train
def main() -> None:
    parser = argument_parser(__doc__)
    on_cpu = DEVICE.type == "cpu"
    parser.add_argument("--depth", type=int, default=1 if REHEARSAL else 4 if on_cpu else 16)
    parser.add_argument("--batch", type=int, default=2 if on_cpu else 24)  # eager, 64 of 78 GiB
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="added to those that this machine and commit have"
    )
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which takes a minute to compile")
    options = parser.parse_args()
    set_allocator()
    if len(options.dtypes) == 1:
        measure(options)
        return
    # Each in a process of its own: this one would keep the memory of a step, 10 GB for d16.
    sizes = [f"--{name}={getattr(options, name)}" for name in ("depth", "batch", "rounds")]
    for dtype in options.dtypes:
        arguments = [*sizes, "--dtypes", dtype, *["--eager"] * options.eager]
        subprocess.run([sys.executable, "-m", "benchmarks.bench_training_step", *arguments], check=True)


if __name__ == "__main__":
    main()
