"""What stands in series when tokens are pruned, in one launch and in several: a part of ``make kernel-table``.

The kernels are compiled for an H200 as ``kernels_aot.py`` compiles them, launchers and all, and what is in series is read
from their PTX by ``support/ptx.py``. Nothing is timed: a change of a kernel, or of how the work is divided, shows in counts.
Written to docs/results/critical-path.json, and into docs/kernels.md by ``python docs/tables.py``.
"""

from __future__ import annotations

import ast
import functools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from gap_kernels.importance import kernel as importance
from gap_kernels.prune import kernel as prune
from gap_kernels.prune import one_launch
from support import ptx

from bench import floor, shapes
from scripts import kernels_aot

TABLE = kernels_aot.TABLE.with_name("critical-path.json")
TARGET = "sm_90"
MULTIPROCESSORS = 132  # of an H200
COPY_TB_PER_S = 4.3
"""Bandwidth of a large copy on an H200, bytes read plus bytes written: an assumption, nothing was measured here."""

DTYPE = torch.bfloat16
CASES = (
    ("LLaVA-1.5, last row", "llava-1.5", 1, False),
    ("LLaVA-NeXT, last row", "llava-next", 1, False),
    ("Qwen2.5-VL 4k, last row", "qwen2.5-vl-4k", 1, False),
    ("Qwen2.5-VL 4k, 64 text rows", "qwen2.5-vl-4k", 1, True),
    ("LLaVA-1.5, batch 8, last row", "llava-1.5", 8, False),
)


@dataclass(frozen=True)
class Row:
    """One way to prune one prompt.

    Attributes:
        case: The prompt.
        way: In one launch, or in several.
        chosen: Whether ``prune_tokens`` does it this way on that GPU.
        launches: How many.
        programs: Of each launch.
        waves: Of each launch: programs over those that the GPU runs at the same time.
        trips: To global memory, one after another, from the first program's start to the last one's end: of a program of
            each kind, without the time that programs wait for room.
        wide_mib: What vectors of rows move, loads and stores, if no predicate were false.
        floor_mib: What can't be avoided: each input byte read once, each output byte written once.
        floor_us: The time of that at COPY_TB_PER_S.
    """

    case: str
    way: str
    chosen: bool
    launches: int
    programs: list[int]
    waves: list[float]
    trips: int
    wide_mib: float
    floor_mib: float
    floor_us: float


class Part(NamedTuple):
    """Programs of a launch that do the same; ``lines`` are theirs in the kernel's file, all if None."""

    programs: int
    lines: range | None


# Names that a loop's bounds use and that aren't parameters of the kernel, by the function that has the loop.
ALIASES = {
    "row_lse_tile": {"begin": "0", "end": "min(split_keys, num_keys)"},
    "visual_mass_tile": {"SHARING": "GROUP"},
    "stored_mean_tile": {"QUERY_HEADS": "KEY_HEADS * GROUP"},
    "mean_tile": {"BLOCK": "BLOCK_N"},
    "count_valid": {"BLOCK": "BLOCK_ROWS"},
    "prune_kernel": {"first_row": "0"},
    "write_row_keys": {"num_rows": "num_query", "BLOCK": "BLOCK_FILL"},
    "write_score_keys": {"BLOCK": "BLOCK_FILL"},
    "write_selected": {"n": "num_query", "BLOCK": "BLOCK_FILL"},
    "select_threshold": {"n": "num_query", "BLOCK": "BLOCK_SELECT"},
}


def launches_of(case: tuple[str, str, int, bool], one: bool) -> list[partial[object]]:
    """Return the launchers that prune a prompt, on memory that isn't even touched."""
    _, name, batch, text_rows = case
    shape = shapes.find(name)
    empty = functools.partial(kernels_aot.empty, dtype=DTYPE)
    query = empty(batch, shape.query_heads, shape.tokens, shape.head_dim)
    key = empty(batch, shape.key_heads, shape.tokens, shape.head_dim)
    hidden, rotary = empty(batch, shape.tokens, shape.channels), empty(batch, shape.tokens, shape.head_dim)
    ids = torch.zeros(shape.axes, batch, shape.tokens).long()
    visual = torch.arange(shape.visual).repeat(batch, 1)
    rows = torch.arange(shape.text).repeat(batch, 1) if text_rows else None
    mask = torch.ones(batch, shape.tokens, dtype=torch.bool)
    if one:
        given = (query, key, hidden, rotary, rotary, ids, visual, shape.keep, None, rows, mask, None, None)
        return [partial(one_launch.prune_tokens, *given, shape.length)]
    scores, index = torch.empty(batch, shape.visual), torch.zeros(batch, shape.length).long()
    return [
        partial(importance.visual_importance, query, key, visual, rows, mask, None, None),
        partial(prune.surviving_rows, scores, visual, shape.keep, None, mask, shape.tokens, shape.length),
        partial(prune.gather_rows, hidden, rotary, rotary, ids, index),
    ]


