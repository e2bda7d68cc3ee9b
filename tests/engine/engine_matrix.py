"""The same tokens from engines of vLLM as from gap_triton in transformers: ``make vllm``.

Each engine is a process of its own, started once. With ``RECORD_SERVING=1`` what was found goes into
docs/results/serving.json, from which the table of docs/serving.md is made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.serving import (
    BLOCK,
    ROOT,
    Answers,
    Engine,
    Oracle,
    Request,
    about_an_image_and_a_video,
    about_two_images,
    about_videos,
    ask,
    embedded,
    of_another_shape,
    questions,
    random_tiles,
    random_weights,
    same,
)

from gap_triton.demo.architectures import ARCHITECTURES, find
from gap_triton.demo.grounding import box_iou, boxes_from_tokens
from gap_triton.demo.scenes import IMAGE_SIZE, held_out
from gap_triton.strategies.by_features import BY_FEATURES
from gap_triton.strategies.two_layers import BY_TWO_LAYERS
from gap_triton.vllm.options import MERGES

RESULTS = ROOT / "docs" / "results" / "serving.json"
MODELS = tuple(ARCHITECTURES)
HIT = 0.5  # intersection over union that counts as right
SCENES, FEW = 128, 16
DENSE_ROUNDING = (
    2  # requests of FEW x 4 whose tokens may differ in bfloat16, where they do without pruning too
)
LOGITS = (
    0.25  # by which a token of a model with random weights may win in bfloat16; they are in the range of +-5
)
LENGTHS = {"llava": 6, "qwen2_5_vl": 8}  # tokens of a prompt beside the image's
# Of the Qwen family, whose towers vLLM builds to the last layer.
AGGREGATED = ({"score": "received", "keep": 0.25, "coverage": "region", "merge": "aggregation"},)
CHUNKS = {"max_num_batched_tokens": 24, "max_num_seqs": 24}
# On a CPU the ranks of a pipeline warm up, which they do through torch.compile.
PIPELINE = {
    "pipeline_parallel_size": 2,
    "enforce_eager": False,
    "compilation_config": {"backend": "eager"},
}
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # of two processes; vLLM dies of "nobind" then


@dataclass(frozen=True)
class Call:
    """One call of an engine: how it is called in the table, and what is asked."""

    what: str
    requests: list[Request]


Check = Callable[[list[Answers]], None]


def accuracy(model: str, answers: Answers) -> float:
    """Share of the held-out scenes whose box was found."""
    tokenizer = find(model).load_processor(find(model).folder).tokenizer
    boxes = boxes_from_tokens(tokenizer.batch_decode(answers.tokens, skip_special_tokens=True))
    truth = held_out(len(answers.tokens)).target_boxes / IMAGE_SIZE
    return float((box_iou(boxes, truth) >= HIT).float().mean())


def record(model: str, engine: str, calls: list[Call], answers: list[Answers], equal: list[int]) -> None:
    """Put rows among those that were recorded before, in the place of older ones of the same engine."""
    if not os.environ.get("RECORD_SERVING"):
        return
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"matrix": []}
    rows = [row for row in known["matrix"] if (row["model"], row["engine"]) != (model, engine)]
    for call, answer, count in zip(calls, answers, equal, strict=True):
        row: dict[str, Any] = {
            "model": model,
            "engine": engine,
            "what": call.what,
            "requests": len(call.requests),
            "same": count,
            "prompt_tokens": answer.prompt_tokens[0],
        }
        if len(call.requests) == SCENES:
            row["accuracy"] = round(accuracy(model, answer), 3)
        rows.append(row)
    known["matrix"] = rows
    known["versions"] = {name: _version(name) for name in ("vllm", "torch", "transformers")}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def _version(package: str) -> str:
    return version("vllm-cpu") + " (vllm-cpu)" if package == "vllm" else version(package)


def run(
    model: str, name: str, engine: Engine, calls: list[Call], dtype: torch.dtype = torch.float32
) -> tuple[list[Answers], list[int]]:
    """Ask an engine and the oracle; what the engine answered, and how often they agree, by call."""
    answers, equal, _ = run_and_measure(model, name, engine, calls, dtype)
    return answers, equal


def run_and_measure(
    model: str, name: str, engine: Engine, calls: list[Call], dtype: torch.dtype
) -> tuple[list[Answers], list[int], float]:
    """The same, and how much worse the engine's tokens are in the oracle's eyes, at most: a difference of logits."""
    answers = ask(engine, [call.requests for call in calls])
    oracle = Oracle(engine.folder, dtype)
    equal, worst = [], 0.0
    for call, answer in zip(calls, answers, strict=True):
        requests = [replace(each, options={**engine.gap, **each.options}) for each in call.requests]
        count, difference = oracle.compare(requests, answer.tokens)
        equal.append(count)
        worst = max(worst, difference)
    record(model, name, calls, answers, equal)
    return answers, equal, worst


def assert_equal(calls: list[Call], equal: list[int]) -> None:
    assert {call.what: len(call.requests) - count for call, count in zip(calls, equal, strict=True)} == {
        call.what: 0 for call in calls
    }


def shown(options: dict[str, Any]) -> str:
    return ", ".join(str(value) for value in options.values())


# --------------------------------------------------------------------------------------------- one engine, many requests
def scores_of(model: str) -> tuple[str, ...]:
    return ("spatial", "received", *(("cls",) if model == "llava" else ()))


def ordinary_calls(model: str) -> Iterator[Call]:
    yield Call("1.0", questions(model, SCENES, keep=1.0))
    for score, keep, ids in product(scores_of(model), (0.5, 0.25), ("kept", "compacted")):
        options = {"score": score, "keep": keep, "ids": ids}
        yield Call(shown(options), questions(model, SCENES, **options))
    for options in (
        {"score": "key_norm", "keep": 0.5},
        {"score": "random", "keep": 0.5, "seed": 3},
        {"score": "received", "keep": 20},
        {"score": "received", "keep": 0.25, "coverage": "region"},
        {"score": "received", "keep": 0.25, "coverage": "stride"},
        {"score": "spatial", "keep": 0.01},
    ):
        yield Call(shown(options), questions(model, 2 * FEW, **options))
    for number in range(4):
        alone = questions(model, number + 1, score="received", keep=0.5, seed=1)[number:]
        yield Call(f"one request at a time, {number + 1}", alone)
    yield Call("two images, a share", about_two_images(model, FEW, score="received", keep=0.5, seed=1))
    yield Call("two images, a count", about_two_images(model, FEW, score="spatial", keep=9))
    mixed = [
        replace(each, options=options)
        for options in ({"score": "received", "keep": 0.25}, {"score": "spatial", "keep": 24}, {})
        for each in questions(model, FEW)
    ]
    yield Call("mixed options in one call", mixed)
    yield Call("the same again", mixed)
    if model != "llava":  # whose images are all of one size
        for size in ((32, 128), (160, 40), (64, 96)):
            options = {"score": "received", "keep": 0.5, "seed": 2}
            what = f"images of {size[0]} x {size[1]} pixels"
            yield Call(what, of_another_shape(questions(model, FEW, **options), size))
        yield from calls_about_videos()


def calls_about_videos() -> Iterator[Call]:
    """Of the Qwen family, whose tokenizer is one model's."""
    for options in (
        {"keep": 1.0},
        {"score": "received", "keep": 0.5},
        {"score": "received", "keep": 0.5, "ids": "compacted"},
        {"score": "key_norm", "keep": 0.25},
        {"score": "spatial", "keep": 0.25},
        {"score": "random", "keep": 0.25, "seed": 3},  # of which frames keep different numbers
        {"score": "received", "keep": 20},
        {"score": "received", "keep": 0.25, "coverage": "region"},
        {"score": "received", "keep": 0.25, "coverage": "coverage_gain"},
        {"score": "received", "keep": 0.25, "coverage": "windows"},
        {"score": "received", "keep": 0.25, "merge": "contextual"},
        *AGGREGATED,
    ):
        yield Call(f"videos: {shown(options)}", about_videos("qwen2_5_vl", FEW, 2, **options))
    options = {"score": "received", "keep": 0.25, "seed": 1}
    yield Call("videos of another length", about_videos("qwen2_5_vl", FEW, 3, **options))
    yield Call("an image and a video", about_an_image_and_a_video("qwen2_5_vl", FEW, **options))


