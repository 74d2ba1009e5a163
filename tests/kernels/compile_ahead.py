"""Compile every Triton kernel for other GPUs: `python tests/kernels/compile_ahead.py [op …] [--arch sm_90 …]`.

The ops are called with CPU tensors in bfloat16 (or in --dtypes), forward and backward, on the GPU benchmark cases of
their specs (with --all, on every case and in every layout of the contract test), once for each candidate tile (with
--tiles first, once). Each launch compiles the kernel, specialized as on a GPU, and does not run it, so that all
kernels are covered without a list. Prints the resources of each kernel, and writes them to a file with --write. Exits
with 1 on a spill, on more shared memory than a block may have, or on a product of 16-bit tiles without tensor cores.

Runs in a separate process, because Triton's interpreter must be off.
"""

import argparse
import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.errors import PTXASError
from triton.runtime.jit import JITFunction

from mvar_kernels import dispatch, tiling
from mvar_kernels.dispatch import BackendError
from mvar_kernels.testing.contract import LAYOUTS
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Case, Inputs, Spec

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)")
NARROW_LOAD = re.compile(r"\bld\.global(?:\.[a-z]\w*(?:::\w+)*)*\.[bsu](?:8|16) ")
PRODUCT_OF_HALVES = re.compile(r"tt\.dot .*: tensor<\w+x(?:bf16|f16)>")


DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Architecture:
    """Limits per block and per multiprocessor (CUDA C++ programming guide, compute capabilities)."""

    capability: int
    block_shared_bytes: int
    shared_bytes: int
    registers: int = 65536
    threads: int = 2048


ARCHITECTURES = {
    "sm_80": Architecture(80, 163 * 1024, 164 * 1024),
    "sm_90": Architecture(90, 227 * 1024, 228 * 1024),
    "sm_100": Architecture(100, 227 * 1024, 228 * 1024),
}


@dataclass(frozen=True)
class Needs:
    """Resources of one compiled kernel.

    narrow_loads: number of instructions that load a single value of 16 bits or fewer from global memory. occupancy:
    theoretical share of a multiprocessor's warps that can be resident.
    """

    kernel: str
    tile: str
    dtype: str
    arch: str
    warps: int
    stages: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    narrow_loads: int
    tensor_cores: bool
    should_use_tensor_cores: bool
    occupancy: float

    def faults(self) -> list[str]:
        limit = ARCHITECTURES[self.arch].block_shared_bytes
        found = {
            f"spills: {self.stack_bytes} bytes of stack": self.stack_bytes > 0,
            f"{self.shared_bytes} bytes of shared memory, {limit} at most": self.shared_bytes > limit,
            "no tensor-core instruction": self.should_use_tensor_cores and not self.tensor_cores,
        }
        return [fault for fault, is_so in found.items() if is_so]


@dataclass(frozen=True)
class Launch:
    """A launch that was compiled and not run. arguments: by the names of the kernel's parameters."""

    compiled: Any
    arguments: dict[str, Any]
    grid: tuple[int, ...]


class CompileOnlyDriver:
    """A Triton driver for a GPU that is not present, with which kernels can only be compiled."""

    def __init__(self, arch: str) -> None:
        self.capability = ARCHITECTURES[arch].capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device, so each architecture needs its own

    def get_current_stream(self, device: int) -> int:
        return 0


def needs(arch: str, dtype: torch.dtype, compiled: Any) -> Needs:
    """Return a compiled kernel's resources, read from its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    meta, machine = compiled.metadata, ARCHITECTURES[arch]
    threads = 32 * meta.num_warps
    blocks = min(
        machine.registers // (threads * -(-registers // 8) * 8),
        machine.shared_bytes // (meta.shared + 1024),  # 1 KB per block is reserved for the system
        machine.threads // threads,
        32,
    )
    sizes = compiled.src.constants.items()
    names = compiled.src.fn.arg_names
    bound = {"maxnreg": meta.maxnreg} if meta.maxnreg else {}
    constants = {names[path[0]]: value for path, value in sizes if names[path[0]].isupper()} | bound
    tile = " ".join(f"{name}={value}" for name, value in constants.items())
    return Needs(
        kernel=meta.name,
        tile=tile,
        dtype=str(dtype).removeprefix("torch."),
        arch=arch,
        warps=meta.num_warps,
        stages=meta.num_stages,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=meta.shared,
        narrow_loads=len(NARROW_LOAD.findall(compiled.asm["ptx"])),
        tensor_cores=bool(TENSOR_CORES.search(compiled.asm["ptx"])),
        should_use_tensor_cores=bool(PRODUCT_OF_HALVES.search(compiled.asm["ttir"])),
        occupancy=blocks * threads / machine.threads,
    )


@contextlib.contextmanager
def compiling(
    arch: str, candidate: int, found: dict[str, Any], launches: list[Launch] | None = None
) -> Iterator[list[int]]:
    """Make launches compile for `arch` with the given candidate tile; yield the largest number of candidates.

    `found` gets the kernels, `launches` every launch. Third-party kernels with triton.autotune are compiled with each
    of their configurations.
    """
    most = [1]

    def chosen(kernel: str, shape_class: str, candidates: Sequence[tiling.Tile], device: torch.device) -> tiling.Tile:
        most[0] = max(most[0], len(candidates))
        return candidates[candidate % len(candidates)]

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)  # compiled now or before
        found[compiled.hash] = compiled
        if launches is not None:
            arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
            launches.append(Launch(compiled, arguments, tuple(grid(arguments) if callable(grid) else grid)))

    def every_configuration(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            self.best_config = config
            with contextlib.suppress(CompileTimeAssertionFailure, PTXASError):  # which autotuning skips, too
                self.fn.run(*args, **kwargs, **config.all_kwargs())

    driver.set_active(CompileOnlyDriver(arch))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(Autotuner, "run", every_configuration),
        mock.patch.object(tiling, "chosen", chosen),
        mock.patch.object(tiling, "architecture", lambda device: arch),
    ):
        yield most


def inputs_of(spec: Spec, case: Case, dtype: torch.dtype) -> Inputs:
    """Return the case's inputs in `dtype`; what has a batch is uninitialized, as it is not computed with."""
    one, two = (spec.inputs(case.at_batch(B), torch.Generator().manual_seed(0)) for B in (1, 2))
    inputs = {}
    for name, t in one.items():
        t = t.to(torch.float32 if name in (*spec.keeps_dtype, *case.keeps_dtype) else dtype)
        if t.shape != two[name].shape:
            t = torch.empty_strided((case.sizes["B"], *t.shape[1:]), (t[0].numel(), *t.stride()[1:]), dtype=t.dtype)
        inputs[name] = t
    return inputs


