"""Resources of every CUDA kernel, from nvcc: `python tests/kernels/cuda_resources.py [--write table.json]`.

Compiles csrc/*/cuda.cu for sm_80, sm_90 and sm_100; no GPU is needed. Exits with 1 on a spill, or if products of 16-bit
tiles do not use tensor cores.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.helpers.paths import ROOT

CSRC = ROOT / "csrc"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Matches ptxas's report of each kernel.
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Needs:
    """Resources of one kernel on one architecture: registers and stack per thread, and use of tensor cores."""

    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    tensor_cores: bool
    should_use_tensor_cores: bool

    def faults(self) -> list[str]:
        missing = self.should_use_tensor_cores and not self.tensor_cores
        return ["spills"] * (self.stack_bytes > 0) + ["no tensor cores"] * missing


def nvcc() -> str | None:
    """Return the path of nvcc, or None if it is not installed."""
    return shutil.which("nvcc")


def nvcc_version() -> str:
    said = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\S+),", said)
    return found[1] if found else "of unknown version"


def needs(source: Path, architectures: Sequence[str] = ARCHITECTURES) -> list[Needs]:
    """Return the resources of every kernel in a source file on each architecture.

    Raises RuntimeError with nvcc's output if the file does not compile.
    """
    compiler = nvcc()
    assert compiler is not None
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder)
        targets = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in architectures]
        command = [compiler, "-std=c++17", "-O3", f"-I{CSRC}", "-DMVAR_CUDA_MODULE=_cuda", "-Xptxas=-v", *targets]
        command += ["--keep", f"--keep-dir={kept}", "--threads=0", "-fatbin", "-o", str(kept / "out"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        ptx = {arch: "".join(p.read_text() for p in kept.glob(f"*compute_{arch[3:]}*.ptx")) for arch in architectures}
    return [_needs(match, ptx[match["arch"]]) for match in KERNEL.finditer(done.stderr)]


def _needs(match: re.Match[str], ptx: str) -> Needs:
    body = ptx[ptx.index(f".entry {match['name']}(") :].split(".entry ", 2)[1]
    readable = subprocess.run(["c++filt", match["name"]], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"^void |mvar::cuda::|\(anonymous namespace\)::", "", readable).split(">(")[0].split("(")[0]
    # Products of 16-bit tiles go through ldmatrix or fragments (csrc/common/cuda/tensor_core.h).
    return Needs(
        kernel=name.replace("__nv_bfloat16", "bf16").replace("__half", "f16").strip() + (">" if "<" in name else ""),
        arch=match["arch"],
        registers=int(match["registers"]),
        stack_bytes=int(match["stack"]),
        tensor_cores="mma.sync" in body,
        should_use_tensor_cores="ldmatrix" in body,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a JSON file for the table")
    options = parser.parse_args()
    if nvcc() is None:
        parser.error("no nvcc on PATH")
    table = [row for source in sorted(CSRC.glob("*/cuda.cu")) for row in needs(source)]
    table.sort(key=lambda row: (row.kernel, row.arch))
    for row in table:
        faults = "; ".join(f"FAULT {fault}" for fault in row.faults())
        print(f"{row.kernel:50s} {row.arch:6s} {row.registers:3d} registers, {row.stack_bytes} B stack {faults}")
    if options.write:
        one_a_line = ",\n".join(f"  {json.dumps(asdict(row))}" for row in table)
        options.write.write_text(f'{{\n "nvcc": "{nvcc_version()}",\n "rows": [\n{one_a_line}\n ]\n}}\n')
    return 1 if any(row.faults() for row in table) else 0


if __name__ == "__main__":
    sys.exit(main())
