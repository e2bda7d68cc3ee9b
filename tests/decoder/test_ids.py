"""Which rows survive, in which order, with which ids: exact."""

from __future__ import annotations

import pytest
import torch
from support.prompts import make_prompt
from support.tiny import BOS, IMAGE, LAYERS, build, generate

import gap_triton
from gap_triton import GapConfig
from gap_triton.prefill.position_ids import compact, score_order

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
@pytest.mark.parametrize("ids", ["kept", "compacted", "permuted"])
def test_logits_equal_a_plain_loop_over_the_layers(ids: str, layer: int, score: str) -> None:
    model, inputs = attached(ids=ids, layer=layer, score=score), make_prompt("llava", "single")
    output = generate(model, inputs, tokens=4)
    selection = gap_triton.last_selection(model)
    gap_triton.detach(model)

    prompt_length = inputs["input_ids"].shape[1]
    rows = selection.index[0].tolist()
    if ids == "permuted":
        score = dict(zip(selection.candidates[0].tolist(), selection.score[0].tolist(), strict=True))
        best_first = iter(sorted((r for r in rows if r in score), key=lambda r: (-score[r], r)))
        order = [next(best_first) if r in score else r for r in rows]
        assert order != rows
    else:
        order = rows
    numbers = rows if ids == "kept" else list(range(len(rows)))
    for step in range(4):
        tokens = output.sequences[:, : prompt_length + step]
        new = list(range(prompt_length, prompt_length + step))
        behind = new if ids == "kept" else [len(rows) + i for i in range(step)]
        with torch.no_grad():
            expected = replay(model, tokens, inputs["pixel_values"], order + new, numbers + behind, layer)
        assert float((output.logits[step] - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("ids", ["compacted", "permuted"])
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
