"""docs/generated/compiled_kernels.md: the resources of every kernel, as its compiler reports them."""

from collections.abc import Iterator
from typing import Any

from benchmarks.common.markdown import table

TRITON = "kernel,constants,warps,stages,registers,stack,shared KB,narrow loads,occupancy,tensor cores".split(",")


def page(triton: dict[str, Any], cuda: dict[str, Any]) -> str:
    tables = "".join(f"\n### {arch}\n\n{_triton(arch, triton['rows'])}" for arch in _architectures(triton))
    registers = (f"registers, {arch}" for arch in _architectures(cuda))
    return f"""# Kernels, compiled ahead of time

Without a GPU: nothing here was run or timed. Registers are those of a thread; stack is the bytes per thread of
registers that were spilled to memory.

- [Triton](#triton)
- [CUDA C++](#cuda-c)

## Triton

Every kernel with every tile that can be chosen, for the sizes of d16, d20 and d30 in bfloat16, with its shared memory
per block and its occupancy, the share of a multiprocessor's warps that fit by that and by registers; narrow loads are
instructions that load one number of 16 bits. Written by
`python tests/kernels/compile_ahead.py --write benchmarks/results/kernels.json` with Triton {triton["triton"]}.
{tables}
## CUDA C++

Every instance of every kernel, written by
`python tests/kernels/cuda_resources.py --write benchmarks/results/cuda_kernels.json` with nvcc
{cuda["nvcc"]}. Shared memory is requested at the launch.

{table(("kernel", *registers, "stack", "tensor cores"), _cuda(cuda["rows"]))}"""


def _architectures(compiled: dict[str, Any]) -> list[str]:
    return sorted({row["arch"] for row in compiled["rows"]}, key=lambda arch: int(arch.removeprefix("sm_")))


def _triton(arch: str, rows: list[dict[str, Any]]) -> str:
    return table(
        TRITON,
        (
            (
                row["kernel"].strip("_").removesuffix("_kernel"),
                row["tile"],
                row["warps"],
                row["stages"],
                row["registers"],
                row["stack_bytes"],
                f"{row['shared_bytes'] / 1024:.1f}",
                row["narrow_loads"],
                f"{row['occupancy']:.0%}",
                _yes(row["tensor_cores"]),
            )
            for row in rows
            if row["arch"] == arch
        ),
    )


def _cuda(rows: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        of_kernel = sorted((row for row in rows if row["kernel"] == kernel), key=lambda row: int(row["arch"][3:]))
        stack, cores = max(row["stack_bytes"] for row in of_kernel), all(row["tensor_cores"] for row in of_kernel)
        yield f"`{kernel.replace('_kernel', '')}`", *(row["registers"] for row in of_kernel), stack, _yes(cores)


def _yes(value: bool) -> str:
    return "yes" if value else "–"
