"""Shikra and MiniGPT-v2: checkpoints in their authors' layout, made from tiny configs, against models put together here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.comparison import TOLERANCE, error
from support.lone import LoneOracle, lone
from support.model_types import PUBLISHED
from support.oracle import NAME as ORACLE
from support.tiny import BOS, GRID, IMAGE_SIZE, LAYERS, PAD, PATCH, TEXT, VISION, generate
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import gelu, layer_norm, linear
from transformers import Blip2VisionConfig, Blip2VisionModel, CLIPVisionConfig, CLIPVisionModel

import gap_triton
from gap_triton import GapConfig
from gap_triton.evaluation.decoders import minigpt_v2_asker, shikra_asker
from gap_triton.evaluation.question import Question
from gap_triton.models import minigpt_v2, shikra
from gap_triton.models.visual_decoder import IMAGE_TOKEN, VisualDecoder
from gap_triton.strategies import spatial_order

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HIDDEN = VISION["hidden_size"], TEXT["hidden_size"]
EVA_CONFIG = Blip2VisionConfig(**VISION)
RANK, ALPHA = 4, 16


def noise(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def clip() -> CLIPVisionModel:
    torch.manual_seed(5)
    return CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()


PROJECTION = {"weight": noise(HIDDEN, WIDTH, seed=1, scale=0.1), "bias": noise(HIDDEN, seed=2, scale=0.1)}


# ------------------------------------------------------------------------------------------ Shikra
def save_shikra(folder: Path, layout: str = "bin", **changes: torch.Tensor | None) -> None:
    """A folder as the authors' training writes it; ``changes`` replaces keys, or takes them out where None."""
    decoder = lone()
    state = {f"model.mm_projector.{key}": value for key, value in PROJECTION.items()}
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(LAYERS)}
    state = decoder.state_dict() | state | changes
    state = {key: value.clone() for key, value in state.items() if value is not None}
    folder.mkdir(exist_ok=True)
    config = decoder.config.to_dict() | {
        "model_type": "shikra",
        "architectures": ["ShikraLlamaForCausalLM"],
        "mm_hidden_size": WIDTH,
        "mm_vision_select_layer": -2,
        "use_mm_proj": True,
    }
    (folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    if layout == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    elif layout == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        where = {key: names[i % 2] for i, key in enumerate(state)}
        for name in names:
            torch.save({key: state[key] for key in state if where[key] == name}, folder / name)
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


def load_shikra(folder: Path, **options: str) -> VisualDecoder:
    clip().save_pretrained(folder / "clip")
    return shikra.load(folder / "shikra", folder / "clip", dtype=torch.float32, **options)


def shikra_features(pixel_values: torch.Tensor) -> torch.Tensor:
    """Stops one layer before CLIP's last, which is its hidden state -2."""
    tower = clip()
    layers = getattr(tower, "vision_model", tower).encoder.layers
    kept = []
    layers[-2].register_forward_hook(lambda *args: kept.append(args[2]))
    tower(pixel_values)
    states = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    return linear(states[:, 1:], PROJECTION["weight"], PROJECTION["bias"])


# ------------------------------------------------------------------------------------------ MiniGPT-v2
def eva_state(side: int = IMAGE_SIZE // PATCH) -> dict[str, torch.Tensor]:
    """In the layout of ``eva_vit_g.pth``: one block more than is used, and a head."""
    width, inner = WIDTH, VISION["intermediate_size"]
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + side * side, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (3, width),
        "head.bias": (3,),
    }
    block = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.q_bias": (width,),
        "attn.v_bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (inner, width),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (width, inner),
        "mlp.fc2.bias": (width,),
    }
    for i in range(VISION["num_hidden_layers"] + 1):
        shapes |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    return {key: noise(*shape, seed=i, scale=0.2) for i, (key, shape) in enumerate(shapes.items())}


