"""What a run leaves on disk, and what it finds there: its log and its checkpoints, whatever happened to them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mvar.train.metrics import Reporter


def reporter(out: Path, done: int = 0, tensorboard: bool = False) -> Reporter:
    return Reporter(out, True, tensorboard=tensorboard, name="run", done=done, total=22)


class FullWriter:
    """TensorBoard's on a full disk."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def add_scalar(self, *_: object) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_costs_the_log_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=FullWriter))
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    full = reporter(tmp_path, tensorboard=True)
    full.tell(1, {"loss": 1.0}, 1.0)
    full.row(2, {"loss": 1.0})
    full.close()
    assert capsys.readouterr().out.count("No space left on device; training goes on") == 1
