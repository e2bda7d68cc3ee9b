"""What changes from step to step: the task, and how fast the model learns.

The three phases follow how large models of this kind are made: a vision tower that is aligned with words first, then
a decoder that learns from easy to hard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gap_triton.demo.scenes import MOST_OBJECTS

PEAK_RATE = 1.5e-3
WARM_UP = 100  # steps, at the start of a phase that trains weights for the first time


@dataclass(frozen=True)
class Phase:
    """What the steps of one phase learn from.

    Attributes:
        name: What the phase teaches.
        begin: The phase's first step, as a share of all steps.
        answers: Whether the decoder answers questions; otherwise the vision tower alone learns words.
        fewest: Objects in a scene, at least.
        most: Objects in a scene, at most.
    """

    name: str
    begin: float
    answers: bool
    fewest: int
    most: int


PHASES = (
    # Colours and shapes as words. Without it the decoder ignores the question for thousands of steps.
    Phase("name", 0.0, False, 2, MOST_OBJECTS),
    # How to write down where something is, with at most one thing to tell it from.
    Phase("locate, 1 or 2", 0.08, True, 1, 2),
    Phase("locate, 2 to 4", 0.2, True, 2, MOST_OBJECTS),
)


def phase_at(step: int, steps: int) -> Phase:
    """Return the phase of one step."""
    return [phase for phase in PHASES if step >= _first(phase, steps)][-1]


def learning_rate(step: int, steps: int) -> float:
    """Return AdamW's rate at one step: half a cosine down to 0, with a warm-up for the tower and one for the decoder."""
    decoder = _first(PHASES[1], steps)
    warm = (step - decoder if step >= decoder else step) + 1
    return PEAK_RATE * min(warm / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def _first(phase: Phase, steps: int) -> int:
    return math.ceil(phase.begin * steps)
