"""Compile the Triton kernels for a GPU machine ahead of time: `PYTHON -m benchmarks.precompile`.

PYTHON: an interpreter of the GPU machine's version, with its version of Triton and any torch, numpy and mvar's other
dependencies; Triton's cache keys follow from these, the kernels' sources and the architecture, and need no GPU.
Compiled are all kernels of the contract (three dtypes, three layouts), of the benchmarks (every tile in bfloat16) and
of the third-party packages that were fetched (every configuration that they try), with the C launcher of each
signature. What a launch reads of them goes into an archive (common/kernel_cache.py), to be copied with the repository
at the same commit.
"""

import ctypes
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import third_party
from benchmarks.baselines.ops import BASELINES
from benchmarks.common.environment import argument_parser
from benchmarks.common.kernel_cache import ARCHIVE, CACHE, pack
from benchmarks.common.limits import first_line
from mvar.check.plan import DTYPES
from mvar_kernels.testing.registry import SPECS
from tests.kernels import compile_ahead

MULTIPROCESSORS = 132  # of an H100: sizes of third-party kernels depend on it


def compile_ours(op: str, arch: str, dtype: str) -> int:
    """Compile the op's kernels for all cases and layouts; in bfloat16 also every tile of its benchmarks."""
    spec, found, torch_dtype = SPECS[op], dict[str, Any](), getattr(torch, dtype)
    plans = [((*spec.bench_cuda, *spec.cases), {"every_tile": False, "layouts": True})]
    if dtype == "bfloat16":
        plans.append((spec.bench_cuda, {"every_tile": True, "layouts": False}))
    with compile_ahead.inputs_allowed():
        for cases, options in plans:
            found |= compile_ahead.compile_op(spec, cases, torch_dtype, arch, **options)
    build_launchers(found)
    return len(found)


def compile_third_party(op: str, arch: str, dtype: str) -> int:
    """Compile the third-party kernels for the op's benchmarks."""
    third_party.add_to_path()
    third_party.load()  # before there is a driver that cannot be asked for its GPU
    pretend_gpu()
    spec, found = SPECS[op], dict[str, Any]()
    for case, baseline in itertools.product(spec.bench_cuda, BASELINES[op].values()):
        inputs = compile_ahead.inputs_of(spec, case, getattr(torch, dtype))
        if baseline.third_party and baseline.supports is not None and baseline.supports(inputs, case):
            with compile_ahead.compiling(arch, 0, found):
                compile_ahead.run_case(spec, inputs, lambda t, run=baseline.run, case=case: run(t, case))  # type: ignore[misc]
    build_launchers(found)
    return len(found)


def pretend_gpu() -> None:
    """Answer, for the rest of this process, what third-party code asks torch before a launch."""
    properties = types.SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    torch.cuda.device = lambda index: nullcontext()  # type: ignore[assignment, misc, return-value]
    torch.cuda.get_device_properties = lambda device=None: properties  # type: ignore[assignment, return-value]


def build_launchers(found: Mapping[str, Any]) -> None:
    """Build what a first launch builds by the C compiler: Triton's module for the driver, and each kernel's launcher.

    In a process of its own: they are linked with an empty library instead of the driver's, and loaded.
    """
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime.driver import driver as runtime

    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        command = ["gcc", "-shared", f"-Wl,-soname,{library.name}", "-o", str(library), "-x", "c", os.devnull]
        subprocess.run(command, check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        sys.setdlopenflags(os.RTLD_LAZY)  # its functions are missing, and none is called
        ctypes.CDLL(str(library))
        runtime.active.utils = nvidia.CudaUtils()
        for compiled in found.values():
            nvidia.CudaLauncher(compiled.src, compiled.metadata)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--arch", default="sm_90", help="(default: sm_90)")
    parser.add_argument("ops", nargs="*", metavar="op", help="(default: all)")
    options = parser.parse_args()
    if unwanted := [name for name in os.environ if name.startswith("TRITON_")]:
        parser.error(f"unset {', '.join(unwanted)}: these change what is compiled, or for which GPU")
    start, ops = time.monotonic(), options.ops or list(SPECS)
    shutil.rmtree(CACHE, ignore_errors=True)
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    third_party.add_to_path()
    with_third_party = [op for op in ops if any(each.third_party for each in BASELINES.get(op, {}).values())]
    tasks = [(compile_third_party, op, "bfloat16") for op in with_third_party if third_party.FOLDER.is_dir()]
    tasks += [(compile_ours, op, dtype) for dtype in DTYPES for op in ops]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {pool.submit(work, op, options.arch, dtype): (work, op, dtype) for work, op, dtype in tasks}
        failed = 0
        for done in as_completed(running):
            work, op, dtype = running[done]
            try:
                result = f"{done.result()} kernels"
            except Exception as error:  # what the others compile goes into the archive
                result, failed = first_line(error), failed + 1
            print(f"{result}: {work.__name__}, {op}, {dtype}", flush=True)
    kernels = pack(CACHE, ARCHIVE)
    size = ARCHIVE.stat().st_size / 2**20
    print(f"{kernels} kernels, {size:.1f} MiB in {ARCHIVE}, {time.monotonic() - start:.0f} s")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
