"""Counting trips to global memory in PTX: what is in series, and what isn't."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from support.ptx import Instruction, Trips, read, run


def count(body: str, times: int = 1, **options: object) -> Trips:
    program = read(".visible .entry kernel(\n)\n{\n" + body + "\n}\n")
    return run(program, Trips(**options), lambda _: True, lambda _: times)


LOAD = "ld.global.b32 {{ %r{0} }}, [ %rd{1} + 0 ];"
STORE = "st.global.b32 [ %rd{1} + 0 ], {{ %r{0} }};"


@pytest.mark.parametrize(
    ("lines", "trips"),
    [
        ([LOAD.format(1, 1), LOAD.format(2, 2), STORE.format(1, 3), STORE.format(2, 4)], 1),
        ([LOAD.format(1, 1), STORE.format(1, 3), LOAD.format(2, 2), STORE.format(2, 4)], 2),
        ([LOAD.format(1, 1), "mul.wide.s32 %rd2, %r1, 4;", LOAD.format(2, 2), STORE.format(2, 4)], 2),
        ([LOAD.format(1, 1), "add.s32 %r3, %r1, 1;", LOAD.format(2, 2), STORE.format(2, 4)], 1),
        ([LOAD.format(1, 1), "setp.ne.b32 %p1, %r1, 0;", "@%p1 bra $L__BB0_1;", LOAD.format(2, 2)], 1),
        ([LOAD.format(1, 1), "st.shared.b32 [ %r9 + 0 ], %r1;", LOAD.format(2, 2), STORE.format(2, 4)], 1),
        ([LOAD.format(1, 1), "st.shared.b32 [ %r9 + 0 ], %r1;", "bar.sync 0;", LOAD.format(2, 2)], 1),
        (["@%p1 atom.global.gpu.acq_rel.add.u32 %r1, [ %rd1 + 0 ], %r2;"], 1),
        ([STORE.format(1, 1), "@%p1 atom.global.gpu.acq_rel.add.u32 %r1, [ %rd1 + 0 ], %r2;"], 2),
        (["cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;"] * 2, 0),
    ],
)
def test_trips_in_series(lines: list[str], trips: int) -> None:
    assert count("\n".join(lines)).now == trips


def test_the_use_of_what_follows_a_branch_waits_for_it() -> None:
    lines = [
        LOAD.format(1, 1),
        "setp.ne.b32 %p1, %r1, 0;",
        "@%p1 bra $L__BB0_1;",
        LOAD.format(2, 2),
        STORE.format(2, 4),
        "$L__BB0_1:",
        "ret;",
    ]
    assert count("\n".join(lines)).now == 2


LOOP = """
$L__BB0_1:
.loc 1 7 5 // kernel.py:7:5
cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
cp.async.commit_group ;
cp.async.wait_group {0};
@%p1 bra $L__BB0_1;
cp.async.wait_group 0;
"""


COPY = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;\ncp.async.commit_group ;\n"
AHEAD = (
    COPY
    + """
$L__BB0_1:
cp.async.wait_group {0};
"""
    + COPY
    + """
@%p1 bra $L__BB0_1;
cp.async.wait_group 0;
"""
)


@pytest.mark.parametrize(("before", "kept", "trips"), [("", 0, 4), (COPY, 1, 2)])
def test_a_loop_that_loads_ahead_waits_less_often(before: str, kept: int, trips: int) -> None:
    """What it would load after its last round is neither waited for nor counted."""
    found = count(before + AHEAD.format(kept), times=4)
    assert found.now == trips
    assert found.wide_bytes == 4 * 16


def test_a_loop_that_loads_what_it_needs_waits_each_time() -> None:
    found = count(LOOP.format(0), times=4)
    assert found.now == 4
    assert found.wide_bytes == 4 * 16


def test_a_branch_back_to_the_end_is_no_loop() -> None:
    lines = [
        "bra $L__BB0_2;",
        "$L__BB0_1:",
        "ret;",
        "$L__BB0_2:",
        LOAD.format(1, 1),
        STORE.format(1, 3),
        "bra $L__BB0_1;",
    ]
    assert count("\n".join(lines), times=7).now == 1


def test_a_wait_is_over_one_trip_after_what_it_waits_for() -> None:
    acquire = "@%p1 atom.global.gpu.acquire.add.u32 %r1, [ %rd1 + 0 ], %r2;"
    assert count(acquire).now == 1
    waits = {"arrived": 5, "waits": lambda instruction: "acquire" in instruction.name}
    assert count(acquire, **waits).now == 6
    in_a_loop = "$L__BB0_1:\n" + acquire + "\n@%p2 bra $L__BB0_1;\nadd.s32 %r3, %r1, 1;\nbra $L__BB0_2;"
    assert count(in_a_loop, times=4, **waits).now == 6


OF_TRITON_3_7 = ".loc 2 63 29 // tile.py:63:29 @[ kernel.py:155:55 @[ one_launch.py:157:72 ] ]"
OF_TRITON_3_9 = """.loc 1 157 72 // one_launch.py:157:72
    .loc 3 155 55, function_name $L__info_string0, inlined_at 1 157 72 // kernel.py:155:55
    .loc 2 63 29, function_name $L__info_string0, inlined_at 3 155 55 // tile.py:63:29"""


@pytest.mark.parametrize("location", [OF_TRITON_3_7, OF_TRITON_3_9])
def test_places_name_the_function_and_the_line_of_the_kernel(location: str) -> None:
    body = (
        location
        + """
        add.s32 %r1, %r2, %r3;
        .file 1 "/a/one_launch.py"
        .file 2 "/a/tile.py"
        .file 3 "/a/kernel.py"
    """
    )
    (instruction,) = read(".visible .entry kernel(\n)\n{\n" + body + "\n}\n").instructions
    assert instruction.place == ("/a/tile.py", 63, "one_launch.py", 157, 3)
    assert instruction.written == ("%r1",)
    assert instruction.read == ("%r2", "%r3")


def test_the_body_of_a_loop_is_what_is_counted() -> None:
    bodies: list[Sequence[Instruction]] = []
    program = read(".visible .entry kernel(\n)\n{\nret;" + LOOP.format(0) + "ret;\n}\n")
    run(program, Trips(), lambda _: True, lambda body: bodies.append(body) or 1)
    (body,) = bodies
    assert [instruction.name for instruction in body][-1] == "bra"
    assert len(body) == 4
    assert body[0].place.line == 7