def assert_that_ids_matter(answers: dict[str, Answers]) -> None:
    kept, compacted = (answers[f"videos: received, 0.5{ids}"].tokens for ids in ("", ", compacted"))
    assert sum(a != b for a, b in zip(kept, compacted, strict=True)) > FEW / 4


@pytest.mark.parametrize("model", MODELS)
def test_an_ordinary_engine(model: str) -> None:
    calls = list(ordinary_calls(model))
    answers, equal = run(
        model, "one process", embedded(model, gap={"keep": 0.75, "score": "received"}), calls
    )
    assert_equal(calls, equal)
    by_what = {call.what: answer for call, answer in zip(calls, answers, strict=True)}
    assert by_what["spatial, 0.01"].prompt_tokens[0] == LENGTHS[model] + 1
    assert by_what["1.0"].prompt_tokens[0] == LENGTHS[model] + 64
    # What was computed for the first call serves the second, and images aren't encoded anew.
    again = by_what["the same again"]
    assert again.hits >= FEW * BLOCK
    assert again.encoded == []
    if model != "llava":
        assert_that_ids_matter(by_what)
    # GAP's point, on the same survivors of the same engine.
    for score in scores_of(model):
        kept, compacted = (accuracy(model, by_what[f"{score}, 0.5, {ids}"]) for ids in ("kept", "compacted"))
        assert kept > compacted + 0.3


