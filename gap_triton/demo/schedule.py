"""What changes from step to step: how many objects a training scene holds, and how fast the model learns."""

from __future__ import annotations

import math

from gap_triton.demo.scenes import MOST_OBJECTS

PEAK_RATE = 1.5e-3
WARM_UP = 200  # steps


def objects(step: int, steps: int) -> tuple[int, int]:
    """Fewest and most objects in the scenes of one step.

    One object alone comes first: the model learns to write down where something is within a few hundred steps,
    and only then has to learn which of several things is meant.
    """
    if step < 0.05 * steps:
        return 1, 1
    if step < 0.1 * steps:
        return 1, 2
    return 2, MOST_OBJECTS


def learning_rate(step: int, steps: int) -> float:
    """AdamW's rate at one step: linear warm-up, then half a cosine down to nothing."""
    return PEAK_RATE * min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
