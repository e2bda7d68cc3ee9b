"""Which rows survive, in which order, with which ids: exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import ways
from support.naive.ids import stretched
from support.prompts import make_prompt
from support.tiny import BOS, IMAGE, LAYERS, build, generate

import gap_triton
from gap_triton import GapConfig
from gap_triton.prefill.position_ids import compact, score_order, stretch

LAYER = 1


def attached(**options: object):
    model = build("llava", "sdpa")
    gap_triton.attach(model, GapConfig(**{"keep": 0.4, "layer": LAYER, **options}))
    return model


@pytest.mark.parametrize(
    "batch", ["even", "left-padded", "right-padded", "ragged-images", "one-without-image"]
)
def test_selection_keeps_text_order_and_ids(batch: str) -> None:
    model, inputs = attached(), make_prompt("llava", batch)
    with torch.no_grad():
        model(**inputs)
    selection = gap_triton.last_selection(model)
    for b, (ids, mask) in enumerate(
        zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
    ):
        rows = [r for r in selection.index[b].tolist() if r >= 0]
        assert rows == sorted(set(rows))
        text = [i for i, token in enumerate(ids) if token != IMAGE and mask[i]]
        visual = [i for i, token in enumerate(ids) if token == IMAGE]
        assert set(text) <= set(rows)
        assert len(ids) - 1 in rows
        kept = [r for r in rows if r in visual]
        assert len(kept) == -(-len(visual) * 4 // 10)
        assert [r for r in selection.visual_index[b].tolist() if r >= 0] == kept
        # The kept ones are the best, ties to the lower row.
        score = dict(zip(selection.candidates[b].tolist(), selection.score[b].tolist(), strict=True))
        assert kept == sorted(sorted(visual, key=lambda r: (-score[r], r))[: len(kept)])


@pytest.mark.parametrize("batch", ["even", "left-padded", "ragged-images"])
def test_ids_are_the_ids_without_pruning(batch: str) -> None:
    model, inputs = attached(), make_prompt("llava", batch)
    seen = []
    last = model.model.language_model.layers[-1]
    last.register_forward_pre_hook(lambda m, a, k: seen.append(k["position_ids"]), with_kwargs=True)
    generate(model, inputs, tokens=4)
    selection = gap_triton.last_selection(model)
    unpruned = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    survives = selection.index >= 0
    expected = unpruned.gather(1, selection.index.clamp(min=0))
    assert torch.equal(seen[0][survives], expected[survives])
    assert torch.equal(selection.position_ids[survives], expected[survives])
    for step, ids in enumerate(seen[1:], start=1):
        assert torch.equal(ids, unpruned[:, -1:] + step)


def replay(
    model,
    tokens: torch.Tensor,
    pixel_values: torch.Tensor,
    rows: list[int],
    ids: list[int],
    after: int = LAYER,
) -> torch.Tensor:
    """Logits of the last token, by a plain loop over the layers of one sample: no cache, no hooks, no masks but causal.

    After layer ``after`` only ``rows`` (in that order) of the prompt go on, with position ids ``ids``; what follows the
    prompt goes on behind them.
    """
    core, text = model.model, model.model.language_model
    embeds = core.get_input_embeddings()(tokens)
    features = core.get_image_features(pixel_values=pixel_values)
    features = torch.cat(list(getattr(features, "pooler_output", features)))
    hidden = embeds.masked_scatter((tokens == IMAGE)[..., None], features)
    positions = torch.arange(tokens.shape[1])[None]
    for index, layer in enumerate(text.layers):
        if index == after + 1:
            hidden, positions = hidden[:, rows], torch.tensor([ids])
        mask = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()[None, None]
        rotary = text.rotary_emb(hidden, positions)
        output = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        hidden = output[0] if isinstance(output, tuple) else output
    return model.lm_head(text.norm(hidden[:, -1]))


@pytest.mark.parametrize(("layer", "score"), [(LAYER, "last_token"), (-1, "cls"), (-1, "random")])
@pytest.mark.parametrize("keep", [0.4, 1.0])
@pytest.mark.parametrize("ids", ["kept", "compacted", "permuted", "reordered", "stretched"])
def test_logits_equal_a_plain_loop_over_the_layers(ids: str, keep: float, layer: int, score: str) -> None:
    model, inputs = attached(ids=ids, layer=layer, score=score, keep=keep), make_prompt("llava", "single")
    output = generate(model, inputs, tokens=4)
    selection = gap_triton.last_selection(model)
    gap_triton.detach(model)

    prompt_length = inputs["input_ids"].shape[1]
    if ids == "kept" and keep == 1.0:
        assert selection is None
        rows = list(range(prompt_length))
    else:
        rows = selection.index[0].tolist()
    if ids in ("permuted", "reordered"):
        score = dict(zip(selection.candidates[0].tolist(), selection.score[0].tolist(), strict=True))
        best_first = iter(sorted((r for r in rows if r in score), key=lambda r: (-score[r], r)))
        order = [next(best_first) if r in score else r for r in rows]
        assert order != rows
    else:
        order = rows
    visual = (inputs["input_ids"][0] == IMAGE).tolist()
    numbers = rows
    if ids in ("compacted", "permuted"):
        numbers = list(range(len(rows)))
    elif ids == "stretched":
        numbers = stretched(range(prompt_length), visual, rows)
    assert keep == 1.0 or ids in ("kept", "reordered") or numbers != rows
    for step in range(4):
        tokens = output.sequences[:, : prompt_length + step]
        new = list(range(prompt_length, prompt_length + step))
        behind = [len(rows) + i for i in range(step)] if ids in ("compacted", "permuted") else new
        with torch.no_grad():
            expected = replay(model, tokens, inputs["pixel_values"], order + new, numbers + behind, layer)
        assert float((output.logits[step] - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("ids", ["compacted", "permuted", "reordered", "stretched"])
@pytest.mark.parametrize("score", ["last_token", "random"])
def test_wrong_ids_with_nothing_dropped(ids: str, score: str) -> None:
    """GAP's figure 2b: order alone breaks the model; the value of 1-D ids is right where nothing is missing."""
    inputs = make_prompt("llava", "left-padded")
    with torch.no_grad():
        unpruned = build("llava", "sdpa")(**inputs).logits[:, -1]
        found = attached(ids=ids, keep=1.0, score=score)(**inputs).logits[:, -1]
        count = attached(ids=ids, keep=10**6, score=score)(**inputs).logits[:, -1]
    assert torch.equal(found, count)
    difference = float((found - unpruned).abs().max())
    if ids in ("compacted", "stretched"):
        assert difference <= 1e-4
    else:
        assert difference >= 1e-2