@pytest.mark.parametrize("model", MODELS)
def test_tokens_that_are_compared_and_merged(model: str) -> None:
    received = {"score": "received", "keep": 0.25}
    calls = [
        Call(shown(options), questions(model, FEW, **options))
        for options in (
            *({**received, "coverage": coverage} for coverage in (*BY_FEATURES, *BY_TWO_LAYERS)),
            {"score": "random", "keep": 0.25, "coverage": "max_min"},
            {"score": "key_norm", "keep": 0.25, "coverage": "coverage_gain", "exponent": 2.0},
            *({**received, "merge": merge} for merge in MERGES if merge not in ("none", "aggregation")),
            *(AGGREGATED if model != "llava" else ()),
            {**received, "coverage": "coverage_gain", "merge": "contextual"},
            *([{"score": "cls", "keep": 0.25, "merge": "contextual"}] if model == "llava" else []),
        )
    ]
    answers, equal = run(model, "compared and merged", embedded(model), calls)
    assert_equal(calls, equal)
    assert len({str(answer.tokens) for answer in answers}) > len(calls) / 2  # none of it is without effect


# --------------------------------------------------------------------------------------------- short of something
@pytest.mark.parametrize("model", MODELS)
def test_a_prompt_in_chunks_smaller_than_its_image(model: str) -> None:
    engine = embedded(model, settings=CHUNKS)
    calls = [
        Call(shown(options), questions(model, FEW, **options))
        for options in ({"score": "received", "keep": 0.75}, {"score": "spatial", "keep": 0.75})
    ]
    if model != "llava":
        options = {"score": "received", "keep": 0.5}
        calls.append(Call(f"videos: {shown(options)}", about_videos(model, FEW, 3, **options)))
    answers, equal = run(model, "24 tokens a step", engine, calls)
    assert answers[0].prompt_tokens[0] > 2 * 24
    assert_equal(calls, equal)


@pytest.mark.parametrize("model", MODELS)
def test_requests_that_lose_their_place(model: str) -> None:
    # Two blocks hold a prompt, and an answer begins a third.
    keep = 2 * BLOCK - 1 - LENGTHS[model]
    engine = embedded(model, settings={"num_gpu_blocks_override": 14, "max_model_len": 128})
    calls = [Call(f"received, {keep}", questions(model, 2 * FEW, score="received", keep=keep))]
    answers, equal = run(model, "14 blocks: preempted", engine, calls)
    assert answers[0].preemptions > 0
    assert_equal(calls, equal)


