"""Shikra and MiniGPT-v2: checkpoints in their authors' layout, made from tiny configs, against models put together here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from support.comparison import TOLERANCE, error
from support.lone import LoneOracle, lone
from support.model_types import PUBLISHED
from support.oracle import NAME as ORACLE
from support.published import (
    ALPHA,
    HIDDEN,
    PROJECTION,
    RANK,
    WIDTH,
    Case,
    clip,
    eva_config,
    eva_state,
    load_minigpt,
    load_shikra,
    lora,
    minigpt_features,
    minigpt_state,
    noise,
    save_shikra,
)
from support.tiny import BOS, GRID, IMAGE_SIZE, LAYERS, PATCH, VISION, generate
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Blip2VisionConfig, Blip2VisionModel

import gap_triton
from gap_triton import GapConfig
from gap_triton.evaluation.decoders import minigpt_v2_asker, shikra_asker
from gap_triton.evaluation.question import Question
from gap_triton.models import minigpt_v2, shikra
from gap_triton.models.visual_decoder import IMAGE_TOKEN, VisualDecoder
from gap_triton.strategies import spatial_order

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=PUBLISHED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param)


def test_features(case: Case) -> None:
    with torch.no_grad():
        features = case.model.projector(case.model.tower(case.pixel_values))
    assert features.shape == case.features.shape
    torch.testing.assert_close(features, case.features, rtol=1e-5, atol=1e-5)
    assert float(features.std()) > 0.05  # not a constant


def test_logits_are_those_of_the_parts(case: Case) -> None:
    expected = generate(case.reference("sdpa"), case.merged)
    output = generate(case.model, case.inputs)
    assert torch.equal(output.sequences, expected.sequences)
    assert error(output, expected) <= TOLERANCE
    with torch.no_grad():
        logits, reference = case.model(**case.inputs).logits, case.reference("sdpa")(**case.merged).logits
    real = case.attention_mask == 1
    assert float((logits - reference)[real].abs().max()) <= TOLERANCE


def test_keep_everything_is_sdpa_bit_for_bit(case: Case) -> None:
    dense = generate(case.model, case.inputs)
    with gap_triton.pruning(case.model.decoder, GapConfig(keep=1.0, layer=1)):
        pruned = generate(case.model, case.inputs)
    assert torch.equal(pruned.sequences, dense.sequences)
    assert error(pruned, dense) == 0.0


@pytest.mark.parametrize("layer", [0, 1, LAYERS - 2])
def test_the_oracle(case: Case, layer: int) -> None:
    with gap_triton.pruning(case.model.decoder, GapConfig(keep=0.4, layer=layer)):
        pruned = generate(case.model, case.inputs)
    reference = case.reference(ORACLE)
    with LoneOracle(reference, layer, 0.4, case.visual) as oracle:
        expected = generate(reference, case.merged)
    tokens = int(case.visual[0].sum())
    assert oracle.dropped.sum(1).tolist() == [tokens - -(-2 * tokens // 5)] * 2
    assert torch.equal(pruned.sequences, expected.sequences)
    assert error(pruned, expected) <= TOLERANCE


def test_pruning_changes_the_logits(case: Case) -> None:
    dense = generate(case.model, case.inputs)
    with gap_triton.pruning(case.model.decoder, GapConfig(keep=0.4, layer=1)):
        assert error(generate(case.model, case.inputs), dense) > 100 * TOLERANCE


def eva_patches(side: int) -> minigpt_v2.EvaPatches:
    """A tower in which a patch reaches no row but its own."""
    tower = Blip2VisionModel(Blip2VisionConfig(**{**VISION, "image_size": side})).eval()
    for layer in tower.encoder.layers:
        torch.nn.init.zeros_(layer.self_attn.projection.weight)
        torch.nn.init.zeros_(layer.self_attn.projection.bias)
    return minigpt_v2.EvaPatches(tower)


def test_minigpt_tokens_stand_in_a_grid_of_four_times_as_many_rows_as_columns() -> None:
    """Not in a square, as their number would allow: 256 tokens are 32 x 8, and here 16 are 8 x 2."""
    side = 8 * PATCH
    tower = eva_patches(side)
    model = VisualDecoder(tower, torch.nn.Linear(4 * WIDTH, HIDDEN), lone()).eval()
    pixel_values = noise(2, 3, side, side, seed=3)
    assert tower.grid(pixel_values) == (8, 2)
    assert tower.grid(noise(1, 3, 448, 448 // 4, seed=0)) == (112, 7)
    with torch.no_grad():
        before = tower(pixel_values)
        for row, column in ((0, 0), (3, 5), (7, 7)):
            marked = pixel_values.clone()
            marked[0, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 1.0
            changed = (tower(marked)[0] != before[0]).any(-1).nonzero()[:, 0].tolist()
            assert changed == [row * 2 + column // 4]
    ids = torch.tensor([[BOS, *[IMAGE_TOKEN] * 16, 7, 8], [BOS, 9, *[IMAGE_TOKEN] * 16, 10]])
    for layer in (-1, 1):
        with gap_triton.pruning(model.decoder, GapConfig(4, layer, "spatial")):
            generate(model, {"input_ids": ids, "pixel_values": pixel_values}, tokens=2, num_beams=2)
            kept = gap_triton.last_selection(model.decoder).visual_index
        expected = spatial_order((8, 2)).argsort()[:4].sort().values
        assert expected.tolist() != spatial_order((4, 4)).argsort()[:4].sort().values.tolist()
        assert kept.tolist() == [(expected + 1).tolist()] * 2 + [(expected + 2).tolist()] * 2


def test_shikra_tokens_stand_in_the_grid_of_the_patches(case: Case) -> None:
    grid = case.model.tower.grid(case.pixel_values)
    # Six patches in a row are no whole tokens of four, which then run on into the next row and make no grid.
    assert grid == ((GRID, GRID) if case.features.shape[1] == GRID * GRID else None)
    with gap_triton.pruning(case.model.decoder, GapConfig(4, -1, "spatial")):
        if grid is None:
            with pytest.raises(
                ValueError, match=r"nothing tells how many rows and columns .*pass visual_grid"
            ):
                generate(case.model, case.inputs)
            return
        generate(case.model, case.inputs, tokens=2)
        kept = gap_triton.last_selection(case.model.decoder).visual_index
    rows = [visual.nonzero()[:, 0] for visual in case.visual]
    expected = spatial_order((GRID, GRID)).argsort()[:4].sort().values
    assert kept.tolist() == [row[expected].tolist() for row in rows]


def test_places_and_images_must_agree(case: Case) -> None:
    with pytest.raises(
        ValueError, match=r"input_ids hold \d+ visual tokens and the 1 images of pixel_values have"
    ):
        case.model(case.input_ids, case.pixel_values[:1])
    with pytest.raises(ValueError, match=r"and the 0 images of pixel_values have 0"):
        case.model(case.input_ids)


@pytest.mark.parametrize("layout", ["bin", "sharded", "safetensors"])
def test_shikra_file_formats(tmp_path: Path, layout: str) -> None:
    save_shikra(tmp_path / "shikra", layout)
    model = load_shikra(tmp_path)
    assert {key: value.tolist() for key, value in model.projector.state_dict().items()} == {
        key: value.tolist() for key, value in PROJECTION.items()
    }
    own, expected = model.decoder.state_dict(), lone().state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[key], expected[key]) for key in own)


@pytest.mark.parametrize(("layer", "state"), [(None, -2), (-1, -1)], ids=["unsaid", "last"])
def test_shikra_vision_layer(tmp_path: Path, layer: int | None, state: int) -> None:
    save_shikra(tmp_path / "shikra")
    file = tmp_path / "shikra" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"mm_vision_select_layer": layer}
    if layer is None:
        del config["mm_vision_select_layer"]
    file.write_text(json.dumps(config), encoding="utf-8")
    model, pixels = load_shikra(tmp_path), noise(1, 3, IMAGE_SIZE, IMAGE_SIZE, seed=3)
    with torch.no_grad():
        expected = clip()(pixels, output_hidden_states=True).hidden_states[state][:, 1:]
        assert torch.equal(model.tower(pixels), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.mm_projector.bias": None}, r"1 missing keys \(model.mm_projector.bias\)"),
        ({"model.layers.1.mlp.up_proj.weight": None}, r"missing keys \(model.layers.1.mlp.up_proj.weight\)"),
        ({"model.vision.weight": torch.ones(2)}, r"1 unexpected keys \(model.vision.weight\)"),
    ],
    ids=["projector", "decoder", "unexpected"],
)
def test_shikra_keys(tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    save_shikra(tmp_path / "shikra", **changes)
    with pytest.raises(
        ValueError, match=r"(?s)The Shikra checkpoint .* is not laid out as expected.*" + message
    ):
        load_shikra(tmp_path)


def test_minigpt_lora_keys_of_later_peft(tmp_path: Path) -> None:
    model = load_minigpt(tmp_path, minigpt_state(".default"), eva_state())
    before, after = lone().state_dict(), model.decoder.state_dict()
    matrices = lora()
    for key, weight in after.items():
        name = key.removesuffix(".weight")
        if f"{name}.lora_A" in matrices:
            change = ALPHA / RANK * matrices[f"{name}.lora_B"] @ matrices[f"{name}.lora_A"]
            torch.testing.assert_close(weight, before[key] + change)
        else:
            assert torch.equal(weight, before[key])


def test_minigpt_layer_norm_of_the_checkpoint(tmp_path: Path) -> None:
    state = minigpt_state()
    state |= {"ln_vision.weight": noise(WIDTH, seed=11), "ln_vision.bias": noise(WIDTH, seed=12)}
    pixels = noise(1, 3, IMAGE_SIZE, IMAGE_SIZE, seed=3)
    model = load_minigpt(tmp_path, state, eva_state())
    with torch.no_grad():
        features = model.projector(model.tower(pixels))
    torch.testing.assert_close(features, minigpt_features(pixels, state, eva_state()), rtol=1e-5, atol=1e-5)


def test_minigpt_layer_norm_epsilon(tmp_path: Path) -> None:
    """1e-5, where the tower's own norms have 1e-6: it shows in features of small variance."""
    eva = {key: value * 1e-3 for key, value in eva_state().items()}
    pixels = noise(1, 3, IMAGE_SIZE, IMAGE_SIZE, seed=3)
    model = load_minigpt(tmp_path, minigpt_state(), eva)
    with torch.no_grad():
        features = model.projector(model.tower(pixels))
    torch.testing.assert_close(features, minigpt_features(pixels, minigpt_state(), eva), rtol=1e-4, atol=1e-5)


