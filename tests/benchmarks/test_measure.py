"""Tests timing, memory measurement and the recorded commit and machine."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import environment, memory, results, timing
from mvar.utils import machine


def test_latencies_and_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) ** 2 / 1e3)
    turns: list[str] = []
    contestants = {name: lambda name=name: turns.append(name) for name in ("one", "other")}
    times = timing.latencies(contestants, rounds=3, seconds=0, warm_up=False)
    assert turns == ["one", "other"] * 3 and [len(times[name]) for name in contestants] == [3, 3]
    assert times["one"] != times["other"] and times["one"] == sorted(times["one"])
    monkeypatch.setattr(timing, "latencies", lambda *_, **options: {"one": [3.0, 1.0, 2.0]})
    assert timing.interleaved(contestants, rounds=3, seconds=0) == {"one": 2.0}


@pytest.mark.parametrize(("calls", "order"), [(1, "event call event"), (3, "call event call call call event")])
def test_gpu_timing_order(monkeypatch: pytest.MonkeyPatch, calls: int, order: str) -> None:
    """Before timing several calls, one untimed call hides the host's launch latency; a single call has none."""
    seen: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            seen.append("event")

        def synchronize(self) -> None:
            assert seen[-1] == "event"

        def elapsed_time(self, end: "Event") -> float:
            return 6.0

    monkeypatch.setattr(timing, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert timing._ms(lambda: seen.append("call"), calls) == 6.0 / calls
    assert " ".join(seen) == order


def test_commit_with_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    model, row = "mvar/models/transformer.py", "benchmarks/results/one/ops.json"
    for name in (model, row, "benchmarks/report/ops.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "benchmarks" / "results")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    for name, changed in (("README.md", False), (row, False), (model, True)):
        (tmp_path / name).write_text("another")
        assert results._commit().endswith(" with changes") == changed
    git("checkout", "--quiet", "mvar")
    (tmp_path / "benchmarks" / "report" / "ops.py").write_text("another")
    assert results._commit().endswith(" with changes")


def test_sources_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed sources are detected without git; damaged result files are ignored."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "benchmarks" / "results")
    (tmp_path / "mvar").mkdir()
    found = set()
    for text in ("one", "other"):
        (tmp_path / "mvar" / "model.py").write_text(text)
        found.add(results._sources())
    assert len(found) == 2
    results.save("adaln", [])
    assert results.load("adaln") == []
    (results.folder() / "adaln.json").write_text('{"machine": ')
    assert results.load("adaln") is None


def test_unknown_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of a repository, on machines with and without git, the commit is unknown."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results._commit() == "unknown, maybe with changes"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results._commit() == "unknown, maybe with changes"


def test_device_name_distinguishes_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cloud machines report the same name for Zen 3 and Zen 5, and disabling AMX in oneDNN changes results."""
    facts = {"model name": "AMD EPYC", "cpu family": "25", "flags": "avx avx2"}
    monkeypatch.setattr(results, "cpuinfo", lambda: facts)
    monkeypatch.setattr(machine, "cpuinfo", lambda: facts)
    monkeypatch.setattr(results, "DEVICE", torch.device("cpu"))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert results.device_name() == "amd_epyc_family_25_avx2"
    facts |= {"cpu family": "26", "flags": "avx2 avx512f avx512_bf16"}
    assert results.device_name() == "amd_epyc_family_26_avx512"
    facts |= {"model name": "Intel(R) Xeon(R)", "cpu family": "6", "flags": "avx2 avx512f amx_tile amx_bf16"}
    assert results.device_name() == "intel_r_xeon_r_family_6_avx512_amx"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert results.device_name() == "intel_r_xeon_r_family_6_avx512_amx_onednn_up_to_avx512_core_bf16"
    facts.clear()  # no /proc/cpuinfo
    assert results.device_name()


def test_set_allocator_restarts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(environment, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(environment, "REHEARSAL", False)
    monkeypatch.setattr(os, "execve", lambda *command: started.append(command))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "benchmarks.bench_ops", "adaln"])
    for name in environment.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    environment.set_allocator()
    ((_, arguments, variables),) = started
    assert arguments == [sys.executable, "-m", "benchmarks.bench_ops", "adaln"]
    assert variables.items() >= environment.ALLOCATOR.items()
    for name, value in environment.ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    environment.set_allocator()
    assert len(started) == 1


def test_in_subprocess(monkeypatch: pytest.MonkeyPatch) -> None:
    """The subprocess does not inherit the allocator settings for timing; this process keeps them."""
    monkeypatch.setenv("MALLOC_TOP_PAD_", "268435456")
    assert memory.in_subprocess(os.getenv, "MALLOC_TOP_PAD_", "none") == "none" and os.environ["MALLOC_TOP_PAD_"]
    with pytest.raises(RuntimeError, match="_exit: exit code 3"):
        memory.in_subprocess(os._exit, 3)
