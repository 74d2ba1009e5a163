"""Compiled kernels for a GPU machine whose minutes are not for compiling: `PYTHON -m benchmarks.carry`.

PYTHON: an interpreter of the GPU machine's version, with its version of Triton and any torch, numpy and mvar's other
dependencies; Triton's keys follow from these, the kernels' sources and the architecture, not from a GPU. Compiled ahead
are all kernels of the contract (three dtypes, three layouts), of the benchmarks (every tile in bfloat16) and of the
other projects that were fetched (peers.py, every configuration that they try), and the C launcher of each signature.
What a launch reads of them goes into an archive (carried.py), to travel with the tree, of the same commit.
"""

import argparse
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
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import peers
from benchmarks.carried import ARCHIVE, CACHE, pack
from benchmarks.rivals import RIVALS
from mvar.check.command import DTYPES
from mvar_kernels.testing.registry import SPECS
from tests import compile_ahead

MULTIPROCESSORS = 132  # of an H100: in the other projects' kernels a size follows from it


def ours(op: str, arch: str, dtype: str) -> int:
    """Compile the op's kernels in a dtype, of all cases and layouts; in bfloat16 also every tile of its benchmarks."""
    spec, found = SPECS[op], dict[str, Any]()
    with compile_ahead.inputs_allowed():
        cases = (*spec.bench_cuda, *spec.cases)
        found |= compile_ahead.compile_op(spec, cases, getattr(torch, dtype), arch, every_tile=False, layouts=True)
        if dtype == "bfloat16":
            found |= compile_ahead.compile_op(
                spec, spec.bench_cuda, torch.bfloat16, arch, every_tile=True, layouts=False
            )
    launchers(found)
    return len(found)


def theirs(op: str, arch: str, dtype: str) -> int:
    """Compile the other projects' kernels for the op's benchmarks."""
    peers.importable()
    peers.load()  # while there is no driver that can be asked for its GPU
    spec, found = SPECS[op], dict[str, Any]()
    with seeming_gpu():
        for case, rival in itertools.product(spec.bench_cuda, RIVALS[op].values()):
            inputs = compile_ahead.inputs_of(spec, case, getattr(torch, dtype))
            if rival.peer and rival.takes is not None and rival.takes(inputs, case):
                with compile_ahead.compiling(arch, 0, found):
                    compile_ahead.run_case(spec, inputs, lambda t, run=rival.run, case=case: run(t, case))  # type: ignore[misc]
    launchers(found)
    return len(found)


@contextmanager
def seeming_gpu() -> Iterator[None]:
    """What other projects' code asks torch for on its way to a launch."""
    properties = types.SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    with (
        mock.patch.object(torch.cuda, "device", lambda index: nullcontext()),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: properties),
    ):
        yield


def launchers(found: Mapping[str, Any]) -> None:
    """Build what a first launch builds by the C compiler: Triton's module for the driver, and each kernel's launcher.

    In a process of its own: they are linked with a library in the place of the driver's, and loaded.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90", help="(default: sm_90)")
    parser.add_argument("ops", nargs="*", metavar="op", help="(default: all)")
    options = parser.parse_args()
    if unwanted := [name for name in os.environ if name.startswith("TRITON_")]:
        parser.error(f"unset {', '.join(unwanted)}: these change what is compiled, or for whom")
    start, ops = time.monotonic(), options.ops or list(SPECS)
    shutil.rmtree(CACHE, ignore_errors=True)
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    peers.importable()
    with_peers = [op for op in ops if any(rival.peer for rival in RIVALS.get(op, {}).values())]
    tasks = [(theirs, op, "bfloat16") for op in with_peers if peers.FOLDER.is_dir()]
    tasks += [(ours, op, dtype) for dtype in DTYPES for op in ops]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {pool.submit(work, op, options.arch, dtype): (work, op, dtype) for work, op, dtype in tasks}
        failed = 0
        for done in as_completed(running):
            work, op, dtype = running[done]
            try:
                what = f"{done.result()} kernels"
            except Exception as error:  # what the others compile is carried
                what, failed = f"{type(error).__name__}: {error}", failed + 1
            print(f"{what}: {work.__name__} for {op}, {dtype}", flush=True)
    kernels = pack(CACHE, ARCHIVE)
    size = ARCHIVE.stat().st_size / 2**20
    print(f"{kernels} kernels, {size:.1f} MiB in {ARCHIVE}, {time.monotonic() - start:.0f} s")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