def run_case(spec: Spec, inputs: Inputs, forward: Callable[[Inputs], Sequence[torch.Tensor]]) -> None:
    """Call forward and backward of one case; the outputs are not computed."""
    inputs = {n: t.detach().requires_grad_(n in spec.grads) for n, t in inputs.items()}
    wanted = [t for t in inputs.values() if t.requires_grad]
    with contextlib.suppress(BackendError):  # the op has no Triton kernel, or none for the backward
        outs = forward(inputs)
        if wanted:
            torch.autograd.grad(outs, wanted, [torch.zeros_like(o) for o in outs])


def compile_op(
    spec: Spec, cases: Sequence[Case], dtype: torch.dtype, arch: str, *, every_tile: bool, layouts: bool
) -> dict[str, Any]:
    """Return every kernel that the cases launch, with every tile or the first; empty if the op has no Triton kernel."""
    found: dict[str, Any] = {}
    for case in cases:
        inputs = inputs_of(spec, case, dtype)
        for layout in (torch.Tensor.detach, *(LAYOUTS if layouts and case in spec.cases else ())):
            moved = {name: layout(t) for name, t in inputs.items()}
            candidate, most = 0, [1]
            while candidate < (most[0] if every_tile else 1):
                with compiling(arch, candidate, found) as most:
                    run_case(spec, moved, lambda t, case=case: spec.call(t, case, "triton"))  # type: ignore[misc]
                candidate += 1
    return found


def inputs_allowed() -> contextlib.AbstractContextManager[Any]:
    """Allow CPU tensors, which the ops otherwise accept for Triton only in the interpreter."""
    return mock.patch.multiple(dispatch, interpreted=lambda: True, _another_mode=lambda: None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", choices=[*SPECS, []], help="default: all with a Triton kernel")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="(default: bfloat16)")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="of these names only")
    parser.add_argument("--all", action="store_true", help="every case and layout, not the benchmarks' alone")
    parser.add_argument("--tiles", choices=("every", "first"), default="every", help="first: those of no tuning")
    parser.add_argument("--write", type=Path, help="a JSON file for the table")
    options = parser.parse_args()
    if dispatch.interpreted():
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled")
    chosen = [
        (SPECS[op], SPECS[op].bench_cuda + (SPECS[op].cases if options.all else ())) for op in options.ops or SPECS
    ]
    if options.cases:
        unknown = set(options.cases) - {case.name for _, cases in chosen for case in cases}
        if unknown:
            parser.error(f"--cases: no {', '.join(sorted(unknown))}")
        chosen = [(spec, tuple(case for case in cases if case.name in options.cases)) for spec, cases in chosen]
    every, table = options.tiles == "every", list[Needs]()
    with inputs_allowed():
        for arch, (spec, cases), dtype in itertools.product(
            options.arch, chosen, [getattr(torch, name) for name in options.dtypes]
        ):
            found = compile_op(spec, cases, dtype, arch, every_tile=every, layouts=options.all)
            table += [needs(arch, dtype, compiled) for compiled in found.values()]
    table.sort(key=lambda row: (row.kernel, row.arch, row.dtype, row.tile))
    for row in table:
        print(
            f"{row.kernel:36s} {row.arch:6s} {row.dtype:8s} {row.registers:3d} registers, "
            f"{row.shared_bytes:6d} B shared, "
            f"{row.warps} warps, {row.stages} stages, occupancy {row.occupancy:.0%}"
            f"{', tensor cores' * row.tensor_cores}, {row.narrow_loads} narrow loads: {row.tile} "
            + "; ".join(f"FAULT {fault}" for fault in row.faults())
        )
    if options.write:
        one_a_line = ",\n".join(f"  {json.dumps(asdict(row))}" for row in table)
        options.write.write_text(f'{{\n "triton": "{triton.__version__}",\n "rows": [\n{one_a_line}\n ]\n}}\n')
    return 1 if any(row.faults() for row in table) else 0


if __name__ == "__main__":
    sys.exit(main())
