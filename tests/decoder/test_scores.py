"""What ranks visual tokens in the decoder, and how a choice is spread over the image, computed by other means."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support import families, ways
from support.installed_types import build_or_skip
from support.prompts import make_prompt
from support.tiny import IMAGE, build
from torch import Tensor

import gap_triton
from gap_triton import GapConfig, Stage
from gap_triton.integration.supported_models import find_parts
from gap_triton.prefill import rope, unrotated
from gap_triton.prefill import scores as scores_of_decoder
from gap_triton.strategies import STRIDE_SHARE, spatial_order

LAYER = 1
SIDE = 6  # an image of the tiny models is 6 x 6 visual tokens
ROPES = ["llava", "llava/qwen2", "qwen2_5_vl"]


def model_and_prompt(name: str, batch: str, implementation: str):
    if name == ways.MROPE:
        return ways.build(name, implementation), ways.make(name, batch)
    return build(name, implementation), make_prompt(name, batch)


def selected(name: str, batch: str, config: GapConfig) -> gap_triton.Selection:
    model, inputs = model_and_prompt(name, batch, "gap_triton")
    gap_triton.configure(model, config)
    with torch.no_grad():
        model(**inputs)
    return gap_triton.last_selection(model)


def heard(name: str, batch: str, *projections: str) -> tuple[dict, list[torch.Tensor]]:
    """The prompt, and what the named linear layers of the scoring layer put out without pruning, [B, H, S, D] each."""
    model, inputs = model_and_prompt(name, batch, "sdpa")
    attention = model.model.language_model.layers[LAYER].self_attn
    seen: dict[str, torch.Tensor] = {}
    for projection in projections:
        getattr(attention, projection).register_forward_hook(
            lambda m, a, output, key=projection: seen.__setitem__(key, output)
        )
    with torch.no_grad():
        model(**inputs)
    return inputs, [seen[key].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for key in projections]


@pytest.mark.parametrize("batch", ["even", "left-padded", "right-padded", "ragged-images"])
@pytest.mark.parametrize("name", ROPES)
def test_unrotated_is_attention_without_positions(name: str, batch: str) -> None:
    inputs, (query, key) = heard(name, batch, "q_proj", "k_proj")
    selection = selected(name, batch, GapConfig(0.4, LAYER, "unrotated"))
    for b, mask in enumerate(inputs["attention_mask"].bool()):
        real = mask.nonzero()[:, 0]
        last = int(real[-1])
        heads = query.shape[1] // key.shape[1]
        total = 0.0
        image = (inputs["input_ids"][b] == IMAGE).nonzero()[
            :, 0
        ]  # what does not show an image does not compete
        for head in range(query.shape[1]):
            logits = key[b, head // heads, image] @ query[b, head, last] / math.sqrt(query.shape[-1])
            total = total + logits.softmax(0)
        by_row = torch.zeros(len(mask)).index_put((image,), total / query.shape[1])
        rows = selection.candidates[b][selection.candidates[b] >= 0]
        assert torch.allclose(selection.score[b, : len(rows)], by_row[rows], rtol=1e-4, atol=1e-6)
    rotated = selected(name, batch, GapConfig(0.4, LAYER, "last_token"))
    assert not torch.allclose(selection.score, rotated.score, rtol=1e-2)


def test_unrotated_in_a_later_stage_and_turn() -> None:
    """Scores are among the tokens of this turn that are left, by positions that the model gave them."""
    config = GapConfig(0.6, 0, "random", then=(Stage(0.3, LAYER, "unrotated"),))
    model, inputs = model_and_prompt("llava", "single", "gap_triton")
    gap_triton.configure(model, config)
    attention = model.model.language_model.layers[LAYER].self_attn
    seen: list[torch.Tensor] = []
    for projection in ("q_proj", "k_proj"):
        getattr(attention, projection).register_forward_hook(lambda m, a, output: seen.append(output))
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        seen.clear()
        again = {"input_ids": inputs["input_ids"][:, 1:], "pixel_values": inputs["pixel_values"]}
        model(**again, past_key_values=cache)
    query, key = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)[0] for x in seen)
    heads = query.shape[0] // key.shape[0]
    logits = torch.einsum("hd,hsd->hs", query[:, -1], key.repeat_interleave(heads, 0))
    selection = gap_triton.last_selection(model)
    assert selection.before is not None
    left = selection.before.index[0].tolist()
    is_visual = torch.tensor([row in selection.candidates[0].tolist() for row in left])
    logits = logits.masked_fill(~is_visual, -torch.inf)
    attended = (logits / math.sqrt(query.shape[-1])).softmax(-1).mean(0)
    expected = torch.stack([attended[left.index(row)] for row in selection.candidates[0].tolist()])
    assert torch.allclose(selection.score[0], expected, rtol=1e-4, atol=1e-6)


def rotations(model: Any, config: GapConfig, inputs: dict, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was turned back in each stage, with all that the model has rotated: queries and keys before and by layers."""
    module = inspect.getmodule(type(find_parts(model).text.layers[0]))
    rotate: Any = vars(module)["apply_rotary_pos_emb"]
    before: list[torch.Tensor] = []

    @functools.wraps(rotate)
    def noting(*args: Any, **kwargs: Any) -> Any:
        before.extend(x for x in args[:2] if x.dim() == 4)
        return rotate(*args, **kwargs)

    turned: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = scores_of_decoder.unrotated

    def turning(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(module, "apply_rotary_pos_emb", rotate)
        turned.append(real(*args))
        monkeypatch.setattr(module, "apply_rotary_pos_emb", noting)
        return turned[-1]

    monkeypatch.setattr(scores_of_decoder, "unrotated", turning)
    monkeypatch.setattr(module, "apply_rotary_pos_emb", noting)
    with torch.no_grad(), families.visual_features(model), gap_triton.pruning(model, config):
        model(**inputs)
    return [
        min(
            (x - y).abs().max().item()
            for seen in before
            for y in (seen, seen.transpose(1, 2))
            if x.shape == y.shape
        )
        for pair in turned
        for x in pair
    ]


@pytest.mark.parametrize(
    ("model_type", "layers"), [("gemma3", (0, 1)), ("step3p7", (0, 1)), ("gemma4", (0,))]
)
def test_a_rotation_is_taken_back_by_that_of_its_own_layer(
    model_type: str, layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that slide have rotary embeddings of their own, and the next layer may be of the other kind."""
    model = build_or_skip(model_type)
    inputs = families.prompt(model)
    for layer in layers:
        for off in rotations(model, GapConfig(0.5, layer, "unrotated"), inputs, monkeypatch):
            assert off < 1e-5


@pytest.mark.parametrize("ids", ["kept", "compacted", "stretched"])
def test_a_later_stage_takes_back_the_ids_that_its_layer_had(
    ids: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = model_and_prompt("llava", "left-padded", "sdpa")
    config = GapConfig(0.5, 1, "unrotated", ids=ids, then=(Stage(0.25, 3, "unrotated"),))
    found = rotations(model, config, inputs, monkeypatch)
    assert len(found) == 4
    assert max(found) < 1e-5


@pytest.mark.parametrize("score", ["unrotated", "raters_corrected"])
def test_layers_that_do_not_always_rotate_are_refused(score: str) -> None:
    """Cohere 2 rotates where it slides only: elsewhere nothing could be taken back."""
    with pytest.raises(
        ValueError, match=f"score='{score}': Cohere2Attention does not rotate all queries and keys"
    ):
        gap_triton.attach(families.build("cohere2_vision"), GapConfig(0.5, 1, score))


@pytest.mark.parametrize(
    ("model_type", "score", "message"),
    [
        ("hunyuan_vl", "unrotated", "turns the two channels of a pair by ids of different axes"),
        ("fuyu", "unrotated", "PersimmonAttention does not rotate all queries and keys"),
        ("fuyu", "raters_corrected", "PersimmonAttention does not rotate all queries and keys"),
    ],
)
def test_rotations_that_cannot_be_undone_are_refused(model_type: str, score: Any, message: str) -> None:
    """Pairs of two angles are no rotation; and an attention that splits its heads itself may take any of their channels."""
    with pytest.raises(ValueError, match=f"score={score!r}: .*{message}"):
        gap_triton.attach(build_or_skip(model_type), GapConfig(0.5, 0, score))


def test_unrotated_takes_back_a_stretched_rotation() -> None:
    """YaRN multiplies cos and sin, so that queries and keys are longer after RoPE."""
    scores = []
    for stretch in (1.0, 1.7):
        model, inputs = model_and_prompt("llava", "left-padded", "gap_triton")
        model.model.language_model.rotary_emb.attention_scaling = stretch
        gap_triton.configure(model, GapConfig(0.4, 0, "unrotated"))
        with torch.no_grad():
            model(**inputs)
        scores.append(gap_triton.last_selection(model).score)
    assert torch.allclose(*scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch", ["left-padded", "ragged-images"])
@pytest.mark.parametrize("name", ROPES)
def test_key_norm(name: str, batch: str) -> None:
    """Rotation leaves lengths as they are, so the keys before RoPE tell."""
    inputs, (key,) = heard(name, batch, "k_proj")
    selection = selected(name, batch, GapConfig(0.4, LAYER, "key_norm"))
    norms = key.square().sum((1, 3)).sqrt()
    for b in range(len(inputs["input_ids"])):
        rows = selection.candidates[b][selection.candidates[b] >= 0]
        assert torch.allclose(selection.score[b, : len(rows)], norms[b, rows], rtol=1e-4)


def embeds_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, Q, C], what the decoder is given."""
    embeds: list[torch.Tensor] = []
    model.model.language_model.register_forward_pre_hook(
        lambda m, a, k: embeds.append(k["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    return embeds[0]


@pytest.mark.parametrize("batch", ["even", "left-padded", "right-padded", "ragged-images", "single"])
def test_raters_are_the_relevant_rows_of_text(batch: str) -> None:
    """Rows are found by plain loops over the embeddings; then the score is that of the rows, one by one."""
    model, inputs = model_and_prompt("llava", batch, "sdpa")
    embeds = embeds_of(model, inputs)
    _, (query, key) = heard("llava", batch, "q_proj", "k_proj")
    rotary = model.model.language_model.rotary_emb
    by_raters = selected("llava", batch, GapConfig(0.4, LAYER, "raters"))
    by_text = selected("llava", batch, GapConfig(0.4, LAYER, "text"))
    fewer = False
    for b, ids in enumerate(inputs["input_ids"]):
        real = inputs["attention_mask"][b].bool()
        visual = (ids == IMAGE).nonzero()[:, 0]
        text = [i for i in range(int(visual[-1]) + 1, len(ids)) if real[i]]
        shares = (embeds[b, visual] @ embeds[b, text].T).softmax(1).mean(0)
        rows = [row for row, share in zip(text, shares, strict=True) if share >= shares.mean()]
        fewer = fewer or len(rows) < len(text)
        # Attention of those rows, with RoPE, over what each may see.
        positions = (inputs["attention_mask"][b].cumsum(0) - 1).clamp(min=0)
        cos, sin = (x[0] for x in rotary(query, positions[None]))

        def turned(x: torch.Tensor, cos=cos, sin=sin) -> torch.Tensor:
            half = x.shape[-1] // 2
            return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

        q, k = turned(query[b]), turned(key[b]).repeat_interleave(query.shape[1] // key.shape[1], 0)
        total = torch.zeros(len(ids))
        for row in rows:
            seen = real & (torch.arange(len(ids)) <= row)
            logits = torch.einsum("hd,hsd->hs", q[:, row], k) / math.sqrt(q.shape[-1])
            total += logits.masked_fill(~seen, -torch.inf).softmax(-1).mean(0)
        count = len(visual)
        assert torch.allclose(by_raters.score[b, :count], (total / len(rows))[visual], rtol=1e-4, atol=1e-6)
    assert fewer
    assert not torch.allclose(by_raters.score, by_text.score)


def rope_of_ones(inv_freq: torch.Tensor, distance: torch.Tensor) -> float:
    """Two vectors of ones, one turned by so many positions on each channel pair: twice the sum of cosines."""
    return float(2 * torch.cos(inv_freq.double() * distance.double()).sum()) / math.sqrt(2 * len(inv_freq))


@pytest.mark.parametrize("batch", ["even", "left-padded", "right-padded", "ragged-images", "single"])
def test_corrected_raters_against_loops(batch: str) -> None:
    """SparseVLM+ in float64: attention over what RoPE makes of equal vectors, of the heads that have the most of it."""
    model, inputs = model_and_prompt("llava", batch, "sdpa")
    embeds = embeds_of(model, inputs)
    _, (query, key) = heard("llava", batch, "q_proj", "k_proj")
    query, key = query.double(), key.double()
    inv_freq = model.model.language_model.rotary_emb.inv_freq
    heads, chosen_heads = query.shape[1], max(round(query.shape[1] * 14 / 32), 1)
    assert chosen_heads < heads
    found = selected("llava", batch, GapConfig(0.4, LAYER, "raters_corrected"))
    for b, ids in enumerate(inputs["input_ids"]):
        real = inputs["attention_mask"][b].bool()
        position = (inputs["attention_mask"][b].cumsum(0) - 1).clamp(min=0)
        visual = (ids == IMAGE).nonzero()[:, 0].tolist()
        text = [i for i in range(visual[-1] + 1, len(ids)) if real[i]]
        shares = (embeds[b, visual] @ embeds[b, text].T).softmax(1).mean(0)
        rows = [row for row, share in zip(text, shares, strict=True) if share >= shares.mean()]

        def turned(x: torch.Tensor, row: int, position=position) -> torch.Tensor:
            angle = (inv_freq.double() * position[row].double()).repeat(2)
            half = x.shape[-1] // 2
            return x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angle.sin()

        by_head = torch.zeros(heads, len(visual), dtype=torch.float64)
        for head in range(heads):
            kv = head // (heads // key.shape[1])
            keys = torch.stack([turned(key[b, kv, i], i) for i in range(len(ids))])
            for row in rows:
                seen = real & (torch.arange(len(ids)) <= row)
                logits = keys @ turned(query[b, head, row], row) / math.sqrt(query.shape[-1])
                attended = logits.masked_fill(~seen, -torch.inf).softmax(0)
                for number, column in enumerate(visual):
                    bias = rope_of_ones(inv_freq, position[row] - position[column])
                    by_head[head, number] += attended[column] / bias
        best = sorted(range(heads), key=lambda head: -float(by_head[head].sum()))[:chosen_heads]
        expected = (by_head[best].mean(0) / len(rows)).float()
        assert torch.allclose(found.score[b, : len(visual)], expected, rtol=2e-3, atol=1e-5)
    plain = selected("llava", batch, GapConfig(0.4, LAYER, "raters"))
    assert not torch.allclose(found.score, plain.score, rtol=1e-2)


def corrected_in_both_ways(run: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the operator, and by ones that the model's own function turns."""
    known: list[bool] = []

    def noting(module: Any, rotary: Any, query: Tensor) -> rope.Rope | None:
        found = rope.rope_of(module, rotary, query)
        # Before transformers 5 there may be cos and sin of several axes, which the operator doesn't take.
        known.append(found is not None or rotary[0].dim() == 4)
        return found

    monkeypatch.setattr(scores_of_decoder, "rope_of", noting)
    by_operator = run()
    assert known
    assert all(known)
    monkeypatch.setattr(scores_of_decoder, "rope_of", lambda *given: None)
    by_function = run()
    torch.testing.assert_close(by_operator, by_function, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch", ["left-padded", "right-padded", "ragged-images"])
@pytest.mark.parametrize("name", ROPES)
def test_the_operator_turns_ones_as_the_model_does(
    name: str, batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GapConfig(0.6, 0, "raters_corrected", then=(Stage(0.3, LAYER, "raters_corrected"),))
    corrected_in_both_ways(lambda: selected(name, batch, config).score, monkeypatch)


@pytest.mark.parametrize("model_type", ["glm4v", "glm4v_moe", "hunyuan_vl", "granite4_vision"])
def test_the_operator_turns_ones_as_other_families_do(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs side by side, a part of the channels, pairs of two angles, and a scale of its own."""
    model = build_or_skip(model_type)
    gap_triton.attach(model, GapConfig(0.5, 0, "raters_corrected"))

    def run() -> Tensor:
        with torch.no_grad(), families.visual_features(model):
            model(**families.prompt(model))
        return gap_triton.last_selection(model).score

    corrected_in_both_ways(run, monkeypatch)


def test_a_rotation_that_turns_ones_in_another_way_turns_them_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as long queries have twice the attention by RoPE alone, so half the score."""
    config = GapConfig(0.4, LAYER, "raters_corrected")
    expected, module = (
        selected("llava", "left-padded", config).score,
        transformers.models.llama.modeling_llama,
    )
    rotate = module.apply_rotary_pos_emb

    def longer(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        is_of_ones = bool((q == 1).all())  # those of the model stay as they are
        q, k = rotate(q, k, cos, sin, unsqueeze_dim)
        return (2 * q if is_of_ones else q), k

    monkeypatch.setattr(module, "apply_rotary_pos_emb", longer)
    found = selected("llava", "left-padded", config).score
    torch.testing.assert_close(2 * found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", ["raters_corrected", "unrotated"])
@pytest.mark.parametrize("name", ROPES[:2])
def test_a_ready_made_mask_says_what_padding_says(name: str, score: str) -> None:
    inputs = model_and_prompt(name, "left-padded", "sdpa")[1]
    real = inputs["attention_mask"].bool()
    causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    mask = (causal[None, None] & real[:, None, None]) | torch.eye(len(causal), dtype=torch.bool)
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    scores = []
    for given in (inputs["attention_mask"], mask, additive):
        model = model_and_prompt(name, "left-padded", "gap_triton")[0]
        gap_triton.configure(model, GapConfig(0.4, LAYER, score))
        with torch.no_grad():
            model(**{**inputs, "attention_mask": given, "position_ids": positions})
        scores.append(gap_triton.last_selection(model).score)
    for found in scores[1:]:
        assert torch.allclose(found, scores[0], rtol=1e-3, atol=1e-5)


def test_heads_that_are_split_can_not_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_of_decoder, "tensor_parallel_group", lambda attachment, query: object())
    with pytest.raises(
        ValueError, match=r"score='raters_corrected': .* split over devices; use score='raters'"
    ):
        selected("llava", "single", GapConfig(0.4, LAYER, "raters_corrected"))


def test_without_a_known_rotation_the_correction_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unrotated, "ROTATIONS", ("spin",))
    with pytest.raises(
        ValueError,
        match=r"score='raters_corrected': LlamaAttention does not rotate .* by spin .* use score='raters'",
    ):
        gap_triton.configure(build("llava", "gap_triton"), GapConfig(0.4, LAYER, "raters_corrected"))


def grids_of(selection: gap_triton.Selection, b: int) -> list[dict[int, tuple[int, int]]]:
    """Row of the prompt -> cell, for each image of sample ``b``."""
    rows = [row for row in selection.candidates[b].tolist() if row >= 0]
    images = [rows[i : i + SIDE * SIDE] for i in range(0, len(rows), SIDE * SIDE)]
    return [{row: divmod(i, SIDE) for i, row in enumerate(image)} for image in images]


@pytest.mark.parametrize("batch", ["left-padded", "ragged-images", "one-without-image", "single"])
@pytest.mark.parametrize("name", ROPES)
def test_region_in_the_decoder(name: str, batch: str) -> None:
    config = GapConfig(0.3, LAYER, "text", "region")
    selection = selected(name, batch, config)
    for b in range(len(selection.index)):
        score = dict(zip(selection.candidates[b].tolist(), selection.score[b].tolist(), strict=True))
        images = grids_of(selection, b)
        rows = [row for image in images for row in image]
        keep = config.count(len(rows))
        regions: dict[tuple[int, int, int], list[int]] = {}
        for number, image in enumerate(images):
            for row, (down, right) in image.items():
                regions.setdefault((number, down // 2, right // 2), []).append(row)
        each = math.ceil(keep / len(regions)) if regions else 0
        candidates = [
            row for region in regions.values() for row in sorted(region, key=lambda r: (-score[r], r))[:each]
        ]
        expected = sorted(sorted(candidates, key=lambda r: (-score[r], r))[:keep])
        assert [row for row in selection.visual_index[b].tolist() if row >= 0] == expected
    plain = selected(name, batch, GapConfig(0.3, LAYER, "text"))
    assert torch.equal(plain.score, selection.score)
    assert not torch.equal(plain.index, selection.index)


@pytest.mark.parametrize("batch", ["left-padded", "single"])
def test_stride_in_the_decoder(batch: str) -> None:
    config = GapConfig(0.4, LAYER, "text", "stride")
    selection = selected("llava", batch, config)
    order = spatial_order((SIDE, SIDE)).tolist()
    for b in range(len(selection.index)):
        score = dict(zip(selection.candidates[b].tolist(), selection.score[b].tolist(), strict=True))
        images = grids_of(selection, b)
        rank = {row: order[down * SIDE + right] for image in images for row, (down, right) in image.items()}
        keep = config.count(len(rank))
        spread = sorted(rank, key=lambda r: (rank[r], r))[: int(STRIDE_SHARE * keep)]
        rest = sorted((r for r in rank if r not in spread), key=lambda r: (-score[r], r))[
            : keep - len(spread)
        ]
        assert [row for row in selection.visual_index[b].tolist() if row >= 0] == sorted(spread + rest)


@pytest.mark.parametrize("score", ["last_token", "unrotated"])
@pytest.mark.parametrize("batch", ["even", "left-padded", "ragged-images"])
def test_a_share_in_the_operator_and_one_of_too_many_digits_for_it(score: str, batch: str) -> None:
    """Both are exact. Of these counts the two shares are as many tokens, so that the same survive."""
    chosen = [
        selected("llava", batch, GapConfig(0.5, LAYER, score, "stride", spread=spread))
        for spread in (0.4375, 0.43750000001)
    ]
    usual = selected("llava", batch, GapConfig(0.5, LAYER, score, "stride"))
    assert torch.equal(chosen[0].index, chosen[1].index)
    assert not torch.equal(chosen[0].index, usual.index)


def test_spatial_is_the_same_before_and_in_the_decoder() -> None:
    chosen = [
        selected("llava", "ragged-images", GapConfig(0.25, layer, "spatial")).visual_index
        for layer in (-1, 1)
    ]
    assert torch.equal(*chosen)
    rows = [row for row in chosen[0][0].tolist() if row >= 0]
    assert len(rows) == 9
    assert len({row // 2 for row in rows}) == 9


def test_raters_need_embeddings() -> None:
    model = transformers.LlamaForCausalLM(build("llava").config.text_config).eval()
    gap_triton.attach(model, GapConfig(0.5, 1, "raters"))
    ids = torch.arange(5, 25)[None]
    with pytest.raises(ValueError, match="score='raters': the decoder was given input_ids"):
        model(input_ids=ids, visual_mask=ids < 15)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), visual_mask=ids < 15)
    assert gap_triton.last_selection(model).visual_index.shape[1] == 5
