"""Analyze the text of a compiled program (XLA's HLO): loops, collectives and memory traffic.

Unlike XLA's own cost analysis, this counts the body of a loop once per iteration.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
SIZES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
}
# opcodes without memory traffic: they name existing data, or contain other instructions
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
}
_OPENING = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = ")
_CALLED = re.compile(
    r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.-]+)|branch_computations=\{([^}]*)\}"
)
Bytes = float | int | np.integer  # not only integers, because a 4-bit number is half a byte


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    kind: opcode. shape: shape of the result, as text. source: name of the JAX operation. root: whether its result is
    that of the computation.
    """

    name: str
    kind: str
    shape: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    text: str
    root: bool

    @property
    def bytes(self) -> Bytes:
        return shape_bytes(self.shape)

    @property
    def memory(self) -> Bytes:
        """Return the bytes of the result in device memory, without those in on-chip memory."""
        return shape_bytes(self.shape, on_chip=False)

    @property
    def source(self) -> str:
        return found.group(1) if (found := re.search(r'op_name="([^"]*)"', self.text)) else ""

    @property
    def collective(self) -> str | None:
        """Return the kind of a collective, or None for other instructions.

        An asynchronous collective consists of two instructions, "-start" and "-done". Only "-start" counts.
        """
        kind = self.kind.removesuffix("-start")
        return kind if kind in COLLECTIVES else None


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction and how it is executed.

    times: number of executions, the product of the lengths of its loops; an unknown length counts as 1. loops: names of
    the loops around it, outermost first. known: whether the lengths of all loops are known. fused: whether the
    instruction is inside a fusion.
    """

    instruction: Instruction
    times: int
    loops: tuple[str, ...]
    known: bool
    fused: bool


class Program:
    """The text of a compiled program (`compiled.as_text()`), as computations of instructions."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", {}
        self._frames = _frames(text)
        for line in text.splitlines():
            if opening := _OPENING.match(line):
                current = self.computations.setdefault(opening.group(1), {})
                self.entry = opening.group(1) if line.startswith("ENTRY") else self.entry
            elif (start := _LINE.match(line)) and (instruction := _parse(line, start)):
                current[instruction.name] = instruction

    def runs(self) -> Iterator[Run]:
        """Yield every instruction that the program reaches, including those in loops and fusions."""
        yield from self._runs(self.entry, 1, (), True, False)

    def _runs(self, computation: str, times: int, loops: tuple[str, ...], known: bool, fused: bool) -> Iterator[Run]:
        for instruction in self.computations[computation].values():
            yield Run(instruction, times, loops, known, fused)
            if instruction.kind == "while":
                length = self.trip_count(instruction)
                inside = (times * (length or 1), (*loops, instruction.name), known and length is not None, fused)
            else:
                inside = (times, loops, known, fused or instruction.kind == "fusion")
            for called in (
                instruction.called
                if instruction.kind not in ("all-reduce", "reduce-scatter", "reduce", "sort", "scatter")
                else ()
            ):
                yield from self._runs(called, *inside)

    def trip_count(self, loop: Instruction) -> int | None:
        """Return the length of a `while` that counts to a constant (a scan), or None if its end depends on data."""
        condition = self.computations[re.search(r"condition=%?([\w.-]+)", loop.text).group(1)]
        root = next(i for i in condition.values() if i.root)
        if root.kind == "fusion":
            root = next(i for i in self.computations[root.called[0]].values() if i.root)
        if root.kind != "compare" or "direction=LT" not in root.text or not root.shape.startswith("pred[]"):
            return None
        constants = [i for i in condition.values() if i.kind == "constant" and i.shape.startswith("s32[]")]
        values = [int(re.search(r"constant\((-?\d+)\)", i.text).group(1)) for i in constants]
        return values[0] if len(values) == 1 else None

    def traffic_by_source(self, package: str = "/mqformer_jax/") -> dict[str, Bytes]:
        """Return the bytes of traffic by line of code, largest first, e.g. {"models/layers.py:166 MLP.__call__": 1e9}.

        An instruction counts for the innermost line of the package in its stack trace. Instructions without a line,
        such as copies that the compiler adds, are named by opcode.
        """
        found: dict[str, Bytes] = {}
        for run in self.runs():
            if not run.fused and (moved := self._moved(run) * run.times):
                name = self._line(run.instruction, package) or run.instruction.kind
                found[name] = found.get(name, 0) + moved
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _line(self, instruction: Instruction, package: str) -> str:
        frame = re.search(r"stack_frame_id=(\d+)", instruction.text)
        number = int(frame.group(1)) if frame else 0
        while number in self._frames:
            file, line, function, number = self._frames[number]
            if package in file:
                return f"{file.rpartition(package)[2]}:{line} {function}"
        return ""

    def collectives(self) -> list[tuple[Run, int]]:
        """Return each collective instruction with the number of devices in its group."""
        return [(run, _group(run.instruction.text)) for run in self.runs() if run.instruction.collective]

    def largest(self, count: int = 5) -> list[dict[str, Any]]:
        """Return bytes, shape and source of the largest results in device memory, one for each shape.

        Results in on-chip memory, S(1) in the program's text, are left out.
        """
        made = (r.instruction for r in self.runs() if not r.fused and r.instruction.kind not in FREE | {"copy-done"})
        return largest_by_shape(
            (
                (i.bytes, re.sub(r"\{.*", "", i.shape), i.source)
                for i in made
                if "S(1)" not in i.shape and i.shape[0] != "("
            ),
            count,
        )

    def traffic(self, once: bool = False) -> Bytes:
        """Return the bytes that the program reads and writes in memory: operands and results of all instructions.

        Collectives are left out, and so is everything in on-chip memory. Of an operand that is sliced, only the slice
        counts. An instruction in a loop counts once per iteration, or only once if `once` is true, for comparison with
        XLA's "bytes accessed".
        """
        return sum(self._moved(r) * (1 if once else r.times) for r in self.runs() if not r.fused)

    def _moved(self, run: Run) -> Bytes:
        i = run.instruction
        if i.kind in FREE or i.kind.endswith("-done") or i.collective:
            return 0
        if i.kind == "fusion":
            return sum(_slices(self.computations[i.called[0]]))
        if i.kind == "copy-start":  # its shape is (result, operand, context)
            return i.memory
        siblings = self._home[i.name]
        if i.kind == "slice-start":  # its shape is ((operand), result, context)
            sizes = _elements(i.shape)
            return sizes[1][0] * ((not sizes[0][1]) + (not sizes[1][1]))
        return sum(
            _part(i, k, siblings[name].memory) for k, name in enumerate(i.operands) if name in siblings
        ) + _written(i, siblings)

    @functools.cached_property
    def _home(self) -> dict[str, dict[str, Instruction]]:
        return {name: computation for computation in self.computations.values() for name in computation}


