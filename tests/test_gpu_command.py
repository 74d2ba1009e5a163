"""`make gpu`: what one step does to the others, and that it forgets no op."""

import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import Step
from mvar_kernels.catalogue import SPECS

DONE = Step("report", [sys.executable, "-c", "print('tables')"], 20)


def python(name: str, code: str, seconds: float = 20) -> Step:
    return Step(name, [sys.executable, "-c", code], seconds)


def test_a_step_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One fails, one hangs with a child that holds its output, and one is not there; those after them run."""
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    hangs = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    plan = [[python("fails", "raise SystemExit(3)"), python("hangs", hangs, 1)], [python("works", "print('here')")]]
    begin = time.monotonic()
    assert not gpu.run(iter(plan), DONE, tmp_path / "all.txt")
    assert time.monotonic() - begin < 30
    said = {line.split()[0]: line for line in (tmp_path / "all.txt").read_text().splitlines()}
    assert "failed (3)" in said["fails"] and " cut " in said["hangs"]
    assert " done " in said["works"] and said["works"].endswith("here") and said["report"].endswith("tables")


def test_time_is_kept_for_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    plan = [[python("long", "import time; time.sleep(60)", 60)]]
    assert not gpu.run(iter(plan), DONE, tmp_path / "all.txt", seconds=DONE.seconds + 1)
    assert (tmp_path / "all.txt").read_text().splitlines()[-1].endswith("tables")
    assert gpu.run(iter([]), DONE, tmp_path / "all.txt")


def test_no_op_is_forgotten() -> None:
    assert set(gpu.OPS) == set(SPECS)
    assert all(any(part in op for line in gpu.CONTRACT for part in line.split(" or ")) for op in SPECS)
