# mypy: disable-error-code="no-untyped-def"
"""How a program of a launch learns that others have finished their part."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def announce(counter):
    """Add one to a counter after everything that this program has stored; return what it was before."""
    tl.debug_barrier()  # every thread's stores come before the addition, which one thread does
    before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()  # and what any thread loads from here on comes after it
    return before


@triton.jit
def wait(counter, wanted):
    """Wait until a counter has reached a value."""
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < wanted:
        pass
    tl.debug_barrier()
