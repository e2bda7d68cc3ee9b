# mypy: disable-error-code="no-untyped-def"
"""Two programs that wait for each other in turn."""

from __future__ import annotations

import triton
import triton.language as tl
from gap_kernels.handover import announce, wait


@triton.jit(do_not_specialize=["rounds"])
def ping_pong_kernel(counter, rounds, APART: tl.constexpr):
    """Hand over ``2 * rounds`` times, by two counters that are zero before."""
    first = tl.program_id(0) == 0
    for i in range(rounds):
        if first:
            announce(counter)
            wait(counter + APART, i + 1)
        else:
            wait(counter, i + 1)
            announce(counter + APART)