def test_compacted_3d_ids_are_wrong_with_nothing_dropped() -> None:
    """A text is numbered on all axes alike, so a compacted image has lost its rows and columns."""
    inputs = ways.make(ways.MROPE, "even")
    model = ways.build(ways.MROPE, "gap_triton")
    gap_triton.configure(model, GapConfig(1.0, LAYER, ids="compacted"))
    with torch.no_grad():
        found = model(**inputs).logits[:, -1]
        unpruned = ways.build(ways.MROPE, "sdpa")(**inputs).logits[:, -1]
    assert float((found - unpruned).abs().max()) >= 1e-3
    ids = gap_triton.last_selection(model).position_ids
    assert torch.equal(ids, torch.arange(ids.shape[-1]).expand_as(ids))


@given(data=st.data())
def test_stretched_ids_against_a_loop(data) -> None:
    """Several runs of visual tokens, several axes, padding and filler."""
    number = data.draw(st.integers(1, 14))
    visual = torch.tensor(
        [data.draw(st.lists(st.booleans(), min_size=number, max_size=number)) for _ in range(2)]
    )
    axes = data.draw(st.sampled_from([(), (3,)]))
    ids = torch.randint(
        0, 40, (*axes, 2, number), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    kept = [sorted(data.draw(st.sets(st.integers(0, number - 1), min_size=1))) for _ in range(2)]
    most = max(map(len, kept))
    index = torch.tensor([[-1] * (most - len(rows)) + rows for rows in kept])
    found = stretch(ids, index, visual)
    for axis, numbers in enumerate(ids.reshape(-1, 2, number).tolist()):
        for b, rows in enumerate(kept):
            got = found.reshape(-1, 2, most)[axis, b, most - len(rows) :].tolist()
            assert got == stretched(numbers[b], visual[b].tolist(), rows)


def test_stretched_3d_ids_fill_each_axis() -> None:
    inputs = ways.make(ways.MROPE, "even")
    model = ways.build(ways.MROPE, "gap_triton")
    seen = {}
    for ids in ("kept", "stretched"):
        gap_triton.configure(model, GapConfig(2, LAYER, "last_token", ids=ids))
        with torch.no_grad():
            model(**inputs)
        seen[ids] = gap_triton.last_selection(model)
    rows = seen["kept"].index
    assert torch.equal(rows, seen["stretched"].index)
    visual = seen["kept"].visual.gather(1, rows)
    kept, stretched_ids = seen["kept"].position_ids, seen["stretched"].position_ids
    assert torch.equal(kept[:, ~visual], stretched_ids[:, ~visual])
    assert (stretched_ids >= kept).all()
    assert not torch.equal(kept, stretched_ids)


@pytest.mark.parametrize("ids", ["compacted", "permuted", "reordered", "stretched"])
def test_ablations_do_not_depend_on_the_batch(ids: str) -> None:
    """A sample alone and the same sample padded in a batch: the same logits."""
    model, inputs = attached(ids=ids), make_prompt("llava", "ragged-images")
    batched = generate(model, inputs)
    single = {
        "input_ids": inputs["input_ids"][:1, -int(inputs["attention_mask"][0].sum()) :],
        "pixel_values": inputs["pixel_values"][:1],
    }
    single["attention_mask"] = torch.ones_like(single["input_ids"])
    alone = generate(model, single)
    for a, b in zip(batched.logits, alone.logits, strict=True):
        assert float((a[:1] - b).abs().max()) <= 1e-4


def test_random_is_seeded() -> None:
    inputs = make_prompt("llava", "even")
    picks = []
    for seed in (0, 0, 1):
        model = attached(score="random", seed=seed)
        with torch.no_grad():
            model(**inputs)
        picks.append(gap_triton.last_selection(model).visual_index)
    assert torch.equal(picks[0], picks[1])
    assert not torch.equal(picks[0], picks[2])
    assert picks[0].shape == (2, 15)


@pytest.mark.parametrize(
    "batch", ["even", "left-padded", "right-padded", "ragged-images", "one-without-image"]
)
def test_before_the_decoder(batch: str) -> None:
    """layer=-1: every layer holds the survivors only, and ids are still those of the unpruned prompt."""
    model, inputs = attached(layer=-1, score="random"), make_prompt("llava", batch)
    seen = []
    first = model.model.language_model.layers[0]
    first.register_forward_pre_hook(lambda m, a, k: seen.append((k["position_ids"], a[0])), with_kwargs=True)
    output = generate(model, inputs, tokens=3)
    selection = gap_triton.last_selection(model)
    assert seen[0][1].shape[1] == selection.index.shape[1]
    assert all(bool(step.isfinite().all()) for step in output.logits)
    if batch != "right-padded":
        unpruned = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert torch.equal(seen[2][0], unpruned[:, -1:] + 2)


def test_before_the_decoder_without_position_ids() -> None:
    """A hand-written loop that passes no position ids continues at the unpruned position."""
    import transformers

    model, inputs = attached(layer=-1, score="random"), make_prompt("llava", "single")
    generated = generate(model, inputs, tokens=2)
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        first = model(
            input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], past_key_values=cache
        )
        token = first.logits[:, -1:].argmax(-1)
        second = model(input_ids=token, past_key_values=cache)
    assert float((second.logits[:, -1] - generated.logits[1]).abs().max()) <= 1e-4


