"""What was measured, in a table, in words and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from .measure import Measurement, Spread, ratio, spread
from .variants import ATTACHED, ORACLE, PRUNED, UNPRUNED, graphed

LITTLE = 0.02
"""Differences below this share are called none."""
MILLISECONDS = 1e3


def bytes_in_words(count: int) -> str:
    """``"12.3 MiB"``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"


def in_milliseconds(values: list[float]) -> Spread:
    """Median, p20 and p80 of times in seconds."""
    return spread(values).times(MILLISECONDS)


def table_of(found: dict[str, Measurement], batch: int) -> Table:
    """A column for each variant."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    prefill = [in_milliseconds(each.prefill_s) for each in found.values()]
    decode = [in_milliseconds(each.decode_s) for each in found.values()]
    table.add_row("first token, ms", *(f"{each.median:.4g}" for each in prefill))
    table.add_row("  p20 - p80", *(f"{each.p20:.4g} - {each.p80:.4g}" for each in prefill))
    table.add_row("next tokens, ms", *(f"{each.median:.3g}" for each in decode))
    table.add_row("  p20 - p80", *(f"{each.p20:.3g} - {each.p80:.3g}" for each in decode))
    table.add_row("tokens/s", *(f"{batch * MILLISECONDS / each.median:.4g}" for each in decode))
    table.add_row("KV cache", *(bytes_in_words(each.kv_bytes) for each in found.values()))
    peaks = (each.peak_bytes for each in found.values())
    table.add_row("peak memory", *("?" if each is None else bytes_in_words(each) for each in peaks))
    for what in ("launches", "syncs"):
        counts = [
            ", ".join("?" if each is None else str(getattr(each, what)) for each in (one.prefill, one.decode))
            for one in found.values()
        ]
        table.add_row("waits" if what == "syncs" else what, *counts)
    return table


def ratios_of(found: dict[str, Measurement]) -> dict[str, dict[str, Spread]]:
    """How many times as fast the first is as the second, for prefill and decode: ratios of one round, their median."""
    pairs = {
        "pruned over sdpa": (PRUNED, UNPRUNED),
        "oracle over sdpa": (ORACLE, UNPRUNED),
        "pruned over oracle": (PRUNED, ORACLE),
        "attached over sdpa": (ATTACHED, UNPRUNED),
        "pruned graph over sdpa graph": (graphed(PRUNED), graphed(UNPRUNED)),
        "pruned graph over oracle graph": (graphed(PRUNED), graphed(ORACLE)),
        "pruned graph over pruned": (graphed(PRUNED), PRUNED),
    }
    return {
        name: {
            "prefill": ratio(found[ours].prefill_s, found[theirs].prefill_s),
            "decode": ratio(found[ours].decode_s, found[theirs].decode_s),
        }
        for name, (ours, theirs) in pairs.items()
        if ours in found and theirs in found
    }


def verdict(found: dict[str, Measurement], *, static: bool, compiled: bool) -> list[str]:
    """What the numbers say, a sentence for prefill and one for decode; and as many on CUDA graphs, where there are any."""
    ratios = ratios_of(found)
    sentences = []
    for what in ("prefill", "decode"):
        gain, share = ratios["pruned over sdpa"][what], ratios["pruned over oracle"][what]
        sentence = f"{what} {_as_words(gain)} than sdpa, {share.median:.0%} of the oracle's speed"
        if gain.p20 <= 1 <= gain.p80:
            sentence = f"{what} as fast as sdpa within the spread, {share.median:.0%} of the oracle's speed"
        if gain.median < 1 - LITTLE and gain.p80 < 1:
            sentence += f": {_why_slower(found, what, static=static, compiled=compiled)}"
        sentences.append(sentence)
    if graphed(PRUNED) in found:
        sentences += [_of_graphs(ratios, what) for what in ("prefill", "decode")]
    return sentences


def _of_graphs(ratios: dict[str, dict[str, Spread]], what: str) -> str:
    over = {
        other: ratios[f"pruned graph over {other}"][what]
        for other in ("sdpa graph", "oracle graph", "pruned")
    }
    return (
        f"as a CUDA graph, {what} {_as_words(over['sdpa graph'])} than sdpa as one, "
        f"{over['oracle graph'].median:.0%} of the oracle's speed as one; {_as_words(over['pruned'])} than without a graph"
    )


def _as_words(gain: Spread) -> str:
    if gain.median >= 1.1:
        return f"{gain.median:.2f} times faster"
    return f"{abs(1 - 1 / gain.median):.0%} {'faster' if gain.median >= 1 else 'slower'}"


def _why_slower(found: dict[str, Measurement], what: str, *, static: bool, compiled: bool) -> str:
    oracle_gains = ratios_of(found)["oracle over sdpa"][what].median > 1 + LITTLE
    if what == "prefill":
        if oracle_gains:
            return (
                "what pruning adds on the host outweighs what it saves; longer prompts or larger batches gain"
            )
        return "the prompt is so short that fewer tokens save nothing"
    if not compiled:
        return f"it is bound by the host; {'--compile' if static else '--cache static --compile'} takes the host out"
    return "too few tokens were dropped for their keys to matter"


def rows_of(found: dict[str, Measurement]) -> list[dict[str, Any]]:
    """One row for each variant, ready for JSON. Times in milliseconds, each with the spread and all its values."""
    rows = []
    for each in found.values():
        faster = {
            "prefill": asdict(ratio(each.prefill_s, found[UNPRUNED].prefill_s)),
            "decode": asdict(ratio(each.decode_s, found[UNPRUNED].decode_s)),
        }
        rows.append(
            {
                "variant": each.name,
                "baseline": UNPRUNED,
                "faster_than_baseline": faster,
                "prefill_ms": asdict(in_milliseconds(each.prefill_s)),
                "decode_ms": asdict(in_milliseconds(each.decode_s)),
                "prefill_ms_values": [value * MILLISECONDS for value in each.prefill_s],
                "decode_ms_values": [value * MILLISECONDS for value in each.decode_s],
                "kv_bytes": each.kv_bytes,
                "peak_bytes": each.peak_bytes,
                **{
                    what: {"prefill": getattr(each.prefill, what), "decode": getattr(each.decode, what, None)}
                    for what in ("launches", "syncs")
                },
            }
        )
    return rows
