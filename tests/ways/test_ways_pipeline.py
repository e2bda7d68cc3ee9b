"""Transformers' pipeline, which answers what `generate` does."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import gap_triton
from gap_triton import GapConfig
from gap_triton.demo.architectures import LLAVA
from gap_triton.demo.scenes import held_out

CONFIG = GapConfig(keep=0.25, layer=1)
SCENES = held_out(3)
IMAGES = [SCENES.image(i) for i in range(3)]
TEXTS = [LLAVA.prompt(SCENES.question(i)) for i in range(3)]


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(LLAVA.folder)


@pytest.fixture(scope="module")
def expected(processor) -> list[str]:
    model = AutoModelForImageTextToText.from_pretrained(LLAVA.folder, attn_implementation="gap_triton")
    gap_triton.configure(model, CONFIG)
    answers = []
    for image, text in zip(IMAGES, TEXTS, strict=True):
        inputs = processor(images=image, text=text, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers += processor.batch_decode(
            written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    assert len(set(answers)) == 3
    return answers


def said(pipe: Any, **options: Any) -> list[str]:
    found = pipe(images=IMAGES, text=TEXTS, max_new_tokens=8, return_full_text=False, **options)
    assert gap_triton.last_selection(pipe.model).visual_index.shape[1] == 16
    return [each["generated_text"].strip() for each in found]


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}], ids=["one by one", "batch"])
def test_a_pipeline_of_a_model_that_is_pruned(processor, expected: list[str], options: dict) -> None:
    model = AutoModelForImageTextToText.from_pretrained(LLAVA.folder, attn_implementation="gap_triton")
    gap_triton.configure(model, CONFIG)
    assert said(pipeline("image-text-to-text", model=model, processor=processor), **options) == expected


def test_a_pipeline_that_loads_its_model_by_the_name(expected: list[str]) -> None:
    pipe = pipeline(
        "image-text-to-text",
        model=str(LLAVA.folder),
        model_kwargs={"attn_implementation": "gap_triton"},
        device="cpu",
    )
    gap_triton.configure(pipe.model, CONFIG)
    assert said(pipe) == expected
