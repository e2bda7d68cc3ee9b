"""The budget of a method: how many visual tokens it is to keep."""

from __future__ import annotations

from ..config import Outliers
from ..plain import is_int, plain, shown

DIGITS = 6
LEAST = 10.0**-DIGITS


def check_budget(budget: object) -> float | int:
    """Return ``budget`` as a share, a float in (0, 1], or as a count, an int >= 1.

    Raises:
        ValueError: It is none.
    """
    value = plain(budget)
    if (is_int(value) and value >= 1) or (isinstance(value, float) and 0.0 < value <= 1.0):
        return value
    raise ValueError(
        f"budget={shown(budget)}: expected a share of the visual tokens, a float in (0, 1], or their number, an int >= 1"
    )


def check_budget_or_outliers(budget: object) -> float | int | Outliers:
    """Return the same, or ``"outliers"``.

    Raises:
        ValueError: It is none.
    """
    value = plain(budget)
    if isinstance(value, str):
        if value == "outliers":
            return "outliers"
        raise ValueError(
            f"budget={shown(budget)}: expected a share, a float in (0, 1], an int >= 1, or 'outliers'"
        )
    return check_budget(budget)


def check_share(budget: object) -> float:
    """Return ``budget`` as a share in (0, 1].

    Raises:
        ValueError: It is none.
    """
    value = plain(budget)
    if not isinstance(value, float) or not 0.0 < value <= 1.0:
        raise ValueError(f"budget={shown(budget)}: expected a share of the visual tokens, a float in (0, 1]")
    return value


def rounded(share: float) -> float:
    """Return a share that was computed, to six digits and never 0, so that it does not show how it was computed."""
    return min(max(round(share, DIGITS), LEAST), 1.0)