@pytest.mark.parametrize("model", MODELS)
def test_images_are_encoded_within_what_memory_was_profiled_with(model: str) -> None:
    engine = embedded(
        model, gap={"keep": 0.25, "score": "received"}, settings={"max_num_batched_tokens": 512}
    )
    calls = [Call("received, 0.25, as the engine says", questions(model, 2 * FEW))]
    answers, equal = run(model, "512 tokens a step", engine, calls)
    assert_equal(calls, equal)
    assert max(answers[0].encoded) == 512 // 4  # not the 512 / 0.25 that the scheduler's own count would be
    assert sum(answers[0].encoded) == 64 * 2 * FEW


def test_an_image_that_ends_where_a_block_does_is_cached_whole() -> None:
    gap = {"keep": 0.6, "score": "received", "block": BLOCK, "before": 1}
    calls = [Call("received, 0.6 rounded to a block", questions("llava", FEW))] * 2
    answers = ask(embedded("llava", gap=gap), [call.requests for call in calls])
    assert answers[0].prompt_tokens[0] == BLOCK - 1 + LENGTHS["llava"]
    assert answers[1].hits == FEW * BLOCK  # the token before the image, and all 31 of it
    assert answers[1].encoded == []
    asked = [replace(each, options={"score": "received", "keep": BLOCK - 1}) for each in calls[0].requests]
    equal = [same(answer, Oracle(find("llava").folder).answer(asked)) for answer in answers]
    record("llava", "rounded to a block", calls[:1], answers[1:], equal[1:])
    assert equal == [FEW, FEW]


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16(model: str) -> None:
    calls = [
        Call(shown(options), questions(model, 4 * FEW, **options))
        for options in (
            {"keep": 1.0},
            {"score": "spatial", "keep": 0.5},
            {"score": "received", "keep": 0.5},
        )
    ]
    engine = embedded(model, settings={"dtype": "bfloat16"})
    _, equal = run(model, "bfloat16", engine, calls, torch.bfloat16)
    dense, *pruned = equal
    assert min(pruned) >= dense - DENSE_ROUNDING
    assert dense >= 4 * FEW - DENSE_ROUNDING


def assert_rounded(equal: list[int], worst: float) -> None:
    """Of calls of 4 * FEW requests to random weights, which decide between tokens more narrowly than trained ones."""
    assert worst <= LOGITS
    assert min(equal) > 4 * FEW / 2


# --------------------------------------------------------------------------------------------- several processes
@pytest.mark.parametrize("model", MODELS)
def test_tensor_parallelism(model: str) -> None:
    engine = embedded(model, settings={"tensor_parallel_size": 2}, environment=TWO_CORES)
    calls = [
        Call(shown(options), questions(model, 2 * FEW, **options))
        for options in (
            {"score": "received", "keep": 0.25},
            {"score": "key_norm", "keep": 0.25},
            {"score": "received", "keep": 0.25, "coverage": "coverage_gain"},
            {"score": "received", "keep": 0.25, "merge": "contextual"},
            *([{"score": "cls", "keep": 0.25}] if model == "llava" else AGGREGATED),
        )
    ]
    if model != "llava":
        options = {"score": "received", "keep": 0.25}
        calls.append(Call(f"videos: {shown(options)}", about_videos(model, FEW, 2, **options)))
    _, equal = run(model, "tensor parallel, 2", engine, calls)
    assert_equal(calls, equal)


@pytest.mark.parametrize("model", MODELS)
def test_pipeline_parallelism(model: str) -> None:
    engine = embedded(model, settings=PIPELINE, environment=TWO_CORES)
    calls = [
        Call(shown(options), questions(model, 2 * FEW, **options))
        for options in ({"score": "received", "keep": 0.25}, {"score": "spatial", "keep": 0.25})
    ]
    if model != "llava":
        options = {"score": "received", "keep": 0.25}
        calls.append(Call(f"videos: {shown(options)}", about_videos(model, FEW, 2, **options)))
    _, equal = run(model, "pipeline, 2", engine, calls)
    assert_equal(calls, equal)


