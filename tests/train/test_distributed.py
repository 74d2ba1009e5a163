"""Two processes with gloo on the CPU: the same losses as one with the whole batch, under DDP and under FSDP2."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.tensor import DTensor

from mvar.train.distributed import gradient_sync, init_training
from mvar.train.flags import Flags
from mvar.utils.distributed import local_device
from tests.helpers import training

pytestmark = pytest.mark.slow

# Dropped labels and branches, accumulated gradients, a checkpoint on the way.
RUNS = {
    "ddp": {"ac": 2, "bs": 128},
    "fsdp": {"ac": 2, "bs": 128, "fsdp": True, "recompute": True},
}


def _process(rank: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with init_training("cpu") as context:
        for name, changed in RUNS.items():
            run = training.trainer(training.flags(out / name, **changed), context)
            run.run()
            if name == "ddp":
                with gradient_sync(run.module, enabled=False):  # accumulated gradients are exchanged once
                    assert not run.module.require_backward_grad_sync
            if name == "fsdp":
                held = [p for p in run.optimizer.parameters if isinstance(p, DTensor)]
                assert len(held) == len(run.optimizer.parameters)
                assert sum(p.to_local().numel() for p in held) < 0.6 * sum(p.numel() for p in held)
            again = training.trainer(training.flags(out / name, **changed), context)
            assert again.resume() and again.iteration == run.iteration
            weights, read = run.weights(), again.weights()
            assert all(torch.equal(value, read[key]) for key, value in weights.items())
            assert bool(weights) == (rank == 0)


def test_every_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(()))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert local_device(None) == local_device("cuda") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device(None) == local_device("cuda") == torch.device("cuda:3")
    assert local_device("cuda:1") == torch.device("cuda:1") and local_device("cpu") == torch.device("cpu")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_process, (port, out), nprocs=2)
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Flags:
    flags = training.flags(tmp_path_factory.mktemp("alone"), **RUNS["ddp"])
    training.trainer(flags).run()
    return flags


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(name: str, alone: Flags, two: Path) -> None:
    one, both = training.rows(Path(alone.out)), training.rows(two / name)
    assert len(one) == len(both) == 11
    for row, other in zip(one, both, strict=True):
        for key in ("loss", "loss_scale0", "loss_last", "accuracy", "code_usage"):
            # Sums of float32 in another order; an accuracy can differ by a tie.
            assert other[key] == pytest.approx(row[key], rel=2e-4), key
        assert other["gradient_norm"] == pytest.approx(row["gradient_norm"], rel=2e-4)
    # What two processes have saved, sharded or not, one goes on with.
    again = training.trainer(replace(alone, out=str(two / name)))
    assert again.resume() and again.iteration == 22 and not dist.is_initialized()
    for key, value in again.weights().items():
        assert value.shape == again.model.state_dict()[key].shape
