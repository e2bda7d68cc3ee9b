"""Arguments as callers write them: numpy's values as Python's own, and any value in the words of an error message."""

from __future__ import annotations

from numbers import Integral
from typing import TypeGuard

import numpy as np

MAX_SHOWN = 300


def plain(value: object) -> object:
    """Return a value of numpy, an array of no dimension, or a value of a subclass as Python's own int, float, bool or str.

    Anything else is returned as it is. A narrow float is read as the decimal that it prints.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, Integral) and not isinstance(value, np.timedelta64):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(str(value)) if isinstance(value, np.floating) else float(value)
    return str.__str__(value) if isinstance(value, str) else value


def is_int(value: object) -> TypeGuard[int]:
    """Return whether ``value``, a `plain` one, is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: object) -> str:
    """Return ``repr(value)``, cut where it is long; for what can't be printed, such as an int of 5000 digits, its type."""
    try:
        text = repr(value)
    except Exception:  # what a foreign `__repr__` raises says nothing about the argument
        return f"<{type(value).__name__}>"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