# --------------------------------------------------------------------------------------------- other models
@pytest.mark.parametrize("model", ["qwen2_vl", "qwen3_vl"])
def test_models_with_random_weights(model: str, tmp_path: Path) -> None:
    engine = random_weights(model, tmp_path)
    calls = [
        Call(shown(options), questions("qwen2_5_vl", FEW, **options))
        for options in (
            {"keep": 1.0},
            {"score": "received", "keep": 0.5},
            {"score": "key_norm", "keep": 0.25},
            {"score": "spatial", "keep": 0.25},
            {"score": "received", "keep": 0.25, "coverage": "max_min"},
            {"score": "received", "keep": 0.25, "merge": "contextual"},
        )
    ]
    pairs = about_two_images("qwen2_5_vl", FEW, score="received", keep=0.5)
    calls += [Call("two images", pairs), *calls_about_videos()]
    answers, equal = run(f"{model}, random weights", "one process", engine, calls)
    assert_equal(calls, equal)
    assert_that_ids_matter({call.what: answer for call, answer in zip(calls, answers, strict=True)})


def test_frames_apart_in_chunks(tmp_path: Path) -> None:
    """A step may end inside a frame, or in the text before one."""
    engine = replace(random_weights("qwen3_vl", tmp_path), settings=CHUNKS)
    calls = [
        Call(f"videos: {shown(options)}", about_videos("qwen2_5_vl", FEW, 3, **options))
        for options in (
            {"score": "received", "keep": 0.5},
            {"score": "random", "keep": 0.1, "seed": 3},
        )
    ]
    _, equal = run("qwen3_vl, random weights", "24 tokens a step", engine, calls)
    assert_equal(calls, equal)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="the kernels of vLLM for layers that carry a state, on a CPU, are for AVX-512",
)
def test_layers_that_carry_a_state(tmp_path: Path) -> None:
    """On a CPU they take nothing but bfloat16; a state goes from one chunk of a prompt to the next."""
    engine = replace(random_weights("qwen3_5", tmp_path), settings={**CHUNKS, "dtype": "bfloat16"})
    ways = ({"keep": 1.0}, {"score": "received", "keep": 0.5}, {"score": "spatial", "keep": 0.5})
    calls = [
        *(Call(shown(options), questions("qwen2_5_vl", 4 * FEW, **options)) for options in ways),
        *(
            Call(f"videos: {shown(options)}", about_videos("qwen2_5_vl", 4 * FEW, 2, **options))
            for options in ways
        ),
    ]
    answers, equal, worst = run_and_measure(
        "qwen3_5, random weights", "bfloat16, 24 tokens a step", engine, calls, torch.bfloat16
    )
    assert_rounded(equal, worst)
    # By another choice of as many tokens they would be other answers.
    _, otherwise = Oracle(engine.folder, torch.bfloat16).compare(calls[1].requests, answers[2].tokens)
    assert otherwise > 4 * LOGITS


TILES = ("llava_next", "llava_onevision")


def calls_about_tiles(model: str) -> Iterator[Call]:
    for options in (
        {"keep": 1.0},
        {"score": "received", "keep": 0.5},
        {"score": "received", "keep": 0.5, "ids": "compacted"},
        {"score": "key_norm", "keep": 0.25},
        {"score": "spatial", "keep": 0.25},
        {"score": "random", "keep": 0.5, "seed": 3},
        {"score": "received", "keep": 9},  # fewer than two for each newline
        {"score": "received", "keep": 0.25, "coverage": "region"},
        {"score": "received", "keep": 0.25, "coverage": "stride"},
        {"score": "received", "keep": 0.25, "coverage": "coverage_gain"},
        {"score": "random", "keep": 0.25, "coverage": "max_min"},
        {"score": "received", "keep": 0.25, "coverage": "anchors"},
        {"score": "received", "keep": 0.25, "merge": "contextual"},
        {"score": "received", "keep": 0.25, "merge": "average"},
        *([{"score": "cls", "keep": 0.5}] if model == "llava_next" else []),
    ):
        yield Call(shown(options), questions("llava", FEW, **options))
    yield Call("two images", about_two_images("llava", FEW, score="received", keep=0.5))
    for size in ((90, 40), (20, 70), (130, 131)):  # some are cut off at the rim, or have more tiles
        options = {"score": "received", "keep": 0.5, "seed": 2}
        what = f"images of {size[0]} x {size[1]} pixels"
        yield Call(what, of_another_shape(questions("llava", FEW, **options), size))


