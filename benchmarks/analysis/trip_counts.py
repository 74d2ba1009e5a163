"""How often a Triton kernel's loops run, and which arguments it reads and writes: from its IR (TTIR) and a launch.

Bounds of loops are numbers that follow from arguments and program ids. They are worked out here for all programs of a
launch at a time, through the operations on integers of which bounds are made, among them loads from tensors of
integers (attention's tile plan), which must therefore hold their values.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

LOCATION = re.compile(r"\s*loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
CARRIED = re.compile(r"(%[\w$.-]+) = (%[\w$.#-]+)")  # of a for loop the first is the induction variable
OPERATION = re.compile(r'^(?:(%.+?) = )?"?([\w.]+)"?')
LOOPS = ("scf.for", "scf.while")
READS = ("tt.load", "tt.descriptor_load", "tt.descriptor_gather")
WRITES = ("tt.store", "tt.descriptor_store", "tt.descriptor_scatter", "tt.descriptor_reduce")
ATOMICS = ("tt.atomic_rmw", "tt.atomic_cas")
FOLDED: Mapping[str, Any] = {"arith.maxsi": np.max, "arith.minsi": np.min}
COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    **{"eq": np.equal, "ne": np.not_equal, "slt": np.less, "sle": np.less_equal, "sgt": np.greater},
    **{"sge": np.greater_equal, "ult": np.less, "ule": np.less_equal, "ugt": np.greater, "uge": np.greater_equal},
}
ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    **{"addi": np.add, "subi": np.subtract, "muli": np.multiply, "minsi": np.minimum, "maxsi": np.maximum},
    **{"minui": np.minimum, "maxui": np.maximum, "andi": np.bitwise_and, "ori": np.bitwise_or},
    **{"xori": np.bitwise_xor, "shli": np.left_shift, "shrsi": np.right_shift, "shrui": np.right_shift},
    "divsi": lambda a, b: np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)),  # towards 0
    "remsi": lambda a, b: np.sign(a) * (np.abs(a) % np.abs(b)),
    **{"divui": np.floor_divide, "remui": np.remainder},
    **{"ceildivsi": lambda a, b: -(-a // b), "floordivsi": np.floor_divide},
    "select": lambda condition, a, b: np.where(condition, a, b),
}
UNCHANGED = ("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast", "tt.broadcast")


class UnknownError(Exception):
    """A number depends on what this module does not follow: floats, values carried from iteration to iteration."""


@dataclass
class Block:
    """A region's operations. inputs: its arguments, by name, and the number of each."""

    parent: "Operation | None"
    inputs: dict[str, int] = field(default_factory=dict)
    operations: "list[Operation]" = field(default_factory=list)
    results: "dict[str, Operation]" = field(default_factory=dict)


@dataclass
class Operation:
    """operands: of a for loop [lower, upper, step, initial values …], of a while loop its initial values."""

    name: str
    text: str
    operands: list[str]
    block: Block
    blocks: list[Block] = field(default_factory=list)

    def inside(self) -> "Iterator[tuple[Operation, int]]":
        """The blocks around it and which of their operation's they are, from the inside out."""
        block = self.block
        while block.parent is not None:
            yield block.parent, block.parent.blocks.index(block)
            block = block.parent.block


def parse(ttir: str) -> Operation:
    """The function of a kernel."""
    root = Block(None)
    stack = [root]
    for line in LOCATION.sub("", ttir).splitlines():
        line = line.strip()
        if not line or line.startswith(("#", "module", "//")):
            continue
        if line.startswith("^"):  # the arguments of a block
            stack[-1].inputs |= {name: i for i, name in enumerate(VALUE.findall(line))}
            continue
        if line.startswith("}"):
            if len(stack) == 1:
                break
            last = stack.pop().parent
            if line.endswith("{") and last is not None:
                stack.append(_open(last, {}))
            continue
        operation = _operation(line, stack[-1])
        stack[-1].operations.append(operation)
        if line.endswith("{"):
            stack.append(_open(operation, _inputs(operation)))
    return root.operations[0]


def _operation(line: str, block: Block) -> Operation:
    matched = OPERATION.match(line)
    assert matched is not None, line
    results, name = matched.groups()
    operands = VALUE.findall(line[matched.end() :])
    if name in LOOPS:
        initial = [value for _, value in CARRIED.findall(line.partition(name)[2])]
        operands = [*operands[1:4], *initial[1:]] if name == "scf.for" else initial
    operation = Operation(name, line, operands, block)
    block.results |= dict.fromkeys((name.partition(":")[0] for name in (results or "").split(", ")), operation)
    return operation


