"""What holds the memory of a training step: `python -m benchmarks.bench_training_memory`.

Sizes of the tensors of M-VAR at 256×256, and the peak memory of each part of a step, with and without `--recompute`
and `--opt adamw8bit`; with --rounds the times of both instead. Every case runs in a process of its own. A part's peak
includes all that is held meanwhile. On a CPU it is the process's, with the free memory that glibc keeps; in the cases
"mmap", allocations of 1 MiB and more are returned as soon as they are freed, as with MALLOC_MMAP_THRESHOLD_=1048576.
"""

import ctypes
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.baselines.eager_training import OURS
from benchmarks.bench_training_step import DTYPES, TrainingStep
from benchmarks.common.environment import DEVICE, REHEARSAL, argument_parser, set_allocator
from benchmarks.common.markdown import table
from benchmarks.common.memory import in_subprocess, peak_gib
from benchmarks.common.results import save
from benchmarks.common.timing import interleaved
from mvar.train.distributed import checkpoint_activations
from mvar.train.optimizer import adamw8bit
from mvar_kernels.precision import float32_matmuls

M_MMAP_THRESHOLD, MMAP_BYTES = -3, 2**20  # mallopt's number of the setting; see malloc.h


class Case(NamedTuple):
    dtype: str
    recompute: bool
    opt: str
    mmap: bool = False

    def __str__(self) -> str:
        options = {"recompute": self.recompute, self.opt: self.opt != "adamw", "mmap": self.mmap}
        return ", ".join([self.dtype, *(name for name, given in options.items() if given)])


CASES = [
    Case(dtype, recompute, opt) for dtype in DTYPES for opt in ("adamw", "adamw8bit") for recompute in (False, True)
]
CASES += [Case("float32", False, "adamw", mmap=True), Case("float32", True, "adamw8bit", mmap=True)]


def tensors_gib(tensors: Iterable[Tensor]) -> float:
    """Memory of the tensors; those that share it are counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) / 2**30


@float32_matmuls(DEVICE, fast=True)  # as in mvar train
def measure(depth: int, batch: int, case: Case) -> dict[str, float]:
    """GiB in the second step: the first makes the optimizer's state, and compiles."""
    if case.mmap:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
    before = peak_gib(lambda: None)
    training = TrainingStep(depth, batch, opt=case.opt)
    if case.recompute:
        checkpoint_activations(training.model.typed_blocks())
    dtype, parameters = getattr(torch, case.dtype), list(training.model.parameters())
    training.step(OURS, dtype)
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[str, float] = {}
    saved: list[Tensor] = []
    loss: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.append(tensor.detach())
        return tensor

    def forward() -> None:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss.append(training.loss(OURS, dtype))

    def backward() -> None:
        training.stepper.backward(loss.pop())

    peaks = {"peak of the forward pass": peak_gib(forward)}
    activations = tensors_gib(saved)
    saved.clear()
    peaks["peak of the backward pass"] = peak_gib(backward)
    sizes["process before the model"] = before
    sizes["tokenizer"] = tensors_gib(training.tokenizer.parameters())
    sizes["weights"] = tensors_gib(parameters)
    sizes["gradients"] = tensors_gib(p.grad for p in parameters if p.grad is not None)
    sizes["moments"] = tensors_gib(
        value
        for state in training.stepper.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.dim()
    )
    sizes["sum"] = sum(sizes.values())
    sizes["activations at the end of the forward pass"] = activations
    peaks["peak of the optimizer step"] = peak_gib(training.optimize)
    return sizes | peaks | {"peak": max(peaks.values()), "peak beyond the sum": max(peaks.values()) - sizes["sum"]}


@float32_matmuls(DEVICE, fast=True)
def times(depth: int, batch: int, dtype: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of forward and backward pass, without and with recomputation, and of the optimizers."""
    training = TrainingStep(depth, batch)
    blocks, optimizers = training.model.typed_blocks(), [training.stepper.optimizer, adamw8bit(training.model)]

    def passes(recompute: bool) -> None:
        training.model.zero_grad()
        if recompute:
            checkpoint_activations(blocks)
        try:
            training.stepper.backward(training.loss(OURS, getattr(torch, dtype)))
        finally:
            for block in blocks if recompute else ():
                del block.forward  # the one of the instance

    runs: dict[str, Callable[[], Any]] = {
        "forward and backward": partial(passes, False),
        "with recomputation": partial(passes, True),
    }
    runs |= {name: optimizer.step for name, optimizer in zip(("adamw", "adamw8bit"), optimizers, strict=True)}
    for run in runs.values():
        run()
    return interleaved(runs, rounds=rounds, seconds=0, warm_up=False)


def report(results: dict[str, dict[str, float]]) -> str:
    names = next(iter(results.values()))
    return table(("GiB", *results), [(name, *(f"{of[name]:.2f}" for of in results.values())) for name in names])


def main(run: Callable[..., dict[str, float]] = in_subprocess) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--depth", type=int, default=1 if REHEARSAL else 16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cases", nargs="+", type=int, help=f"numbers from 0 to {len(CASES) - 1}", default=())
    parser.add_argument("--rounds", type=int, default=0, help="measure times, the median of so many")
    options = parser.parse_args()
    if options.rounds:
        set_allocator()
        for dtype in DTYPES:
            print(dtype, times(options.depth, options.batch, dtype, options.rounds), flush=True)
        return
    results: dict[str, dict[str, float]] = {}
    for case in [CASES[i] for i in options.cases] or CASES:
        if case.mmap and DEVICE.type != "cpu":
            continue
        results[str(case)] = run(measure, options.depth, options.batch, case)
        print(case, results[str(case)], flush=True)
        path = save(f"memory_d{options.depth}", {"batch": options.batch, "gib": results})
    print(report(results), path, sep="\n")


if __name__ == "__main__":
    main()
