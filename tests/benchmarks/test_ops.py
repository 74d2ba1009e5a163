"""Tests `pytest benchmarks --benchmark-only`: it collects all ops, and times one case."""

import os
import subprocess
import sys

import pytest

from benchmarks.common.results import ROOT
from mvar_kernels.testing.registry import SPECS


def test_ops_under_pytest_benchmark() -> None:
    pytest.importorskip("pytest_benchmark")

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", *arguments]
        # pytest-xdist's variables for its workers are removed. A rehearsal uses small cases.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment["MVAR_REHEARSAL"] = "1"
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout

    listed = run("--collect-only")
    assert all(f"[{op}-" in listed for op in SPECS) and "-bfloat16-cuda-backward]" in listed
    timed = run("--benchmark-only", "-k", "gated_adaln and float32 and backward and (cpu or mamba_ssm)")
    assert "1 passed, 1 skipped" in timed and "benchmark 'gated_adaln': 1 tests" in timed, timed
