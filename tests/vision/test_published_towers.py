"""What the towers of Shikra and MiniGPT-v2 tell the decoder behind them, against towers that are run or written out here."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from support.comparison import TOLERANCE, error
from support.lone import lone
from support.methods import BY_TOWER, preset
from support.model_types import PUBLISHED
from support.published import (
    HIDDEN,
    PROJECTION,
    Case,
    clip,
    eva_state,
    minigpt_features,
    minigpt_state,
    noise,
)
from support.tiny import IMAGE, LAYERS, PATCH, VISION, generate, text_config

import gap_triton
from gap_triton import GapConfig
from gap_triton.models.visual_decoder import IMAGE_TOKEN, Tower, VisualDecoder
from gap_triton.strategies import LLAVA, aggregate
from gap_triton.vision_tower import TowerRecorder, find_tower, install

SIDE = 8 * PATCH  # four patches in a row make 8 x 2 tokens
SCORES = ("cls", "received", "key_norm")
ALL = frozenset({*SCORES, "keys", "similarity", "features"})
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module", params=PUBLISHED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param, SIDE if "gpt" in request.param else 24)


def expected_of(case: Case) -> dict[str, torch.Tensor]:
    """What each tower tells of its visual tokens, [I * N, ...], by eager attention, without a token for the class."""
    if case.features.shape[1] == 36:  # Shikra
        tower = clip()
        tower.set_attn_implementation("eager")
        layers = getattr(tower, "vision_model", tower).encoder.layers
        keys: list[torch.Tensor] = []
        layers[-2].self_attn.k_proj.register_forward_hook(lambda *args: keys.append(args[2]))
        with torch.no_grad():
            run = tower(case.pixel_values, output_attentions=True, output_hidden_states=True)
        weights, key, last, entering = (
            run.attentions[-2],
            keys[0],
            run.hidden_states[-1],
            run.hidden_states[-2],
        )
        entering, each = entering[:, 1:], 1
    else:
        seen: dict[str, list[torch.Tensor]] = {}
        minigpt_features(case.pixel_values, minigpt_state(), eva_state(SIDE // PATCH), seen)
        weights, key, last, entering = (seen[name][-1] for name in ("weights", "keys", "output", "entering"))
        each = 4

    def tokens(rows: torch.Tensor) -> torch.Tensor:
        """Means of ``each`` patches in a row, of [I, 1 + P, ...]."""
        return rows[:, 1:].unflatten(1, (-1, each)).mean(dim=2).flatten(0, 1)

    weights = weights.mean(dim=1)
    return {
        "cls": tokens(weights[:, 0]),
        "received": tokens(weights.mean(dim=1)),
        "key_norm": tokens(key.norm(dim=-1)),
        "keys": tokens(key),
        "similarity": tokens(last),
        "features": entering.flatten(0, 1),
    }


def test_a_tower_tells_what_an_eager_one_shows(case: Case) -> None:
    tower = find_tower(case.model.tower)
    handles, recorder = install(tower), TowerRecorder(tower, ALL)
    recorder.start()
    with torch.no_grad():
        encoding = case.model.tower.get_image_features(case.pixel_values)
    recorder.stop()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(encoding.pooler_output, case.features, rtol=1e-5, atol=1e-5)
    output, expected = recorder.output(), expected_of(case)
    for need in sorted(ALL):
        torch.testing.assert_close(getattr(output, need), expected[need], **CLOSE)
    torch.testing.assert_close(output.project(output.features).view_as(case.features), case.features)


@pytest.mark.parametrize("score", SCORES)
def test_scores_of_the_tower(case: Case, score: str) -> None:
    """In a forward, and in `generate` with two beams, whose images are encoded once."""
    expected = expected_of(case)[score].view(2, -1)
    keep = 5
    best = expected.topk(keep, dim=1).indices.sort(dim=1).values
    rows = torch.stack(
        [visual.nonzero()[:, 0][index] for visual, index in zip(case.visual, best, strict=True)]
    )
    with gap_triton.pruning(case.model.decoder, GapConfig(keep, -1, score)), torch.no_grad():
        case.model(**case.inputs)
        selection = gap_triton.last_selection(case.model.decoder)
        torch.testing.assert_close(selection.score, expected, **CLOSE)
        assert torch.equal(selection.visual_index, rows)
        generate(case.model, case.inputs, tokens=2, num_beams=2)
        selection = gap_triton.last_selection(case.model.decoder)
        torch.testing.assert_close(selection.score, expected.repeat_interleave(2, dim=0), **CLOSE)
        assert torch.equal(selection.visual_index, rows.repeat_interleave(2, dim=0))


def llava() -> transformers.PreTrainedModel:
    """Shikra as transformers has it, but for the projector: there two layers, here the second one changes nothing."""
    config = transformers.LlavaConfig(
        text_config=text_config("llama"),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        projector_hidden_act="linear",
    )
    model = transformers.LlavaForConditionalGeneration._from_config(
        config, attn_implementation="gap_triton"
    ).eval()
    decoder, projector = lone(), model.model.multi_modal_projector
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(clip().state_dict())
    projector.linear_1.load_state_dict(PROJECTION)
    with torch.no_grad():
        torch.nn.init.eye_(projector.linear_2.weight)
        torch.nn.init.zeros_(projector.linear_2.bias)
    return model


def test_shikra_is_pruned_as_the_same_model_of_transformers(tmp_path: Path) -> None:
    """By every preset that ranks by the tower, with what it merges and where it merges it."""
    case, reference = Case(tmp_path, "shikra", attn_implementation="gap_triton"), llava()
    inputs = case.inputs | {"input_ids": case.input_ids.masked_fill(case.visual, IMAGE)}
    for name in BY_TOWER:
        config = preset(name, LAYERS, cls=True)
        outputs = []
        for model, decoder, given in (
            (case.model, case.model.decoder, case.inputs),
            (reference, reference, inputs),
        ):
            gap_triton.configure(decoder, config)
            outputs.append((generate(model, given, tokens=2), gap_triton.last_selection(decoder)))
        (output, selection), (expected, as_there) = outputs
        assert torch.equal(selection.visual_index, as_there.visual_index), name
        assert error(output, expected) <= TOLERANCE, name
    by_model = (
        GapConfig.preset("prumerge", model=case.model.decoder),
        GapConfig.preset("prumerge", model=reference),
    )
    assert by_model == (GapConfig.preset("prumerge"),) * 2
    dense = generate(lone(), case.merged, tokens=2)
    assert error(output, dense) > 100 * TOLERANCE


def test_nuwa_on_tokens_of_four_patches_in_a_row(tmp_path: Path) -> None:
    """The best of each region of the 8 x 2 grid, into which what is around is merged before the projector."""
    case = Case(tmp_path, "minigpt_v2", SIDE, attn_implementation="gap_triton")
    gap_triton.configure(case.model.decoder, GapConfig(4, -1, "cls", "region", "aggregation"))
    entering: list[torch.Tensor] = []
    case.model.decoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: entering.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        case.model(**case.inputs)
    told = {need: rows.unflatten(0, (2, 16)) for need, rows in expected_of(case).items()}
    anchors = told["cls"].unflatten(1, (4, 4)).argmax(dim=2) + torch.arange(
        0, 16, 4
    )  # 2 x 2 tokens one after the other
    merged = aggregate(told["features"], told["similarity"], told["cls"], anchors, (8, 2), rule=LLAVA)
    kept = gap_triton.last_selection(case.model.decoder).visual_index
    for sample, visual in enumerate(case.visual):
        assert kept[sample].tolist() == visual.nonzero()[:, 0][anchors[sample]].tolist()
        with torch.no_grad():
            expected = case.model.projector(merged.features[sample])
        torch.testing.assert_close(entering[0][sample, kept[sample]], expected, rtol=1e-4, atol=1e-5)
        assert float((expected - case.features[sample, anchors[sample]]).abs().max()) > 1e-2
    for name, budget, kept in (("nuwa", 4, 1), ("prumerge", 6, 6)):
        gap_triton.configure(case.model.decoder, preset(name, LAYERS, cls=True, budget=budget))
        generate(case.model, case.inputs, tokens=2)
        assert gap_triton.last_selection(case.model.decoder).visual_index.shape == (2, kept)


def test_a_copy_ranks_by_its_own_tower(case: Case) -> None:
    with gap_triton.pruning(case.model.decoder, GapConfig(4, -1, "key_norm")), torch.no_grad():
        case.model(**case.inputs)
        score = gap_triton.last_selection(case.model.decoder).score
        twin = copy.deepcopy(case.model)
        for parameter in twin.tower.model.parameters():
            parameter.mul_(1.5)
        twin(**case.inputs)
        assert not torch.allclose(gap_triton.last_selection(twin.decoder).score, score)
        case.model(**case.inputs)
        assert torch.equal(gap_triton.last_selection(case.model.decoder).score, score)


def test_a_decoder_is_no_longer_than_its_weights(case: Case) -> None:
    """What is put before it is no part of it."""
    assert case.model.decoder.state_dict().keys() == lone().state_dict().keys()
    assert sum(1 for _ in case.model.decoder.modules()) == sum(1 for _ in lone().modules())


def test_images_that_were_encoded_elsewhere_are_refused(case: Case) -> None:
    with gap_triton.pruning(case.model.decoder, GapConfig(4, -1, "cls")):
        merged = case.model.merge(case.input_ids, case.pixel_values)
        del merged["visual_encoding"]
        with pytest.raises(
            ValueError, match=r"did not tell 'cls' of this prompt's visual tokens: pass pixel_values"
        ):
            case.model.decoder(**merged)


def test_a_prompt_without_images(case: Case) -> None:
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        dense = case.model(ids).logits
        with gap_triton.pruning(case.model.decoder, GapConfig(4, -1, "cls")):
            assert torch.equal(case.model(ids).logits, dense)


def test_another_tower_for_the_same_decoder(tmp_path: Path) -> None:
    """It is watched from the next configuration on."""
    model = Case(tmp_path, "shikra").model
    tower = copy.deepcopy(model.tower)
    gap_triton.attach(model.decoder, GapConfig(4, -1, "cls"))
    other = type(model)(tower, model.projector, model.decoder)
    gap_triton.configure(model.decoder, GapConfig(4, -1, "cls"))
    with torch.no_grad():
        other.tower.model.get_input_embeddings().weight.mul_(2)
        other(torch.tensor([[5, *[IMAGE_TOKEN] * 36, 6]]), noise(1, 3, 24, 24, seed=1))
    assert gap_triton.last_selection(model.decoder).visual_index.shape == (1, 4)
    gap_triton.detach(model.decoder)
    assert "get_image_features" not in {**vars(tower), **vars(model.tower)}


class SiglipPatches(Tower):
    """A tower without a token for the class."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).last_hidden_state


