"""What a benchmark's figures are and what stands beside them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import environment, memory, results, timing
from mvar.utils import machine


def test_latencies_are_of_every_round_and_medians_of_those(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_gpu_has_work_before_the_clock_of_several_calls_starts(
    monkeypatch: pytest.MonkeyPatch, calls: int, order: str
) -> None:
    """So what the host takes to queue the first of them is not timed; one call fills a turn, and is not doubled."""
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


def test_a_commit_with_changed_code_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_other_sources_are_another_machine_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no git to say so."""
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


def test_without_git_a_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the files, as it travels to a GPU, on a machine with git and on one without."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results._commit() == "unknown, maybe with changes"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results._commit() == "unknown, maybe with changes"


def test_cpus_of_one_name_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rented machines call Zen 3 and Zen 5 the same; and what hides AMX from oneDNN makes other figures."""
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
    facts.clear()  # a system that does not tell
    assert results.device_name()


def test_a_command_restarts_once_with_the_allocator_settings(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_process_of_its_own_returns_a_result_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is without the settings for timing, which this process keeps."""
    monkeypatch.setenv("MALLOC_TOP_PAD_", "268435456")
    assert memory.in_subprocess(os.getenv, "MALLOC_TOP_PAD_", "none") == "none" and os.environ["MALLOC_TOP_PAD_"]
    with pytest.raises(RuntimeError, match="_exit: exit code 3"):
        memory.in_subprocess(os._exit, 3)