def lora(layers: int = LAYERS) -> dict[str, torch.Tensor]:
    """A and B of q_proj and v_proj of each layer, by name in the decoder."""
    heads, kv = TEXT["num_attention_heads"], TEXT["num_key_value_heads"]
    state = {}
    for layer in range(layers):
        for target, out in (("q_proj", HIDDEN), ("v_proj", HIDDEN * kv // heads)):
            name, seed = f"model.layers.{layer}.self_attn.{target}", 100 * layer + out
            state[f"{name}.lora_A"] = noise(RANK, HIDDEN, seed=seed, scale=0.1)
            state[f"{name}.lora_B"] = noise(out, RANK, seed=seed + 1, scale=0.1)
    return state


def minigpt_state(infix: str = "") -> dict[str, torch.Tensor]:
    prefix = "llama_model.base_model.model."
    state = {f"{prefix}{key}{infix}.weight": value for key, value in lora().items()}
    state |= {f"{prefix}model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(LAYERS)}
    state["llama_proj.weight"] = noise(HIDDEN, 4 * WIDTH, seed=8, scale=0.05)
    state["llama_proj.bias"] = noise(HIDDEN, seed=9, scale=0.05)
    return state


def load_minigpt(
    folder: Path, state: dict[str, torch.Tensor], eva: dict[str, torch.Tensor], **options: object
) -> VisualDecoder:
    lone().save_pretrained(folder / "llama")
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 3}, folder / "minigpt.pth")
    torch.save(eva, folder / "eva.pth")
    return minigpt_v2.load(
        folder / "minigpt.pth",
        folder / "llama",
        folder / "eva.pth",
        vision_config=EVA_CONFIG,
        dtype=torch.float32,
        **options,
    )


def minigpt_features(
    pixel_values: torch.Tensor, state: dict[str, torch.Tensor], eva: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The tower written out, straight from its file."""
    images, heads = pixel_values.shape[0], VISION["num_attention_heads"]
    patches = pixel_values.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [I, 3, n, n, P, P]
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = linear(patches, eva["patch_embed.proj.weight"].flatten(1), eva["patch_embed.proj.bias"])
    x = torch.cat([eva["cls_token"].expand(images, -1, -1), x], 1) + eva["pos_embed"]
    for i in range(VISION["num_hidden_layers"]):
        p = {
            key.removeprefix(f"blocks.{i}."): value
            for key, value in eva.items()
            if key.startswith(f"blocks.{i}.")
        }
        h = layer_norm(x, (WIDTH,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        q, k, v = (linear(h, w) for w in p["attn.qkv.weight"].chunk(3))
        q, v = q + p["attn.q_bias"], v + p["attn.v_bias"]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), p["attn.proj.weight"], p["attn.proj.bias"])
        h = layer_norm(x, (WIDTH,), p["norm2.weight"], p["norm2.bias"], 1e-6)
        h = linear(
            gelu(linear(h, p["mlp.fc1.weight"], p["mlp.fc1.bias"])), p["mlp.fc2.weight"], p["mlp.fc2.bias"]
        )
        x = x + h
    x = layer_norm(x, (WIDTH,), state.get("ln_vision.weight"), state.get("ln_vision.bias"), 1e-5)[:, 1:]
    x = torch.stack([x[:, i : i + 4].flatten(1) for i in range(0, x.shape[1], 4)], 1)
    return linear(x, state["llama_proj.weight"], state["llama_proj.bias"])


def add_lora(decoder: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Beside the weights, as in training."""
    matrices = lora()
    for name, module in decoder.named_modules():
        if f"{name}.lora_A" in matrices:
            down, up = matrices[f"{name}.lora_A"], matrices[f"{name}.lora_B"]
            module.register_forward_hook(
                lambda _, args, out, down=down, up=up: out + ALPHA / RANK * linear(linear(args[0], down), up)
            )
    return decoder


# ------------------------------------------------------------------------------------------ both
class Case:
    """A loaded model, and what it should compute."""

    def __init__(self, folder: Path, name: str, **options: str) -> None:
        self.pixel_values = noise(2, 3, IMAGE_SIZE, IMAGE_SIZE, seed=3)
        if name == "shikra":
            save_shikra(folder / "shikra")
            self.model = load_shikra(folder, **options)
            self.features = shikra_features(self.pixel_values)
            self.reference: Callable[[str], transformers.PreTrainedModel] = lambda kind: lone("llama", kind)
        else:
            self.model = load_minigpt(folder, minigpt_state(), eva_state(), **options)
            self.features = minigpt_features(self.pixel_values, minigpt_state(), eva_state())
            self.reference = lambda kind: add_lora(lone("llama", kind))
        tokens = self.features.shape[1]
        self.input_ids = torch.full((2, tokens + 14), PAD)
        self.attention_mask = torch.ones_like(self.input_ids)
        self.attention_mask[0, :4] = 0
        for sample, start in enumerate((4, 0)):
            words = noise(tokens + 14 - start, seed=4 + sample).abs().mul(30).long().clamp(max=130) + 5
            self.input_ids[sample, start:] = words
            self.input_ids[sample, start] = BOS
            self.input_ids[sample, start + 3 : start + 3 + tokens] = IMAGE_TOKEN
        self.visual = self.input_ids == IMAGE_TOKEN

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.input_ids,
            "pixel_values": self.pixel_values,
            "attention_mask": self.attention_mask,
        }

    @property
    def merged(self) -> dict[str, torch.Tensor]:
        """Put together row by row."""
        table = lone().get_input_embeddings().weight.detach()
        rows = [
            [next(features) if i == IMAGE_TOKEN else table[i] for i in ids]
            for ids, features in zip(self.input_ids.tolist(), map(iter, self.features.detach()), strict=True)
        ]
        return {
            "inputs_embeds": torch.stack([torch.stack(row) for row in rows]),
            "attention_mask": self.attention_mask,
        }


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
            tmp_path / "other.pth", tmp_path / "llama", tmp_path / "eva.pth", vision_config=EVA_CONFIG
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
        names |= {"vision_config": EVA_CONFIG, "visual_tokens": 9}
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
