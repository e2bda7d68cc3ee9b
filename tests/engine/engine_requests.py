"""What the plug-in tells vLLM before any model runs: which engines are refused, what a prompt becomes, and its hashes."""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.serving import (
    ENVIRONMENT,
    IN_PROCESS,
    TILE,
    Engine,
    Request,
    about_an_image_and_a_video,
    about_videos,
    embedded,
    of_another_shape,
    questions,
    random_tiles,
    random_weights,
)

os.environ |= {**ENVIRONMENT, **IN_PROCESS}

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from gap_triton.demo.scenes import IMAGE_SIZE
from gap_triton.vllm.model import GapModel
from gap_triton.vllm.plan import FIELDS
from gap_triton.vllm.qwen import packed_family


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
        return self.processed(request, text, options)

    def about_a_video(self, text: str | None = None, frames: int = 2, **options: Any) -> Any:
        (request,) = about_videos(self.model, 1, frames)
        return self.processed(request, text, options)

    def processed(self, request: Request, text: str | None, options: dict[str, Any]) -> Any:
        items = self.processor.info.parse_mm_data(request.data)
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
    with pytest.raises(
        ValueError, match="merge='aggregation' in vLLM: it compares tokens by hidden states of the last"
    ):
        llava(merge="aggregation", coverage="region")
    assert qwen(merge="aggregation", coverage="region")
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


VIDEO_PAD = 35  # the placeholder of a video in the embedded model's vocabulary


def test_placeholders_and_hashes_of_videos() -> None:
    half = Processor("qwen2_5_vl", {"keep": 0.5})
    hashes = set()
    for frames, options, kept in (
        (2, {}, 64),
        (3, {}, 96),
        (2, {"keep": 20}, 20),
        (2, {"score": "spatial"}, 64),
    ):
        result = half.about_a_video(frames=frames, **options)
        (place,) = result["mm_placeholders"]["video"]
        assert place.length == kept
        assert result["prompt_token_ids"].count(VIDEO_PAD) == kept
        (item,) = result["mm_kwargs"]["video"]
        assert int(item[FIELDS["video"]].data[0]) == kept
        hashes.add(*result["mm_hashes"]["video"])
    assert len(hashes) == 4
    with pytest.raises(ValueError, match="the prompt ends in a pruned image or video"):
        half.about_a_video(text="<|video_pad|>")


@pytest.mark.parametrize("model", ["qwen3_vl", "qwen3_5"])
def test_placeholders_of_frames_apart(model: str, tmp_path: Path) -> None:
    """A timestamp stands before each frame, and stays."""
    half = Processor("qwen2_5_vl", {"keep": 0.5}, random_weights(model, tmp_path))
    whole = half.about_a_video(frames=3, keep=1.0)["prompt_token_ids"]
    text = [token for token in whole if token != VIDEO_PAD]
    for options, frames in (
        ({}, [32, 32, 32]),
        ({"keep": 20}, [6, 7, 7]),
        ({"keep": 2}, [0, 1, 1]),
        ({"score": "random", "keep": 9, "seed": 1}, None),
    ):
        result = half.about_a_video(frames=3, **options)
        ids = result["prompt_token_ids"]
        assert [token for token in ids if token != VIDEO_PAD] == text
        (place,) = result["mm_placeholders"]["video"]
        assert place.get_num_embeds() == ids.count(VIDEO_PAD) == sum(frames or [9])
        if frames is not None:
            runs = [last + 1 - first for first, last in place.extract_embeds_range()]
            assert runs == [frame for frame in frames if frame]
    # A prompt that ends in a video ends in the token behind its last frame.
    assert half.about_a_video(text="<|video_pad|>")
    for options in (
        {"score": "random", "coverage": "max_min"},
        {"preset": "divprune"},
        {"score": "random", "merge": "average"},
    ):
        with pytest.raises(
            ValueError, match="how many tokens stay of each frame of a video is then not known"
        ):
            half.about_a_video(frames=3, **options)
        assert half(**options)  # of an image
    assert half.about_a_video(frames=3, preset="divprune", keep=1.0)


