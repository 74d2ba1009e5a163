"""Tests the GPU check and benchmark stages: isolation of steps, results after an interruption, and output."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_ops, gpu_bench, gpu_check, tune_triton
from benchmarks.analysis import roofline
from benchmarks.baselines import third_party
from benchmarks.common import environment, kernel_cache, op_calls, processes, results
from benchmarks.common.processes import Step, run_step, run_steps
from mvar.check.jobs import Job
from mvar.check.plan import read
from mvar_kernels.testing.registry import SPECS
from tests.kernels.test_check import STAND_IN

REHEARSED = {"MVAR_REHEARSAL": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(results.ROOT)}


def python(name: str, code: str, seconds: float = 20) -> Step:
    return Step(name, [sys.executable, "-c", code], seconds)


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOGS", tmp_path / "logs")


def test_failed_steps_do_not_affect_others(capsys: pytest.CaptureFixture[str]) -> None:
    """A step runs after one that fails and one that hangs with a child process holding its output."""
    hangs = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    begin = time.monotonic()
    plan = [python("fails", "raise SystemExit(3)"), python("hangs", hangs, 1), python("works", "print('here')")]
    assert run_steps(plan, 60, gpu_bench.MIN_SECONDS) == ["fails", "hangs"]
    assert time.monotonic() - begin < 30
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "failed (3)" in said["fails"] and " cut " in said["hangs"]
    assert " done " in said["works"] and said["works"].endswith("here")


def test_steps_without_enough_time_are_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_steps([python("long", "raise SystemExit(0)")], 1, gpu_bench.MIN_SECONDS) == ["long"]
    assert "long" in (said := capsys.readouterr().out) and "no time left" in said
    assert run_steps([python("short", "")], 60, gpu_bench.MIN_SECONDS) == []
    assert not run_step(python("cut", "import time; time.sleep(60)", 60), time.monotonic() + 1)
    assert " cut " in capsys.readouterr().out


def test_plan_has_all_ops() -> None:
    assert set(gpu_bench.OPS) == set(SPECS) > set(gpu_bench.COMPILED)
    for seconds in (gpu_bench.SECONDS, 900.0):
        assert sum(step.seconds for step in gpu_bench.plan(seconds)) == pytest.approx(seconds)


@pytest.fixture
def fake_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces the workers and the generation of gpu_check by fake ones; returns the folder with its results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in (environment, results):
        monkeypatch.setattr(module, "REHEARSAL", True)
    worker = (sys.executable, "-c", STAND_IN)
    jobs = [Job("adaln", "cpu", "float32", ["odd", "crash", "one_token"], command=worker)]
    monkeypatch.setattr(gpu_check, "plan_jobs", lambda *_: jobs)
    monkeypatch.setattr(kernel_cache, "ARCHIVE", tmp_path / "none")
    monkeypatch.setattr(gpu_check, "timed_jobs", lambda *_: [Job("adaln", "cpu", "float32", ["d16"], command=worker)])
    monkeypatch.setattr(gpu_check, "WORKER", worker)
    monkeypatch.setattr(gpu_check, "generation", lambda _: python("generation", "print('the same tokens')"))
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--seconds", "60"])
    return tmp_path / "build" / "rehearsal"


def test_check_reports_and_retries_failures(fake_check: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        gpu_check.main()
    assert exit.value.code == 1
    out = capsys.readouterr().out
    assert "60 s at most: 3 cases by 1 processes" in out
    assert "WRONG adaln cpu float32 crash: process exited with SIGSEGV" in out
    for way in ("without wgmma", "with one stage", "launch by launch"):
        assert f"adaln cpu float32 crash, {way}: process exited with SIGSEGV" in out
    assert "the same tokens" in out and "1 wrong, 0 not done" in out
    assert [row.case for row in read(fake_check / "check.jsonl")] == ["odd", "crash", "one_token"]
    assert [row.case for row in read(fake_check / "timed.jsonl")] == ["d16"]


def test_check_succeeds(fake_check: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [Job("adaln", "cpu", "float32", ["odd"], command=(sys.executable, "-c", STAND_IN))]
    monkeypatch.setattr(gpu_check, "plan_jobs", lambda *_: jobs)
    with pytest.raises(SystemExit) as exit:
        gpu_check.main()
    assert exit.value.code == 0 and "0 wrong, 0 not done" in capsys.readouterr().out


def test_killed_check_leaves_complete_rows(fake_check: Path) -> None:
    """Kills the real command after the first row; the file then has only complete lines."""
    environment = os.environ | REHEARSED
    command = [sys.executable, "-m", "benchmarks.gpu_check", "adaln"]
    process = subprocess.Popen(command, cwd=fake_check.parent.parent, env=environment, stdout=subprocess.DEVNULL)
    rows = fake_check / "check.jsonl"
    begin = time.monotonic()
    while not (rows.exists() and rows.stat().st_size) and time.monotonic() - begin < 100:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert all(row.op == "adaln" for row in read(rows)) and rows.stat().st_size


def test_stages_without_gpu_explain_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(sys, "argv", ["stage"])
    for stage in (gpu_check, gpu_bench, tune_triton):
        with pytest.raises(SystemExit, match="no CUDA device; MVAR_REHEARSAL=1 TRITON_INTERPRET=1 rehearses"):
            stage.main()


def test_only_failed(fake_check: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.undo()
    file = fake_check.parent / "all_right.jsonl"
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text("")
    monkeypatch.setattr(gpu_check, "require_gpu", lambda: None)
    monkeypatch.setattr(kernel_cache, "ARCHIVE", file / "none")
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--only-failed", str(file)])
    gpu_check.main()
    assert f"no failed cases in {file}" in capsys.readouterr().out
    for arguments in (["nonsense"], ["--only-failed", str(file.with_name("missing"))]):
        monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
        with pytest.raises(SystemExit) as exit:
            gpu_check.main()
        assert exit.value.code == 2 and arguments[-1] in capsys.readouterr().err


def test_damaged_archive_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel_cache, "ARCHIVE", tmp_path / "cache.tar.xz")
    monkeypatch.setattr(kernel_cache, "CACHE", tmp_path / "cache")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    kernel_cache.ARCHIVE.write_bytes(b"\xfd7zXZ\x00 and no more")
    kernel_cache.use_precompiled()
    assert "cannot be unpacked" in capsys.readouterr().out and "TRITON_CACHE_DIR" not in os.environ


def test_restart_after_gpu_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new process has the same flags, the remaining ops, and the failures so far."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(third_party, "FOLDER", tmp_path / "none")
    for module in (environment, results, op_calls, bench_ops):
        monkeypatch.setattr(module, "REHEARSAL", True)
    monkeypatch.setattr(bench_ops, "device_works", lambda: False)

    def lost(run: op_calls.Run, seconds: float, *, compiled: bool) -> bench_ops.Row:
        raise RuntimeError("illegal memory access")

    class Replaced(Exception):
        pass

    def replaced(path: str, arguments: list[str]) -> None:
        assert arguments[1:] == ["-m", "benchmarks.bench_ops", "adaln", "ssd_scan", "--eager", "--seconds", "0"]
        raise Replaced

    monkeypatch.setattr(bench_ops, "measure", lost)
    monkeypatch.setattr(os, "execv", replaced)
    monkeypatch.setattr(sys, "argv", ["ops", "gated_adaln", "adaln", "ssd_scan", "--eager", "--seconds", "0"])
    with pytest.raises(Replaced):
        bench_ops.main()
    assert os.environ.pop(bench_ops.FAILED).startswith("gated_adaln, one_token: RuntimeError: illegal memory access")


def test_failed_tile_does_not_stop_tuning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiles = [tune_triton.Tile({"BLOCK": size}) for size in (16, 32, 64)]

    def run() -> tuple[torch.Tensor]:
        tile = tune_triton.tiling.chosen("kernel", "class", tiles, torch.device("cpu"))
        if tile.sizes["BLOCK"] == 32:
            raise RuntimeError("out of resource: shared memory")
        return (torch.ones(3),)

    found: dict[tune_triton.Key, tune_triton.Timings] = {}
    tune_triton.compare(run, found, time.monotonic() + 60)
    (entry,) = found.values()
    assert [ms < float("inf") for ms in entry.ms] == [True, False, True]
    assert "out of resource" in capsys.readouterr().out


def test_existing_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of the same commit are kept until measured again; a failed matmul or case does not stop the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(third_party, "FOLDER", tmp_path / "none")
    for module in (environment, results):
        monkeypatch.setattr(module, "REHEARSAL", True)
    monkeypatch.setattr(op_calls, "benchmark_cases", lambda spec: spec.cases[1:2])
    monkeypatch.setattr(roofline, "matmul_tflops", lambda dtype: torch.ones(2) @ torch.ones(3))
    measured = bench_ops.measure

    def row(run: op_calls.Run, seconds: float, *, compiled: bool) -> bench_ops.Row:
        if run.backward and run.dtype == torch.bfloat16:
            raise RuntimeError("no memory")
        return measured(run, seconds, compiled=compiled)

    monkeypatch.setattr(bench_ops, "measure", row)
    monkeypatch.setattr(bench_ops, "interleaved", lambda contestants, **options: dict.fromkeys(contestants, 1.0))
    known = [{"case": name, "dtype": "float32", "pass": "forward", "known": True} for name in ("one_token", "d16")]
    results.save("adaln", known)
    monkeypatch.setattr(sys, "argv", ["ops", "adaln", "--eager"])
    with pytest.raises(SystemExit) as exit:
        bench_ops.main()
    assert "products: RuntimeError" in str(exit.value) and "one_token: RuntimeError: no memory" in str(exit.value)
    rows = {bench_ops.key(row): row for row in results.load("adaln")}
    assert "known" in rows["d16", "float32", "forward"] and len(rows) == 4
    assert {"eager", "copy", "mvar cpu"} <= set(rows["one_token", "float32", "forward"]["median_ms"])
    assert capsys.readouterr().out.count("adaln, one_token") == 3


@pytest.mark.parametrize(
    ("stage", "name", "columns"),
    [
        ("bench_ops adaln --eager --seconds 0", "adaln", {"case", "dtype", "pass", "median_ms", "wrong"}),
        ("tune_triton", "tune", {"kernel", "shape_class", "ms", "sizes", "warps", "stages"}),
    ],
)
def test_killed_stage_leaves_complete_rows(tmp_path: Path, stage: str, name: str, columns: set[str]) -> None:
    """Kills the command after the first rows; the file is valid and the package's tile table is unchanged."""
    table = tune_triton.tiling.TABLE.read_bytes()
    command = [sys.executable, "-m", *f"benchmarks.{stage}".split()]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | REHEARSED, stdout=subprocess.DEVNULL)
    rows, begin = tmp_path / "build" / "rehearsal" / f"{name}.json", time.monotonic()
    while not rows.exists() and time.monotonic() - begin < 100:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = json.loads(rows.read_text())["rows"]
    assert found and all(columns <= set(row) for row in found)
    assert tune_triton.tiling.TABLE.read_bytes() == table


