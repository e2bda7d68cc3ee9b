"""Times of a prefill and of decode steps, variant after variant in turn, so that whatever slows the machine slows all."""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..clock import seconds
from .counting import Counts, count
from .variants import ORACLE, PRUNED, UNPRUNED, Variant, graphed

WARM_UP = 2
"""Prefills, each with a few steps, that are not timed."""
WARM_UP_STEPS = 3
MAX_ERROR = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far logits may be from those of the oracle, as a share of the largest: what another order of summation makes."""


@dataclass
class Measurement:
    """What one variant takes.

    Attributes:
        name: The variant.
        prefill_s: Seconds of each prefill, to the first token.
        decode_s: Seconds of each decode step.
        kv_bytes: Keys and values in the cache after the prefill, as allocated.
        peak_bytes: The most memory that a prefill has at a time, the weights left out; None of a CUDA graph, which holds
            what it needs for good.
        prefill: What a prefill asks of the device.
        decode: What a decode step asks of the device; None on a CPU for one that is compiled, which nothing can count.
    """

    name: str
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    kv_bytes: int = 0
    peak_bytes: int | None = 0
    prefill: Counts = field(default_factory=Counts)
    decode: Counts | None = None


class WrongLogits(ValueError):
    """Two variants that should agree don't, so there is nothing worth measuring."""


def check_against_oracle(pruned: Variant, oracle: Variant, steps: int = 2) -> float:
    """Compare logits of a prefill and of ``steps`` more tokens; returns the largest difference, as a share of the largest.

    Raises:
        WrongLogits: It is more than rounding.
    """
    worst = 0.0
    for step in range(steps + 1):
        got, expected = (each.decode() if step else each.prefill() for each in (pruned, oracle))
        worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
        oracle.token = pruned.token.clone()  # a replay writes the next one into the same tensor
    limit = MAX_ERROR.get(got.dtype, MAX_ERROR[torch.float32])
    if not worst <= limit:
        raise WrongLogits(
            f"{pruned.name}: logits differ from the {oracle.name}'s by {worst:.1e} of the largest; at most {limit:.0e}"
        )
    return worst


def check_all(variants: Sequence[Variant]) -> float:
    """Compare the pruned model with the oracle, and what was captured with what runs as it comes.

    Returns:
        The largest difference of the pruned ones from the oracle, as a share of the largest logit.

    Raises:
        WrongLogits: One is more than rounding.
    """
    by_name = {each.name: each for each in variants}
    oracle = by_name[ORACLE]
    worst = check_against_oracle(by_name[PRUNED], oracle)
    for name, other in ((PRUNED, oracle), (ORACLE, oracle), (UNPRUNED, by_name[UNPRUNED])):
        captured = by_name.get(graphed(name))
        if captured is not None:
            difference = check_against_oracle(captured, other)
            worst = max(worst, difference) if name == PRUNED else worst
    return worst


def measure(
    variants: Sequence[Variant],
    *,
    rounds: int,
    steps: int,
    device: torch.device,
    progress: Callable[[str, int], object] = lambda what, done: None,
) -> dict[str, Measurement]:
    """Measure all variants in turn; which comes first changes from round to round.

    Args:
        variants: What to measure.
        rounds: Timed prefills of each.
        steps: Timed decode steps of each, behind its last prefill.
        device: Where they run.
        progress: Called with what was done, and how many such calls came to an end.

    Returns:
        What each takes, by name.
    """
    found = {each.name: Measurement(each.name) for each in variants}
    for each in variants:
        for _ in range(WARM_UP):
            each.prefill()
            for _ in range(WARM_UP_STEPS):
                each.decode()
        each.prefill()
        found[each.name].kv_bytes = each.kv_bytes()
        found[each.name].peak_bytes = None if each.holds_memory else peak_bytes(each.prefill, device)
        found[each.name].prefill = count(each.prefill, device)
        if each.step is None or device.type == "cuda":
            found[each.name].decode = count(each.decode, device)
        progress("warm-up", 1)

    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for each in rotated(variants, turn):
                found[each.name].prefill_s.append(seconds(each.prefill, device))
                progress("prefill", 1)
        for each in variants:
            each.prefill()
            each.decode()
        for turn in range(steps):
            for each in rotated(variants, turn):
                found[each.name].decode_s.append(seconds(each.decode, device))
                progress("decode", 1)
    finally:
        if collects:
            gc.enable()
    return found


def rotated(variants: Sequence[Variant], turn: int) -> list[Variant]:
    """The variants, beginning with another one in each turn."""
    first = turn % len(variants)
    return [*variants[first:], *variants[:first]]


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call has at a time, above what is there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = sorted((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]")
    return max(itertools.accumulate((change for _, change in changes), initial=0))


@dataclass(frozen=True)
class Spread:
    """Median of a sample, and what 20 and 80 percent of it stay below."""

    median: float
    p20: float
    p80: float

    def times(self, factor: float) -> Spread:
        """The same in another unit."""
        return Spread(self.median * factor, self.p20 * factor, self.p80 * factor)


def spread(values: Sequence[float]) -> Spread:
    """Median, p20 and p80."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), cuts[0], cuts[3])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """``theirs / ours``, round by round: how many times as fast ours is."""
    return spread([theirs_s / ours_s for ours_s, theirs_s in zip(ours, theirs, strict=True)])