def numbered(model: Any, owner: Any, result: Any) -> tuple[torch.Tensor, int]:
    """The ids that ``model``, a class, has for what a processor made; ``owner`` has what it asks itself for."""
    features = [
        MultiModalFeatureSpec(data=item, modality=modality, identifier=str(number), mm_position=place)
        for modality, places in result["mm_placeholders"].items()
        for number, (item, place) in enumerate(zip(result["mm_kwargs"][modality], places, strict=True))
    ]
    return model.get_mrope_input_positions(owner, result["prompt_token_ids"], features)


@pytest.mark.parametrize("model", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("frames", [2, 9])
def test_ids_are_those_of_vllm_without_pruning(model: str, frames: int, tmp_path: Path) -> None:
    """Also of a video that takes more ids by its frames than by its rows: there transformers 5 has smaller ones."""
    engine = embedded(model) if model == "qwen2_5_vl" else random_weights(model, tmp_path)
    processor = Processor("qwen2_5_vl", {"keep": 0.5}, engine)
    config = processor.processor.info.get_hf_config()
    ours = SimpleNamespace(
        gap_family=packed_family(config, config.vision_start_token_id if model == "qwen3_vl" else None)
    )
    stock = {
        "qwen2_vl": Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": Qwen3VLForConditionalGeneration,
    }[model]
    owner = SimpleNamespace(config=config)
    for name in ("iter_mm_grid_thw", "_get_mrope_input_positions"):
        if hasattr(stock, name):
            of_class = inspect.getattr_static(stock, name)
            setattr(
                owner,
                name,
                getattr(stock, name) if isinstance(of_class, staticmethod) else partial(of_class, owner),
            )
    (image,) = about_an_image_and_a_video("qwen2_5_vl", 1)
    (video,) = about_videos("qwen2_5_vl", 1, frames)
    request = replace(image, videos=video.videos)
    whole = processor.processed(request, None, {"keep": 1.0})
    expected, delta = numbered(stock, owner, whole)
    found, found_delta = numbered(GapModel, ours, whole)
    assert torch.equal(found, expected)
    assert found_delta == delta
    # Pruned, all that is no placeholder keeps its id, and so does what is generated.
    pruned = processor.processed(request, None, {"keep": 0.25})
    ids, after = numbered(GapModel, ours, pruned)
    media = torch.tensor(ours.gap_family.placeholders)
    text, text_of_whole = (
        ~torch.isin(torch.tensor(each["prompt_token_ids"]), media) for each in (pruned, whole)
    )
    assert torch.equal(ids[:, text], expected[:, text_of_whole])
    assert len(pruned["prompt_token_ids"]) + after == len(whole["prompt_token_ids"]) + delta


def test_renumbering_is_refused_where_layers_carry_a_state(tmp_path: Path) -> None:
    processor = Processor("qwen2_5_vl", {"keep": 0.5}, random_weights("qwen3_5", tmp_path))
    with pytest.raises(ValueError, match="ids='compacted': some decoder layers of this model carry a state"):
        processor(ids="compacted")


def test_what_vllm_has_configured_for_a_model_is_done(tmp_path: Path) -> None:
    """It looks by the name of an architecture, and ours has another."""
    engine = replace(
        random_weights("qwen3_5", tmp_path), overrides={"text_config": {"mamba_ssm_dtype": "bfloat16"}}
    )
    assert configure(engine).cache_config.mamba_ssm_cache_dtype == "bfloat16"


def test_videos_are_refused(tmp_path: Path) -> None:
    reason = "gap_triton in vLLM takes no video here, because LLaVA-OneVision makes one token of several"
    for engine, sentence in (
        (random_tiles("llava_onevision", tmp_path / "onevision"), reason),
        (random_tiles("llava_next", tmp_path / "next"), "At most 0 video"),  # nor without the plug-in
        (embedded("llava"), "At most 0 video"),
    ):
        processor = Processor("llava", {"keep": 0.5}, engine)
        with pytest.raises((ValueError, VLLMValidationError), match=re.escape(sentence)):
            processor.about_a_video()
        assert processor()
