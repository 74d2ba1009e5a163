"""Tests of the log and the checkpoints of a training run on disk, including damaged and missing files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mvar.cli.main import main
from mvar.data import tensor_source
from mvar.train.lock import locked
from mvar.train.metrics import MetricLogger
from mvar.utils.distributed import DistContext
from tests.helpers import training

pytestmark = pytest.mark.slow


def make_logger(out: Path, iteration: int = 0, tensorboard: bool = False) -> MetricLogger:
    return MetricLogger(out, True, tensorboard=tensorboard, name="run", iteration=iteration, total=22)


class FullWriter:
    """A TensorBoard `SummaryWriter` on a full disk."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def add_scalar(self, *_: object) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise OSError(28, "No space left on device")


def test_full_disk_disables_logging_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=FullWriter))
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    logger = make_logger(tmp_path, tensorboard=True)
    logger.log(1, {"loss": 1.0}, 1.0)
    logger.row(2, {"loss": 1.0})
    logger.close()
    assert capsys.readouterr().out.count("No space left on device; training continues") == 1


def test_tensorboard_startup_failure_disables_tensorboard_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=raise_no_space))
    logger = make_logger(tmp_path, tensorboard=True)
    logger.log(1, {"loss": 1.0}, 1.0)
    logger.close()
    assert capsys.readouterr().out.count("No space left on device; training continues") == 1
    assert (tmp_path / "log.jsonl").read_text().count("loss") == 1


def save_checkpoints(out: Path, *iterations: int) -> None:
    """Write untrained checkpoints for the given iterations."""
    run = training.trainer(training.flags(out))
    for run.iteration in iterations:
        run._save()


def test_only_own_temporary_folders_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".nfs0001").write_text("another's")
    save_checkpoints(tmp_path, 8)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [".nfs0001", "00000008"]


def test_resume_requires_same_tokenizer_and_data(tmp_path: Path) -> None:
    save_checkpoints(tmp_path, 8)
    tokenizer, train, _ = training.data()
    codes = tokenizer.quantize.embedding.weight.data
    before = codes.clone()
    codes[0, 0] += 1
    try:
        with pytest.raises(ValueError, match="the tokenizer's weights: the run in .* has .*, not .*; keep it, or"):
            training.trainer(training.flags(tmp_path)).resume()
    finally:
        codes.copy_(before)
    run = training.trainer(training.flags(tmp_path))
    assert run.resume()
    labels = torch.arange(len(train)) % 10
    run = training.trainer(training.flags(tmp_path), source=tensor_source(torch.zeros(len(train), 30).long(), labels))
    with pytest.raises(ValueError, match="the training items' names: the run in"):
        run.resume()


def test_non_finite_values_are_logged_as_null(tmp_path: Path) -> None:
    make_logger(tmp_path).log(1, {"loss": float("nan"), "gradient_norm": float("inf"), "epoch": 0.5}, 1.0)
    row = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)
    assert (row["loss"], row["gradient_norm"], row["epoch"]) == (None, None, 0.5)


def test_log_is_truncated_to_the_resumed_iteration(tmp_path: Path) -> None:
    first = make_logger(tmp_path)
    for iteration in range(1, 6):
        first.row(iteration, {"loss": 1.0})
    log = tmp_path / "log.jsonl"
    with log.open("a") as stream:
        stream.write('{"iteration": 2, "lo')  # an incomplete line, as left by SIGKILL
    second = make_logger(tmp_path, iteration=3)
    second.row(4, {"loss": 2.0})
    assert [json.loads(line)["iteration"] for line in log.read_text().splitlines()] == [1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_damaged_checkpoint_error_names_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_checkpoints(tmp_path, 8, 16)
    files = sorted((tmp_path / "checkpoints").glob("*/*.safetensors"))
    files[1].write_bytes(files[1].read_bytes()[:-1000])
    run = training.trainer(training.flags(tmp_path))
    assert run.resume() and run.iteration == 8
    out = "".join(capfd.readouterr())
    assert out.count("\n") == 1 and f"{files[1].parent}: cannot be used: {files[1].name}: truncated or damaged" in out
    assert "trying the previous one" in out
    files[0].write_bytes(b"\xff" * 1000)
    with pytest.raises(OSError, match=f"{files[0].name}: truncated .* no other checkpoint: delete .* another --out"):
        training.trainer(training.flags(tmp_path)).resume()
    assert "Traceback" not in "".join(capfd.readouterr())


HOLD_LOCK = """
import sys, time
from pathlib import Path
from mvar.utils.distributed import DistContext
from mvar.train.lock import locked
with locked(Path(sys.argv[1]), DistContext()):
    print(flush=True)
    time.sleep(600)
"""


def test_folder_is_locked_by_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path, DistContext()):  # released on exit
        pass
    other = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"\n"
    try:
        with pytest.raises(SystemExit):
            main(["train", *training.arguments(tmp_path)])
        message = f"--out: {tmp_path} is in use by process {other.pid} on {os.uname().nodename}; wait until it ends, or"
        assert message in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with locked(tmp_path, DistContext()):  # the lock of a killed process does not persist
        pass


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{}", "missing, or not of type"),
        ("[]", "not an object"),
        ('{"iteration": 16}', "missing, or not of type"),
    ],
)
def test_checkpoint_with_missing_state_keys_is_skipped(
    content: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoints(tmp_path, 8, 16)
    (tmp_path / "checkpoints" / "00000016" / "state.json").write_text(content)
    run = training.trainer(training.flags(tmp_path))
    assert run.resume() and run.iteration == 8
    out = capsys.readouterr().out
    assert "state.json: cannot be used: " in out and problem in out


def test_checkpoint_is_synced_before_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    fsync, rename = os.fsync, Path.rename

    def record(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def rename_after_sync(aside: Path, target: Path) -> Path:
        assert {*aside.iterdir(), aside, aside.parent} <= set(synced)
        synced.clear()
        return rename(aside, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", rename_after_sync)
    save_checkpoints(tmp_path, 8)
    assert synced == [tmp_path / "checkpoints"]  # the folder is synced after the rename