def test_archive_contents(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in ("A/k.cubin", "A/k.json", "A/__grp__k.json", "A/k.ptx", "A/k.ttir", "B/m.cubin"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text(name)
    assert kernel_cache.pack(cache, tmp_path / "archive" / "cache.tar.xz") == 2
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "own.cubin").write_text("own")
    assert kernel_cache.unpack(tmp_path / "archive" / "cache.tar.xz", tmp_path / "there") == 2
    found = {str(path.relative_to(tmp_path / "there")) for path in (tmp_path / "there").rglob("*") if path.is_file()}
    assert found == {"own.cubin", "A/k.cubin", "A/k.json", "A/__grp__k.json", "B/m.cubin"}
    assert (tmp_path / "there" / "A" / "k.json").read_text() == "A/k.json"


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (lambda i: torch.ones(3), None),
        (lambda i: torch.ones(3) * (1 + 2**-7), None),
        (lambda i: torch.ones(3) + i, "another answer in launch 2"),
        (lambda i: torch.ones(3) * 1.1, "off from the first tile's answer by 1.0e-01"),
        (lambda i: torch.ones(3) * torch.nan, "another answer in launch 2"),
        (lambda i: torch.ones(3, dtype=torch.int64) * 2, "another answer than the first tile's"),
    ],
)
def test_tile_outputs_match_first_tile(answers: Any, said: str | None) -> None:
    calls = iter(range(100))
    got = tune_triton.fault(lambda: (answers(next(calls)),), (torch.ones(3).to(answers(0).dtype),))
    assert got is None if said is None else got is not None and got.startswith(said)
