"""What the plug-in tells vLLM before any model runs: which engines are refused, what a prompt becomes, and its hashes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.serving import (
    ENVIRONMENT,
    IN_PROCESS,
    TILE,
    Engine,
    embedded,
    of_another_shape,
    questions,
    random_tiles,
)

os.environ |= {**ENVIRONMENT, **IN_PROCESS}

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY

from gap_triton.demo.scenes import IMAGE_SIZE
from gap_triton.vllm.plan import FIELDS


def configure(engine: Engine) -> Any:
    """The configuration of an engine."""
    return EngineArgs(**engine.arguments).create_engine_config()


def config_of(model: str, gap: Any, **settings: Any) -> Any:
    """The configuration of an engine of an embedded model."""
    return configure(embedded(model, gap=gap, settings=settings))


@pytest.mark.parametrize(
    ("gap", "settings", "sentence"),
    [
        ({"keep": 0}, {}, "GapConfig.keep=0: an int counts the tokens kept"),
        (
            {"score": "text_similarity"},
            {},
            "score='text_similarity' in vLLM: what is kept of an image is cached",
        ),
        (0.5, {}, r"hf_overrides\['gap'\]=0.5: expected a dictionary"),
        (
            {},
            {"mm_encoder_tp_mode": "data"},
            "mm_encoder_tp_mode='data' is refused: images are then encoded past",
        ),
        ({}, {"compilation_config": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder is refused"),
        ({}, {"enable_lora": True}, "LoRA is refused: never tried"),
        ({}, {"enable_prompt_embeds": True}, "enable_prompt_embeds is refused"),
        ({}, {"enable_mm_embeds": True}, "enable_mm_embeds is refused"),
    ],
)
def test_engines_that_are_refused(gap: Any, settings: dict[str, Any], sentence: str) -> None:
    # Vllm itself knows that a LLaVA's encoder can't be split by images.
    with pytest.raises(ValueError, match=sentence):
        config_of("qwen2_5_vl", gap, **settings)


def test_an_engine_without_options_is_refused() -> None:
    arguments = embedded("llava").arguments
    del arguments["hf_overrides"]["gap"]
    with pytest.raises(ValueError, match="hf_overrides has no 'gap', which says what to keep of an image"):
        EngineArgs(**arguments).create_engine_config()


def test_the_other_model_runner_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match=r"model runner V2 is refused: .*set VLLM_USE_V2_MODEL_RUNNER=0"):
        config_of("llava", {})


def test_a_share_scales_what_is_encoded_at_once() -> None:
    whole, quarter, count = (
        config_of("llava", {"keep": keep}).scheduler_config.max_num_encoder_input_tokens
        for keep in (1.0, 0.25, 16)
    )
    assert (quarter, count) == (whole // 4, whole)


class Processor:
    """The multimodal processor of an engine, without the engine."""

    def __init__(self, model: str, gap: dict[str, Any], engine: Engine | None = None) -> None:
        self.model = model
        config = config_of(model, gap) if engine is None else configure(replace(engine, gap=gap))
        self.processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)

    def __call__(
        self,
        scene: int = 0,
        text: str | None = None,
        size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE),
        **options: Any,
    ) -> Any:
        (request,) = of_another_shape(questions(self.model, scene + 1)[scene:], size)
        items = self.processor.info.parse_mm_data({"image": list(request.images)})
        kwargs = {f"gap_{name}": value for name, value in options.items()}
        return self.processor(request.text if text is None else text, items, hf_processor_mm_kwargs=kwargs)


@pytest.mark.parametrize("model", ["llava", "qwen2_5_vl"])
def test_placeholders_and_hashes(model: str) -> None:
    half, quarter = (Processor(model, {"keep": keep, "score": "received"}) for keep in (0.5, 0.25))
    for processor, options, kept in ((half, {}, 32), (half, {"keep": 5}, 5), (quarter, {}, 16)):
        result = processor(**options)
        (place,) = result["mm_placeholders"]["image"]
        assert place.length == kept
        ids = result["prompt_token_ids"]
        assert len(set(ids[place.offset : place.offset + kept])) == 1
        assert ids[place.offset + kept] != ids[place.offset]
        (item,) = result["mm_kwargs"]["image"]
        assert int(item[FIELDS["image"]].data[0]) == kept

    def hash_of(processor: Processor, **options: Any) -> str:
        (found,) = processor(**options)["mm_hashes"]["image"]
        return found

    # Of engines that share a cache: what an image keeps makes it another one, who says so does not.
    assert hash_of(half) != hash_of(quarter)
    assert hash_of(half, keep=0.25) == hash_of(quarter)
    assert hash_of(half, score="spatial") != hash_of(half)
    assert hash_of(half, scene=1) != hash_of(half)


def test_requests_that_are_refused() -> None:
    llava, qwen = Processor("llava", {"keep": 0.5}), Processor("qwen2_5_vl", {"keep": 0.5})
    with pytest.raises(ValueError, match="there is no 'gap_kept'; expected some of gap_keep"):
        llava(kept=0.5)
    with pytest.raises(ValueError, match="score='cls': the vision tower of this model has no CLS token"):
        qwen(score="cls")
    assert llava(score="cls")
    with pytest.raises(ValueError, match="the prompt ends in a pruned image"):
        llava(text="<image>")
    assert llava(text="<image>", keep=1.0)


@pytest.mark.parametrize("model", ["llava_next", "llava_onevision"])
def test_placeholders_of_tiles(model: str, tmp_path: Path) -> None:
    half = Processor("llava", {"keep": 0.5}, random_tiles(model, tmp_path))
    for options, kept in (
        ({}, 44),  # of an overview of 16, and 8 rows of 8 and a newline
        ({"keep": 1.0}, 88),
        ({"size": (90, 40)}, 47),  # of 16, and 6 rows of 12 and a newline
        ({"keep": 5, "size": (20, 70)}, 5),
    ):
        (place,) = half(**options)["mm_placeholders"]["image"]
        assert place.length == kept, options


def test_images_between_whose_features_a_model_interpolates_are_refused(tmp_path: Path) -> None:
    engine = random_tiles("llava_onevision", tmp_path)
    engine = replace(engine, overrides={"image_grid_pinpoints": [[4 * TILE, 4 * TILE]]})  # it takes 9 tiles
    half = Processor("llava", {"keep": 0.5}, engine)
    with pytest.raises(ValueError, match="an image is larger than the model takes, so that it interpolates"):
        half()
    (place,) = half(keep=1.0)["mm_placeholders"]["image"]
    assert place.length == 16 + 12 * 13
    assert half(score="random")  # which asks nothing of places


@pytest.mark.parametrize("model", ["llava_next", "llava_onevision"])
def test_a_tower_that_was_never_tried_is_refused(model: str, tmp_path: Path) -> None:
    engine = random_tiles(model, tmp_path)
    other = "full" if model == "llava_next" else "default"
    with pytest.raises(
        ValueError, match="a LLaVA whose decoder gets a CLS token, or not all patches is refused"
    ):
        configure(replace(engine, overrides={"vision_feature_select_strategy": other}))


def test_videos_are_refused(tmp_path: Path) -> None:
    onevision = Processor("llava", {"keep": 0.5}, random_tiles("llava_onevision", tmp_path))
    for processor in (Processor("qwen2_5_vl", {"keep": 0.5}), onevision):
        limits = processor.processor.info.allowed_mm_limits
        assert limits["video"] == 0
        assert limits["image"] > 0
