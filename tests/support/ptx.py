"""Reads NVIDIA's PTX: how many trips to global memory a kernel makes one after another, and what its wide accesses move.

Instructions are followed in the order of the text: both sides of a condition, and loops as often as the caller says. The
model is that of a warp, which issues in order and waits where it uses what hasn't arrived:

- what is loaded arrives one trip after its address is known, so independent loads are one trip;
- a store to global memory waits for its value, and no load overtakes it, nor an atomic operation or a barrier;
- so does a branch for its condition, and a wait for asynchronous copies for those it names;
- an atomic operation is a trip, and one more if it releases what was stored before, which has to arrive first.

The compiler of the last step (ptxas) may still move a load ahead of unrelated arithmetic, as the model assumes, but not
ahead of a store or a barrier.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

REGISTER = re.compile(r"%[a-z]+\d+")
LOCATION = re.compile(r"\.loc\s+(\d+ \d+ \d+)(?:,.*inlined_at (\d+ \d+ \d+))?\s*(?://\s*(.*))?")
FRAME = re.compile(r"([\w.]+):(\d+):\d+")
"""Of a comment: triton 3.7 names every call there, 3.9 only the innermost place, and before it where that is called from."""
FILE = re.compile(r'\.file\s+(\d+)\s+"(.*?)"')
LABEL = re.compile(r"(\$\w+):")
TARGET = re.compile(r"\$\w+")
WIDTH = re.compile(r"(?:\.v(\d))?\.[bfus](\d+)$")
WIDE_BYTES = 16
"""Of a thread: what vectors of rows are moved by; index and score accesses are narrower, or the same for all threads."""


class Place(NamedTuple):
    """Where an instruction comes from: the line of the function that has it, and the line of the kernel itself."""

    path: str
    line: int
    outermost_file: str
    outermost_line: int
    depth: int = 0
    """How many calls are inlined one into another there."""


@dataclass
class Instruction:
    """One of the text, with what it writes and reads."""

    name: str
    written: tuple[str, ...]
    read: tuple[str, ...]
    operands: str
    place: Place
    index: int


@dataclass
class Program:
    """A kernel's instructions in order, and where each label stands."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def target(self, instruction: Instruction) -> int | None:
        """Return where a branch leads."""
        found = TARGET.search(instruction.operands) if instruction.name.startswith("bra") else None
        return self.labels.get(found[0]) if found else None

    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each loop: a branch back, and where it leads, if that leads to the branch again."""
        following = self._following()
        found: dict[int, int] = {}
        for instruction in self.instructions:
            first = self.target(instruction)
            if (
                first is not None
                and first <= instruction.index
                and instruction.index in _reached(first, following)
            ):
                found[first] = instruction.index
        return sorted(found.items())

    def _following(self) -> list[list[int]]:
        """Return for each instruction which may come next."""
        following = []
        for instruction in self.instructions:
            target = self.target(instruction)
            always = instruction.name.startswith("ret") or (target is not None and not instruction.read)
            follows = (
                [] if always or instruction.index + 1 == len(self.instructions) else [instruction.index + 1]
            )
            following.append(follows if target is None else [*follows, target])
        return following


def _reached(first: int, following: list[list[int]]) -> set[int]:
    """Return the instructions that a way from one of them leads to, itself among them."""
    reached, ahead = {first}, [first]
    while ahead:
        fresh = set(following[ahead.pop()]) - reached
        reached |= fresh
        ahead.extend(fresh)
    return reached


def read(text: str) -> Program:
    """Read the first kernel of a module."""
    files = {int(number): path for number, path in FILE.findall(text)}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    place = Place("", 0, "", 0)
    callers: dict[
        str, tuple[tuple[str, int], ...]
    ] = {}  # by place, the places that it is called from, itself first
    body = text[text.index(".entry") :]
    for line in body[body.index("{") :].splitlines():
        location = LOCATION.search(line)
        if location:
            number, at, _ = map(int, location[1].split())
            path = files.get(number, "")
            frames = tuple((name, int(called)) for name, called in FRAME.findall(location[3] or "")[1:])
            callers[location[1]] = ((Path(path).name, at), *(callers.get(location[2], ()) or frames))
            if at:
                *_, outermost = callers[location[1]]
                place = Place(path, at, *outermost, len(callers[location[1]]))
            continue
        statement = line.split("//")[0].strip()
        label = LABEL.match(statement)
        if label:
            labels[label[1]] = len(instructions)
        elif statement.endswith(";") and not statement.startswith("."):
            instructions.append(_instruction(statement.rstrip(";"), place, len(instructions)))
    return Program(instructions, labels)


def _instruction(statement: str, place: Place, index: int) -> Instruction:
    guard: tuple[str, ...] = ()
    if statement.startswith("@"):
        predicate, _, statement = statement.partition(" ")
        guard = tuple(REGISTER.findall(predicate))
    name, _, operands = statement.strip().replace("\t", " ").partition(" ")
    first = re.match(r"\s*(\{[^}]*\}|[^,]*)", operands)
    if first is None or name.startswith(("st.", "bra", "bar", "cp.async", "red", "fence", "membar", "ret")):
        return Instruction(name, (), (*guard, *REGISTER.findall(operands)), operands, place, index)
    written = tuple(REGISTER.findall(first[0]))
    rest = REGISTER.findall(operands[first.end() :])
    return Instruction(name, written, (*guard, *rest), operands, place, index)


@dataclass
class Trips:
    """Follows instructions; counts trips in series, and bytes of wide accesses.

    Attributes:
        now: Trips that are over when the next instruction is issued.
        wide_bytes: Of a thread, loaded or stored; predicates taken as true.
        arrived: Trips after which what a `wait` waits for is there.
        waits: Says whether an instruction belongs to such a wait, which is over for good once it is.
    """

    arrived: int = 0
    waits: Callable[[Instruction], bool] = lambda instruction: False
    now: int = 0
    wide_bytes: int = 0
    _known: dict[str, int] = field(default_factory=dict)  # by register, trips until it is known
    _shared: int = 0  # trips until all of shared memory is known
    _storing: bool = False
    _copies: list[tuple[int, int]] = field(default_factory=list)  # asynchronous ones by group: trips, bytes
    _group: tuple[int, int] = (0, 0)
    _waited: set[int] = field(default_factory=set)

    def follow(self, instruction: Instruction) -> None:
        """Issue one instruction."""
        if instruction.index in self._waited:
            return
        if self.waits(instruction):
            self._waited.add(instruction.index)
        name = instruction.name
        ready = max([self._known.get(register, 0) for register in instruction.read], default=0)
        if name.startswith("cp.async.wait_group"):
            kept = int(instruction.operands.split()[0])
            while len(self._copies) > kept:
                self.now = max(self.now, self._copies.pop(0)[0])
        elif name.startswith("cp.async.commit"):
            self._copies.append(self._group)
            self._group = (0, 0)
        elif name.startswith("cp.async") and ".global" in name:
            arrival, size = self._group
            self._group = max(arrival, self.now + 1, ready + 1), size + WIDE_BYTES
            self.wide_bytes += WIDE_BYTES
        elif name.startswith(("atom", "red")) and ".global" in name:
            self._atomic(instruction, ready)
        elif name.startswith("ld.") and ".global" in name:
            arrival = max(self.now, ready) + 1
            if self.waits(instruction):
                arrival = max(arrival, self.arrived + 1)
            self._count_wide(name)
            self._know(instruction, arrival)
        elif name.startswith("st.") and ".global" in name:
            self.now = max(self.now, ready)
            self._storing = True
            self._count_wide(name)
        elif name.startswith("st.shared"):
            self._shared = max(self._shared, ready)
        elif name.startswith("ld.shared"):
            self._know(instruction, max(self._shared, ready))
        elif name.startswith(("bar", "fence", "membar")):
            self.now = max(self.now, self._shared)
        elif name.startswith("bra"):
            self.now = max(self.now, ready)
        else:
            self._know(instruction, ready)

    def leave_loop(self) -> None:
        """Forget copies on their way: a loop that loads ahead asks for nothing more in its last rounds."""
        self.wide_bytes -= sum(size for _, size in self._copies)
        self._copies.clear()

    def _atomic(self, instruction: Instruction, ready: int) -> None:
        self.now = max(self.now, ready)
        if ("acq_rel" in instruction.name or "release" in instruction.name) and self._storing:
            self.now += 1  # what was stored arrives
            self._storing = False
        arrival = self.now + 1
        if self.waits(instruction):
            arrival = max(arrival, self.arrived + 1)
        self._know(instruction, arrival)
        if "relaxed" not in instruction.name:
            self.now = arrival

    def _know(self, instruction: Instruction, trips: int) -> None:
        for register in instruction.written:
            self._known[register] = trips

    def _count_wide(self, name: str) -> None:
        width = WIDTH.search(name)
        size = int(width[1] or 1) * int(width[2]) // 8 if width else 0
        if size >= WIDE_BYTES:
            self.wide_bytes += size


def run(
    program: Program,
    trips: Trips,
    belongs: Callable[[Instruction], bool],
    times: Callable[[Sequence[Instruction]], int],
) -> Trips:
    """Follow the instructions that belong to a part of a program, each loop as many ``times`` as its body is said to run."""
    loops = program.loops()

    def part(first: int, last: int) -> None:
        index = first
        while index <= last:
            inner = [
                end
                for start, end in loops
                if start == index and end <= last and (start, end) != (first, last)
            ]
            if inner and belongs(program.instructions[inner[-1]]):
                for _ in range(times(program.instructions[index : inner[-1] + 1])):
                    part(index, inner[-1])
                trips.leave_loop()
                index = inner[-1] + 1
                continue
            if belongs(program.instructions[index]):
                trips.follow(program.instructions[index])
            index += 1

    part(0, len(program.instructions) - 1)
    return trips
