"""Runs the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `python -m tests.helpers.sanitizers`.

Builds the extension with both sanitizers in a separate folder (CMakeLists.txt, MVAR_SANITIZE), then runs the specs'
cases, forward and backward: every op, dtype and instruction set of this machine, contiguous and strided inputs, odd and
empty sizes, with one and two threads. The first fault ends the run with the sanitizer's report. `--op` selects one op.

The sanitizers must be loaded before torch allocates memory, so GCC's runtime is preloaded in a subprocess.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.helpers.native_build import ROOT, build, load

BUILD = ROOT / "build" / "sanitizers"
# Leaks and allocator mismatches in Python and torch are ignored.
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
# Sizes in addition to those of the specs' cases, by op.
EDGES = {
    "adaln": [
        {"B": 2, "L": 0, "C": 8},
        {"B": 0, "L": 3, "C": 8},
        {"B": 2, "L": 3, "C": 1},
        {"B": 1, "L": 70, "C": 131},
    ],
    "scale_attention": [{"B": 0, "H": 2, "D": 8}, {"B": 1, "H": 1, "D": 1}, {"B": 1, "H": 3, "D": 67}],
    "ssd_scan": [
        {"B": 0, "L": 5, "H": 2, "P": 4, "N": 4},
        {"B": 1, "L": 1, "H": 1, "P": 1, "N": 1},
        {"B": 1, "L": 17, "H": 2, "P": 67, "N": 33},
    ],
    "sample_tokens": [{"B": 0, "l": 3, "V": 5}, {"B": 2, "l": 0, "V": 5}, {"B": 1, "l": 2, "V": 17}],
}
EDGES |= {"gated_adaln": EDGES["adaln"], "mamba2_mixer": EDGES["ssd_scan"], "soft_embedding": EDGES["sample_tokens"]}


def absent() -> list[str]:
    """Instruction sets that this machine lacks, according to the package's extension."""
    from mvar_kernels.dispatch import native

    extension = native()
    assert extension is not None
    used, found = extension.instruction_set(), []
    for name in extension.build_info()["instruction_sets"]:
        try:
            extension.use_instruction_set(name)
        except ValueError:
            found.append(name)
    extension.use_instruction_set(used)
    return found


def runtime() -> str:
    """The value of LD_PRELOAD."""
    compiler = os.environ.get("CXX", "g++")
    names = ("libasan.so", "libubsan.so")
    return " ".join(
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in names
    )


def run(only: str | None, sets: list[str] | None) -> None:
    """Run every case in this process, which has the sanitizers loaded."""
    import torch

    from mvar_kernels.dispatch import OPS, native
    from mvar_kernels.testing.registry import SPECS

    extension = native()
    assert extension is not None
    for instruction_set in sets or extension.build_info()["instruction_sets"]:
        try:
            extension.use_instruction_set(instruction_set)
        except ValueError as error:
            print(f"{instruction_set}: {error}", flush=True)
            continue
        for op, spec in SPECS.items():
            if only not in (None, op) or "cpu" not in OPS[op].modules:
                continue
            start, count = time.perf_counter(), 0
            for call in calls(spec):
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    call()
                    count += 1
            print(f"{instruction_set} {op}: {count} calls, {time.perf_counter() - start:.0f} s", flush=True)


def calls(spec: "Spec") -> Iterator[Callable[[], object]]:  # type: ignore[name-defined]  # noqa: F821
    """Calls of the op for every case, including EDGES, in each dtype and layout."""
    from dataclasses import replace
    from functools import partial

    import torch

    from mvar_kernels.testing.contract import evaluate, every_other, prepared, transposed

    cases = [case for case in spec.cases if case.name != "d16_256"]  # takes minutes and covers nothing new
    base = next(case for case in cases if case.name in ("odd", "top_k"))
    cases += [replace(base, name=str(sizes), sizes=sizes) for sizes in EDGES[spec.op]]
    for case in cases:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = prepared(spec, case, dtype)
            for layout in (torch.clone, every_other, transposed):
                yield partial(evaluate, spec, case, {name: layout(t) for name, t in inputs.items()}, "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", help="this one alone")
    parser.add_argument("--sets", nargs="+", help="these instruction sets alone")
    parser.add_argument("--module", type=Path, help="the sanitized extension, in the process that has the sanitizers")
    options = parser.parse_args()
    if options.module is not None:
        load(options.module)
        run(options.op, options.sets)
        return
    module = build(BUILD, "-DMVAR_SANITIZE=ON", f"-DMVAR_ABSENT={';'.join(absent())}")
    command = [sys.executable, "-m", "tests.helpers.sanitizers", "--module", str(module)]
    command += ["--op", options.op] if options.op else []
    command += ["--sets", *options.sets] if options.sets else []
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | ENVIRONMENT | {"LD_PRELOAD": runtime()})


if __name__ == "__main__":
    main()
