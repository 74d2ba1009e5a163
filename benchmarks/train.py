"""A training step, ours beside eager PyTorch and torch.compile: `python -m benchmarks.train`.

Forward, loss, backward, clipping and fused AdamW of M-VAR at 256×256, on random tokens, without drops; the sides share
weights, optimizer and autocast. Before anything is timed gradients must agree in float32. What the encoder adds to
a step that starts from pictures is timed by itself.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import mvar
from benchmarks import plain
from benchmarks.measure import DEVICE, REHEARSAL, interleaved, kept, require_allocator, write
from benchmarks.memory import in_a_process_of_its_own, peak_gib
from benchmarks.products import best_tflops
from benchmarks.sides import random_pair
from mvar.config import HEAD_DIM
from mvar.train.metrics import flops_per_image
from mvar.train.objective import Objective
from mvar.train.optimizer import Stepper, adamw
from mvar_kernels.precision import float32_matmuls

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(labels, inputs, tokens) → the mean loss"""

SIDES = OURS, EAGER, COMPILED = "mvar", "eager PyTorch", "torch.compile"
DTYPES = ("float32", "bfloat16")
COMPARED = 2  # rows whose gradients are compared
LEAST = 1e-4  # of the largest gradient's norm: what a smaller one, a query bias's sum that cancels, is compared with
AGREE = 1e-3  # of a gradient's norm, float32: sums in other orders over some ten thousand terms


def sides(model: mvar.MVAR) -> dict[str, Loss]:
    objective = Objective(model)

    def ours(labels: Tensor, inputs: Tensor, tokens: Tensor) -> Tensor:
        return objective(labels, inputs, tokens).loss

    def theirs(block: plain.RunBlock, loss: Callable[..., Tensor]) -> Loss:
        return lambda labels, inputs, tokens: loss(
            model, *plain.features(model, labels, inputs, run_block=block), tokens
        )

    # One graph for all blocks and one for head and loss, as large trainers compile: minutes less than one for all.
    compiled = theirs(torch.compile(plain.block), torch.compile(plain.loss))
    return {OURS: ours, EAGER: theirs(plain.block, plain.loss), COMPILED: compiled}


class Steps:
    """A model, a batch, an optimizer, and a step of each side. blocks: fewer than the depth, which sets the width."""

    def __init__(self, depth: int, batch: int, blocks: int | None = None) -> None:
        model, tokenizer = random_pair(
            blocks or depth, 256, "mvar", width=HEAD_DIM * depth, label_drop=0.0, drop_path=0.0, qk_norm=False
        )
        assert isinstance(model, mvar.MVAR)
        self.model, self.tokenizer, self.batch = model.train(), tokenizer.cpu(), batch
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.num_codes, (batch, model.config.num_tokens), generator=generator)
        labels = torch.randint(model.config.num_classes, (batch,), generator=generator)
        inputs = self.tokenizer.teacher_forcing_inputs(tokens)
        self.data = [value.to(DEVICE) for value in (labels, inputs, tokens)]
        self.stepper = Stepper(adamw(self.model), DEVICE, clip=2.0, float16=False, average=0.0)
        self.sides = sides(self.model)

    def step(self, side: str, dtype: torch.dtype) -> None:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = self.sides[side](*self.data)
        self.stepper.backward(loss)
        self.stepper.step(learning_rate=1e-6, weight_decay=0.05)

    def peak(self, side: str, dtype: torch.dtype) -> float:
        """GiB of a step after the first, which compiles and makes the optimizer's state."""
        self.step(side, dtype)
        return peak_gib(lambda: self.step(side, dtype))

    @float32_matmuls(DEVICE, fast=DEVICE.type == "cpu")
    def gradient_differences(self) -> dict[str, float]:
        """The largest, over the weights, of the difference to the eager side's gradient, relative to its norm.

        Of a few rows of the batch, for which a GPU has memory in float32 with the activations of all blocks.
        In true float32: TF32 products, which steps on a GPU have, would be what differs.
        """
        names, parameters = zip(*self.model.named_parameters(), strict=True)

        def gradients(side: str) -> tuple[Tensor, ...]:
            return torch.autograd.grad(self.sides[side](*(value[:COMPARED] for value in self.data)), parameters)

        right = gradients(EAGER)
        least = LEAST * max(float(g.norm()) for g in right)
        worst = {
            side: max(
                (float((a - b).norm()) / max(float(b.norm()), least), name)
                for a, b, name in zip(gradients(side), right, names, strict=True)
            )
            for side in self.sides
            if side != EAGER
        }
        if wrong := {side: at for side, at in worst.items() if at[0] > AGREE}:
            raise SystemExit(f"gradients differ from eager PyTorch's by more than {AGREE}: {wrong}")
        return {side: difference for side, (difference, _) in worst.items()}


