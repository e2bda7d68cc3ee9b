"""What is kept of an image, as an engine and a request say it: read, merged, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from ..config import BEFORE_THE_DECODER, GapConfig, Ids, Merge, needs_text
from ..plain import is_int, plain, shown
from ..strategies import Coverage

PREFIX = "gap_"
"""What the options of a request begin with, among the ``mm_processor_kwargs``."""
FIELDS = ("keep", "score", "coverage", "ids", "seed", "exponent", "merge")
COVERAGES: tuple[Coverage, ...] = get_args(Coverage)
MERGES: tuple[Merge, ...] = get_args(Merge)
IDS: tuple[Ids, ...] = ("kept", "compacted")
OPTIONS = (*FIELDS, "preset", "block", "before")
SCORE = "received"  # any tower has it


@dataclass(frozen=True)
class Options:
    """How an image is pruned.

    Attributes:
        config: Its one stage is before the decoder, and the number of survivors follows from the number of tokens.
        block: The number of survivors is rounded down so that the image ends where a block of so many tokens of the KV cache
            ends; None = it is not rounded.
        before: How many tokens of a prompt stand before its image.
    """

    config: GapConfig
    block: int | None = None
    before: int = 0

    @property
    def keeps_everything(self) -> bool:
        """Whether no token is dropped of any image."""
        return isinstance(self.config.keep, float) and self.config.keep == 1.0

    def kept(self, tokens: int) -> int:
        """Return how many of an image's ``tokens`` survive."""
        count = self.config.count(tokens)
        if self.block is None or count >= tokens:
            return count
        rounded = (self.before + count) // self.block * self.block - self.before
        return rounded if rounded > 0 else count

    def factors(self) -> dict[str, Any]:
        """Return what decides about the survivors, by name: of two images that differ in it, neither is the other's."""
        values = {name: getattr(self.config, name) for name in FIELDS}
        return {f"{PREFIX}{name}": value for name, value in values.items()} | {
            f"{PREFIX}block": self.block or 0,
            f"{PREFIX}before": self.before,
        }

    def __str__(self) -> str:
        usual = {"exponent": 1.0, "merge": "none"}
        all_values = {name: getattr(self.config, name) for name in FIELDS}
        values = [f"{name}={value!r}" for name, value in all_values.items() if usual.get(name) != value]
        values += [f"block={self.block}, before={self.before}"] if self.block else []
        return ", ".join(values)


def options_of(engine: Mapping[str, Any], request: Mapping[str, Any] | None = None) -> Options:
    """Return the options of an image.

    Args:
        engine: What ``hf_overrides`` has under ``"gap"``.
        request: The ``mm_processor_kwargs`` of a request; those that begin with ``gap_`` replace what the engine says.

    Raises:
        ValueError: There is no such option, a value is out of range, or no engine can do it; the message has the reason.
    """
    if not isinstance(engine, Mapping):
        raise ValueError(
            f"hf_overrides['gap']={shown(engine)}: expected a dictionary, such as {{'keep': 0.5, 'score': 'received'}}"
        )
    asked = {k[len(PREFIX) :]: v for k, v in (request or {}).items() if k.startswith(PREFIX)}
    for names, where in ((engine, "hf_overrides['gap']"), (asked, "mm_processor_kwargs")):
        prefix = PREFIX if names is asked else ""
        for name in names:
            if name not in OPTIONS:
                expected = ", ".join(f"{prefix}{option}" for option in OPTIONS)
                raise ValueError(
                    f"{where}: there is no {shown(prefix + str(name))}; expected some of {expected}"
                )
    given = {**engine, **asked}
    config = _config_of(given)
    refuse(config)
    block, before = plain(given.get("block")), plain(given.get("before", 0))
    if block is not None and (not is_int(block) or block < 1):
        raise ValueError(
            f"block={shown(block)}: expected the number of tokens of a block of the KV cache, an int >= 1"
        )
    if not is_int(before) or before < 0:
        raise ValueError(
            f"before={shown(before)}: expected the number of tokens before the image, an int >= 0"
        )
    return Options(config, block, before)


def without_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``kwargs`` without what is ours, which no processor of transformers knows."""
    return {name: value for name, value in kwargs.items() if not name.startswith(PREFIX)}


def refuse(config: GapConfig) -> None:
    """Raise ValueError if an engine that caches by image and by position can't prune by ``config``."""
    reason = None
    if config.layer != BEFORE_THE_DECODER or config.then:
        reason = (
            f"then={config.then!r}" if config.layer == BEFORE_THE_DECODER else f"layer={config.layer}",
            "an engine counts the same tokens of a request for all layers, so nothing can be dropped inside the decoder",
        )
    elif isinstance(config.keep, str):
        reason = (
            f"keep={config.keep!r}",
            "the number of tokens must be known before the image is encoded, and outliers are counted after it",
        )
    elif needs_text(config):
        reason = (
            f"score={config.score!r}",
            "what is kept of an image is cached by the image, and would depend on the question",
        )
    elif config.ids not in IDS:
        reason = (
            f"ids={config.ids!r}",
            "it has not been built for an engine, which numbers a prompt before it ranks tokens",
        )
    else:
        reason = _field_beside(config)
    if reason is not None:
        raise ValueError(f"{reason[0]} in vLLM: {reason[1]}. Use gap_triton in transformers for it")


def _field_beside(config: GapConfig) -> tuple[str, str] | None:
    """A field of ``config`` that is none of `FIELDS` and not at its default, and why an engine can't have it."""
    usual = GapConfig(**{"layer": config.layer, **{name: getattr(config, name) for name in FIELDS}})
    for field in fields(config):
        value = getattr(config, field.name)
        if value != getattr(usual, field.name):
            return f"{field.name}={value!r}", "this option has not been built for an engine"
    return None


def _config_of(given: Mapping[str, Any]) -> GapConfig:
    values, preset = {name: plain(given[name]) for name in FIELDS if name in given}, given.get("preset")
    if preset is None:
        return GapConfig(**{"layer": BEFORE_THE_DECODER, "score": SCORE, **values})  # type: ignore[arg-type]
    budget = {"budget": values.pop("keep")} if "keep" in values else {}
    score = {"score": values.pop("score")} if "score" in values else {}
    return replace(GapConfig.preset(preset, **budget, **score), **values)  # type: ignore[arg-type]
