"""Valid calls of everything public in gap_kernels and gap_triton.strategies, each with a naive check of its result.

What is valid is written down here from the documentation: sizes, dtypes, ranges, strides, and values such as NaN where
they have a meaning. The checks are loops in float64 that share nothing with the package; most are the oracles of the other
tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gap_kernels
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from gap_triton import strategies

from .naive import aggregate as naive_aggregate
from .naive import attention as naive_attention
from .naive import corrected as naive_corrected
from .naive import cosine as naive_cosine
from .naive import greedy as naive_greedy
from .naive import importance as naive_importance
from .naive import merge as naive_merge
from .naive import prompt as naive_prompt
from .naive import prune as naive_prune
from .naive import raters as naive_raters
from .naive import received as naive_received
from .naive import region as naive_region
from .naive import rotation as naive_rotation
from .naive import scatter as naive_scatter
from .naive import select as naive_select
from .naive import similarity as naive_similarity
from .naive import strategies as naive_strategies
from .naive import windows as naive_windows

NAN, INF = math.nan, math.inf
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
GAP = 1e-5
"""Numbers that are nearer to each other than this may be ranked either way."""
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2**-8, torch.bfloat16: 2**-5}
"""Of a merged feature, relative and absolute: sums of a few dozen products, rounded to the dtype."""


@dataclass
class Call:
    """A valid call.

    Attributes:
        function: what is called.
        arguments: by name.
        check: raises an AssertionError for a wrong result.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    check: Callable[[Any], None]


