"""Every Triton kernel, compiled for the GPUs it is meant for: no spills, within the memory, on the tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mvar_kernels.ops.adaln.op import _ADALN, _GATED
from mvar_kernels.ops.mamba2 import mixer, scan
from mvar_kernels.ops.sample_tokens.op import _SAMPLE, _SOFT
from mvar_kernels.ops.scale_attention import op as attention

pytest.importorskip("triton")
OPS = [op.name for op in (_ADALN, _GATED, attention._OP, mixer._OP, scan._OP, _SAMPLE, _SOFT) if "triton" in op.modules]

# Registers that do not fit, in bytes of stack a thread at most: gradients of both directions of a scan at once.
KNOWN_SPILLS = {"_ssd_scan_bwd_grads_kernel": 256}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_kernels_compile_and_fit(arch: str, tmp_path: Path) -> None:
    table = tmp_path / "kernels.json"
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead.py")), "--arch", arch, "--write", str(table)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert table.exists(), done.stderr
    rows = json.loads(table.read_text())["rows"]
    kernels = {row["kernel"] for row in rows}
    for row in rows:
        known = KNOWN_SPILLS.get(row["kernel"], 0) if "BOTH=True" in row["tile"] else 0
        assert row["stack_bytes"] <= known, row
    faults = [line for line in done.stdout.splitlines() if "FAULT" in line.replace("FAULT spills", "")]
    assert not faults, "\n".join(faults)
    for op in OPS:
        assert any(op in kernel for kernel in kernels), f"no kernel of {op} was compiled"
