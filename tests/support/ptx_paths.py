"""What comes before what in a kernel's PTX, on any path through it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

LABEL = re.compile(r"(\$L__BB\w+):")
BRANCH = re.compile(r"(@\S+\s+)?bra(?:\.uni)?\s+(\$L__BB\w+);")


class Program:
    """The instructions of a kernel, and which may follow which."""

    def __init__(self, ptx: str) -> None:
        body = ptx[ptx.index(".entry") :]
        # Blocks inside of it end in the first column, too; sections that follow it have none.
        body = body.split(".section")[0]
        body = body[body.index("\n{") : body.rindex("\n}")]
        self.lines: list[str] = []
        labels: dict[str, int] = {}
        for line in (line.strip() for line in body.splitlines()):
            label = LABEL.match(line)
            if label:
                labels[label[1]] = len(self.lines)
            elif line.endswith(";"):
                self.lines.append(line)
        assert not any("brx" in line for line in self.lines)
        self.following: list[list[int]] = []
        for place, line in enumerate(self.lines):
            branch = BRANCH.match(line)
            jump = [labels[branch[2]]] if branch else []
            ends = line == "ret;" or (branch and not branch[1]) or place + 1 == len(self.lines)
            self.following.append(jump if ends else [*jump, place + 1])

    def find(self, wanted: Callable[[str], bool]) -> list[int]:
        """Return the places of the instructions that are wanted."""
        return [place for place, line in enumerate(self.lines) if wanted(line)]

    def reached(self, starts: Iterable[int], barred: Callable[[str], bool] = lambda line: False) -> list[int]:
        """Return the places that may run at or after ``starts`` on a path that holds nothing ``barred``."""
        seen: set[int] = set()
        left = list(starts)
        while left:
            place = left.pop()
            if place not in seen and not barred(self.lines[place]):
                seen.add(place)
                left += self.following[place]
        return sorted(seen)


def is_wait(line: str) -> bool:
    """Return whether a program learns here how far others are."""
    return "ld.global.gpu.acquire" in line


def acquires(line: str) -> bool:
    """Return whether what others have announced is seen by what follows."""
    return is_wait(line) or ("atom.global" in line and "acq" in line)


def is_load(line: str) -> bool:
    """Return whether data is read from memory."""
    return ("ld.global" in line or "cp.async" in line) and not is_wait(line)


def is_store(line: str) -> bool:
    """Return whether data is written to memory."""
    return "st.global" in line


def loads_without_waiting(ptx: str) -> list[str]:
    """Return the loads of what other programs write, marked by ``.cg``, that some path reaches without waiting first."""
    program = Program(ptx)
    lines = [program.lines[place] for place in program.reached([0], acquires)]
    return [line for line in lines if "ld.global.cg" in line]


def loads_after_stores(ptx: str, starts: Callable[[str], bool] | None = None) -> list[list[str]]:
    """Return, for the entry or for each place that ``starts``, the loads behind it that a store precedes."""
    program = Program(ptx)
    found = []
    for start in [0] if starts is None else program.find(starts):
        stores = [place for place in program.reached([start]) if is_store(program.lines[place])]
        after = program.reached({place for store in stores for place in program.following[store]})
        found.append([program.lines[place] for place in after if is_load(program.lines[place])])
    return found
