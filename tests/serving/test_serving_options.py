"""What an engine and its requests may ask for, how many tokens that keeps, and what is refused with which sentence."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.towers import MERGE

from gap_triton import GapConfig
from gap_triton.vllm.options import OPTIONS, PREFIX, Options, options_of, without_options
from gap_triton.vllm.plan import Plan, plans_of, rows_of, shortened
from gap_triton.vllm.refusals import REFUSED, reasons_against


def test_a_request_replaces_what_the_engine_says() -> None:
    engine = {"keep": 0.5, "score": "spatial", "seed": 3}
    assert options_of(engine).config == GapConfig(keep=0.5, layer=-1, score="spatial", seed=3)
    asked = options_of(engine, {"gap_keep": 16, "gap_coverage": "stride", "size": {"height": 3}})
    assert asked.config == GapConfig(keep=16, layer=-1, score="spatial", coverage="stride", seed=3)
    assert engine == {"keep": 0.5, "score": "spatial", "seed": 3}


def test_a_preset_takes_keep_as_its_budget() -> None:
    for name in (
        "cls",
        "random",
        "spatial",
        "divprune",
        "scope",
        "vispruner",
        "hiprune",
        "visionzip",
        "prumerge",
    ):
        expected = GapConfig.preset(name, budget=0.3)
        assert options_of({"preset": name, "keep": 0.3}).config == expected
    assert options_of({"preset": "cls", "score": "received"}).config.score == "received"
    assert options_of({"keep": 0.3}, {"gap_preset": "spatial"}).config.score == "spatial"


@pytest.mark.parametrize(
    ("engine", "request_", "sentence"),
    [
        (None, {}, "hf_overrides['gap']=None: expected a dictionary"),
        ({"kep": 0.5}, {}, "hf_overrides['gap']: there is no 'kep'; expected some of keep, score"),
        ({}, {"gap_layer": 2}, "mm_processor_kwargs: there is no 'gap_layer'; expected some of gap_keep"),
        ({"keep": 0}, {}, "GapConfig.keep=0: an int counts the tokens kept and must be >= 1"),
        ({}, {"gap_keep": "half"}, "GapConfig.keep='half': expected a float"),
        ({"keep": "outliers"}, {}, "keep='outliers' in vLLM: the number of tokens must be known before"),
        (
            {"score": "text_similarity"},
            {},
            "score='text_similarity' in vLLM: what is kept of an image is cached",
        ),
        ({"score": "text"}, {}, "after the vision encoder (layer=-1) it is one of"),
        (
            {"ids": "permuted"},
            {},
            "ids='permuted' in vLLM: it has not been built for an engine, which numbers a prompt before",
        ),
        ({"preset": "fastv"}, {}, "in vLLM: an engine counts the same tokens of a request for all layers"),
        ({"preset": "pyramiddrop"}, {}, "nothing can be dropped inside the decoder"),
        ({"preset": "prumerge"}, {}, "keep='outliers' in vLLM"),
        ({"preset": "nuwa"}, {}, "nothing can be dropped inside the decoder"),
        ({"preset": "trim"}, {}, "keep='outliers' in vLLM"),
        ({"preset": "cdpruner"}, {}, "score='text_similarity' in vLLM"),
        ({"preset": "trim", "keep": 0.5}, {}, "score='text_similarity' in vLLM"),
        ({"preset": "nothing"}, {}, "preset 'nothing': expected one of"),
        ({"preset": "spatial", "score": "cls"}, {}, "preset 'spatial' takes no 'score'"),
        ({"block": 0}, {}, "block=0: expected the number of tokens of a block"),
        ({"block": True}, {}, "block=True: expected the number of tokens of a block"),
        ({"block": 32, "before": -1}, {}, "before=-1: expected the number of tokens before the image"),
    ],
)
def test_what_is_wrong_is_refused_with_its_reason(
    engine: Any, request_: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        options_of(engine, request_)


def test_processors_of_transformers_get_none_of_it() -> None:
    kwargs = {f"{PREFIX}{name}": 1 for name in OPTIONS} | {"max_pixels": 5}
    assert without_options(kwargs) == {"max_pixels": 5}


@pytest.mark.parametrize(
    ("options", "tokens", "kept"),
    [
        ({"keep": 0.5}, 65, 33),
        ({"keep": 20}, 64, 20),
        ({"keep": 100}, 64, 64),
        ({"keep": 0.25, "block": 32, "before": 1}, 576, 127),  # 144 would end 17 tokens into a block
        ({"keep": 0.125, "block": 32, "before": 1}, 576, 63),
        ({"keep": 31, "block": 32, "before": 1}, 576, 31),  # ends where a block does
        ({"keep": 20, "block": 32, "before": 1}, 576, 20),  # no block ends before
        ({"keep": 1.0, "block": 32, "before": 1}, 576, 576),  # nothing is dropped
        ({"keep": 0.5, "block": 16}, 100, 48),
    ],
)
def test_how_many_survive(options: dict[str, Any], tokens: int, kept: int) -> None:
    assert options_of(options).kept(tokens) == kept


def test_images_that_keep_something_else_differ() -> None:
    base = options_of({"keep": 0.5, "coverage": "coverage_gain"})
    others = [
        options_of({"keep": 0.5, "coverage": "coverage_gain"}, {f"{PREFIX}{name}": value})
        for name, value in (
            ("keep", 0.25),
            ("keep", 1),
            ("score", "spatial"),
            ("coverage", "region"),
            ("ids", "compacted"),
            ("seed", 1),
            ("block", 32),
            ("before", 2),
            ("exponent", 2.0),
            ("merge", "cluster"),
        )
    ]
    every = [str(sorted(each.factors().items())) for each in (base, *others)]
    assert len(set(every)) == len(every)
    # And what a request says that the engine says already is no other image.
    again = options_of({"coverage": "coverage_gain"}, {"gap_keep": 0.5, "gap_score": "received"})
    assert again.factors() == base.factors()
    assert set(base.factors()) == {f"{PREFIX}{name}" for name in OPTIONS if name != "preset"}


def test_a_plan_is_what_was_asked_for() -> None:
    options = options_of(
        {
            "keep": 0.3,
            "score": "key_norm",
            "coverage": "determinant",
            "seed": 2**62,
            "exponent": 0.1,
            "merge": "average",
        }
    )
    rows = rows_of(options, [10, 64])
    assert rows.dtype == torch.int64
    assert plans_of(rows) == [
        Plan(3, "key_norm", "determinant", "kept", 2**62, 0.1, "average"),
        Plan(20, "key_norm", "determinant", "kept", 2**62, 0.1, "average"),
    ]
    assert plans_of(rows[1]) == plans_of(rows)[1:]


def test_placeholders_that_are_fewer() -> None:
    assert shortened([7] * 5, [True] * 5, [2]) == [7] * 2
    # Text between the frames of a video stays, also where nothing of a frame does.
    tokens = [1, 2, 7, 7, 7, 3, 1, 2, 7, 7, 7, 3]
    stands_for = [token == 7 for token in tokens]
    assert shortened(tokens, stands_for, [0, 2]) == [1, 2, 3, 1, 2, 7, 7, 3]
    with pytest.raises(ValueError, match="an image has 2 runs of placeholders: expected 1"):
        shortened(tokens, stands_for, [2])


def test_options_are_shown_in_one_line() -> None:
    assert str(options_of({"keep": 0.5})) == (
        "keep=0.5, score='received', coverage='topk', ids='kept', seed=0"
    )
    assert "exponent=2" in str(options_of({"keep": 0.5, "coverage": "coverage_gain", "exponent": 2}))
    assert str(dataclasses.replace(options_of({"keep": 5}), block=32, before=1)).endswith(
        ", block=32, before=1"
    )
    assert isinstance(options_of({"keep": 5}), Options)


# --------------------------------------------------------------------------------------------- engines
def tower(model_type: str) -> SimpleNamespace:
    """The configuration of a vision tower."""
    return SimpleNamespace(model_type=model_type, num_hidden_layers=24)


def engine(**changes: Any) -> SimpleNamespace:
    """The configuration of an engine that does nothing unusual, and ``changes`` by path."""
    config = SimpleNamespace(
        use_v2_model_runner=False,
        model_config=SimpleNamespace(
            multimodal_config=SimpleNamespace(
                mm_encoder_tp_mode="weights", video_pruning_rate=None, enable_mm_embeds=False
            ),
            hf_config=SimpleNamespace(
                model_type="llava",
                vision_config=tower("clip_vision_model"),
                vision_feature_select_strategy="default",
                vision_feature_layer=-2,
            ),
            enable_prompt_embeds=False,
        ),
        compilation_config=SimpleNamespace(cudagraph_mm_encoder=False, compile_mm_encoder=False),
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        parallel_config=SimpleNamespace(
            data_parallel_size=1, prefill_context_parallel_size=1, decode_context_parallel_size=1
        ),
    )
    for path, value in changes.items():
        *parents, last = path.split("__")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, last, value)
    return config


def test_an_ordinary_engine_is_not_refused() -> None:
    assert reasons_against(engine()) == []
    # Qwen's towers merge patches and have no CLS token.
    qwen = SimpleNamespace(model_type="qwen2_5_vl", vision_config=SimpleNamespace(spatial_merge_size=MERGE))
    assert reasons_against(engine(model_config__hf_config=qwen)) == []
    assert reasons_against(engine(model_config__hf_config__vision_feature_layer=9)) == []
    # LLaVA-OneVision has another tower, without a CLS token.
    onevision = {
        "model_config__hf_config__model_type": "llava_onevision",
        "model_config__hf_config__vision_config": tower("siglip_vision_model"),
        "model_config__hf_config__vision_feature_select_strategy": "full",
    }
    assert reasons_against(engine(**onevision)) == []
    for path, value in onevision.items():
        assert reasons_against(engine(**{path: value})), path  # no LLaVA-1.5 does any of that alone


UNTRIED = {
    "model runner V2": {"use_v2_model_runner": True},
    "mm_encoder_tp_mode='data'": {"model_config__multimodal_config__mm_encoder_tp_mode": "data"},
    "cudagraph_mm_encoder": {"compilation_config__cudagraph_mm_encoder": True},
    "compile_mm_encoder": {"compilation_config__compile_mm_encoder": True},
    "video_pruning_rate": {"model_config__multimodal_config__video_pruning_rate": 0.5},
    "a LLaVA with another tower than its own": {"model_config__hf_config__vision_config": tower("pixtral")},
    "a LLaVA whose decoder gets a CLS token, or not all patches": {
        "model_config__hf_config__vision_feature_select_strategy": "full"
    },
    "a LLaVA that takes features of several layers": {
        "model_config__hf_config__vision_feature_layer": [-2, -1]
    },
    "a LLaVA that takes features of one of its tower's first layers": {
        "model_config__hf_config__vision_feature_layer": 8  # what the 8th of 24 puts out; the 9th is HiPrune's
    },
    "enable_mm_embeds": {"model_config__multimodal_config__enable_mm_embeds": True},
    "enable_prompt_embeds": {"model_config__enable_prompt_embeds": True},
    "speculative decoding": {"speculative_config": object()},
    "LoRA": {"lora_config": object()},
    "kv_transfer_config": {"kv_transfer_config": object()},
    "ec_transfer_config": {"ec_transfer_config": object()},
    "data_parallel_size above 1": {"parallel_config__data_parallel_size": 2},
    "context parallelism": {"parallel_config__decode_context_parallel_size": 2},
}


@pytest.mark.parametrize(("name", "changes"), UNTRIED.items(), ids=UNTRIED)
def test_what_was_never_tried_is_refused(name: str, changes: dict[str, Any]) -> None:
    (reason,) = reasons_against(engine(**changes))
    assert reason.startswith(f"{name} is refused: ")


def test_each_refusal_is_tried() -> None:
    assert set(UNTRIED) == {name for name, _, _ in REFUSED}