@functools.cache
def tree_of(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def loop_at(path: str, line: int) -> tuple[str, ast.For] | None:
    """Return the loop whose head is on a line, and the name of its function."""
    if not Path(path).is_file():
        return None
    for function in tree_of(path).body:
        for node in ast.walk(function):
            if isinstance(function, ast.FunctionDef) and isinstance(node, ast.For) and node.lineno == line:
                return function.name, node
    return None


def times_of(values: dict[str, Any], body: Sequence[ptx.Instruction]) -> int:
    """Return how often a loop of a kernel runs that is launched with ``values``; once where it is a ``while``.

    Raises:
        ValueError: If its bounds aren't known.
    """
    # What counts the rounds is of the loop's own line. Of loops in one another the outermost has the others in its body.
    places = sorted({(each.place.depth, each.place.line, each.place.path) for each in body})
    found = next(filter(None, (loop_at(path, line) for _, line, path in places)), None)
    if found is None:  # as `while`, which nothing is known of
        return 1
    function, loop = found
    names: dict[str, Any] = {"num_query": values.get("num_rows"), "min": min, **values}
    names["tl"] = SimpleNamespace(minimum=min, maximum=max)
    for name, expression in ALIASES.get(function, {}).items():
        names[name] = evaluated(expression, names, names.get(name))
    bounds = [evaluated(ast.unparse(bound), names) for bound in getattr(loop.iter, "args", ())]
    if not bounds or None in bounds:
        raise ValueError(f"{function}: the bounds of `{ast.unparse(loop.iter)}` aren't known; see ALIASES")
    return len(range(*bounds))


def evaluated(expression: str, names: dict[str, Any], otherwise: Any = None) -> Any:
    try:
        return eval(expression, {"__builtins__": {}}, names)
    except (NameError, TypeError):
        return otherwise


def parts_of(kernel: Any, programs: int, values: dict[str, Any]) -> list[Part]:
    """Return the parts of a launch in the order in which they wait for one another.

    Those of the one launch are the branches of its first condition on the number of the program, and end at the values that
    it is compared with.
    """
    if kernel.fn.__name__ != "prune_kernel":
        return [Part(programs, None)]
    source = tree_of(kernel.fn.__code__.co_filename)
    function = next(node for node in source.body if getattr(node, "name", "") == kernel.fn.__name__)
    assert isinstance(function, ast.FunctionDef)
    branch = next(node for node in function.body if isinstance(node, ast.If) and node.orelse)
    parts, first, body = [], 0, [branch]
    while len(body) == 1 and isinstance(body[0], ast.If) and isinstance(body[0].test, ast.Compare):
        end = values[ast.unparse(body[0].test.comparators[0])]
        parts.append(Part(end - first, lines_of(body[0].body)))
        first, body = end, body[0].orelse
    return [*parts, Part(programs - first, lines_of(body))]


def lines_of(body: Sequence[ast.stmt]) -> range:
    return range(body[0].lineno, (body[-1].end_lineno or body[-1].lineno) + 1)


def followed(launch: kernels_aot.Launch) -> tuple[int, int]:
    """Return the trips in series of a launch, and the bytes of its wide accesses."""
    program = ptx.read(launch.compiled.asm["ptx"])
    values, file = launch.values, Path(launch.kernel.fn.__code__.co_filename).name
    threads = 32 * launch.compiled.metadata.num_warps
    parts = parts_of(launch.kernel, math.prod(launch.grid), values)
    own = [part.lines for part in parts if part.lines is not None]
    waiting = waiting_lines()
    done, moved = 0, 0
    for part in parts:

        def belongs(instruction: ptx.Instruction, lines: range | None = part.lines) -> bool:
            line = instruction.place.outermost_line
            of_kernel = instruction.place.outermost_file == file
            return lines is None or line in lines or not (of_kernel and any(line in each for each in own))

        trips = ptx.Trips(arrived=done, waits=lambda each: each.place[:2] in waiting)
        ptx.run(program, trips, belongs, functools.partial(times_of, values))
        if part.programs:
            done = trips.now
            moved += trips.wide_bytes * threads * part.programs
    return done, moved


@functools.cache
def waiting_lines() -> set[tuple[str, int]]:
    """Return the lines at which programs wait for others."""
    from gap_kernels import handover

    lines = lines_of(
        [node for node in tree_of(handover.__file__).body if getattr(node, "name", "") == "wait"]
    )
    return {(handover.__file__, line) for line in lines}


def rows() -> Iterator[Row]:
    """Compile, and follow what the binaries do."""
    for case in CASES:
        name, shape_name, batch, text_rows = case
        of_shape = shapes.Case(shapes.find(shape_name), batch)
        scoring = [floor.importance_work(of_shape, DTYPE, n).bytes for n in (1, of_shape.shape.text)]
        floor_bytes = floor.prune_work(of_shape, DTYPE).bytes + text_rows * (scoring[1] - scoring[0])
        for one in (True, False):
            launched = kernels_aot.launched_by(launches_of(case, one), TARGET)
            programs = [math.prod(launch.grid) for launch in launched]
            if one:
                chosen = (
                    programs[0]
                    <= one_launch.MAX_WAVES * one_launch.PROGRAMS_PER_MULTIPROCESSOR * MULTIPROCESSORS
                )
            measured = [kernels_aot.measured(launch.compiled, name, TARGET) for launch in launched]
            counts = [followed(launch) for launch in launched]
            yield Row(
                case=name,
                way="one launch" if one else "several launches",
                chosen=chosen == one,
                launches=len(launched),
                programs=programs,
                waves=[
                    round(number / ((row.resident or 1) * MULTIPROCESSORS), 1)
                    for number, row in zip(programs, measured, strict=True)
                ],
                trips=sum(trips for trips, _ in counts),
                wide_mib=round(sum(moved for _, moved in counts) / 2**20, 1),
                floor_mib=round(floor_bytes / 2**20, 1),
                floor_us=round(floor_bytes / COPY_TB_PER_S / 1e6, 1),
            )


def write_table() -> None:
    """Write what the installed compiler gives, a row to a line."""
    made = [json.dumps(asdict(row)) for row in rows()]
    head = f'"triton": "{triton.__version__}", "copy_tb_per_s": {COPY_TB_PER_S}'
    TABLE.write_text(f'{{{head}, "rows": [\n' + ",\n".join(made) + "\n]}\n", encoding="utf-8")


if __name__ == "__main__":
    write_table()