def _frames(text: str) -> dict[int, tuple[str, int, str, int]]:
    """Return {frame: (file, line, function, calling frame)} from the tables at the start of a program's text."""
    quoted = lambda title: dict(re.findall(r'^(\d+) "(.*)"$', _section(text, title), re.MULTILINE))
    files, functions = quoted("FileNames"), quoted("FunctionNames")
    pattern = r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)"
    locations = {n: rest for n, *rest in re.findall(pattern, _section(text, "FileLocations"), re.MULTILINE)}
    frames = {}
    pattern = r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?"
    for number, location, parent in re.findall(pattern, _section(text, "StackFrames"), re.MULTILINE):
        file, function, line = locations[location]
        calling = int(parent or 0)
        frames[int(number)] = files[file], int(line), functions[function], 0 if calling == int(number) else calling
    return frames


def _section(text: str, title: str) -> str:
    found = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
    return found.group(1) if found else ""


def _slices(fused: dict[str, Instruction]) -> Iterator[Bytes]:
    """Yield the bytes that a fusion reads from each parameter, and those that it writes."""
    for parameter in (i for i in fused.values() if i.kind == "parameter"):
        users = [(i, k) for i in fused.values() for k, name in enumerate(i.operands) if name == parameter.name]
        # several reads of a parameter count at most as one full read
        yield min(parameter.memory, sum(_part(user, k, parameter.memory) for user, k in users))
    root = next(i for i in fused.values() if i.root)
    for out in [fused[name] for name in root.operands] if root.kind == "tuple" else [root]:
        if not out.memory:
            continue
        while out.kind in ("bitcast", "copy") and out.operands[0] in fused:
            out = fused[out.operands[0]]
        yield _written(out, fused)