def _inputs(operation: Operation) -> dict[str, int]:
    """The names of the first block's arguments; of a loop the induction variable is number 0."""
    if operation.name == "tt.func":
        return {name: i for i, name in enumerate(operation.operands)}
    if operation.name not in LOOPS:
        return {}
    carried = CARRIED.findall(operation.text.partition(operation.name)[2])
    return {name: i for i, (name, _) in enumerate(carried)}


def _open(operation: Operation, inputs: dict[str, int]) -> Block:
    block = Block(operation, inputs)
    operation.blocks.append(block)
    return block


def walk(operation: Operation, depth: int = 0) -> Iterator[tuple[Operation, int]]:
    """All operations inside one in order, with the number of loops around each."""
    for block in operation.blocks:
        for each in block.operations:
            yield each, depth
            yield from walk(each, depth + (each.name in LOOPS))


def _found(name: str, block: Block | None) -> tuple[Operation | None, Block | None, int]:
    """What defines a value: an operation, or a block as its n-th argument."""
    base = name.partition("#")[0]
    while block is not None:
        if base in block.inputs:
            return None, block, block.inputs[base]
        if base in block.results:
            return block.results[base], None, int(name.partition("#")[2] or 0)
        block = block.parent.block if block.parent else None
    raise UnknownError(f"{name} is not defined")


