"""A kernel's machine code (SASS), read statically: its loops, and their memory and tensor-core instructions."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;")
GUARD = re.compile(r"^@!?U?P\w+\s+")
BRANCH = re.compile(r"^BRA(?:\.\w+)*\s+(.*?)(0x[0-9a-f]+)$")
WIDTH = re.compile("[US]?(8|16)|64|128|256")
MEMORY = ("LDG", "LDGSTS", "STG")
TENSOR_CORES = {"HGMMA": 4, "HMMA": 1}
"""Instructions of wgmma and of mma.sync, and how many warps carry out one together. Those of sm_100 (UTCHMMA) do not
say their size."""


class Loop(NamedTuple):
    """first, last: indices of instructions. depth: 1 for the outermost. own: indices that are in no loop inside and on
    the shortest way through: of the two sides of a branch the longer is for the ends of a sequence."""

    first: int
    last: int
    depth: int
    own: tuple[int, ...]


class Listing(NamedTuple):
    """outside: indices of the instructions in no loop, without those that only a CALL reaches: the slow paths of
    divisions and square roots. skipping: spans (first, last) of instructions that a branch outside of loops skips, and
    a loop with them."""

    instructions: tuple[str, ...]
    loops: tuple[Loop, ...]
    outside: tuple[int, ...]
    skipping: tuple[tuple[int, int], ...]

    def loop_of(self, index: int) -> int | None:
        """The first loop in the smallest span around an instruction that is outside of loops."""
        around = [(first, last) for first, last in self.skipping if first <= index <= last]
        if not around:
            return None
        first, last = min(around, key=lambda span: span[1] - span[0])
        return next(k for k, loop in enumerate(self.loops) if first <= loop.first <= last)

    def accesses(self, indices: Iterable[int]) -> Counter[str]:
        """Number of global memory accesses by instruction and width: "LDG 16 B"."""
        return Counter(kind for i in indices if (kind := _access(self.instructions[i])))

    def flops(self, indices: Iterable[int]) -> Counter[tuple[str, str]]:
        """FLOPs of one warp in (kind of tensor-core instruction, dtype of the operands)."""
        found: Counter[tuple[str, str]] = Counter()
        for i in indices:
            kind, *modifiers = _opcode(self.instructions[i]).split(".")
            if kind in TENSOR_CORES:
                dtype = next((m for m in modifiers[1:] if m in ("BF16", "TF32")), "F16")
                found[kind, dtype] += 2 * _multiplications(kind, modifiers[0]) // TENSOR_CORES[kind]
        return found


def sass(cubin: bytes, cuobjdump: Path) -> str:
    """The disassembly of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([cuobjdump, "-sass", file.name], capture_output=True, text=True, check=True).stdout


def parse(text: str) -> Listing:
    """A kernel's listing by cuobjdump -sass.

    A loop is all that lies between a backward branch and its target; several branches to one target are one loop.

    Raises ValueError where two loops overlap.
    """
    found = [(int(address, 16), code) for address, code in INSTRUCTION.findall(text)]
    at = {address: i for i, (address, _) in enumerate(found)}
    instructions = tuple(code for _, code in found)
    targets = [_target(code, at) for code in instructions]
    reached = _reached(instructions, targets)
    ends: dict[int, int] = {}  # by first instruction
    for i, target in enumerate(targets):
        if target is not None and target < i and i in reached:
            ends[target] = i
    spans = sorted(ends.items(), key=lambda span: (span[0], -span[1]))
    for first, last in spans:
        if any(first < other <= last < end for other, end in spans):
            raise ValueError(f"loops overlap at instructions {first} to {last}")
    innermost: dict[int, int] = {}
    for k, (first, last) in enumerate(spans):  # outer ones come first
        innermost |= dict.fromkeys(range(first, last + 1), k)
    loops = tuple(
        Loop(
            first,
            last,
            sum(a <= first and last <= b for a, b in spans),
            tuple(i for i in _shortest(first, last, instructions, targets, spans) if innermost[i] == k),
        )
        for k, (first, last) in enumerate(spans)
    )
    skipping = tuple(
        (i + 1, target - 1)
        for i, target in enumerate(targets)
        if target is not None and i not in innermost and any(i < first and last < target for first, last in spans)
    )
    return Listing(instructions, loops, tuple(sorted(reached - innermost.keys())), skipping)


def _shortest(
    first: int,
    last: int,
    instructions: Sequence[str],
    targets: Sequence[int | None],
    spans: Sequence[tuple[int, int]],
) -> list[int]:
    """The indices on the shortest way from first to last, which skips no loop inside."""
    ways: dict[int, tuple[int, int | None]] = {first: (1, None)}  # length, and the index before
    for i in range(first, last):
        if i not in ways:
            continue
        for after in _successors(i, instructions[i], targets[i]):
            skips = any(i < start and end < after for start, end in spans)
            if i < after <= last and not skips and (after not in ways or ways[i][0] + 1 < ways[after][0]):
                ways[after] = (ways[i][0] + 1, i)
    found: list[int] = []
    at: int | None = last
    while at is not None:
        found.append(at)
        at = ways[at][1]
    return found[::-1]


def _opcode(code: str) -> str:
    return GUARD.sub("", code).split()[0]


def _target(code: str, at: dict[int, int]) -> int | None:
    branch = BRANCH.match(GUARD.sub("", code))
    return at.get(int(branch[2], 16)) if branch else None


def _successors(i: int, code: str, target: int | None) -> Iterator[int]:
    if target is not None:
        yield target
        branch = BRANCH.match(GUARD.sub("", code))
        if code.startswith("@") or (branch and branch[1]):  # a second predicate is an operand
            yield i + 1
    elif code.startswith("@") or _opcode(code).split(".")[0] not in ("EXIT", "RET"):
        yield i + 1


def _reached(instructions: Sequence[str], targets: Sequence[int | None]) -> set[int]:
    reached, waiting = set[int](), [0]
    while waiting:
        i = waiting.pop()
        if i not in reached and i < len(instructions):
            reached.add(i)
            waiting.extend(_successors(i, instructions[i], targets[i]))
    return reached


def _access(code: str) -> str | None:
    name, *modifiers = _opcode(code).split(".")
    if name in MEMORY:
        bits = next((m.lstrip("US") for m in modifiers if WIDTH.fullmatch(m)), "32")
        return f"{name} {int(bits) // 8} B"
    return "TMA" if name in ("UTMALDG", "UTMASTG", "UBLKCP") else None


def _multiplications(kind: str, shape: str) -> int:
    """Of "64x32x16", or of "16816" and "1688": 16×8×16 and 16×8×8."""
    m, n, k = shape.split("x") if kind == "HGMMA" else (shape[:2], shape[2], shape[3:])
    return int(m) * int(n) * int(k)
