"""Tests that CUDA kernels compiled for A100 and H100 do not spill and use tensor cores.

`make bench` compiles for every architecture.
"""

from pathlib import Path

import pytest

from tests.kernels import cuda_resources

pytestmark = pytest.mark.slow

ARCHITECTURES = ("sm_80", "sm_90")
SOURCES = sorted(cuda_resources.CSRC.glob("*/cuda.cu"))


@pytest.mark.skipif(cuda_resources.nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name)
def test_kernel_resources(source: Path) -> None:
    rows = cuda_resources.needs(source, ARCHITECTURES)
    assert {row.arch for row in rows} == set(ARCHITECTURES)
    assert not [row for row in rows if row.faults()]


@pytest.mark.skipif(cuda_resources.nvcc() is None, reason="needs nvcc")
def test_spill_is_reported(tmp_path: Path) -> None:
    source = tmp_path / "cuda.cu"
    source.write_text("""
        __global__ void spilling(float* data, int turns) {
          float kept[100];
          for (int i = 0; i < 100; ++i) kept[i] = data[i * turns];
          for (int turn = 0; turn < turns; ++turn) kept[turn] += kept[data[turn] > 0];
          for (int i = 0; i < 100; ++i) data[i] = kept[i];
        }
    """)
    for row in cuda_resources.needs(source, ARCHITECTURES):
        assert row.kernel == "spilling" and "spills" in row.faults()