@float32_matmuls(DEVICE, fast=True)  # as mvar train has them
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cpu = DEVICE.type == "cpu"
    parser.add_argument("--depth", type=int, default=1 if REHEARSAL else 4 if on_cpu else 16)
    parser.add_argument("--batch", type=int, default=2 if on_cpu else 24)  # eager, 64 of 78 GiB
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="added to those that this machine and commit have"
    )
    parser.add_argument("--untimed", action="store_true", help="only fill the caches of compiled code on disk")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which takes a minute to compile")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = ["--depth", str(options.depth), "--batch", str(options.batch)]
    if options.memory_of:
        print(Steps(options.depth, options.batch).peak(options.memory_of, getattr(torch, options.dtypes[0])))
        return
    if options.untimed:
        compile_ahead(Steps(options.depth, options.batch, blocks=1), options.dtypes)
        return
    require_allocator()
    if len(options.dtypes) == 1:
        measure(options, sizes)
        return
    # Each in a process of its own: what one step of d16 takes, 10 GB, this one would keep.
    for dtype in options.dtypes:
        command = [sys.executable, "-m", "benchmarks.train", *sizes, "--rounds", str(options.rounds), "--dtypes", dtype]
        command += ["--eager"] * options.eager
        subprocess.run(command, check=True)


def measure(options: argparse.Namespace, sizes: list[str]) -> None:
    """Memory and time of every side in one dtype; beside them the least time of the matrix products alone."""
    (name,) = options.dtypes
    dtype, result = getattr(torch, name), f"train_d{options.depth}"
    peaks: dict[str, float] = {}
    if DEVICE.type == "cpu":  # first, in processes of their own, while this one holds next to nothing
        own = partial(in_a_process_of_its_own, "benchmarks.train", *sizes, "--dtypes", name, "--memory-of")
        peaks = {side: own(side) for side in SIDES if not (options.eager and side == COMPILED)}
    steps = Steps(options.depth, options.batch)
    if options.eager:
        del steps.sides[COMPILED]
    differences = steps.gradient_differences()
    print(f"gradients agree: {differences}", flush=True)
    peaks = peaks or {side: steps.peak(side, dtype) for side in steps.sides}
    timed = interleaved({s: partial(steps.step, s, dtype) for s in steps.sides}, rounds=options.rounds, seconds=0)
    gflop = steps.batch * flops_per_image(steps.model) / 1e9
    rate = 1e3 * best_tflops(dtype)[0]
    run = {
        "batch": steps.batch,
        "dtype": name,
        "median_ms": timed,
        "peak_gib": peaks,
        "gflop": gflop,
        "peak_gflops": rate,
        "floor_ms": 1e3 * gflop / rate,
    }
    before = [other for other in (kept(result) or {"runs": []})["runs"] if other["batch"] == steps.batch]
    runs = {other["dtype"]: other for other in (*before, run)}
    rows = {
        "gradient_differences": differences,
        "encode": encode(steps),
        "runs": [runs[name] for name in DTYPES if name in runs],
    }
    print(json.dumps(run), write(result, rows))


def compile_ahead(steps: Steps, dtypes: Sequence[str]) -> None:
    """What the sides have compiled, which is the same for every block, beside other work."""
    steps.gradient_differences()
    for side in SIDES:
        for name in dtypes:
            steps.step(side, getattr(torch, name))


def encode(steps: Steps) -> dict[str, float]:
    """Milliseconds for the batch's pictures to become tokens, with the published tokenizer's sizes, float32."""
    tokenizer, side = steps.tokenizer.to(DEVICE), steps.tokenizer.resolution
    images = torch.rand(steps.batch, 3, side, side, device=DEVICE) * 2 - 1
    return interleaved({"encoder": lambda: tokenizer.encode(images)}, rounds=2, seconds=0)


if __name__ == "__main__":
    main()