@pytest.mark.parametrize("model", TILES)
def test_images_that_are_cut_into_tiles(model: str, tmp_path: Path) -> None:
    calls = list(calls_about_tiles(model))
    answers, equal = run(f"{model}, random weights", "one process", random_tiles(model, tmp_path), calls)
    assert_equal(calls, equal)
    by_what = {call.what: answer for call, answer in zip(calls, answers, strict=True)}
    # An overview of 16 tokens, and 4 tiles with 8 newlines: all of 88, or half.
    whole, half = (by_what[what].prompt_tokens[0] for what in ("1.0", "received, 0.5"))
    assert whole - half == 44
    assert by_what["received, 0.5"].tokens != by_what["received, 0.5, compacted"].tokens


@pytest.mark.parametrize("model", TILES)
def test_images_of_one_prompt_that_have_different_numbers_of_tiles(model: str, tmp_path: Path) -> None:
    """A processor fills them up to one number; where an image was seen before, alone, it does not."""
    options = {"score": "received", "keep": 0.5}
    pairs = [
        replace(each, images=(each.images[0], each.images[1].resize((90, 40))))
        for each in about_two_images("llava", FEW, **options)
    ]
    again = [replace(each, options={**options, "seed": 1}) for each in pairs]  # as if they were other images
    alone = [
        replace(each, images=(image,), text=each.text.replace("<image>", "", 1))
        for each in again
        for image in each.images
    ]
    filled, _, each_its_own = ask(random_tiles(model, tmp_path), [pairs, alone, again])
    assert filled.tokens == each_its_own.tokens
    assert each_its_own.encoded == []


@pytest.mark.parametrize("model", TILES)
def test_tiles_that_lose_their_place(model: str, tmp_path: Path) -> None:
    keep = 2 * BLOCK - 1 - LENGTHS["llava"]
    engine = replace(
        random_tiles(model, tmp_path), settings={"num_gpu_blocks_override": 14, "max_model_len": 128}
    )
    calls = [Call(f"received, {keep}", questions("llava", 2 * FEW, score="received", keep=keep))]
    answers, equal = run(f"{model}, random weights", "14 blocks: preempted", engine, calls)
    assert answers[0].preemptions > 0
    assert_equal(calls, equal)


@pytest.mark.parametrize("model", TILES)
def test_tiles_in_bfloat16(model: str, tmp_path: Path) -> None:
    engine = replace(random_tiles(model, tmp_path), settings={"dtype": "bfloat16"})
    calls = [
        Call(shown(options), questions("llava", 4 * FEW, **options))
        for options in (
            {"keep": 1.0},
            {"score": "spatial", "keep": 0.5},
            {"score": "received", "keep": 0.5},
        )
    ]
    _, equal, worst = run_and_measure(f"{model}, random weights", "bfloat16", engine, calls, torch.bfloat16)
    assert_rounded(equal, worst)


@pytest.mark.parametrize("model", TILES)
@pytest.mark.parametrize(
    ("name", "changes"),
    {
        "24 tokens a step": {"settings": CHUNKS},
        "tensor parallel, 2": {"settings": {"tensor_parallel_size": 2}, "environment": TWO_CORES},
        "pipeline, 2": {"settings": PIPELINE, "environment": TWO_CORES},
    }.items(),
)
def test_tiles_in_chunks_and_in_two_processes(
    model: str, name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    calls = [
        Call(shown(options), questions("llava", FEW, **options))
        for options in ({"score": "received", "keep": 0.5}, {"score": "spatial", "keep": 0.5})
    ]
    engine = replace(random_tiles(model, tmp_path), **changes)
    _, equal = run(f"{model}, random weights", name, engine, calls)
    assert_equal(calls, equal)