def _part(user: Instruction, position: int, whole: Bytes) -> Bytes:
    """Return the bytes that an instruction reads from operand `position`, of which `whole` are in device memory."""
    if user.kind in ("dynamic-slice", "slice", "gather") and position == 0:
        return min(user.bytes, whole)
    if user.kind == "dynamic-update-slice" and position == 0:
        return 0  # written in place
    return whole


def _written(i: Instruction, siblings: dict[str, Instruction]) -> Bytes:
    if i.kind == "dynamic-update-slice" and i.operands[1] in siblings:
        return min(siblings[i.operands[1]].bytes, i.memory)
    return i.memory


def _parse(line: str, start: re.Match) -> Instruction | None:
    rest = line[start.end() :]
    cut = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:cut], rest[cut:].lstrip()
    if not (kind := re.match(r"([\w-]+)\(", rest)):
        return None
    end = _closing(rest[kind.end() - 1 :]) + kind.end() - 1
    operands, attributes = rest[kind.end() : end], rest[end:]
    called = tuple(name.strip(" %") for one, many in _CALLED.findall(attributes) for name in (one or many).split(","))
    names = tuple(re.findall(r"%([\w.-]+)", operands))
    return Instruction(start.group(2), kind.group(1), shape, names, called, rest, bool(start.group(1)))


def _closing(text: str) -> int:
    """Return the position of the parenthesis that closes the one at the start of `text`."""
    depth = 0
    for at in re.finditer(r"[()]", text):
        depth += 1 if at.group() == "(" else -1
        if depth == 0:
            return at.start()
    raise ValueError(f"the program's text cannot be parsed, parentheses are not balanced: {text[:80]}")


def shape_bytes(shape: str, on_chip: bool = True) -> Bytes:
    """Return the bytes of a shape, or tuple of shapes, as XLA prints it. Padding that a layout adds does not count.

    on_chip: also count what is in on-chip memory.
    """
    return sum(size for size, there in _elements(shape) if on_chip or not there)


def _elements(shape: str) -> list[tuple[Bytes, bool]]:
    """Return the bytes of each array of a shape, and whether it is in on-chip memory: S(1), or S(2) for flags."""
    found = re.findall(r"\b(pred|[sufc]\d+|bf16|f8\w+)\[([\d,]*)\](?:\{([^}]*)\})?", shape)
    return [
        (
            SIZES.get(kind, 1 if kind.startswith("f8") else 4) * np.prod([int(n) for n in dims.split(",") if n]),
            bool(re.search(r"S\([12]\)", layout)),
        )
        for kind, dims, layout in found
    ]


def _group(text: str) -> int:
    """Return the number of devices in each group of a collective, or 1 if the instruction has no groups.

    Formats of groups: replica_groups={{0,1},{2,3}}, [2,4]<=[8] or mesh['a'=4,'b'=2] {'a'}.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found.group(1).split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(found.group(2))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\)\))?(?: \{([^}]*)\})?", text):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found.group(1))}
        return int(np.prod([sizes[name] for name in re.findall(r"'(\w+)'", found.group(2) or "")]))
    return 1


def largest_by_shape(made: Iterator[tuple[Bytes, str, str]], count: int) -> list[dict[str, Any]]:
    by_shape = {}
    for size, shape, source in sorted(made, key=lambda item: -item[0]):
        by_shape.setdefault(shape, {"bytes": float(size), "shape": shape, "source": source})
        if len(by_shape) == count:
            break
    return list(by_shape.values())
