"""The ways to run a model that are compared: unpruned, and each method and budget with ids kept and compacted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from .. import GapConfig
from ..config import Ids
from ..demo.report import budget_name
from ..demo.table import UNPRUNED as UNPRUNED_CONFIG
from ..demo.table import method_name

IDS: tuple[Ids, ...] = ("kept", "compacted")


@dataclass(frozen=True)
class Way:
    """One way to run the model.

    Attributes:
        name: Names it in files and tables.
        method: A preset's name, or score and layer.
        budget: Visual tokens to keep, a share or a count; None = all.
        config: What is pruned.
    """

    name: str
    method: str
    budget: float | int | None
    config: GapConfig


UNPRUNED = Way("unpruned", "unpruned", None, UNPRUNED_CONFIG)


def ways_of(
    model: Any,
    methods: Sequence[str | None],
    budgets: Sequence[float | int],
    ids: Sequence[str] = IDS,
    **axes: Any,
) -> list[Way]:
    """Return all combinations, unpruned first.

    Args:
        model: The model that presets are for; None = any, to see whether the words are right before one is loaded.
        methods: Names of presets; None = `GapConfig` with ``axes``.
        budgets: Shares or counts, in the sense of each method.
        ids: Position ids of the survivors.
        **axes: Fields of `GapConfig`, such as ``layer`` and ``score``.

    Raises:
        ValueError: A method takes no such budget, or there is no such method, or no such field or value.
    """
    ways = [UNPRUNED]
    for method, budget, rule in product(methods, budgets, ids):
        if method is None:
            config = GapConfig(keep=budget, ids=rule, **axes)  # type: ignore[arg-type]
        else:
            try:
                preset = GapConfig.preset(method, budget=budget, model=model)
            except ValueError as error:
                raise ValueError(f"{method}: {error}") from error
            config = replace(preset, ids=rule)  # type: ignore[arg-type]
        name = method or method_name(config)
        ways.append(Way(f"{name}, {budget_name(budget)}, ids {rule}", name, budget, config))
    return ways
