"""Tests that the contract test fails for CUDA kernels with one planted fault each, run on the CPU.

Each fault is one edit of a source file; the other object files are linked unchanged.
"""

import json
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mvar_kernels.testing.registry import SPECS
from tests.helpers import cuda_on_cpu
from tests.helpers.paths import ROOT
from tests.kernels.test_contract import CUDA_ON_CPU, compare, evaluate, prepared, refusal

CSRC = ROOT / "csrc"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU plays the GPU only where there is none"),
]


@dataclass(frozen=True)
class Fault:
    """A replacement of `before` by `after` in `file`, which is the cuda.cu of the op's folder or one of its includes.

    `shows` is part of the shim's error message, or "" if the fault gives wrong results.
    """

    name: str
    folder: str
    op: str
    before: str
    after: str
    shows: str = ""
    file: str = "cuda.cu"
    dtype: torch.dtype = torch.float16


FAULTS = (
    Fault("missing_barrier", "adaln", "gated_adaln", "    __syncthreads();\n#pragma unroll", "#pragma unroll"),
    Fault("wrong_column", "adaln", "adaln", "c = Row::column(v) + i;", "c = Row::column(v) + (i ^ 1);"),
    Fault(
        "slab_off_by_one",
        "adaln",
        "adaln",
        "first + kSlabRows < n.L ? first + kSlabRows",
        "first + kSlabRows < n.L ? first + kSlabRows - 1",
    ),
    Fault(
        "shared_memory_overrun",
        "adaln",
        "gated_adaln",
        "float sums[2][kWarps][kMaxSums];",
        "float sums[2][kWarps - 1][kMaxSums];",
        "past the ends",
    ),
    Fault(
        "barrier_for_some",
        "adaln",
        "gated_adaln",
        "    __syncthreads();\n#pragma unroll",
        "    if (threadIdx.x < 64) __syncthreads();\n#pragma unroll",
        "never come",
    ),
    Fault(
        "missing_barrier",
        "scale_attention",
        "scale_attention",
        "    __syncthreads();\n    if (start + kTile < hi)",
        "    if (start + kTile < hi)",
    ),
    Fault("off_by_one", "scale_attention", "scale_attention", "key >= last", "key > last"),
    Fault("wrong_lane", "scale_attention", "scale_attention", "part + lane / 16)", "part + lane / 8 % 2)"),
    Fault(
        "copies_not_waited_for",
        "scale_attention",
        "scale_attention",
        "    wait_for_copies<0>();",
        "    wait_for_copies<1>();",
        "before its asynchronous copies were waited for",
    ),
    Fault(
        "missing_barrier",
        "sample_tokens",
        "sample_tokens",
        "memory.warps[threadIdx.x / kWarpSize] = x;\n    __syncthreads();",
        "memory.warps[threadIdx.x / kWarpSize] = x;",
    ),
    Fault(
        "off_by_one",
        "sample_tokens",
        "sample_tokens",
        "needed > before + inside[j]) continue;",
        "needed >= before + inside[j]) continue;",
    ),
    Fault("wrong_lane", "sample_tokens", "sample_tokens", "if (lane >= distance) sum", "if (lane > distance) sum"),
    Fault(
        "missing_barrier",
        "mamba2",
        "mamba2_mixer",
        "    __syncthreads();\n    from_inside(y, m);",
        "    from_inside(y, m);",
        file="cuda/chunks.h",
        dtype=torch.bfloat16,  # one part; with float16 the warps are too far apart for the race to show
    ),
    Fault("off_by_one", "mamba2", "mamba2_mixer", "score = s < t ?", "score = s <= t ?", file="cuda/chunks.h"),
    Fault(
        "wrong_lane",
        "mamba2",
        "mamba2_mixer",
        "[first_row + lane / 2 % kRowsOfLane]",
        "[first_row + lane / 4 % kRowsOfLane]",
        file="cuda/short.h",
    ),
    Fault(
        "state_row_off_by_one",
        "mamba2",
        "mamba2_mixer",
        "(l + kTaps - 1) * before_stride",
        "(l + kTaps - 2) * before_stride",
        file="cuda/common.h",
    ),
)


def planted(fault: Fault, folder: Path) -> Path:
    """Build the module with the fault and return its path."""
    cuda_on_cpu.module()
    commands = json.loads((cuda_on_cpu.BUILD / "compile_commands.json").read_text())
    source = CSRC / fault.folder / "cuda.cu"
    text = (source.parent / fault.file).read_text()
    assert text.count(fault.before) == 1, "the fault's place has changed"
    faulty = folder / fault.folder / fault.file  # `folder` comes first in the include path
    faulty.parent.mkdir(parents=True)
    faulty.write_text(text.replace(fault.before, fault.after))
    module = folder / cuda_on_cpu.build().name
    objects = []
    for entry in commands:
        words = shlex.split(entry["command"])
        output = words.index("-o") + 1
        if Path(entry["file"]).resolve() == source.resolve():
            words[output] = str(folder / "cuda.o")
            words[words.index("-O2")] = "-O0"  # compiled for one run
            if fault.file == source.name:
                words[words.index(entry["file"])] = str(faulty)
            subprocess.run([words[0], f"-I{folder}", *words[1:]], check=True, cwd=entry["directory"])
        objects.append(str(Path(entry["directory"], words[output])))
    compiler = shlex.split(commands[0]["command"])[0]
    subprocess.run([compiler, "-shared", "-o", str(module), *objects], check=True)
    return module


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.folder}-{fault.name}")
def test_planted_fault_is_noticed(fault: Fault, tmp_path: Path) -> None:
    kernels = cuda_on_cpu.load(planted(fault, tmp_path))
    spec, dtype = SPECS[fault.op], fault.dtype
    errors = []
    for case in spec.cases:
        if refusal(spec, CUDA_ON_CPU, dtype, case) is not None:
            continue
        inputs = prepared(spec, case, dtype)
        same = evaluate(spec, case, inputs, None)
        exact = evaluate(spec, case, {n: t.double() for n, t in inputs.items()}, None)
        compare(spec, case, evaluate(spec, case, inputs, CUDA_ON_CPU), same, exact)
        try:
            with cuda_on_cpu.playing(kernels):
                compare(spec, case, evaluate(spec, case, inputs, CUDA_ON_CPU), same, exact)
        except (AssertionError, RuntimeError) as error:
            errors.append(str(error))
            if fault.shows in errors[-1]:
                return
    pytest.fail(f"not noticed; answers were {errors}")
