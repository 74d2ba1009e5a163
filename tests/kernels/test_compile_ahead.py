"""Tests that Triton kernels compiled for A100 and H100 do not spill, fit in shared memory and use tensor cores.

Each kernel is compiled with its default tile, and once only: not again for every sequence length in a generation.
`make bench` compiles every tile for every architecture: 109 to 134 s for each of them (AMD EPYC, Zen 3).
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mvar_kernels.ops.adaln.op import _ADALN, _GATED
from mvar_kernels.ops.group_norm_silu.op import _OP as _GROUP_NORM
from mvar_kernels.ops.mamba2 import mixer, scan
from mvar_kernels.ops.sample_tokens.op import _SAMPLE, _SOFT
from mvar_kernels.ops.scale_attention import op as attention
from tests.helpers.compiler import compiler_environment

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
OPS = [op.name for op in (_ADALN, _GATED, _GROUP_NORM, attention._OP, mixer._OP, scan._OP, _SAMPLE, _SOFT)]


# C and what the heads add up are in bfloat16 or in float32.
TWO_DTYPES = {"_ssd_scan_bwd_sweep_kernel", "_mamba2_mixer_bwd_conv_grads_kernel"}


def compiled(table: Path, *options: str) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    """Return the rows that compile_ahead.py writes with default tiles, and the finished process."""
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead.py")), "--tiles", "first", *options]
    command += ["--write", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, env=compiler_environment())
    assert table.exists(), done.stderr
    return json.loads(table.read_text())["rows"], done


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernel_resources(arch: str, tmp_path: Path) -> None:
    rows, done = compiled(tmp_path / "kernels.json", "--arch", arch)
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "FAULT" in line)
    again = Counter((row["kernel"], row["dtype"], row["tile"], row["warps"], row["stages"]) for row in rows)
    assert not [row for row, times in again.items() if times > 1 + (row[0] in TWO_DTYPES)]
    for op in OPS:
        assert any(op in row["kernel"] for row in rows), f"no kernel of {op} was compiled"


def test_float16_and_float32_spills(tmp_path: Path) -> None:
    """Covers the ops whose tiles depend on the dtype; bidirectional Mamba-2 kernels use the most registers."""
    ops = ("scale_attention", "ssd_scan", "mamba2_mixer")
    cases = ("d16_256_training_norm", "d16_256_training_bidirectional")
    options = ("--arch", "sm_90", "--dtypes", "float16", "float32", "--cases", *cases)
    rows, _ = compiled(tmp_path / "kernels.json", *ops, *options)
    for dtype in ("float16", "float32"):
        for op in ops:
            assert any(op in row["kernel"] and row["dtype"] == dtype for row in rows), f"none of {op} in {dtype}"
    spills = {
        f"{row['kernel']} {row['dtype']} {row['tile']}": row["stack_bytes"] for row in rows if row["stack_bytes"] > 0
    }
    assert not spills


LARGEST_STATE = """
import dataclasses, torch
from mvar_kernels.ops.mamba2.spec import MAMBA2_MIXER
from mvar_kernels.ops.mamba2.triton import LARGEST_N
from mvar_kernels.testing.spec import Case
from tests.kernels.compile_ahead import compile_op, inputs_allowed, needs
spec = dataclasses.replace(MAMBA2_MIXER, grads=())
case = Case("", {"B": 1, "L": 40, "H": 1, "P": 64, "N": LARGEST_N}, {"scales": None})
with inputs_allowed():
    found = compile_op(spec, [case], torch.bfloat16, "sm_90", every_tile=False, layouts=False)
for compiled in found.values():
    print(*needs("sm_90", torch.bfloat16, compiled).faults(), sep="\\n")
"""


def run_script(script: str, *arguments: str) -> list[str]:
    """Return the lines that a script prints in a process with Triton's compiler."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=compiler_environment(), check=True)
    return done.stdout.splitlines()


def test_largest_state_fits_in_shared_memory() -> None:
    """A kernel of so large a state may spill; with more shared memory than there is, it would not start."""
    assert not [fault for fault in run_script(LARGEST_STATE) if "shared memory" in fault]


KEYS = """
import importlib, pkgutil, sys
from triton.runtime.jit import JITFunction
for op in sys.argv[1:]:
    package = importlib.import_module(f"mvar_kernels.ops.{op}.triton")
    names = [f"{package.__name__}.{part.name}" for part in pkgutil.iter_modules(package.__path__)]
    for module in (package, *map(importlib.import_module, names)):
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                print(name, value.cache_key)
"""


def test_cache_key_is_independent_of_import_order() -> None:
    """Processes that import the ops in different orders must share one cache of compiled kernels."""
    ops = ["adaln", "scale_attention", "mamba2", "sample_tokens", "group_norm_silu"]
    orders = (ops, ops[::-1], ["mamba2"])
    found = [{tuple(line.split()) for line in run_script(KEYS, *order)} for order in orders]
    assert len(found[0]) > 20 and found[0] == found[1] > found[2] != set()