def test_any_other_tower_before_a_decoder() -> None:
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)).eval()
    model = VisualDecoder(
        SiglipPatches(siglip), torch.nn.Linear(VISION["hidden_size"], HIDDEN), lone()
    ).eval()
    config = GapConfig.preset("prumerge", model=model.decoder, budget=4)
    assert config.score == "received"
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * 36, 6, 7]])
    with gap_triton.pruning(model.decoder, config), torch.no_grad():
        model(ids, noise(1, 3, 24, 24, seed=1))
        assert gap_triton.last_selection(model.decoder).visual_index.shape == (1, 4)
    with pytest.raises(ValueError, match="SiglipVisionModel has no CLS token"):
        gap_triton.attach(model.decoder, GapConfig(4, -1, "cls"))


def test_a_decoder_inside_a_wrapper(tmp_path: Path) -> None:
    """As what PEFT returns: the tower is found from the decoder itself."""
    case = Case(tmp_path, "shikra")
    wrapped = torch.nn.Sequential(case.model.decoder)
    wrapped.get_input_embeddings = case.model.decoder.get_input_embeddings
    model = VisualDecoder(copy.deepcopy(case.model.tower), case.model.projector, wrapped).eval()
    gap_triton.attach(wrapped, GapConfig(4, -1, "cls"))
    with torch.no_grad():
        case.model.decoder(**model.merge(case.input_ids, case.pixel_values))
    assert gap_triton.last_selection(wrapped).visual_index.shape == (2, 4)


def test_a_decoder_that_nothing_encodes_for_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"can't watch the vision tower of LlamaModel: it has no get_image_features"
    ):
        gap_triton.attach(lone(), GapConfig(4, -1, "cls"))
