"""A fuzz of everything public in gap_kernels and gap_triton.strategies.

Valid calls are compared with naive loops. Calls with one bad argument must raise a ValueError that begins with its name.
NaN, infinities and the largest numbers in one sample must leave the others as they are.
``make fuzz`` runs 100,000 calls; without it there are a few thousand, the same each time.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any

import gap_kernels
import numpy
import pytest
import torch
from gap_kernels.validation import describe
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.fuzz_calls import MAKERS, Call, calls
from torch import Tensor
from torch.masked import masked_tensor

from gap_triton import strategies

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(prototype|beta) s"
)  # of other kinds of tensors, which are refused
CALLS = int(os.environ.get("FUZZ_CALLS", "4000"))
MAX_LENGTH = 2**24
fuzzed = settings(
    deadline=None,
    max_examples=max(1, CALLS // (3 * len(MAKERS))),
    derandomize="FUZZ_CALLS" not in os.environ,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    database=None,
)
NOT_CALLED = {"AttentionOutput", "PromptRows", "PrunedTokens", "backend", "Coverage", "Merged"}

BIG = [2**63, -(2**63) - 1, 10**30, 10**5000]
NO_TENSOR = [None, 1, 2.5, "scores", [1.0, 2.0], numpy.ones((2, 3)), object(), torch.float32, 10**5000]
NO_INT = [True, 1.5, math.nan, "3", [1], numpy.int64(1), 2j, object()]
NO_NUMBER = [True, math.nan, "1", [0.5], 2j, object(), 10**400, torch.tensor(1.0)]
NO_BOOL = [0, 1, None, "yes", 1.0, torch.tensor(True), numpy.True_]
NO_GRID = [
    None, 5, (3,), (1, 2, 3), (0, 4), (4, -1), (2.0, 3), (True, 2), "ab", {2, 3}, torch.ones(2), (2**40, 2**40),
    (10**5000, 1), (2**24 + 1, 1), [math.nan, 2], numpy.array([2, 3]),
]  # fmt: skip
NO_DEVICE = ["gpu", "cuda:99", 1.5, -7, 10**30, object(), [], torch.float32, "cpu:x", 99]
NO_CHOICE = [
    "",
    "Mean",
    None,
    1,
    ["mean"],
    {"mean"},
    b"mean",
    numpy.array(["mean", "max"]),
    torch.ones(2),
    10**5000,
]

BAD: dict[str, list[Any]] = {
    "scale": [*NO_NUMBER, math.inf, -math.inf, 1e39],
    "radius": [*NO_NUMBER, None, 0, -1.0, -math.inf],
    "self_weight": [*NO_NUMBER, math.inf, -math.inf, 1e39],
    "pillar_quantile": [*NO_NUMBER, None, -0.1, 1.1, math.inf],
    "radius_in_diagonals": NO_BOOL,
    "spread": [*NO_NUMBER, -0.1, 1.1, math.inf],
    "causal": NO_BOOL,
    "average": NO_BOOL,
    "rescale": NO_BOOL,
    "head_reduction": NO_CHOICE,
    "coverage": NO_CHOICE,
    "exponent": [*NO_NUMBER, None, -0.5, math.inf, 1e39],
    "grid": NO_GRID,
    "region": [*NO_GRID, (2, 5), (10, 1)],
    "device": NO_DEVICE,
    "rule": [None, "llava", {}, strategies.AggregationRule, *NO_CHOICE],
    "per_region": [*NO_INT, 0, -1, -(10**30)],
    "windows": [*NO_INT, None, 0, -1, -(10**30)],
    "heads": [*NO_INT, None, 0, -1, 99, *BIG],
    "length": [*NO_INT, -1, MAX_LENGTH + 1, *BIG, torch.tensor(3)],
    "k": [*NO_INT, None, -1, -(10**30), torch.ones(2), torch.ones(9, dtype=torch.int64)],
}
BAD["keep"] = BAD["count"] = BAD["k"]
BAD["num_rows"] = [None, *BAD["length"]]
BAD["important"] = [*NO_INT, None, -1, 10**30, torch.tensor(1)]
BAD["removed_at_once"] = [*NO_INT, None, 0, -1, -(10**30)]
INDICES = {
    "visual_index",
    "rows",
    "importance_rows",
    "importance_columns",
    "anchors",
    "kept",
    "neighbours",
} | {"targets", "excluded", "index", "among", "pairs", "pivots"}
DISTINCT = {
    ("collect_nearest", "kept"), ("merge_nearest", "targets"), ("merge_nearest", "excluded"),
    ("prune_by_score", "visual_index"), ("prune_tokens", "visual_index"), ("average", "kept"), ("nearest", "kept"),
    ("cluster", "kept"), ("scatter_rows", "index"),
    ("contextual", "kept"), ("aggregate", "anchors"), ("least_similar_indices", "pivots"),
}  # fmt: skip
ATTENTION = {
    "query": "B Hq Q D",
    "key": "B Hkv S D",
    "attention_mask": "B S",
    "rows": "B R",
    "visual_index": "B V",
}
ROWS = {
    "hidden_states": "B Q C", "cos": "B Q F", "sin": "B Q F", "position_ids": "A B Q", "visual_index": "B V", "keep": "B",
}  # fmt: skip
SPREAD = {"neighbours": "! V M", "order": "! V"}
MERGE = {
    "features": "G N C",
    "keys": "G N E",
    "similarity": "G N E",
    "scores": "G N",
    "kept": "G K",
    "anchors": "G K",
}
SHAPES: dict[str, dict[str, str]] = {
    "read_prompt": {
        "tokens": "B Q", "attention_mask": "B Q", "answer": "B Q", "rankers": "B Q", "index": "B S",
    },
    "text_raters": {"embeds": "B Q C", "visual_index": "B V", "text_rows": "B R"},
    "collect_nearest": {"features": "B N C", "keys": "B N E", "weights": "B N", "kept": "B K"},
    "merge_nearest": {"features": "B N C", "keys": "B N E", "targets": "B M", "excluded": "B K"},
    "text_cosine": {"embeds": "B Q C", "visual_index": "B V", "text_rows": "B R"},
    "scatter_rows": {"values": "B L C", "index": "B L", "among": "B S", "base": "B Q C"},
    "topk_indices": {"scores": "B N", "k": "B"},
    "window_ranks": {"scores": "B N", "earlier": "B N"},
    "unrotate": {
        "query": "B Hq S D", "key": "B Hkv S D", "cos": "A ! S F", "sin": "A ! S F", "pairs": "! D",
    },
    "greedy_indices": {"features": "B N C", "scores": "B N", "mask": "B N", "k": "B"},
    "distinct_indices": {"features": "B N C", "scores": "B N"},
    "least_similar_indices": {"features": "B N C", "pivots": "B P", "mask": "B N", "k": "B"},
    "topk_per_region": {"scores": "B N", "neighbours": "! N R", "k": "B"},
    "corrected_importance": {**ATTENTION, "cos": "B Q E", "sin": "B Q E", "turns": "D"},
    "visual_importance": {**ATTENTION, "lse": "B Hq R", "value": "B Hkv S Dv"},
    "attention": {**ATTENTION, "value": "B Hkv S D", "importance_rows": "B R", "importance_columns": "B V"},
    "attention_received": {
        "query": "B H S D", "key": "B Hkv S D", "attention_mask": "B S", "lse": "B H S", "cu_seqlens": "!",
    },
    "prune_by_score": {**ROWS, **SPREAD, "scores": "B V", "attention_mask": "B Q"},
    "prune_tokens": {**ATTENTION, **ROWS, **SPREAD},
    "spatial_aggregate": {
        "features": "B N C", "similarity_features": "B N E", "anchors": "B M", "pillars": "B M", "scores": "B N",
    },
    "choose": {"scores": "G N", "keep": "G", "neighbours": "! N R", "order": "! N"},
    "average": MERGE,
    "cluster": MERGE,
    "nearest": MERGE,
    "contextual": {**MERGE, "count": "G"},
    "aggregate": MERGE,
    "outlier_count": {"scores": "G N"},
    "similarity_outlier_count": {"similarities": "G N"},
    "text_similarity": {"visual": "G N C", "text": "G T C", "text_mask": "G T"},
    "raters": {"visual": "G N C", "visual_mask": "G N", "text": "G T C", "text_mask": "G T"},
}  # fmt: skip
"""Names of dimensions by argument, as documented; "!" is one that has few sizes."""
SHORT = {
    ("spread", "prune_by_score"), ("spread", "prune_tokens"), ("pillar_quantile", "spatial_aggregate"),
}  # fmt: skip
OPTIONAL = {
    "answer", "rankers", "index", "rows", "attention_mask", "lse", "value", "importance_rows", "importance_columns",
    "cu_seqlens", "pillars", "mask", "excluded", "among", "base",
}  # fmt: skip


def bad_values(call: Call, name: str) -> list[tuple[str, Any]]:
    """Bad values of an argument, each with what is wrong: a "shape" may be laid at the door of another argument."""
    value = call.arguments[name]
    found = [("value", bad) for bad in BAD.get(name, [])]
    function = call.function.__name__
    if function == "contextual_count":  # of any shape
        found = [
            (kind, bad) for kind, bad in found if not isinstance(bad, Tensor) or bad.dtype != torch.int64
        ]
    if (function, name) in (("choose", "keep"), ("topk_indices", "k"), ("distinct_indices", "k")):
        too_many = call.arguments["scores"].shape[1] + 1
        found += [("value", bad) for bad in (2**63, 10**30, too_many)]
        if isinstance(value, Tensor) and value.numel():
            found += [("value", value + too_many), ("value", value | 2**62)]
    if name == "count" and call.arguments.get("length", 0) is None:
        found += [("value", bad) for bad in (MAX_LENGTH + 1, 10**30)]
    if (name, function) in SHORT:  # a kernel multiplies by its digits
        found.append(("value", 0.1234567891))
    if name in ("keep", "count", "k") and isinstance(value, Tensor) and value.numel():
        found += [("value", value - value.max() - 1)]
    if not isinstance(value, Tensor):
        return found
    if name not in ("keep", "count", "k"):
        needed = name not in OPTIONAL or (function, name) == ("attention", "value")
        needed &= (function, name) != ("greedy_indices", "scores")
        if function == "choose" and name != "scores":
            needed = name == {"region": "neighbours", "stride": "order"}.get(call.arguments["coverage"])
        found += [("value", bad) for bad in NO_TENSOR if needed or bad is not None]
    return found + bad_tensors(call, name, value.detach())


def fixed_dims(call: Call, name: str, value: Tensor) -> list[int]:
    """Dimensions of an argument whose size another argument, or the operator, says too."""
    dims = SHAPES[call.function.__name__]
    others = {
        letter
        for key, other in call.arguments.items()
        if isinstance(other, Tensor) and key != name
        for letter in dims[key].split()
    }
    own = dims[name].split()[-value.dim() :]
    if name == "lse" and call.arguments["rows" if "rows" in call.arguments else "lse"] is None:
        others.add("R")
    return [dim for dim, letter in enumerate(own) if letter in others or letter == "!"]


def bad_tensors(call: Call, name: str, value: Tensor) -> list[tuple[str, Any]]:
    first = next(key for key, other in call.arguments.items() if isinstance(other, Tensor))
    other_dtypes = [torch.complex64, torch.int16]
    if value.is_floating_point():
        other_dtypes += [torch.bool, torch.int64]
        other_dtypes += [torch.float16] if name == "scores" else []
    else:
        other_dtypes += [torch.float32, torch.uint8]
    if (call.function.__name__, name) == ("read_prompt", "attention_mask"):
        other_dtypes = [torch.complex64]  # as a tokenizer makes it, or a model
    found: list[tuple[str, Any]] = [("value", value.to(dtype)) for dtype in other_dtypes]
    if call.function.__name__ != "contextual_count":
        if name != "position_ids":  # which may have one dimension more
            found.append(("shape", value[None]))
        found.append(("shape", value[None, None, None]))
        found += [("shape", value.flatten()[:1].sum())]
        for dim in fixed_dims(call, name, value):
            found.append(("shape", value.new_zeros([n + 7 * (d == dim) for d, n in enumerate(value.shape)])))
    if name != first:
        found.append(("shape", value.to("meta")))
    if value.dim() and value.dtype != torch.bool:
        found.append(("value", value.to_sparse()))
    if value.dtype in (torch.float32, torch.float64, torch.int64):
        found.append(("value", masked_tensor(value.clone(), torch.ones_like(value, dtype=torch.bool))))
    if value.dim() == 2 and value.dtype != torch.bool:
        found.append(("value", value.to_sparse_csr()))
    if value.dtype == torch.float32 and value.numel():
        found.append(("value", value.to_mkldnn()))
    if value.dim() > 1 and len(value):
        found.append(("value", torch.nested.nested_tensor(list(value.unbind()))))
        if value.dim() > 2 or value.shape[1]:
            found.append(("value", torch.nested.nested_tensor(list(value.unbind()), layout=torch.jagged)))
    unread = name == "neighbours" and call.arguments.get("coverage", "region") != "region"
    if name in INDICES and value.numel() and not unread:
        low, high = value.flatten().clone(), value.flatten().clone()
        low[-1], high[0] = -2, torch.iinfo(value.dtype).max
        found += [("value", low.view(value.shape)), ("value", high.view(value.shape))]
    if (call.function.__name__, name) in DISTINCT and value.shape[1] > 1 and len(value):
        twice = value.clone()
        twice[:, :2] = 0
        found.append(("value", twice))
    if name == "neighbours" and value.numel() and not unread:
        itself = value.clone()
        itself[:, -1, 0] = value.shape[1] - 1
        found.append(("value", itself))
        if value.shape[2] > 1 and value.shape[1] > 1:
            twice = value.clone()
            twice[:, 0, :2] = 1
            found.append(("value", twice))
    if name == "turns":
        found += [("value", value + 99), ("value", value - 99)]
    if name == "cu_seqlens":
        found += [("value", value + 1), ("value", value.flip(0)), ("value", value[:0])]
    return found


def run(call: Call, **changed: Any) -> Any:
    return call.function(**{**call.arguments, **changed})


@pytest.mark.parametrize("name", list(MAKERS))
def test_valid_calls(name: str) -> None:
    @fuzzed
    @given(calls(name))
    def each(call: Call) -> None:
        call.check(run(call))

    each()


@pytest.mark.parametrize("name", list(MAKERS))
def test_one_bad_argument(name: str) -> None:
    @fuzzed
    @given(calls(name), st.data())
    def each(call: Call, data: st.DataObject) -> None:
        options = [(key, *bad) for key in call.arguments for bad in bad_values(call, key)]
        key, kind, bad = options[data.draw(st.integers(0, len(options) - 1))]
        named = key if kind == "value" else "|".join(call.arguments)
        try:
            run(call, **{key: bad})
        except ValueError as error:
            if re.match(rf"({named}): .*\bgot\b", str(error)):
                return
            raise AssertionError(f"{key}={describe(bad)} gave {error}") from error
        except Exception as error:
            raise AssertionError(f"{key}={describe(bad)} raised {type(error).__name__}: {error}") from error
        pytest.fail(f"{key}={describe(bad)} was taken")

    each()


# The former takes no numbers, and of the latter some belong to all samples.
SAMPLES = [name for name in MAKERS if name in SHAPES and name not in ("read_prompt", "unrotate")]


def plain(value: Tensor) -> Tensor:
    """A copy without strides of its own: PyTorch may add numbers up in another order where they lie otherwise."""
    return value.detach().clone(memory_format=torch.contiguous_format)


def spoiled(value: Tensor, sample: int, generator: torch.Generator) -> Tensor:
    """``value`` [B, ...] with a third of the numbers of one sample replaced."""
    value = plain(value)
    bad = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(value.dtype).max]).to(value.dtype)
    one = value[sample]
    which = torch.randint(0, 12, one.shape, generator=generator)
    value[sample] = torch.where(which < 4, bad[which.clamp(max=3)], one)
    return value


@pytest.mark.parametrize("name", SAMPLES)
def test_bad_numbers_stay_in_their_sample(name: str) -> None:
    @fuzzed
    @given(calls(name), st.data())
    def each(call: Call, data: st.DataObject) -> None:
        floats = {
            key: x for key, x in call.arguments.items() if isinstance(x, Tensor) and x.is_floating_point()
        }
        batch = min(len(x) for x in floats.values())
        assume(batch > 0)
        sample = data.draw(st.integers(0, batch - 1))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        chosen = [key for key in floats if data.draw(st.booleans())]
        changed = {key: spoiled(floats[key], sample, generator) for key in chosen}
        same: dict[str, Any] = {key: plain(floats[key]) for key in chosen}
        if name.startswith("prune"):  # how many rows stay may differ
            changed["length"] = same["length"] = call.arguments["hidden_states"].shape[1]
        found, expected = parts(run(call, **changed)), parts(run(call, **same))
        others = [b for b in range(batch) if b != sample]
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            torch.testing.assert_close(one[others], other[others], rtol=0, atol=0, equal_nan=True)

    each()


def parts(result: Any) -> list[Tensor]:
    """The tensors of a result, each with the samples first."""
    if isinstance(result, gap_kernels.PrunedTokens):
        return [*result[:3], result.position_ids.movedim(-2, 0), *result[4:]]
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


def test_everything_public_is_here() -> None:
    public = {*gap_kernels.__all__, *strategies.__all__} - NOT_CALLED
    assert {name for name in public if not name.isupper()} == set(MAKERS)