class Source:
    """Draws sizes, choices and tensors; the values of a tensor come from one drawn seed."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def size(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def pick(self, options: list[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def maybe(self, make: Callable[[], Any]) -> Any:
        return make() if self.draw(st.booleans()) else None

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The same values with other strides, or at an address that isn't aligned."""
        kind = self.pick(["plain", "plain", "transposed", "sliced", "shifted", "parameter"])
        if kind == "transposed" and tensor.dim() > 1:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == "sliced" and tensor.dim():
            return torch.stack([tensor, tensor], -1)[..., 0]
        if kind == "shifted":
            return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
        if kind == "parameter" and tensor.is_floating_point():
            return torch.nn.Parameter(tensor, requires_grad=self.pick([False, True]))
        return tensor

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.laid_out(torch.randn(shape, generator=self.generator, dtype=torch.float32).to(dtype))

    def ints(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 in ``low..high``, both inclusive."""
        return self.laid_out(torch.randint(low, high + 1, shape, generator=self.generator))

    def bools(self, *shape: int) -> Tensor:
        return self.laid_out(torch.rand(shape, generator=self.generator) < 0.7)

    def scores(self, *shape: int, odd: bool = True) -> Tensor:
        """float32 with ties and, if ``odd``, infinities and NaN."""
        values = torch.randint(-4, 5, shape, generator=self.generator) / 4
        if odd and self.draw(st.booleans()):
            special = torch.tensor([0.0, -0.0, INF, -INF, NAN, 2.0**-149, 1.5])
            pick = torch.randint(0, 14, shape, generator=self.generator)
            values = torch.where(pick < 7, special[pick.clamp(max=6)], values)
        return self.laid_out(values.float())

    def rows(self, batch: int, num_rows: int, count: int) -> Tensor:
        """int64 [batch, count], distinct rows in any order, -1 anywhere."""
        order = torch.rand(batch, num_rows, generator=self.generator).argsort(1)[:, :count]
        order = torch.nn.functional.pad(order, (0, count - order.shape[1]), value=-1)
        hidden = torch.rand(order.shape, generator=self.generator) < 0.15
        return self.laid_out(torch.where(hidden, -1, order))

    def sorted_rows(self, batch: int, num_rows: int, count: int) -> Tensor:
        """int64 [batch, count], distinct rows, ascending, -1 on the left."""
        return self.rows(batch, num_rows, count).sort(1).values

    def counts(self, batch: int, most: int) -> int | Tensor:
        """An int, or one per sample."""
        return self.ints(0, most, batch) if self.draw(st.booleans()) else self.size(0, most)

    def length(self, least: int) -> int | None:
        return self.maybe(lambda: least + self.size(0, 3))


def listed(counts: int | Tensor, batch: int) -> list[int]:
    return [counts] * batch if isinstance(counts, int) else counts.tolist()


def assert_index(found: Tensor, expected: list[list[int]], length: int | None, least: int) -> None:
    """Ascending rows with filler on the left, in ``length`` columns, by default ``least``."""
    width = least if length is None else length
    assert found.dtype == torch.int64
    assert found.tolist() == [[-1] * (width - len(row)) + row for row in expected]
    assert found.shape == (len(expected), width)


# --- gap_kernels ---------------------------------------------------------------------------------------------------


def read_prompt(source: Source) -> Call:
    batch, rows = source.size(0, 3), source.size(1, 12)
    tokens, real = source.ints(0, 4, batch, rows), source.bools(batch, rows)
    ids = source.pick([[], [2], [4, 1]])
    named = torch.isin(tokens, torch.tensor(ids, dtype=torch.int64))
    by_mask = source.pick([False, True])
    masks = {name: source.maybe(lambda: source.bools(batch, rows)) for name in ("answer", "rankers")}
    index = source.maybe(lambda: source.sorted_rows(batch, rows, source.size(1, rows)))
    padded = source.pick([False, True])
    expected = naive_prompt.read_each(
        named.tolist(),
        (real if padded else torch.ones(batch, rows)).tolist(),
        *(None if mask is None else mask.tolist() for mask in masks.values()),
        None if index is None else index.tolist(),
    )
    arguments = {
        "tokens": named if by_mask else tokens,
        "placeholders": [] if by_mask else ids,
        "attention_mask": (real.long() if source.pick([False, True]) else real) if padded else None,
        **masks,
        "index": index,
        "num_visual": source.maybe(lambda: max((each.counts[0] for each in expected), default=0)),
        "num_text": source.maybe(lambda: max((each.counts[2] for each in expected), default=0) + 1),
    }
    return Call(gap_kernels.read_prompt, arguments, lambda found: naive_prompt.assert_reads(found, expected))


def text_raters(source: Source) -> Call:
    batch, rows = source.size(0, 3), source.size(1, 12)
    embeds = source.floats(batch, rows, source.size(0, 5))
    visual_index = source.rows(batch, rows, source.size(0, rows))
    text_rows = source.rows(batch, rows, source.size(0, rows))

    def check(found: Tensor) -> None:
        naive_raters.assert_raters(found, embeds, visual_index, text_rows)

    arguments = {"embeds": embeds, "visual_index": visual_index, "text_rows": text_rows}
    return Call(gap_kernels.text_raters, arguments, check)


def text_cosine(source: Source) -> Call:
    batch, rows = source.size(0, 3), source.size(1, 12)
    embeds = source.floats(batch, rows, source.size(0, 5))
    visual_index = source.rows(batch, rows, source.size(0, rows))
    text_rows = source.rows(batch, rows, source.size(0, rows))

    def check(found: Tensor) -> None:
        for sample, named in enumerate(text_rows.tolist()):
            total = embeds[sample].detach().double()[[row for row in named if row >= 0]].sum(0)
            assume(float(total.norm()) == 0 or float(total.norm()) > 1e-3)
        naive_cosine.assert_cosines(found, embeds, visual_index, text_rows)

    arguments = {"embeds": embeds, "visual_index": visual_index, "text_rows": text_rows}
    return Call(gap_kernels.text_cosine, arguments, check)


def scatter_rows(source: Source) -> Call:
    batch, num_rows, channels = source.size(0, 3), source.size(0, 9), source.size(0, 3)
    dtype, some = source.pick(FLOATS), source.maybe(lambda: source.size(0, 9))
    length = source.size(0, 6)
    arguments = {
        "values": source.floats(batch, length, channels, dtype=dtype),
        "index": source.rows(batch, num_rows if some is None else some, length),
        "num_rows": num_rows,
        "among": None if some is None else source.rows(batch, num_rows, some),
        "base": source.maybe(lambda: source.floats(batch, num_rows, channels, dtype=dtype)),
    }

    def check(found: Tensor) -> None:
        plain = {name: x.detach() if isinstance(x, Tensor) else x for name, x in arguments.items()}
        assert torch.equal(found, naive_scatter.scattered(**plain))

    return Call(gap_kernels.scatter_rows, arguments, check)


def unrotate(source: Source) -> Call:
    batch, rows, key_heads, half = source.size(0, 2), source.size(0, 5), source.size(1, 2), source.size(0, 3)
    head_dim, axes = 2 * half + source.size(half == 0, 2), source.pick([None, 1, 3])
    dtype = source.pick(FLOATS)
    shape = [] if axes is None else [axes]
    angle = 9 * torch.randn(*shape, source.pick([1, batch]), rows, 2 * half, generator=source.generator)
    stretch = source.pick([1.0, 1.5])
    pairs = naive_rotation.pairs_of(head_dim, 2 * half, source.pick([False, True]), axes or 1)
    arguments = {
        "query": source.floats(batch, key_heads * source.size(1, 2), rows, head_dim, dtype=dtype),
        "key": source.floats(batch, key_heads, rows, head_dim, dtype=dtype),
        "cos": source.laid_out(stretch * angle.cos()),
        "sin": source.laid_out(stretch * angle.sin()),
        "pairs": source.laid_out(pairs),
        "rescale": stretch != 1.0,
    }

    def check(found: tuple[Tensor, Tensor]) -> None:
        cos, sin = arguments["cos"].detach(), arguments["sin"].detach()
        for result, name in zip(found, ("query", "key"), strict=True):
            assert result.dtype == dtype
            again = naive_rotation.rotated(result.detach(), cos, sin, pairs)
            tolerance = 4 * ROUNDING[dtype] if dtype != torch.float64 else 1e-5  # of cos and sin in float32
            torch.testing.assert_close(
                again, arguments[name].detach().double(), rtol=tolerance, atol=tolerance
            )

    return Call(gap_kernels.unrotate, arguments, check)


def topk_indices(source: Source) -> Call:
    batch, entries = source.size(0, 3), source.size(0, 12)
    scores, k = source.scores(batch, entries), source.counts(batch, entries)
    counts = listed(k, batch)
    most = max(counts, default=0) if isinstance(k, Tensor) else k
    length = source.length(most)

    def check(found: Tensor) -> None:
        wanted = [naive_select.oracle(row, count) for row, count in zip(scores.tolist(), counts, strict=True)]
        assert_index(found, wanted, length, most)

    return Call(gap_kernels.topk_indices, {"scores": scores, "k": k, "length": length}, check)


def window_ranks(source: Source) -> Call:
    batch, grid = source.size(0, 3), (source.size(1, 6), source.size(1, 6))
    cells = grid[0] * grid[1]
    arguments = {
        "scores": source.scores(batch, cells),
        "earlier": source.scores(batch, cells),
        "grid": source.pick([tuple, list])(grid),
        "count": source.size(0, cells + 1),
        "windows": source.pick([1, 2, 4, 10**30]),
    }

    def check(found: Tensor) -> None:
        given = arguments["count"], min(arguments["windows"], 2**40)
        for sample, line in enumerate(arguments["scores"].tolist()):
            wanted = naive_windows.ranks(line, arguments["earlier"][sample].tolist(), grid, *given)
            assert torch.equal(found[sample], wanted)

    return Call(gap_kernels.window_ranks, arguments, check)


def greedy_indices(source: Source) -> Call:
    batch, tokens, channels = source.size(0, 2), source.size(0, 7), source.size(0, 6)
    features = source.floats(batch, tokens, channels, dtype=source.pick(FLOATS))
    rule = source.pick(["max_min", "determinant", "coverage_gain"])
    scores = None if rule == "max_min" else source.maybe(lambda: source.scores(batch, tokens))
    mask = source.maybe(lambda: source.bools(batch, tokens))
    exponent = source.pick([1, 1.0, 0.5, 0])
    k = source.pick([source.counts(batch, tokens + 3), 2**62, 10**30])
    counts = [min(count, tokens) for count in listed(k, batch)]
    most = max(counts, default=0) if isinstance(k, Tensor) else min(k, tokens)
    length = source.length(most)

    def check(found: Tensor) -> None:
        wanted = []
        for sample, count in enumerate(counts):
            row, clear = naive_greedy.oracle(
                features[sample].detach(),
                count,
                rule,
                None if scores is None else scores[sample].tolist(),
                exponent,
                None if mask is None else mask[sample].tolist(),
            )
            assume(clear > naive_greedy.CLEAR)
            wanted.append(row)
        assert_index(found, wanted, length, most)

    arguments = {
        "features": features,
        "k": k,
        "rule": rule,
        "scores": scores,
        "exponent": exponent,
        "mask": mask,
        "length": length,
    }
    return Call(gap_kernels.greedy_indices, arguments, check)


def distinct_indices(source: Source) -> Call:
    batch, tokens, channels = source.size(0, 2), source.size(0, 12), source.size(0, 6)
    features = source.floats(batch, tokens, channels, dtype=source.pick(FLOATS))
    scores, k = source.scores(batch, tokens), source.size(0, tokens)
    important, at_once = source.size(0, k), source.pick([1, 2, 8, 2**40])

    def check(found: Tensor) -> None:
        wanted = []
        for sample, row in enumerate(scores.tolist()):
            given = (features[sample].detach(), row, k, important, at_once)
            index, clear = naive_similarity.distinct(*given)
            assume(clear > naive_similarity.CLEAR)
            wanted.append(index)
        assert_index(found, wanted, None, k)

    arguments = {
        "features": features,
        "scores": scores,
        "k": k,
        "important": important,
        "removed_at_once": at_once,
    }
    return Call(gap_kernels.distinct_indices, arguments, check)


def least_similar_indices(source: Source) -> Call:
    batch, tokens, channels = source.size(0, 2), source.size(0, 9), source.size(0, 6)
    features = source.floats(batch, tokens, channels, dtype=source.pick(FLOATS))
    pivots = source.rows(batch, tokens, source.size(0, tokens + 1))
    mask = source.maybe(lambda: source.bools(batch, tokens))
    k = source.pick([source.counts(batch, tokens + 3), 2**62, 10**30])
    counts = [min(count, tokens) for count in listed(k, batch)]
    most = max(counts, default=0) if isinstance(k, Tensor) else min(k, tokens)
    length = source.length(most)

    def check(found: Tensor) -> None:
        wanted = []
        for sample, count in enumerate(counts):
            hidden = None if mask is None else mask[sample].tolist()
            given = (features[sample].detach(), pivots[sample].tolist(), count, hidden)
            index, clear = naive_similarity.least_similar(*given)
            assume(clear > naive_similarity.CLEAR)
            wanted.append(index)
        assert_index(found, wanted, length, most)

    arguments = {"features": features, "pivots": pivots, "k": k, "mask": mask, "length": length}
    return Call(gap_kernels.least_similar_indices, arguments, check)


def neighbours_of(source: Source, groups: int, entries: int) -> Tensor:
    """int32 [groups, entries, R], others of each, distinct, -1 anywhere."""
    most = source.size(0, 8)
    places = torch.rand(groups, entries, max(entries, 1), generator=source.generator).argsort(-1)[
        ..., :entries
    ]
    itself = places == torch.arange(entries)[:, None]
    others = torch.where(itself, -1, places)[..., :most]
    others = torch.nn.functional.pad(others, (0, most - others.shape[-1]), value=-1)
    hidden = torch.rand(others.shape, generator=source.generator) < 0.3
    return source.laid_out(torch.where(hidden, -1, others).int())


def topk_per_region(source: Source) -> Call:
    batch, entries = source.size(0, 3), source.size(0, 10)
    scores = source.scores(batch, entries)
    neighbours = neighbours_of(source, source.pick([1, batch]), entries)
    per_region = source.pick([None, 1, 2, 3, 9, 2**40, 10**30])
    if per_region is None:
        neighbours = gap_kernels.grid_neighbours((1, max(entries, 1)))[None, :entries]
    k = source.pick([source.counts(batch, entries + 3), 2**62, 10**30])
    counts = [min(count, entries) for count in listed(k, batch)]
    most = max(counts, default=0) if isinstance(k, Tensor) else min(k, entries)
    length = source.length(most)

    def check(found: Tensor) -> None:
        around = neighbours.expand(batch, -1, -1).tolist()
        wanted = [
            naive_region.oracle(row, near, per_region, count)
            for row, near, count in zip(scores.tolist(), around, counts, strict=True)
        ]
        assert_index(found, wanted, length, most)

    arguments = {
        "scores": scores,
        "neighbours": neighbours,
        "per_region": per_region,
        "k": k,
        "length": length,
    }
    return Call(gap_kernels.topk_per_region, arguments, check)


def grid_neighbours(source: Source) -> Call:
    grid = source.pick([tuple, list])([source.size(1, 6), source.size(1, 6)])
    region = (source.size(1, 3), source.size(1, 3))
    device = source.pick([None, "cpu", torch.device("cpu"), "meta"])

    def check(found: Tensor) -> None:
        assert found.dtype == torch.int32
        assert found.device.type == (device.type if isinstance(device, torch.device) else device or "cpu")
        assert found.shape == (grid[0] * grid[1], region[0] * region[1] - 1)
        if not found.is_meta:
            for cells in naive_region.regions(tuple(grid), region):
                for cell in cells:
                    others = [other for other in cells if other != cell]
                    assert [other for other in found[cell].tolist() if other >= 0] == others

    return Call(gap_kernels.grid_neighbours, {"grid": grid, "region": region, "device": device}, check)


def attention_tensors(
    source: Source, most_past: int = 3, least_batch: int = 0
) -> tuple[torch.dtype, Tensor, Tensor]:
    dtype = source.pick(FLOATS)
    batch, key_heads, group = source.size(least_batch, 2), source.size(1, 2), source.size(1, 2)
    rows, past, dim = source.size(1, 5), source.size(0, most_past), source.size(1, 9)
    query = source.floats(batch, key_heads * group, rows, dim, dtype=dtype)
    return dtype, query, source.floats(batch, key_heads, rows + past, dim, dtype=dtype)


def visual_importance(source: Source) -> Call:
    dtype, query, key = attention_tensors(source)
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    visual_index = source.ints(-1, rows - 1, batch, source.size(0, 4))
    options = {
        "rows": source.maybe(lambda: source.ints(-1, rows - 1, batch, source.size(0, 3))),
        "attention_mask": source.maybe(lambda: source.bools(batch, keys)),
        "scale": source.pick([None, None, 0.3, -1, 0]),
        "causal": source.pick([True, False]),
        "value": source.maybe(
            lambda: source.floats(batch, key.shape[1], keys, source.size(0, 3), dtype=dtype)
        ),
        "head_reduction": source.pick(["mean", "max"]),
    }
    expected, lse = naive_importance.oracle(query.detach(), key.detach(), visual_index, **options)
    if batch:
        options["lse"] = source.maybe(lambda: lse.to(source.pick([torch.float32, torch.float64])))

    def check(found: Tensor) -> None:
        tolerance = 1e-5 if options.get("lse") is not None else naive_importance.TOLERANCE[dtype]
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=10 * tolerance, atol=tolerance)

    arguments = {"query": query, "key": key, "visual_index": visual_index, **options}
    return Call(gap_kernels.visual_importance, arguments, check)


def corrected_importance(source: Source) -> Call:
    dtype, query, key = attention_tensors(source)
    batch, heads, rows, head_dim = query.shape
    channels = source.size(1, 6)
    options = {
        "rows": source.maybe(lambda: source.ints(-1, rows - 1, batch, source.size(0, 3))),
        "attention_mask": source.maybe(lambda: source.bools(batch, key.shape[2])),
        "scale": source.pick([None, None, 0.3, -1, 0]),
    }
    angles = naive_corrected.make_angles(batch, rows, channels, source.pick(FLOATS))
    arguments = {
        "query": query,
        "key": key,
        "visual_index": source.ints(-1, rows - 1, batch, source.size(0, 4)),
        **dict(zip(("cos", "sin"), map(source.laid_out, angles), strict=True)),
        # Not turned, or by a sum: differences could be 0, and so could be what is divided by.
        "turns": source.ints(0, channels, head_dim),
        "heads": source.size(1, heads),
        **options,
    }
    exact = {name: x.detach() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    expected, clear = naive_corrected.oracle(**exact)

    def check(found: Tensor) -> None:
        assume(clear > naive_corrected.CLEAR)
        tolerance = naive_corrected.TOLERANCE[dtype]
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=10 * tolerance, atol=tolerance)

    return Call(gap_kernels.corrected_importance, arguments, check)


def attention(source: Source) -> Call:
    dtype, query, key = attention_tensors(source, most_past=2)
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    options = {
        "causal": source.pick([True, False]),
        "attention_mask": source.maybe(lambda: source.bools(batch, keys)),
        "scale": source.pick([None, 0.3, -1]),
    }
    value = source.floats(*key.shape, dtype=dtype)
    columns = source.maybe(lambda: source.ints(-1, rows - 1, batch, source.size(0, 3)))
    asked = None if columns is None else source.maybe(lambda: source.ints(-1, rows - 1, batch, 2))

    def check(found: gap_kernels.AttentionOutput) -> None:
        given = (query.detach(), key.detach(), value.detach())
        output, lse = naive_attention.oracle(*given, **options)
        tolerance = naive_attention.TOLERANCE[dtype]
        assert found.output.dtype == dtype
        torch.testing.assert_close(found.output.double(), output, rtol=10 * tolerance, atol=tolerance)
        torch.testing.assert_close(found.lse.double(), lse, rtol=1e-4, atol=1e-5)
        if columns is None:
            assert found.importance is None
        else:
            wanted = naive_importance.oracle(*given[:2], columns, asked, **options_of_importance(options))[0]
            torch.testing.assert_close(found.importance.double(), wanted, rtol=1e-4, atol=1e-5)

    arguments = {
        "query": query,
        "key": key,
        "value": value,
        **options,
        "importance_rows": asked,
        "importance_columns": columns,
    }
    return Call(gap_kernels.attention, arguments, check)


def options_of_importance(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("attention_mask", "scale", "causal")}


def attention_received(source: Source) -> Call:
    dtype, query, key = attention_tensors(source, most_past=0)
    batch, tokens = query.shape[0], query.shape[2]
    bounds = None
    if batch == 1 and source.pick([True, False]):
        inside = sorted(source.size(0, tokens) for _ in range(source.size(0, 2)))
        bounds = torch.tensor([0, *inside, tokens], dtype=torch.int32)
    options = {
        "attention_mask": source.maybe(lambda: source.bools(batch, tokens)),
        "cu_seqlens": bounds,
        "causal": source.pick([True, False]),
        "scale": source.pick([None, 0.3, -1]),
    }
    expected, lse = naive_received.oracle(query.detach(), key.detach(), **options)
    options["lse"] = source.maybe(lambda: lse.float())

    def check(found: Tensor) -> None:
        tolerance = 1e-5 if options["lse"] is not None else naive_received.TOLERANCE[dtype]
        torch.testing.assert_close(found.double(), expected, rtol=10 * tolerance, atol=tolerance)

    return Call(gap_kernels.attention_received, {"query": query, "key": key, **options}, check)


def prompt_rows(source: Source, batch: int, rows: int) -> dict[str, Tensor]:
    width, other = source.size(0, 4), source.pick(FLOATS)
    cos = source.floats(1, rows, width, dtype=other).expand(batch, -1, -1)
    axes = source.pick([(), (1,), (3,)])
    return {
        "hidden_states": source.floats(batch, rows, source.size(0, 4), dtype=source.pick(FLOATS)),
        "cos": cos,
        "sin": source.floats(batch, rows, width, dtype=other),
        "position_ids": source.ints(-(2**62), 2**62, *axes, batch, rows),
    }


def pruning(source: Source, batch: int, rows: int) -> dict[str, Any]:
    """What both ways to prune take, but scores: a count may be larger than what there is."""
    visual_index = source.rows(batch, rows, source.size(0, 6))
    keep = source.pick([source.counts(batch, visual_index.shape[1] + 2), 2**63 - 1, 10**30])
    return {"visual_index": visual_index, "keep": keep}


def coverage_of(source: Source, batch: int, num_visual: int) -> dict[str, Any]:
    """How scores choose, with what that needs; neighbours are mutual where these say how many are candidates."""
    coverage = source.pick(["topk", "region", "stride"])
    groups, given = source.pick([1, batch]), dict.fromkeys(("neighbours", "per_region", "order", "spread"))
    if coverage == "stride":
        given["order"] = source.ints(-2, 2 * num_visual, groups, num_visual)
        given["spread"] = source.pick([None, 0, 0.25, 0.123456789, 1.0])
    elif coverage == "region":
        given["per_region"] = source.pick([None, 1, 2, 10**30])
        given["neighbours"] = neighbours_of(source, groups, num_visual)
        if given["per_region"] is None:
            pairs = (torch.arange(num_visual) ^ 1)[:, None].int()
            given["neighbours"] = torch.where(pairs < num_visual, pairs, -1).expand(groups, -1, -1)
    return {"coverage": coverage, **given}


def expected_survivors(
    scores: Tensor, how: dict[str, Any], spread: dict[str, Any], rows: int, mask: Tensor | None
) -> list[list[int]]:
    batch = len(how["visual_index"])
    counts = [min(count, 99) for count in listed(how["keep"], batch)]
    real = None if mask is None else mask.tolist()
    given = {
        name: value.expand(batch, *value.shape[1:]).tolist() if isinstance(value, Tensor) else value
        for name, value in spread.items()
        if name != "coverage"
    }
    return naive_prune.oracle(scores.tolist(), how["visual_index"].tolist(), counts, rows, real, **given)


def assert_pruned(
    found: gap_kernels.PrunedTokens, wanted: list[list[int]], kept: dict[str, Tensor], length: int | None
) -> None:
    longest = max((len(row) for row in wanted), default=0)
    naive_prune.check_rows(found, kept, wanted, longest if length is None else length)


def prune_by_score(source: Source) -> Call:
    batch, rows = source.size(0, 3), source.size(1, 9)
    kept, how = prompt_rows(source, batch, rows), pruning(source, batch, rows)
    scores = source.scores(*how["visual_index"].shape)
    mask = source.maybe(lambda: source.bools(batch, rows))
    spread = coverage_of(source, batch, how["visual_index"].shape[1])
    wanted = expected_survivors(scores, how, spread, rows, mask)
    length = source.length(max(1, *(len(row) for row in wanted), 1))
    arguments = {"scores": scores, **kept, **how, "attention_mask": mask, "length": length, **spread}
    return Call(
        gap_kernels.prune_by_score, arguments, lambda found: assert_pruned(found, wanted, kept, length)
    )


def prune_tokens(source: Source) -> Call:
    _, query, key = attention_tensors(source)
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    kept, how = prompt_rows(source, batch, rows), pruning(source, batch, rows)
    mask = source.maybe(lambda: source.bools(batch, keys))
    options = {
        "rows": source.maybe(lambda: source.ints(-1, rows - 1, batch, source.size(1, 2))),
        "attention_mask": mask,
        "scale": source.pick([None, 0.3]),
    }
    scores, _ = naive_importance.oracle(query.detach(), key.detach(), how["visual_index"], **options)
    length = source.maybe(lambda: rows + source.size(0, 3))
    spread = coverage_of(source, batch, how["visual_index"].shape[1])

    def check(found: gap_kernels.PrunedTokens) -> None:
        torch.testing.assert_close(found.scores.double(), scores, rtol=1e-4, atol=1e-5)
        real = None if mask is None else mask[:, keys - rows :]
        wanted = expected_survivors(found.scores, how, spread, rows, real)
        assert_pruned(found, wanted, kept, length)

    arguments = {"query": query, "key": key, **kept, **how, **options, "length": length, **spread}
    return Call(gap_kernels.prune_tokens, arguments, check)


def spatial_aggregate(source: Source) -> Call:
    batch, grid = source.size(0, 2), (source.size(1, 4), source.size(1, 4))
    patches, count = grid[0] * grid[1], source.size(0, 4)
    dtype = source.pick(FLOATS)
    features = source.floats(batch, patches, source.size(0, 4), dtype=dtype)
    similarity = source.floats(batch, patches, source.size(0, 4), dtype=source.pick(FLOATS))
    anchors = source.ints(-1, patches - 1, batch, count)
    arguments = {
        "features": features,
        "similarity_features": similarity,
        "anchors": anchors,
        "grid": source.pick([tuple, list])(grid),
        "radius": source.pick([1e-30, 0.5, 1, 2.5, 30.0, INF]),
        "self_weight": source.pick([None, 1.0, 0, -2.5]),
    }
    if source.pick([False, True]):
        quantile = source.pick([0, 0.1, 0.123456789, 0.55, 1])
        arguments |= {"scores": source.scores(batch, patches), "pillar_quantile": quantile}
    else:
        arguments["pillars"] = source.maybe(lambda: source.bools(batch, count))

    def check(found: Tensor) -> None:
        plain = {
            name: value.detach() if isinstance(value, Tensor) else value for name, value in arguments.items()
        }
        tolerance = ROUNDING[dtype]
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), naive_aggregate.oracle(**plain), rtol=tolerance, atol=tolerance
        )

    return Call(gap_kernels.spatial_aggregate, arguments, check)


# --- gap_triton.strategies -----------------------------------------------------------------------------------------


def spatial_order(source: Source) -> Call:
    grid = source.pick([tuple, list])([source.size(1, 9), source.size(1, 9)])
    device = source.pick([None, "cpu", torch.device("cpu"), "meta"])

    def check(found: Tensor) -> None:
        assert found.dtype == torch.int64
        assert found.shape == (grid[0] * grid[1],)
        if not found.is_meta:
            # The Bayer matrix of the next power of two, by its recursion.
            bayer = [[0]]
            while len(bayer) < max(grid):
                bayer = [
                    [4 * bayer[r % len(bayer)][c % len(bayer)] + quarter for c, quarter in halves]
                    for r in range(2 * len(bayer))
                    for halves in [[(c, quarter_of(r, c, len(bayer))) for c in range(2 * len(bayer))]]
                ]
            cells = [bayer[r][c] for r in range(grid[0]) for c in range(grid[1])]
            assert found.tolist() == [sorted(cells).index(cell) for cell in cells]

    return Call(strategies.spatial_order, {"grid": grid, "device": device}, check)


def quarter_of(row: int, column: int, half: int) -> int:
    return [[0, 2], [3, 1]][row // half][column // half]


def choose(source: Source) -> Call:
    coverage = source.pick(["topk", "region", "stride"])
    groups, grid = source.size(0, 3), (source.size(1, 5), source.size(1, 5))
    cells = grid[0] * grid[1]
    # Where a cell that is alone in its region is scored -inf it may count as filler.
    scores = source.scores(groups, cells, odd=coverage != "region")
    keep, per_region = source.counts(groups, cells), source.pick([None, 1, 3, 10**30])
    spread = source.pick([None, 0, 0.3, 0.294118, 1.0])
    counts = listed(keep, groups)
    most = max(counts, default=0) if isinstance(keep, Tensor) else keep
    length = source.length(most)
    shared = source.pick([1, groups])
    arguments = {
        "scores": scores,
        "keep": keep,
        "coverage": coverage,
        "neighbours": gap_kernels.grid_neighbours(grid)[None].expand(shared, -1, -1),
        "per_region": per_region,
        "order": strategies.spatial_order(grid)[None].expand(shared, -1),
        "spread": spread,
        "length": length,
    }

    def check(found: Tensor) -> None:
        wanted = [
            sorted(naive_strategies.expected_choice(coverage, row, grid, count, per_region, spread))
            for row, count in zip(scores.tolist(), counts, strict=True)
        ]
        assert_index(found, wanted, length, most)

    return Call(strategies.choose, arguments, check)


def merge_inputs(source: Source, rows: int) -> tuple[torch.dtype, Tensor, Tensor, Tensor]:
    """Features [G, N, C], keys [G, N, E] whose cosines are apart, and scores [G, N]."""
    groups, dtype = source.size(0, 2), source.pick(FLOATS)
    features = source.floats(groups, rows, source.size(0, 4), dtype=dtype)
    keys = source.floats(groups, rows, source.size(2, 5), dtype=source.pick(FLOATS))
    return dtype, features, keys, torch.rand(groups, rows, generator=source.generator)


def assume_apart(keys: Tensor) -> None:
    """Skip keys of which two are about equally similar to a third."""
    unit = torch.nn.functional.normalize(keys.detach().double(), dim=-1)
    assume(bool(((unit @ unit.transpose(1, 2)).sort().values.diff() > GAP).all()))


def merged(
    function: Callable[..., Any], arguments: dict[str, Any], rows: str, dtype: torch.dtype, wanted: Any
) -> Call:
    """A merge; ``wanted`` maps one sample's number and its kept rows to features by row."""

    def check(found: strategies.Merged) -> None:
        kept = [[row for row in line if row >= 0] for line in arguments[rows].tolist()]
        assert found.features.dtype == dtype
        expected = [wanted(sample, own) for sample, own in enumerate(kept)]
        naive_strategies.expect(
            strategies.Merged(found.index, found.features.detach()), expected, ROUNDING[dtype]
        )

    return Call(function, arguments, check)


def average(source: Source) -> Call:
    rows = source.size(0, 8)
    dtype, features, _, scores = merge_inputs(source, rows)
    kept = source.rows(len(features), rows, source.size(0, rows))
    arguments = {"features": features, "scores": scores, "kept": kept}
    plain = features.detach()

    def wanted(sample: int, own: list[int]) -> dict[int, Tensor]:
        return naive_strategies.averaged(plain[sample], scores[sample].tolist(), own)

    return merged(strategies.average, arguments, "kept", dtype, wanted)


def cluster(source: Source) -> Call:
    groups, rows, dtype = source.size(0, 2), source.size(0, 8), source.pick(FLOATS)
    features = source.floats(groups, rows, source.size(2, 5), dtype=dtype)
    assume_apart(features)
    kept = source.rows(groups, rows, source.size(0, rows))

    def wanted(sample: int, own: list[int]) -> dict[int, Tensor]:
        return naive_strategies.clustered(features[sample].detach(), own)

    return merged(strategies.cluster, {"features": features, "kept": kept}, "kept", dtype, wanted)


def nearest(source: Source) -> Call:
    rows = source.pick([0, 1, 2, 5, 8, 36])
    dtype, features, keys, scores = merge_inputs(source, rows)
    assume_apart(keys)
    kept = source.rows(len(features), rows, source.size(0, min(rows, 6)))
    arguments = {"features": features, "keys": keys, "scores": scores, "kept": kept}

    def wanted(sample: int, own: list[int]) -> dict[int, Tensor]:
        given = (features[sample].detach(), keys[sample].detach(), scores[sample].tolist())
        return naive_strategies.collected_nearest(*given, own)

    return merged(strategies.nearest, arguments, "kept", dtype, wanted)


def collect_nearest(source: Source) -> Call:
    rows = source.pick([0, 1, 2, 5, 8])
    dtype, features, keys, weights = merge_inputs(source, rows)
    assume_apart(keys)
    kept, count = source.rows(len(features), rows, source.size(0, min(rows, 6))), source.size(0, 9)

    def check(found: Tensor) -> None:
        assert found.dtype == dtype
        for sample, own in enumerate(kept.tolist()):
            given = (features[sample].detach(), keys[sample].detach(), weights[sample].tolist())
            expected = torch.stack(naive_merge.collected(*given, own, count))
            assert_near(found[sample], expected, dtype)

    arguments = {"features": features, "keys": keys, "weights": weights, "kept": kept, "count": count}
    return Call(gap_kernels.collect_nearest, arguments, check)


def merge_nearest(source: Source) -> Call:
    rows = source.size(0, 9)
    dtype, features, keys, _ = merge_inputs(source, rows)
    assume_apart(keys)
    some, average = source.size(0, rows), source.pick([False, True])
    index = source.rows(len(features), rows, rows)
    targets, excluded = index[:, :some], index[:, some:] if source.pick([False, True]) else None

    def check(found: Tensor) -> None:
        assert found.dtype == dtype
        for sample, own in enumerate(targets.tolist()):
            gone = [] if excluded is None else excluded[sample].tolist()
            given = (features[sample].detach(), keys[sample].detach(), own, gone, average)
            expected = [each.expand(features.shape[2]) for each in naive_merge.merged(*given)]
            wanted = torch.stack(expected) if expected else features.new_zeros(0, features.shape[2]).double()
            assert_near(found[sample], wanted, dtype)

    arguments = {
        "features": features,
        "keys": keys,
        "targets": targets,
        "excluded": excluded,
        "average": average,
    }
    return Call(gap_kernels.merge_nearest, arguments, check)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare sums of some features of a dtype."""
    torch.testing.assert_close(found.detach().double(), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def contextual(source: Source) -> Call:
    rows = source.size(0, 9)
    dtype, features, keys, _ = merge_inputs(source, rows)
    assume_apart(keys)
    kept = source.rows(len(features), rows, source.size(0, rows))
    count = source.counts(len(features), rows + 1)
    counts = listed(count, len(features))
    most = max(counts, default=0) if isinstance(count, Tensor) else count
    arguments = {
        "features": features,
        "keys": keys,
        "kept": kept,
        "count": count,
        "length": source.length(most),
    }

    def wanted(sample: int, own: list[int]) -> dict[int, Tensor]:
        given = (features[sample].detach(), keys[sample].detach())
        return naive_strategies.gathered_contextual(*given, own, counts[sample])

    return merged(strategies.contextual, arguments, "kept", dtype, wanted)


def contextual_count(source: Source) -> Call:
    keep = source.pick(
        [
            source.size(0, 300),
            10**30,
            source.ints(0, 300, 4),
            source.ints(0, 2**62, 2, 2),
            torch.tensor(2**63 - 1),
        ]
    )

    def check(found: int | Tensor) -> None:
        values = keep.flatten().tolist() if isinstance(keep, Tensor) else [keep]
        counts = found.flatten().tolist() if isinstance(found, Tensor) else [found]
        assert counts == [min(k, max(1, (20 * k + 64) // 128)) for k in values]

    return Call(strategies.contextual_count, {"keep": keep}, check)


def aggregate(source: Source) -> Call:
    groups, grid = source.size(0, 2), (source.size(1, 4), source.size(1, 4))
    cells, dtype = grid[0] * grid[1], source.pick(FLOATS)
    features = source.floats(groups, cells, source.size(0, 3), dtype=dtype)
    similarity = source.floats(groups, cells, source.size(0, 3), dtype=source.pick(FLOATS))
    scores = torch.rand(groups, cells, generator=source.generator)
    anchors = source.sorted_rows(groups, cells, source.size(0, cells))
    quantile, radius = source.pick([0, 0.1, 0.37, 1]), source.pick([0.8, 3, INF])
    rule = strategies.AggregationRule(quantile, radius, False, source.pick([None, 1.0, 0.5]))
    arguments = {
        "features": features,
        "similarity": similarity,
        "scores": scores,
        "anchors": anchors,
        "grid": source.pick([tuple, list])(grid),
        "rule": rule,
    }

    def check(found: strategies.Merged) -> None:
        assert torch.equal(found.index, anchors)
        assert found.features.dtype == dtype
        for sample, line in enumerate(anchors.tolist()):
            levels = sorted(float(scores[sample, row]) for row in line if row >= 0)
            if not levels:
                assert (found.features[sample] == 0).all()
                continue
            place = quantile * (len(levels) - 1)
            low = math.floor(place)
            threshold = levels[low] + (place - low) * (levels[min(low + 1, len(levels) - 1)] - levels[low])
            given = [float(scores[sample, row]) if row >= 0 else -INF for row in line]
            pillars = torch.tensor([[level >= threshold for level in given]])
            one = slice(sample, sample + 1)
            if len(levels) == cells:
                wanted = features[one].detach().double()
            else:
                wanted = naive_aggregate.oracle(
                    features[one].detach(), similarity[one].detach(), anchors[one], grid, radius, pillars,
                    rule.self_weight,
                )  # fmt: skip
            clear = torch.tensor([abs(level - threshold) > GAP for level in given]) | (len(levels) == cells)
            tolerance = ROUNDING[dtype]
            result = found.features[sample, clear].detach().double()
            torch.testing.assert_close(result, wanted[0, clear], rtol=tolerance, atol=tolerance)

    return Call(strategies.aggregate, arguments, check)


def aggregation_rule(source: Source) -> Call:
    arguments = {
        "pillar_quantile": source.pick([0, 0.55, 1]),
        "radius": source.pick([1, 0.3, INF]),
        "radius_in_diagonals": source.pick([True, False]),
        "self_weight": source.pick([None, 1, 0.5]),
    }

    def check(found: strategies.AggregationRule) -> None:
        diagonal = math.hypot(2, 4) if arguments["radius_in_diagonals"] else 1
        least = 1.0 if arguments["radius_in_diagonals"] else 0.0
        assert found.radius_of((3, 5)) == pytest.approx(max(arguments["radius"] * diagonal, least))

    return Call(strategies.AggregationRule, arguments, check)


def outlier_count(source: Source) -> Call:
    groups, rows = source.size(0, 3), source.size(1, 12)
    # Quartiles of quarters are exact in float32.
    scores = source.laid_out(torch.randint(-8, 30, (groups, rows), generator=source.generator) / 4)

    def check(found: Tensor) -> None:
        counts = [max(1, sum(score > outlier_limit(line) for score in line)) for line in scores.tolist()]
        assert found.dtype == torch.int64
        assert found.tolist() == counts

    return Call(strategies.outlier_count, {"scores": scores}, check)


def outlier_limit(line: list[float]) -> float:
    """The third quartile and one and a half times what lies between the first and it."""
    ordered, quartiles = sorted(line), []
    for share in (0.25, 0.75):
        place = share * (len(line) - 1)
        low = math.floor(place)
        next_one = ordered[min(low + 1, len(line) - 1)]
        quartiles.append(ordered[low] + (place - low) * (next_one - ordered[low]))
    return quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])


def similarity_outlier_count(source: Source) -> Call:
    groups, rows = source.size(0, 3), source.size(1, 12)
    similarities = source.laid_out(
        torch.randint(-8, 9, (groups, rows), generator=source.generator) / 1024
    )  # that float32 holds exactly

    def check(found: Tensor) -> None:
        counts = []
        for line in (similarities.double() * strategies.outliers.SIMILARITY_SCALE).softmax(1).tolist():
            limit = outlier_limit(line)
            assume(all(abs(weight - limit) > GAP * limit for weight in line))
            counts.append(max(1, sum(weight > limit for weight in line)))
        assert found.dtype == torch.int64
        assert found.tolist() == counts

    return Call(strategies.similarity_outlier_count, {"similarities": similarities}, check)


def text_similarity(source: Source) -> Call:
    groups, patches, words, channels = (
        source.size(0, 2),
        source.size(0, 5),
        source.size(0, 4),
        source.size(0, 4),
    )
    visual = source.floats(groups, patches, channels, dtype=source.pick(FLOATS))
    text = source.floats(groups, words, channels, dtype=source.pick(FLOATS))
    mask = source.bools(groups, words)

    def check(found: Tensor) -> None:
        assert found.dtype == torch.float32
        assert found.shape == (groups, patches)
        for sample in range(groups):
            mean = text[sample].detach().double()[mask[sample]].sum(0)
            assume(float(mean.norm()) == 0 or float(mean.norm()) > 1e-3)
            wanted = [naive_strategies.cosine(row, mean) for row in visual[sample].detach().double()]
            torch.testing.assert_close(
                found[sample].double(), torch.tensor(wanted).double(), rtol=1e-4, atol=1e-4
            )

    return Call(strategies.text_similarity, {"visual": visual, "text": text, "text_mask": mask}, check)


def raters(source: Source) -> Call:
    groups, patches, words, channels = (
        source.size(0, 2),
        source.size(0, 5),
        source.size(0, 4),
        source.size(0, 4),
    )
    visual = source.floats(groups, patches, channels, dtype=source.pick(FLOATS))
    text = source.floats(groups, words, channels, dtype=source.pick(FLOATS))
    arguments = {
        "visual": visual,
        "visual_mask": source.bools(groups, patches),
        "text": text,
        "text_mask": source.bools(groups, words),
    }

    def check(found: Tensor) -> None:
        assert found.dtype == torch.bool
        assert found.shape == (groups, words)
        for sample in range(groups):
            real = arguments["text_mask"][sample]
            seen = visual[sample].detach().double()[arguments["visual_mask"][sample]]
            relevance = (seen @ text[sample].detach().double()[real].T).softmax(-1).sum(0)
            assert not found[sample, ~real].any()
            assert bool(found[sample].any()) == bool(real.any())
            if len(relevance):
                clear = (relevance - relevance.mean()).abs() > GAP * max(1, len(seen))
                assert torch.equal(found[sample, real][clear], (relevance > relevance.mean())[clear])

    return Call(strategies.raters, arguments, check)


MAKERS: dict[str, Callable[[Source], Call]] = {
    "read_prompt": read_prompt,
    "text_raters": text_raters,
    "text_cosine": text_cosine,
    "collect_nearest": collect_nearest,
    "merge_nearest": merge_nearest,
    "scatter_rows": scatter_rows,
    "unrotate": unrotate,
    "topk_indices": topk_indices,
    "topk_per_region": topk_per_region,
    "window_ranks": window_ranks,
    "greedy_indices": greedy_indices,
    "distinct_indices": distinct_indices,
    "least_similar_indices": least_similar_indices,
    "grid_neighbours": grid_neighbours,
    "visual_importance": visual_importance,
    "corrected_importance": corrected_importance,
    "attention": attention,
    "attention_received": attention_received,
    "prune_by_score": prune_by_score,
    "prune_tokens": prune_tokens,
    "spatial_aggregate": spatial_aggregate,
    "spatial_order": spatial_order,
    "choose": choose,
    "average": average,
    "cluster": cluster,
    "nearest": nearest,
    "contextual": contextual,
    "contextual_count": contextual_count,
    "aggregate": aggregate,
    "AggregationRule": aggregation_rule,
    "outlier_count": outlier_count,
    "similarity_outlier_count": similarity_outlier_count,
    "text_similarity": text_similarity,
    "raters": raters,
}
"""By the name of what is public."""


def calls(name: str) -> st.SearchStrategy[Call]:
    """Valid calls of what goes by that name."""

    @st.composite
    def drawn(draw: st.DrawFn) -> Call:
        return MAKERS[name](Source(draw))

    return drawn()