def test_minigpt_position_embeddings_are_resized(tmp_path: Path) -> None:
    """As transformers does it when a tower sees a larger image than it was made for."""
    small = IMAGE_SIZE // PATCH // 2
    model = load_minigpt(tmp_path, minigpt_state(), eva_state(small))
    tower = Blip2VisionModel(Blip2VisionConfig(**VISION | {"image_size": IMAGE_SIZE // 2})).eval()
    state = {key: value for key, value in model.tower.model.state_dict().items() if "position" not in key}
    tower.load_state_dict(state | {"embeddings.position_embedding": eva_state(small)["pos_embed"]})
    tower.post_layernorm.eps = 1e-5
    pixels = noise(1, 3, IMAGE_SIZE, IMAGE_SIZE, seed=3)
    with torch.no_grad():
        expected = tower(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
        features = model.tower(pixels)
    torch.testing.assert_close(features.flatten(1), expected.flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("state", "llama_proj.bias", None, r"1 missing keys \(llama_proj.bias\)"),
        ("state", "ln_vision.bias", torch.ones(WIDTH), r"1 missing keys \(ln_vision.weight\)"),
        (
            "state",
            "llama_model.base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight",
            None,
            r"1 missing keys \(llama_model.*layers.1.self_attn.v_proj.lora_B.weight\)",
        ),
        (
            "state",
            "query_tokens",
            torch.ones(2),
            r"MiniGPT-v2 checkpoint .*1 unexpected keys \(query_tokens\)",
        ),
        (
            "state",
            "llama_proj.weight",
            torch.ones(2, 2),
            r"does not fit: weight is \[2, 2\], expected \[64, 128\]",
        ),
        (
            "state",
            "llama_model.base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight",
            torch.ones(3, RANK),
            r"does not fit: model.layers.1.self_attn.v_proj is \[32, 64\], its LoRA matrices B \[3, 4\]",
        ),
        (
            "eva",
            "blocks.1.mlp.fc2.bias",
            None,
            r"EVA file .*1 missing keys \(encoder.layers.1.mlp.fc2.bias\)",
        ),
        ("eva", "blocks.1.attn.v_bias", None, r"EVA file .*1 missing keys \(blocks.1.attn.v_bias\)"),
        ("eva", "rel_pos_bias", torch.ones(2), r"EVA file .*1 unexpected keys \(rel_pos_bias\)"),
    ],
)
def test_minigpt_keys(tmp_path: Path, part: str, key: str, value: torch.Tensor | None, message: str) -> None:
    files = {"state": minigpt_state(), "eva": eva_state()}
    files[part][key] = value
    files[part] = {k: v for k, v in files[part].items() if v is not None}
    with pytest.raises(ValueError, match=r"(?s)" + message):
        load_minigpt(tmp_path, files["state"], files["eva"])


def test_minigpt_file_of_another_kind(tmp_path: Path) -> None:
    lone().save_pretrained(tmp_path / "llama")
    torch.save({"weights": 1}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth holds weights: expected a 'model'"):
        minigpt_v2.load(
            tmp_path / "other.pth", tmp_path / "llama", tmp_path / "eva.pth", vision_config=eva_config()
        )


def test_published_shapes() -> None:
    """What the authors' configurations say, without making the weights."""
    with torch.device("meta"):
        tower = Blip2VisionModel(Blip2VisionConfig(image_size=minigpt_v2.IMAGE_SIZE))
    shapes = {key: tuple(value.shape) for key, value in tower.state_dict().items()}
    assert shapes["embeddings.position_embedding"] == (1, 1 + 4 * minigpt_v2.VISUAL_TOKENS, 1408)
    assert shapes["encoder.layers.38.mlp.fc1.weight"] == (6144, 1408)  # int(1408 * 4.3637)
    assert "encoder.layers.39.mlp.fc1.weight" not in shapes
    assert tower.config.num_attention_heads == 16
    assert tower.encoder.layers[0].layer_norm1.eps == 1e-6


# ------------------------------------------------------------------------------------------ prompts and documents
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *shikra_tokens(), *(f"w{i}" for i in range(50))]
    words += [
        "USER:",
        "ASSISTANT:",
        "Where",
        "is",
        "the",
        "cat",
        "in",
        "?",
        "[INST]",
        "[/INST]",
        "<Img>",
        "</Img>",
    ]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    backend.add_special_tokens(["<s>", *shikra_tokens(), "<Img>", "</Img>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def shikra_tokens() -> list[str]:
    return ["<im_patch>", "<im_start>", "<im_end>"]


def test_shikra_prompt() -> None:
    words = tokenizer()
    ids = shikra.prompt_ids(words, "USER: w1 <image> w2 ASSISTANT:", 3)
    start, end = words.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    name = words.convert_tokens_to_ids
    expected = [BOS, name("USER:"), name("w1"), start, -1, -1, -1, end, name("w2"), name("ASSISTANT:")]
    assert ids.tolist() == [expected]
    plain = tokenizer()
    plain.get_vocab = lambda: {"w1": 1}
    with pytest.raises(
        ValueError, match=r"tokenizer does not know <im_start>, <im_patch>, <im_end>: expected the"
    ):
        shikra.prompt_ids(plain, "w1")


def test_minigpt_prompt() -> None:
    words = tokenizer()
    ids = minigpt_v2.prompt_ids(words, "w1 <Img><ImageHere></Img> w2 <ImageHere> w3", 2)
    name = words.convert_tokens_to_ids
    expected = [BOS, name("w1"), name("<Img>"), -1, -1, name("</Img>"), name("w2"), -1, -1, name("w3")]
    assert ids.tolist() == [expected]


def recipes() -> dict[str, str]:
    text = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    return dict(zip(("visual_mask", "shikra", "minigpt_v2"), blocks, strict=True))


@pytest.mark.parametrize("name", ["visual_mask", *PUBLISHED])
def test_the_recipes_of_the_document_run(name: str, tmp_path: Path) -> None:
    from PIL import Image

    image = Image.new("RGB", (2 * IMAGE_SIZE, IMAGE_SIZE + 5), (200, 30, 30))
    names: dict[str, object] = {"image": image, "image_size": IMAGE_SIZE, "device": "cpu"}
    if name == "visual_mask":
        lone().save_pretrained(tmp_path / "llama")
        names |= {
            "llama": tmp_path / "llama",
            "image_features": noise(2, 20, HIDDEN, seed=1, scale=0.1),
            "question_ids": torch.arange(5, 15).view(2, 5),
        }
    elif name == "shikra":
        Case(tmp_path, "shikra")
        size = {"shortest_edge": IMAGE_SIZE}
        transformers.CLIPImageProcessor(size=size, crop_size=IMAGE_SIZE).save_pretrained(tmp_path / "clip")
        tokenizer().save_pretrained(tmp_path / "shikra")
        names |= {"checkpoint": tmp_path / "shikra", "clip": tmp_path / "clip", "visual_tokens": 36}
    else:
        Case(tmp_path, "minigpt_v2")
        tokenizer().save_pretrained(tmp_path / "llama")
        files = {"checkpoint": "minigpt.pth", "llama": "llama", "eva": "eva.pth"}
        names |= {key: tmp_path / file for key, file in files.items()}
        names |= {"vision_config": eva_config(), "visual_tokens": 9}
    exec(compile(recipes()[name], f"docs/published.md: {name}", "exec"), names)
    answer, decoder = names["answer"], names["decoder"] if name == "visual_mask" else names["model"].decoder
    assert answer.shape[1] <= 32
    kept = gap_triton.last_selection(decoder).visual_index
    assert kept.shape[1] == {"visual_mask": 5, "shikra": 9, "minigpt_v2": 3}[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_evaluation_asks_them_in_batches(name: str, tmp_path: Path) -> None:
    from PIL import Image

    whole = Case(tmp_path, name, attn_implementation="gap_triton").model
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ask, tokens = {"shikra": (shikra_asker, 36), "minigpt_v2": (minigpt_v2_asker, 9)}[name]
    processor = transformers.CLIPImageProcessor(size=size, do_center_crop=False)
    asker = ask(whole, tokenizer(), processor, visual_tokens=tokens, max_new_tokens=6)
    images = [Image.effect_noise((50, 20 + 10 * i), 64).convert("RGB") for i in range(3)]
    questions = [
        Question(str(i), " ".join(["the", "cat"] * (i + 1)), lambda i=i: images[i], box=(0, 0, 1, 1))
        for i in range(3)
    ]
    config = GapConfig(0.25, 1, "text")
    gap_triton.configure(asker.model, config)
    batch = asker.prepare(questions)
    assert [(view.width, view.height) for view in batch.views] == [(50, 20), (50, 30), (50, 40)]
    answers = asker.ask(questions, config)
    assert [each.text for each in answers] == [asker.ask([one], config)[0].text for one in questions]
    assert len({each.text for each in answers}) > 1
    kept = -(-tokens // 4)
    for each in answers:
        assert each.visual_tokens == tokens
        assert each.kept_tokens == pytest.approx((2 * tokens + (LAYERS - 2) * kept) / LAYERS)
    if name == "shikra":  # by its tower, and before the decoder, so that all layers hold as many
        by_tower = GapConfig(0.25, -1, "cls")
        gap_triton.configure(asker.model, by_tower)
        assert [each.kept_tokens for each in asker.ask(questions, by_tower)] == [kept] * 3
    # Shikra sees the image padded to a square.
    padded = Image.new("RGB", (50, 50), tuple(int(255 * mean) for mean in processor.image_mean))
    padded.paste(images[0], (0, 15))
    seen = padded if name == "shikra" else images[0]
    pixels = processor(images=[seen], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch.inputs["pixel_values"][:1], pixels)
    prompt = asker.prompt(questions[0])
    assert prompt.count("<image>") + prompt.count("<ImageHere>") == 1


def test_the_older_name() -> None:
    import gap_triton.published.shikra

    import gap_triton.models.shikra
    from gap_triton.published import minigpt_v2 as by_its_older_name

    assert gap_triton.published.shikra is gap_triton.models.shikra
    assert by_its_older_name is gap_triton.models.minigpt_v2
