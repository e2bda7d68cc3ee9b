"""An embedded model and its processor, from nothing: no download, no pretrained part.

Each is an ordinary model of its architecture, only small, so whatever works on it works through the same transformers
code as on the large ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GenerationConfig

from gap_triton.demo.architecture import CONTEXT, Architecture
from gap_triton.demo.vocabulary import BOS, EOS, LOCATION_TOKENS, PAD, UNKNOWN, token_id

from .packing import ANSWER


def build_model(architecture: Architecture, seed: int = 0) -> Any:
    """Build the untrained model; its weights depend on ``seed`` alone."""
    special = {
        "bos_token_id": token_id(BOS),
        "eos_token_id": token_id(EOS),
        "pad_token_id": token_id(PAD),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture.build(special)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=ANSWER + 1, **special)
    return model


def build_tokenizer(architecture: Architecture) -> Tokenizer:
    """Build the tokenizer: lower-case words without punctuation, location tokens and specials kept whole."""
    tokenizer = Tokenizer(
        models.WordLevel({token: token_id(token) for token in architecture.tokens}, unk_token=UNKNOWN)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[?!.,;:]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, token_id(BOS))]
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=False)  # spaces between words
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in architecture.special_tokens])
    # Not special: an answer decoded without its special tokens still has to show the box.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in LOCATION_TOKENS])
    return tokenizer


def save_processor(architecture: Architecture, folder: Path) -> None:
    """Write the files that ``AutoProcessor`` reads.

    They are written by hand because ``save_pretrained`` of transformers 5 names classes that version 4 lacks.
    """
    processor = architecture.processor_file()
    named = (PAD, UNKNOWN, BOS, EOS)
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": processor["processor_class"],
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "additional_special_tokens": [t for t in architecture.special_tokens if t not in named],
        "padding_side": "left",  # generation goes on at the right
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(architecture).save(str(folder / "tokenizer.json"))
    _write(folder / "preprocessor_config.json", architecture.image_processor_file())
    _write(folder / "processor_config.json", processor)
    _write(folder / "tokenizer_config.json", tokenizer)


def save(architecture: Architecture, model: Any, folder: Path) -> None:
    """Write model and processor as ``AutoModelForImageTextToText`` and ``AutoProcessor`` read them."""
    save_processor(architecture, folder)
    model.config.save_pretrained(folder)
    config = folder / "config.json"
    _write(config, architecture.config_file(json.loads(config.read_text())))
    model.generation_config.save_pretrained(folder)
    weights = {name: weight.contiguous() for name, weight in architecture.weights(model.state_dict()).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
