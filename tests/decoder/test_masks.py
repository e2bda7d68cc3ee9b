"""Scores follow the mask that the scoring layer had, whoever made it, and a plain one costs nothing extra."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from support.comparison import TOLERANCE
from support.oracle import NAME as ORACLE
from support.oracle import MaskingOracle
from support.tiny import IMAGE, Image, prompt
from support.tiny import build as build_tiny
from support.ways import MODELS, build, make
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import __version__

import gap_triton
from gap_triton import GapConfig, Stage
from gap_triton.later_layers.masks import is_plain, mask_for_attention
from gap_triton.prefill import drop as prune
from gap_triton.prefill import scores

HIDDEN = torch.finfo(torch.float32).min


def causal(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, 1, Q, Q] bool, what transformers makes of the prompt's own mask."""
    real = inputs["attention_mask"].bool()
    queries = real.shape[1]
    return torch.ones(queries, queries, dtype=torch.bool).tril() & real[:, None, None, :]


def blocks(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Behind the image every second word sees no image row of odd number, another half by sample; the last sees it all."""
    seen = causal(inputs)
    for b, ids in enumerate(inputs["input_ids"]):
        image = (ids == IMAGE).nonzero()[:, 0]
        for row in range(int(image[-1]) + 1 + b, len(ids) - 1, 2):
            seen[b, 0, row, image[b::2]] = False
    return seen


def ahead(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The prompt sees all of itself, as a prefix does."""
    seen = causal(inputs)
    real = inputs["attention_mask"].bool()
    return seen | (real[:, None, :, None] & real[:, None, None, :])


def slopes(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A bias that grows with the distance, another for each head (ALiBi, arXiv 2108.12409)."""
    queries = inputs["input_ids"].shape[1]
    position = torch.arange(queries)
    distance = (position[:, None] - position[None]).clamp(min=0)
    bias = -0.3 / 2.0 ** torch.arange(4)[:, None, None] * distance
    return torch.where(causal(inputs), bias[None], HIDDEN)


MASKS = {
    "blocks": blocks,
    "blocks, added": lambda inputs: torch.where(blocks(inputs), 0.0, HIDDEN),
    "blocks, added as -10000": lambda inputs: torch.where(blocks(inputs), 0.0, -1e4),
    "every row sees itself": lambda inputs: (
        blocks(inputs) | torch.eye(inputs["input_ids"].shape[1], dtype=torch.bool)
    ),
    "looks ahead": ahead,
    "slopes": slopes,
}


def agree(
    name: str, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None, config: GapConfig, **more
) -> None:
    """A forward under ``mask``, with position ids of the padded prompt; the oracle scores by its own probabilities."""
    model, reference = build(name, "gap_triton"), build(name, {"text_config": ORACLE})
    gap_triton.configure(model, config)
    real = inputs["attention_mask"].bool()
    given = {**inputs, **more}
    if mask is not None:
        ids = (real.cumsum(1) - 1).clamp(min=0)
        given |= {
            "attention_mask": mask,
            "position_ids": ids if name == "llava" else ids.expand(3, -1, -1),
        }
    then = [(stage.layer, stage.keep, stage.score) for stage in config.then]
    oracle = MaskingOracle(reference, config.layer, config.keep, config.score, then=then)
    with torch.no_grad(), oracle:
        pruned = model(**given).logits
        if mask is not None and mask.dtype == torch.bool:
            given["attention_mask"] = torch.where(mask, 0.0, HIDDEN)
        oracle.padding = real
        expected = reference(**given).logits
    dropped = oracle.dropped | oracle.later[0] if then else oracle.dropped
    assert dropped.any(1).all()
    assert float((pruned - expected)[real & ~dropped].abs().max()) <= TOLERANCE


@pytest.mark.parametrize("score", ["text", "last_token"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_a_mask_of_four_dimensions(name: str, mask: str, score: str) -> None:
    inputs = make(name, "left-padded")
    agree(name, inputs, MASKS[mask](inputs), GapConfig(0.4, 1, score))


@pytest.mark.parametrize("mask", ["blocks", "slopes"])
@pytest.mark.parametrize("batch", ["right-padded", "ragged-images"])
def test_a_mask_of_four_dimensions_in_other_batches(mask: str, batch: str) -> None:
    inputs = make("llava", batch)
    config = GapConfig(0.6, 0, then=(Stage(0.3, 2),))
    agree("llava", inputs, MASKS[mask](inputs), config)


def test_a_packed_sequence() -> None:
    """Two conversations in one row: words of the second see no image of the first."""
    inputs = make("llava", "single")
    first = int((inputs["input_ids"][0] == IMAGE).nonzero()[40]) - 1  # the second image's bos, so to say
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([torch.arange(first), torch.arange(length - first)])[None]
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    given = {key: value for key, value in inputs.items() if key != "attention_mask"}
    model, reference = build("llava", "gap_triton"), build("llava", {"text_config": ORACLE})
    gap_triton.configure(model, GapConfig(0.4, 1))
    given |= {"position_ids": ids, "use_cache": False}
    with torch.no_grad(), MaskingOracle(reference, 1, 0.4) as oracle:
        pruned, expected = model(**given).logits, reference(**given).logits
    score = gap_triton.last_selection(model).score
    assert bool((score == 0).any())
    assert float((pruned - expected)[~oracle.dropped].abs().max()) <= TOLERANCE


# ------------------------------------------------------------------------------------------------ what it costs
class Count(TorchDispatchMode):
    """Counts calls of everything that runs, and reads from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def reads(self) -> int:
        return self.calls.get("aten::_local_scalar_dense", 0) + self.calls.get("aten::is_nonzero", 0)


def counted(model, inputs: dict[str, torch.Tensor]) -> Count:
    with torch.no_grad(), Count() as count:
        model(**inputs)
    return count


@pytest.mark.parametrize("score", ["text", "last_token"])
@pytest.mark.parametrize("batch", ["even", "left-padded", "right-padded", "ragged-images"])
@pytest.mark.parametrize("name", [*MODELS, "llava/qwen2-ffsss"])
def test_plain_masks_stay_in_one_operator_and_read_nothing(
    name: str, batch: str, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(name, "gap_triton"), make(name, batch)
    gap_triton.configure(model, GapConfig(0.6, 0, score, then=(Stage(0.3, 1, score),)))
    calls, reads = [], []
    real = prune.prune_tokens
    monkeypatch.setattr(prune, "prune_tokens", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    # In the scoring itself; how a model reads its own masks is not ours.
    attend = prune.attention_of

    def watched(*args):
        with Count() as count:
            found = attend(*args)
        reads.append(count.reads)
        return found

    monkeypatch.setattr(prune, "attention_of", watched)
    with torch.no_grad():
        model(**inputs)
    assert len(calls) == 2
    assert reads == [0, 0]


def test_a_wide_window_is_plain_and_a_narrow_one_is_not() -> None:
    for window, plain in ((1000, True), (20, False)):
        from transformers.masking_utils import sliding_window_causal_mask_function

        mask = mask_for_attention(
            **{"batch_size": 2, "kv_length": 50, "kv_offset": 0, "local_size": window},
            **(
                {"q_length": 50, "q_offset": 0}
                if Version(__version__) >= Version("5")
                else {"cache_position": torch.arange(50)}
            ),
            attention_mask=torch.ones(2, 50, dtype=torch.bool).index_fill(1, torch.arange(3), False),
            mask_function=sliding_window_causal_mask_function(window),
        )
        assert is_plain(mask, 50) is plain
    assert not is_plain(mask.clone(), 10)


def calls_with(words: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Operator calls, and calls of anything, that a prefill of a sliding layer takes to score."""
    model = build_tiny("llava/mistral-sliding", "gap_triton")
    gap_triton.configure(model, GapConfig(0.4, 1))
    inputs = prompt("llava", images=((Image(),),), before=(3,), after=(words,))
    importance, inside = [], []
    real, by_mask = scores.visual_importance, scores.importance_by_mask
    monkeypatch.setattr(scores, "visual_importance", lambda *a, **k: (importance.append(1), real(*a, **k))[1])

    def watched(*args):
        with Count() as count:
            found = by_mask(*args)
        inside.append(sum(count.calls.values()))
        return found

    monkeypatch.setattr(scores, "importance_by_mask", watched)
    with torch.no_grad():
        model(**inputs)
    monkeypatch.undo()
    (total,) = inside
    return len(importance), total


def test_many_rows_under_a_window_are_scored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = calls_with(5, monkeypatch), calls_with(200, monkeypatch)
    assert few[0] == many[0] == 0
    assert few == many


def test_memory_is_bounded_by_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time gives the same scores."""
    found = []
    for block in (scores.BLOCK, 1):
        monkeypatch.setattr(scores, "BLOCK", block)
        model = build_tiny("llava/mistral-sliding", "gap_triton")
        gap_triton.configure(model, GapConfig(0.4, 1))
        with torch.no_grad():
            model(**prompt("llava"))
        found.append(gap_triton.last_selection(model).score)
    assert torch.allclose(*found, rtol=1e-5, atol=1e-8)


def test_scores_by_a_mask_under_autocast() -> None:
    """Scores are computed in float32, whatever autocast says."""
    model = build_tiny("llava/mistral-sliding", "gap_triton")
    gap_triton.configure(model, GapConfig(0.4, 1))
    seen = []
    query = torch.randn(1, 4, 20, 16, generator=torch.Generator().manual_seed(1))
    key = torch.randn(1, 2, 20, 16, generator=torch.Generator().manual_seed(2))
    asked = scores.Attention(query, key, None, None, None, None, False)
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            rows, visual = torch.tensor([[15, 19, -1]]), torch.tensor([[3, 4, 5, -1]])
            seen.append(scores.importance_by_mask(asked, mask, rows, visual))
    assert torch.equal(*seen)
    expected = gap_triton.prefill.scores.visual_importance(query, key, visual, rows=rows)
    assert torch.allclose(seen[0], expected, rtol=1e-5, atol=1e-8)
