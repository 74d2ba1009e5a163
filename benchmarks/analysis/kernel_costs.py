"""What a launch of a compiled Triton kernel costs, counted.

Of a launch: the instructions that its warps issue, those of each loop as often as it runs; the bytes of its
arguments, each once; registers, shared memory, memory accesses by width, tensor-core instructions. In a loop the
shorter side of a branch counts (whole chunks; a sequence's first and last chunk take up to an eighth more in the
mixer's forward), outside of loops both; where a loop stands in an `if` whose condition follows from the arguments it is
counted as often as that holds.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from benchmarks.analysis import machine_code, trip_counts
from tests.kernels.compile_ahead import ARCHITECTURES, CUOBJDUMP, Launch, needs

Arguments = Mapping[str, Any]


class Declared(NamedTuple):
    """What does not follow from a kernel's launch and code.

    columns: of an argument of which the kernel takes only some columns of the last dimension, how many.
    unrolled: the compiler takes that many iterations of every loop at a time, and the rest one by one in a second loop.
    iterations: of each loop in the machine code, in order, where they depend on the data or cannot be matched.
    shares: of a kernel whose programs do different things, the share of programs that get to each loop.
    """

    columns: Mapping[str, Callable[[Arguments], int]] = {}
    unrolled: int = 1
    iterations: Callable[[Arguments], tuple[float, ...]] | None = None
    shares: Callable[[Arguments], tuple[float, ...]] | None = None


def _mixer_shares(a: Arguments) -> tuple[float, ...]:
    """The shares of the mixer's programs that scan, that wait, and that go through wide rows twice."""
    parts, norms = a["H"] * -(-a["P"] // a["BLOCK_P"]), -(-a["L"] // a["NORM_ROWS"])
    programs = (-(-a["rows"] // a["group"]) + 1) * a["group"] * (parts + norms)
    scan, norm = a["rows"] * parts / programs, a["rows"] * norms / programs
    return (scan, norm) if a["H"] * a["P"] <= a["BLOCK_E"] else (scan, norm, norm, norm)


def _mixer_iterations(a: Arguments) -> tuple[float, ...]:
    times = (-(-a["L"] // a["CHUNK"]), 0, *2 * (-(-a["H"] * a["P"] // a["BLOCK_E"]),))  # the rows are ready
    return tuple(share * n for share, n in zip(_mixer_shares(a), times, strict=False))


def _of_prepare(a: Arguments) -> int:
    return int(2 * a["N"] if a["MIXER"] else a["N"])


# Of 4,096 normal logits: rounds of the searches for top-k = 900 and top-p = 0.96 (ops/sample_tokens/triton/common.py).
SEARCHES = 10, 7
KERNELS: Mapping[str, Declared] = {
    "_adaln_fwd_kernel": Declared(),
    "_adaln_bwd_kernel": Declared(),
    "_adaln_sums_kernel": Declared(),
    "_gated_adaln_fwd_kernel": Declared(),
    "_gated_adaln_bwd_kernel": Declared(),
    "_scale_attention_fwd_kernel": Declared(),
    "_scale_attention_bwd_kernel": Declared(),
    "_scale_attention_dq_kernel": Declared(),
    "_scale_attention_dkdv_kernel": Declared(),
    "_scale_attention_dtemperature_kernel": Declared(),
    "_ssd_scan_fwd_kernel": Declared(),
    "_ssd_scan_bwd_prepare_kernel": Declared(
        {name: _of_prepare for name in ("B_ptr", "C_ptr", "conv_ptr", "weight_ptr")}  # of [x, B, C] B and C
        | {"steps_ptr": lambda a: 4 * a["CHUNK"] // 7}  # four planes of seven
    ),
    "_ssd_scan_bwd_sweep_kernel": Declared(
        {
            "states_ptr": lambda a: a["N"] // 2,  # the states, or their gradients
            "steps_ptr": lambda a: 2 * a["CHUNK"] // 7,
        }
    ),
    "_ssd_scan_bwd_grads_kernel": Declared(iterations=lambda a: (a["heads"], *2 * (0, a["heads"]))),
    "_mamba2_mixer_prepare_kernel": Declared(
        {"zxbcdt_ptr": lambda a: 2 * a["N"], "conv_ptr": lambda a: 2 * a["N"]}  # B and C
    ),
    "_mamba2_mixer_fwd_kernel": Declared(
        {"zxbcdt_ptr": lambda a: 2 * a["H"] * a["P"]},  # z and x
        iterations=_mixer_iterations,
        shares=_mixer_shares,
    ),
    "_mamba2_mixer_bwd_outputs_kernel": Declared(
        {"states_ptr": lambda a: a["N"] // 2, "steps_ptr": lambda a: 2 * a["CHUNK"] // 7},
        iterations=lambda a: (-(-a["L"] // a["CHUNK"]), 0, -(-a["L"] // a["CHUNK"])),  # `once` is not 4 times
    ),
    "_mamba2_mixer_bwd_norm_kernel": Declared(),
    "_mamba2_mixer_bwd_conv_grads_kernel": Declared(),
    "_sample_tokens_fwd_kernel": Declared(
        iterations=lambda a: (*SEARCHES, 0)
    ),  # of codes near to winning but one: none
    "_soft_embedding_fwd_kernel": Declared(iterations=lambda a: SEARCHES),
    "_group_norm_silu_stats_kernel": Declared(),
    "_group_norm_silu_fwd_kernel": Declared(),
}


@dataclass(frozen=True)
class Cost:
    """One launch. loops: [instructions of the loop itself, its iterations in a program, all those around it included].

    resident_warps: that fit on a multiprocessor. warp_instructions: of all warps. accesses: global memory accesses in
    the code, by width. tensor_core_flops: by kind of instruction and dtype of the operands.
    """

    kernel: str
    tile: str
    programs: int
    warps: int
    stages: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    resident_warps: int
    outside: int
    loops: list[list[float]]
    warp_instructions: int
    accesses: dict[str, int]
    tensor_core_flops: dict[str, int]
    read_bytes: int
    written_bytes: int


def cost(launch: Launch, arch: str) -> Cost:
    """Raises ValueError, with what to add to KERNELS, where that does not describe the kernel."""
    compiled, warps = launch.compiled, launch.compiled.metadata.num_warps
    listing = _listing(compiled.asm["cubin"])
    function = trip_counts.parse(compiled.asm["ttir"])
    name, declared = compiled.metadata.name, KERNELS.get(compiled.metadata.name)
    programs = trip_counts.Programs(function, launch.grid, launch.arguments)
    read, written = trip_counts.accesses(function)
    if declared is None:
        raise ValueError(_unknown(name, launch, read, written))
    iterations = _iterations(name, declared, listing, programs)
    shares = declared.shares(launch.arguments) if declared.shares else (1.0,) * len(listing.loops)
    outside: dict[float, list[int]] = {}  # by how many times in a program
    for index in listing.outside:
        guarded = listing.loop_of(index)
        outside.setdefault(1.0 if guarded is None else shares[guarded], []).append(index)
    loops = zip((loop.own for loop in listing.loops), iterations, strict=True)
    parts = [*((tuple(indices), times) for times, indices in outside.items()), *loops]
    flops: Counter[str] = Counter()
    for indices, times in parts:
        for (kind, dtype), number in listing.flops(indices).items():
            flops[f"{kind} {dtype}"] += round(number * times * warps * programs.count)
    size = {each: _bytes(launch.arguments, each, declared.columns) for each in read | written}
    resources = needs(arch, torch.float32, compiled)
    return Cost(
        kernel=name,
        tile=resources.tile,
        programs=programs.count,
        warps=warps,
        stages=resources.stages,
        registers=resources.registers,
        stack_bytes=resources.stack_bytes,
        shared_bytes=resources.shared_bytes,
        resident_warps=round(resources.occupancy * ARCHITECTURES[arch].threads / 32),
        outside=len(listing.outside),
        loops=[[len(loop.own), round(times, 3)] for loop, times in zip(listing.loops, iterations, strict=True)],
        warp_instructions=round(sum(len(indices) * times for indices, times in parts) * warps * programs.count),
        accesses=dict(sorted(sum((listing.accesses(indices) for indices, _ in parts), Counter()).items())),
        tensor_core_flops=dict(sorted(flops.items())),
        read_bytes=sum(size[each] for each in read),
        written_bytes=sum(size[each] for each in written),
    )


@cache
def _listing(cubin: bytes) -> machine_code.Listing:
    return machine_code.parse(machine_code.sass(cubin, CUOBJDUMP))


def _iterations(
    name: str, declared: Declared, listing: machine_code.Listing, programs: trip_counts.Programs
) -> tuple[float, ...]:
    """Of each loop in the machine code."""
    if declared.iterations is not None:
        given = declared.iterations(programs.arguments)
        if len(given) != len(listing.loops):
            raise ValueError(
                f"{name}: KERNELS has iterations of {len(given)} loops, the code {len(listing.loops)} loops"
            )
        return given
    source, found, depths = trip_counts.loops(programs.function), list[float](), list[int]()
    for loop, depth in source:
        try:
            times = programs.iterations(loop, declared.unrolled)
        except trip_counts.UnknownError as error:
            raise ValueError(f"{name}: add iterations=… to KERNELS: of {loop.text!r} unknown, {error}") from error
        found += times
        depths += [depth] * len(times)
    if depths != [loop.depth for loop in listing.loops]:
        raise ValueError(
            f"{name}: the machine code has loops of depths {[loop.depth for loop in listing.loops]}, the source of "
            f"{depths}, run {found} times. Add unrolled=… or iterations=… to KERNELS; the machine code's loops have "
            f"{[len(loop.own) for loop in listing.loops]} instructions"
        )
    return tuple(found)


def _bytes(arguments: Arguments, name: str, columns: Mapping[str, Callable[[Arguments], int]]) -> int:
    given: Any = arguments[name]
    tensor: torch.Tensor = getattr(given, "base", given)  # of a tensor descriptor
    elements = tensor.numel() // tensor.shape[-1] * columns[name](arguments) if name in columns else tensor.numel()
    return elements * tensor.itemsize


def _unknown(name: str, launch: Launch, read: set[str], written: set[str]) -> str:
    shapes = {each: tuple(launch.arguments[each].shape) for each in sorted(read | written)}
    described = "\n".join(
        f"    {each} {shape}: {' and '.join(['read'] * (each in read) + ['written'] * (each in written))}"
        for each, shape in shapes.items()
    )
    return (
        f'{name} is not in KERNELS (benchmarks/analysis/kernel_costs.py). Add "{name}": Declared(), with the columns '
        f"of these arguments of which it takes only some:\n{described}"
    )