class Programs:
    """Values of a kernel's integers in all programs of one launch: arrays (programs, shape of the tensor)."""

    def __init__(self, function: Operation, grid: Sequence[int], arguments: Mapping[str, Any]) -> None:
        self.grid, self.arguments, self.function = (*grid, 1, 1)[:3], arguments, function
        self.count = int(np.prod(self.grid))
        ids = np.unravel_index(np.arange(self.count), self.grid[::-1])  # x is the fastest
        self.ids = {axis: ids[2 - i] for i, axis in enumerate("xyz")}
        self.known: dict[int, Any] = {}
        self.induction: dict[int, Any] = {}  # by the block of a loop: its variable in the iteration that is looked at

    def value(self, name: str, block: Block) -> Any:
        """Raises UnknownError."""
        operation, outer, index = _found(name, block)
        if operation is None:
            assert outer is not None
            if id(outer) in self.induction and index == 0:
                return self.induction[id(outer)]
            if outer.parent is not self.function:
                raise UnknownError(f"{name} changes from iteration to iteration")
            return self._argument(name)
        if id(operation) not in self.known:
            self.known[id(operation)] = self._evaluate(operation)
        return self.known[id(operation)]

    def _argument(self, name: str) -> Any:
        given = self.arguments.get(name.removeprefix("%"))
        if isinstance(given, torch.Tensor):
            return given, np.zeros(1, np.int64)
        if not isinstance(given, int):
            raise UnknownError(f"{name} is {type(given).__name__}")
        return np.array([given], np.int64)

    def _evaluate(self, operation: Operation) -> Any:
        name, text, block = operation.name, operation.text, operation.block
        if name == "arith.constant":
            number = re.search(r"(?:constant|dense<)\s*(-?\d+|true|false)\b(?![.])", text)
            shape = re.search(r"tensor<((?:\d+x)*)", text)
            if number is None:
                raise UnknownError(text)
            value = int(number[1]) if number[1][-1].isdigit() else int(number[1] == "true")
            return np.full((1, *map(int, (shape[1] if shape else "").split("x")[:-1])), value, np.int64)
        if name == "tt.get_program_id":
            return self.ids[text.partition("get_program_id ")[2][0]]
        if name == "tt.get_num_programs":
            return np.array([self.grid["xyz".index(text.partition("get_num_programs ")[2][0])]], np.int64)
        if name == "tt.make_range":
            ends = [int(re.search(rf"{end} = (\d+)", text)[1]) for end in ("start", "end")]  # type: ignore[index]
            return np.arange(*ends)[None]
        dialect, _, short = name.partition(".")
        operands = [self.value(operand, block) for operand in operation.operands]
        if name == "tt.addptr":
            (tensor, offsets), more = operands
            return tensor, offsets + more
        if name == "tt.load" and "tensor<" not in text:
            return self._loaded(*operands)
        if any(isinstance(operand, tuple) for operand in operands):
            raise UnknownError(text)
        if name == "tt.splat":
            shape = re.search(r"-> tensor<((?:\d+x)+)", text)
            assert shape is not None
            sizes = [int(n) for n in shape[1].split("x")[:-1]]
            return np.broadcast_to(operands[0].reshape(-1, *[1] * len(sizes)), (len(operands[0]), *sizes))
        if name == "tt.reduce":
            fold = FOLDED.get(operation.blocks[0].operations[0].name)
            axis = re.search(r"axis = (\d+)", text)
            if fold is None or axis is None:
                raise UnknownError(text)
            return fold(operands[0], axis=1 + int(axis[1]))
        if name == "arith.cmpi":
            return COMPARISONS[text.partition("cmpi ")[2].partition(",")[0]](*operands)
        if name in UNCHANGED:
            return operands[0]
        if dialect == "arith" and short in ARITHMETIC:
            return ARITHMETIC[short](*operands)
        raise UnknownError(text)

    def _loaded(self, pointer: tuple[torch.Tensor, Any], mask: Any = True, other: Any = 0) -> Any:
        tensor, offsets = pointer
        if tensor.is_floating_point() or not tensor.is_contiguous():
            raise UnknownError("a number loaded from memory")
        return np.where(mask, tensor.flatten().numpy().astype(np.int64)[np.where(mask, offsets, 0)], other)

    def iterations(self, loop: Operation, unrolled: int = 1) -> list[float]:
        """How often the loop's body runs, a mean over the programs: in all iterations of the loops around it, and 0
        where a condition around it is known to be false.

        unrolled: iterations that are one; with more than one, the second number is that of the ones left over.
        """
        around = list(loop.inside())[::-1][1:]  # without the function
        return [
            float(np.mean(np.broadcast_to(self._times(loop, around, unrolled, part), self.count)))
            for part in range(1 if unrolled == 1 else 2)
        ]

    def _times(self, loop: Operation, around: Sequence[tuple[Operation, int]], unrolled: int, part: int) -> Any:
        """In each program, inside the outermost of `around`."""
        if not around:
            return divmod(self._trips(loop), unrolled)[part]
        (outer, which), *rest = around
        if outer.name == "scf.if":
            times = self._times(loop, rest, unrolled, part)
            try:
                return times * (self.value(outer.operands[0], outer.block) != which)
            except UnknownError:
                return times  # counted as taken
        trips = self._trips(outer)
        try:
            return trips * self._times(loop, rest, unrolled, part)
        except UnknownError:  # bounds that change from iteration to iteration
            lower, _, step = (self.value(operand, outer.block) for operand in outer.operands[:3])
            known, times = self.known, 0
            for i in range(int(np.max(trips))):
                self.known, self.induction[id(outer.blocks[0])] = known.copy(), lower + i * step
                times = times + (i < trips) * self._times(loop, rest, unrolled, part)
            self.known = known
            del self.induction[id(outer.blocks[0])]
            return times

    def _trips(self, loop: Operation) -> Any:
        if loop.name == "scf.while":
            raise UnknownError("a while loop")
        lower, upper, step = (self.value(operand, loop.block) for operand in loop.operands[:3])
        return np.maximum(-(-(upper - lower) // step), 0)


def loops(function: Operation) -> list[tuple[Operation, int]]:
    """The loops in order, with their depth, 1 for the outermost."""
    return [(operation, depth + 1) for operation, depth in walk(function) if operation.name in LOOPS]


def accesses(function: Operation) -> tuple[set[str], set[str]]:
    """Names of the arguments that are read and that are written, by loads, stores and descriptors."""
    read, written = set[str](), set[str]()
    for operation, _ in walk(function):
        if operation.name in (*READS, *ATOMICS):
            read |= _arguments(operation.operands[0], operation.block, set())
        if operation.name in (*WRITES, *ATOMICS):
            written |= _arguments(operation.operands[0], operation.block, set())
    return read, written


def _arguments(name: str, block: Block, seen: set[int]) -> set[str]:
    """The kernel's arguments that a pointer may point into."""
    operation, outer, index = _found(name, block)
    if operation is None:
        assert outer is not None and outer.parent is not None
        loop = outer.parent
        if loop.name == "tt.func":
            return {name.removeprefix("%")}
        if loop.name == "scf.for":
            return _arguments(loop.operands[2 + index], loop.block, seen)
        return _arguments(loop.operands[index], loop.block, seen)  # of a while loop
    if id(operation) in seen:
        return set()
    seen.add(id(operation))
    if operation.name == "scf.for":
        return _arguments(operation.operands[3 + index], operation.block, seen)
    if operation.name == "scf.if":
        return {
            found
            for branch in operation.blocks
            for found in _arguments(branch.operations[-1].operands[index], branch, seen)
        }
    operands = operation.operands[1:] if operation.name == "arith.select" else operation.operands[:1]
    return {found for operand in operands for found in _arguments(operand, operation.block, seen)}
