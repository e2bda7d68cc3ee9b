"""The matrix of methods that tests run through: a row for every preset, and for points that no preset is at."""

from __future__ import annotations

import dataclasses
import inspect

from gap_triton import GapConfig, Stage
from gap_triton.presets import PRESETS

SHARE = 0.4


def preset(name: str, layers: int, cls: bool, budget: float | str = SHARE) -> GapConfig:
    """The preset ``name`` for a decoder of ``layers`` layers, below a vision encoder with or without CLS token."""
    options: dict[str, object] = {"budget": budget}
    parameters = inspect.signature(PRESETS[name]).parameters
    if "layers" in parameters:
        options["layers"] = layers
    if "score" in parameters and not cls:
        options["score"] = "received"
    return GapConfig.preset(name, **options)


# Presets that rank by the vision encoder's attention: "cls", or "received" where it has no CLS token.
_BY_TOWER = "prumerge prumerge+ cls nuwa visionzip scope fastervlm vispruner hiprune vscan"
BY_TOWER = tuple(_BY_TOWER.split())
# Points of the space that no preset is at.
COMPOSED = {
    "region in the decoder": GapConfig(0.4, 1, "text", "region"),
    "stride in the decoder": GapConfig(0.4, 1, "last_token", "stride"),
    "spatial in the decoder": GapConfig(0.4, 1, "spatial"),
    "random in the decoder": GapConfig(0.4, 1, "random"),
    "key norm in the decoder": GapConfig(0.4, 1, "key_norm"),
    "key norm of the tower": GapConfig(0.4, -1, "key_norm", "region"),
    "received, by region": GapConfig(0.4, -1, "received", "region"),
    "max-min in the decoder": GapConfig(0.4, 1, "text", "max_min"),
    "unlike each other, twice": GapConfig(
        0.3, 0, "spatial", "determinant", then=(Stage(0.15, 2, "last_token", "coverage_gain"),)
    ),
    "distinct, merged": GapConfig(0.4, -1, "received", "distinct", "nearest"),
    "random, then spread": GapConfig(
        0.7, -1, "random", then=(Stage(0.5, 0, "text", "region"), Stage(0.2, 2, "spatial"))
    ),
    "a count, three times": GapConfig(
        30, 0, "text", then=(Stage(20, 1, "raters"), Stage(7, 3, "last_token"))
    ),
    "of what is left": GapConfig(
        0.7,
        -1,
        "random",
        then=(Stage(0.7, 0, "text", share_of="left"), Stage(0.3, 2, "unrotated", share_of="left")),
    ),
    "candidates in the decoder": GapConfig(0.3, 1, "text", "region", per_region=3),
    "mostly spread": GapConfig(0.4, 1, "text", "stride", spread=0.9),
    "tile by tile": GapConfig(12, -1, "received", "region", per_region=2, budget_by="tiles"),
    "one token": GapConfig(1, -1, "random", then=(Stage(1, 1, "last_token"),)),
}
NAMES = [*PRESETS, *COMPOSED]


def method(name: str, layers: int, cls: bool) -> GapConfig:
    """The method ``name`` of `NAMES` for a model."""
    return COMPOSED[name] if name in COMPOSED else preset(name, layers, cls)


def renumbered(config: GapConfig, ids: str = "compacted") -> GapConfig:
    """``config`` with other ids."""
    return dataclasses.replace(config, ids=ids)