def test_score_order_exact() -> None:
    index = torch.tensor([[-1, 0, 2, 3, 5, 6], [0, 1, 2, 3, 4, 6]])
    visual = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 0]]).bool()
    visual_index = torch.tensor([[2, 3, 4, 5, -1], [1, 2, 3, 4, -1]])
    scores = torch.tensor([[0.1, 0.5, 8, 0.3, 9], [0.2, float("nan"), 0.2, 0.4, 9]])
    expected = [[-1, 0, 3, 5, 2, 6], [0, 4, 1, 3, 2, 6]]
    assert score_order(index, visual, visual_index, scores).tolist() == expected


def test_compact_exact() -> None:
    position_ids = torch.tensor([[1, 1, 0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]])
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]).bool()
    index = torch.tensor([[-1, -1, 2, 5, 6], [0, 2, 3, 5, 6]])
    ids, shift = compact(position_ids, index, real, None)
    assert ids[0, 2:].tolist() == [0, 1, 2]
    assert ids[1, :4].tolist() == [5, 6, 7, 8]
    assert shift.tolist() == [2, 2]
    ids, shift = compact(position_ids, index, real, torch.tensor([0, 3]))
    assert ids[1, :4].tolist() == [2, 3, 4, 5]
    assert shift.tolist() == [2, 5]


def test_layers_before_the_pruning_layer_are_untouched() -> None:
    model, inputs = attached(), make_prompt("llava", "even")
    seen = {}
    for index in (LAYER, LAYERS - 1):
        model.model.language_model.layers[index].register_forward_pre_hook(
            lambda m, a, k, index=index: seen.__setitem__(index, a[0].shape[1]), with_kwargs=True
        )
    with torch.no_grad():
        model(**inputs)
    assert inputs["input_ids"][0, 0] == BOS
    assert seen == {LAYER: inputs["input_ids"].shape[1], LAYERS - 1: inputs["input_ids"].shape[1] - 21}
