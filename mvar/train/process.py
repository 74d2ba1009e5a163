"""The state of a process while it trains."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from mvar.data.order import MAX_WORD
from mvar.train.distributed import TrainContext, init_training
from mvar.train.lock import locked
from mvar.train.run_flags import RunFlags, require
from mvar.train.tensorboard import summary_writer
from mvar_kernels.precision import float32_matmuls


@contextmanager
def training_process(device: str | None) -> Iterator[TrainContext]:
    """The process group of a training; torch's settings as training needs them, restored at the end.

    Raises as :func:`mvar.utils.distributed.init_distributed`.
    """
    with (
        init_training(device) as context,
        _cpu_as_default_device(),
        torch.inference_mode(False),
        torch.random.fork_rng(devices=[]),  # modules draw from the global generator before they are initialized
    ):
        yield context


@contextmanager
def running(flags: RunFlags, context: TrainContext) -> Iterator[None]:
    """Lock --out, and run float32 matmuls as --tf32 says. Collective: every process calls it."""
    with locked(Path(flags.out), context), float32_matmuls(context.device, fast=flags.tf32):
        yield
        context.barrier()


def run_seed(flags: RunFlags, context: TrainContext) -> int:
    """--seed, or a new one: the same in all processes. Collective."""
    return context.broadcast(int.from_bytes(os.urandom(4), "little") if flags.seed is None else flags.seed)


def check_run(flags: RunFlags, context: TrainContext) -> None:
    """Check --seed, --bs and --tb. Raises ValueError for a flag, ImportError for TensorBoard that is not installed."""
    if flags.seed is not None:
        require(0 <= flags.seed <= MAX_WORD, "seed", "a whole number from 0 to 2⁶³−1", flags.seed)
    if flags.tb:
        summary_writer()
    minimum = flags.ac * context.world_size
    require(round(flags.bs / minimum) > 0, "bs", f"at least {minimum} (--ac times the number of processes)", flags.bs)


def _cpu_as_default_device() -> AbstractContextManager[object]:
    """AdamW creates its step counters on torch's default device. No context if that is the CPU, to avoid overhead."""
    cpu = torch.device("cpu")
    return nullcontext() if torch.get_default_device() == cpu else cpu
