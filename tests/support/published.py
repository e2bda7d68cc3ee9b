"""Checkpoints of Shikra and MiniGPT-v2 in their authors' layout, made from tiny configs, and what they should compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch.nn.functional import gelu, layer_norm, linear
from transformers import Blip2VisionConfig, CLIPVisionConfig, CLIPVisionModel

from gap_triton.models import minigpt_v2, shikra
from gap_triton.models.visual_decoder import IMAGE_TOKEN, VisualDecoder

from .lone import lone
from .tiny import BOS, IMAGE_SIZE, LAYERS, PAD, PATCH, TEXT, VISION

WIDTH, HIDDEN = VISION["hidden_size"], TEXT["hidden_size"]
RANK, ALPHA = 4, 16


def noise(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def clip() -> CLIPVisionModel:
    torch.manual_seed(5)
    return CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()


def eva_config(side: int = IMAGE_SIZE) -> Blip2VisionConfig:
    return Blip2VisionConfig(**{**VISION, "image_size": side})


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
    folder: Path,
    state: dict[str, torch.Tensor],
    eva: dict[str, torch.Tensor],
    side: int = IMAGE_SIZE,
    **options: object,
) -> VisualDecoder:
    lone().save_pretrained(folder / "llama")
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 3}, folder / "minigpt.pth")
    torch.save(eva, folder / "eva.pth")
    return minigpt_v2.load(
        folder / "minigpt.pth",
        folder / "llama",
        folder / "eva.pth",
        vision_config=eva_config(side),
        dtype=torch.float32,
        **options,
    )


def minigpt_features(
    pixel_values: torch.Tensor,
    state: dict[str, torch.Tensor],
    eva: dict[str, torch.Tensor],
    seen: dict[str, list[torch.Tensor]] | None = None,
) -> torch.Tensor:
    """The tower written out, straight from its file.

    ``seen`` takes each block's attention [I, H, S, S], keys [I, S, W] and output, and what enters the projector.
    """
    seen = {} if seen is None else seen
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
        for name, value in (("weights", weights), ("keys", k.transpose(1, 2).flatten(2)), ("output", x)):
            seen.setdefault(name, []).append(value)
    x = layer_norm(x, (WIDTH,), state.get("ln_vision.weight"), state.get("ln_vision.bias"), 1e-5)[:, 1:]
    x = torch.stack([x[:, i : i + 4].flatten(1) for i in range(0, x.shape[1], 4)], 1)
    seen["entering"] = [x]
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

    def __init__(self, folder: Path, name: str, side: int = IMAGE_SIZE, **options: str) -> None:
        """``side`` of the images in pixels; Shikra's stay as they are."""
        self.pixel_values = noise(2, 3, side, side, seed=3)
        if name == "shikra":
            save_shikra(folder / "shikra")
            self.model = load_shikra(folder, **options)
            self.features = shikra_features(self.pixel_values)
            self.reference: Callable[[str], transformers.PreTrainedModel] = lambda kind: lone("llama", kind)
        else:
            eva = eva_state(side // PATCH)
            self.model = load_minigpt(folder, minigpt_state(), eva, side, **options)
            self.features = minigpt_features(self.pixel_values, minigpt_state(), eva)
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
