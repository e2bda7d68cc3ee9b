"""The embedded models, and what pruning adds to a prefill of theirs: launches, reads and copies."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, BatchFeature, PreTrainedModel

import gap_triton
from gap_triton import GapConfig
from gap_triton.demo.architectures import ARCHITECTURES, find
from gap_triton.demo.scenes import held_out
from gap_triton.latency import count

MODELS = list(ARCHITECTURES)
CPU = torch.device("cpu")


class Added(NamedTuple):
    """What a call asks of a device beyond the same call without pruning."""

    launches: int
    reads: int
    copies: int


def load(name: str) -> PreTrainedModel:
    """An embedded model, unpruned."""
    model = AutoModelForImageTextToText.from_pretrained(find(name).folder, attn_implementation="sdpa")
    return model.eval()


@functools.cache
def prompt(name: str, batch: int = 1) -> BatchFeature:
    """Prompts of as many held-out scenes, as the model's processor makes them."""
    architecture, scenes = find(name), held_out(batch)
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in scenes.images[:batch]]
    texts = [architecture.prompt(scenes.question(sample)) for sample in range(batch)]
    processor = architecture.load_processor(architecture.folder)
    return processor(images=images, text=texts, padding=True, return_tensors="pt")


def prefill(model: PreTrainedModel, inputs: Any) -> Any:
    """One prefill into a new cache, as `generate` runs it."""
    with torch.no_grad():
        return model(**inputs, use_cache=True, logits_to_keep=1)


def first_token(model: PreTrainedModel, inputs: Any) -> Any:
    """One token of `generate`, which in transformers 5 encodes images ahead of the prefill."""
    return model.generate(**inputs, max_new_tokens=1, do_sample=False)


def added(name: str, config: GapConfig, prepared: bool, batch: int = 1, run: Any = prefill) -> Added:
    """What pruning by ``config`` adds to a prefill of an embedded model, run by ``run``."""
    model, inputs = load(name), prompt(name, batch)
    plain = count(lambda: run(model, inputs), CPU)
    gap_triton.attach(model, config)
    given = gap_triton.prepare(model, inputs) if prepared else inputs
    run(model, given)  # what is computed once for a model is no part of a prefill
    pruned = count(lambda: run(model, given), CPU)
    return Added(pruned.launches - plain.launches, pruned.reads - plain.reads, pruned.copies - plain.copies)
