"""docs/generated/compiled_kernels.md: what every kernel needs of a GPU, as its compiler says."""

from typing import Any


def page(triton: dict[str, Any], cuda: dict[str, Any]) -> str:
    """Markdown of what tests/compile_ahead.py and tests/cuda_resources.py found."""
    lines = [
        "# Kernels, compiled ahead of time",
        "",
        "For GPUs that were not there: nothing here was run or timed. Registers are those of a thread; stack is the",
        "bytes a thread of registers that did not fit, in memory instead.",
        "",
        "- [Triton](#triton)",
        "- [CUDA C++](#cuda-c)",
        "",
        "## Triton",
        "",
        "Every kernel with every tile that can be chosen, for the sizes of d16, d20 and d30 in bfloat16, with its",
        "shared memory a block and the share of a multiprocessor's warps that fit by that and by registers; narrow",
        "loads are instructions that load one number of 16 bits. By",
        f"`python tests/compile_ahead.py --write benchmarks/results/kernels.json` with Triton {triton['triton']}.",
        *(line for arch in _architectures(triton) for line in _triton(arch, triton["rows"])),
        "",
        "## CUDA C++",
        "",
        "Every instance of every kernel, by",
        "`python tests/cuda_resources.py --write benchmarks/results/cuda_kernels.json` "
        f"with nvcc {cuda['nvcc']}. Shared memory is asked for at the launch.",
        "",
        f"| kernel | {' | '.join(f'registers, {arch}' for arch in _architectures(cuda))} | stack | tensor cores |",
        "|---" * (3 + len(_architectures(cuda))) + "|",
        *_cuda(cuda["rows"]),
    ]
    return "\n".join(lines) + "\n"


def _architectures(compiled: dict[str, Any]) -> list[str]:
    return sorted({row["arch"] for row in compiled["rows"]}, key=lambda arch: int(arch.removeprefix("sm_")))


def _triton(arch: str, rows: list[dict[str, Any]]) -> list[str]:
    titles = "kernel,constants,warps,stages,registers,stack,shared KB,narrow loads,occupancy,tensor cores".split(",")
    lines = [f"\n### {arch}\n", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        if row["arch"] == arch:
            cells = (row["kernel"].strip("_").removesuffix("_kernel"), row["tile"], row["warps"], row["stages"])
            shared = f"{row['shared_bytes'] / 1024:.1f}"
            found = (row["registers"], row["stack_bytes"], shared, row["narrow_loads"])
            share = (f"{row['occupancy']:.0%}", "yes" if row["tensor_cores"] else "–")
            lines.append("| " + " | ".join(map(str, (*cells, *found, *share))) + " |")
    return lines


def _cuda(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        of_kernel = sorted((row for row in rows if row["kernel"] == kernel), key=lambda row: int(row["arch"][3:]))
        registers = (row["registers"] for row in of_kernel)
        stack, cores = max(row["stack_bytes"] for row in of_kernel), all(row["tensor_cores"] for row in of_kernel)
        cells = (f"`{kernel.replace('_kernel', '')}`", *registers, stack, "yes" if cores else "–")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines
