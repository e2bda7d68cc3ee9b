"""The embedded model and its processor, from nothing: no download, no pretrained part.

It is an ordinary LLaVA (CLIP vision tower, two-layer projector, Llama decoder with 1-D RoPE), only small, so
whatever works on it works through the same transformers code as on the large ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from gap_triton.demo.packing import ANSWER
from gap_triton.demo.scenes import GRID, IMAGE_SIZE, PATCH
from gap_triton.demo.vocabulary import BOS, EOS, IMAGE, LOCATION_TOKENS, PAD, TOKENS, UNKNOWN, token_id

CONTEXT = 512  # tokens


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """Build the untrained model; its weights depend on ``seed`` alone."""
    special = {
        "bos_token_id": token_id(BOS),
        "eos_token_id": token_id(EOS),
        "pad_token_id": token_id(PAD),
    }
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=token_id(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # the CLS row never reaches the decoder
        image_seq_length=GRID * GRID,
        architectures=["LlavaForConditionalGeneration"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=ANSWER + 1, **special)
    return model


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer: lower-case words without punctuation, location tokens and specials kept whole."""
    tokenizer = Tokenizer(models.WordLevel({token: token_id(token) for token in TOKENS}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[?!.,;:]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, token_id(BOS))]
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=False)  # spaces between words
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in (PAD, UNKNOWN, BOS, EOS, IMAGE)]
    )
    # Not special: an answer decoded without its special tokens still has to show the box.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in LOCATION_TOKENS])
    return tokenizer


def save_processor(folder: Path) -> None:
    """Write the files that ``AutoProcessor`` reads.

    They are written by hand because ``save_pretrained`` of transformers 5 names classes that version 4 lacks.
    """
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},  # any image file, stretched to the native size
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": PATCH,
        "num_additional_image_tokens": 1,  # CLS, which the "default" strategy takes off again
        "vision_feature_select_strategy": "default",
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "additional_special_tokens": [IMAGE],
        "padding_side": "left",  # generation goes on at the right
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    _write(folder / "preprocessor_config.json", image_processor)
    _write(folder / "processor_config.json", processor)
    _write(folder / "tokenizer_config.json", tokenizer)


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write model and processor as ``AutoModelForImageTextToText`` and ``AutoProcessor`` read them.

    The vision tower's weights keep the names that LLaVA checkpoints have always had; transformers 5 dropped one
    level of them and still reads the old ones, version 4 knows no others.
    """
    save_processor(folder)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    old, new = "model.vision_tower.vision_model.", "model.vision_tower."
    weights = {
        name if name.startswith(old) else name.replace(new, old): weight.contiguous()
        for name, weight in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
