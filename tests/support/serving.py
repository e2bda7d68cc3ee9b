"""Engines of vLLM, each in a process of its own, and what gap_triton in transformers answers to the same requests."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

import gap_triton
from gap_triton import GapConfig
from gap_triton.config import BEFORE_THE_DECODER
from gap_triton.demo.architectures import find
from gap_triton.demo.scenes import Scenes, held_out

from . import families, tiny

ROOT = Path(__file__).resolve().parents[2]
# The checkout's own packages, in all processes of an engine, whatever is installed; as pytest has them.
CHECKOUT = os.pathsep.join(str(ROOT / folder) for folder in ("kernels", ".", "tests"))
WORKER = ROOT / "tests" / "scripts" / "vllm_worker.py"
BLOCK = 32  # tokens of a block of the KV cache, the fewest that vLLM allows on a CPU
TILE = 32  # rows and columns of pixels
FRAMES_PER_SECOND = 4.0  # so that three frames of Qwen2.5-VL, each made of two, take fewer ids than its rows
ANSWER = 8  # tokens of an answer
STARTS_AND_ANSWERS_WITHIN = 1500  # seconds; a pipeline compiles, and a machine may be busy
SETTINGS = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "block_size": BLOCK}
ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other one needs a GPU
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
PLUG_IN = {
    "llava": "GapLlavaForConditionalGeneration",
    "llava_next": "GapLlavaNextForConditionalGeneration",
    "llava_onevision": "GapLlavaOnevisionForConditionalGeneration",
    "qwen2_vl": "GapQwen2VLForConditionalGeneration",
    "qwen2_5_vl": "GapQwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "GapQwen3VLForConditionalGeneration",
    "qwen3_5": "GapQwen3_5ForConditionalGeneration",
}


@dataclass(frozen=True)
class Request:
    """One prompt with its images and videos, and what is kept of them: fields of `GapConfig`.

    Attributes:
        videos: Each [frames, rows, columns, 3] uint8, at `FRAMES_PER_SECOND`.
    """

    text: str
    images: tuple[Image.Image, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    videos: tuple[np.ndarray, ...] = ()

    @property
    def data(self) -> dict[str, list[Any]]:
        """Images and videos as vLLM takes them."""
        videos = [(video, {**metadata_of(video), "do_sample_frames": False}) for video in self.videos]
        return {name: items for name, items in (("image", list(self.images)), ("video", videos)) if items}


def metadata_of(video: np.ndarray) -> dict[str, Any]:
    """What is known of a video beside its frames."""
    frames = len(video)
    return {
        "fps": FRAMES_PER_SECOND,
        "duration": frames / FRAMES_PER_SECOND,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
    }


@dataclass(frozen=True)
class Engine:
    """How an engine is started: a folder, its type, what it keeps by default, and what of settings and configs differs."""

    folder: Path
    model_type: str
    gap: dict[str, Any] = field(default_factory=lambda: {"keep": 1.0})
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: dict(IN_PROCESS))
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``vllm.LLM``."""
        overrides = {"architectures": [PLUG_IN[self.model_type]], "gap": self.gap, **self.overrides}
        return {"model": str(self.folder), "seed": 0, "hf_overrides": overrides, **SETTINGS, **self.settings}


@dataclass(frozen=True)
class Answers:
    """What an engine answered to the requests of one call.

    Attributes:
        tokens: By request.
        prompt_tokens: How many tokens each prompt had.
        hits: How many tokens of all prompts were in the prefix cache.
        preemptions: How often a request lost its place.
        encoded: How many unpruned tokens went through the vision tower at a time, in a process of its own only.
    """

    tokens: list[list[int]]
    prompt_tokens: list[int]
    hits: int
    preemptions: int
    encoded: list[int]


def embedded(name: str, **changes: Any) -> Engine:
    """An engine of an embedded model."""
    return replace(Engine(find(name).folder, name), **changes)


def ask(engine: Engine, calls: Sequence[Sequence[Request]]) -> list[Answers]:
    """Start ``engine``, make the ``calls`` one after the other, and end it."""
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job"), Path(folder, "result")
        job.write_bytes(pickle.dumps((engine.arguments, ANSWER, calls)))
        log = Path(folder, "log")
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, str(WORKER), str(job), str(result)],
                env={**os.environ, **ENVIRONMENT, **engine.environment, "PYTHONPATH": CHECKOUT},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(STARTS_AND_ANSWERS_WITHIN)
            finally:
                with contextlib.suppress(ProcessLookupError):  # it has ended, and so have its own processes
                    os.killpg(process.pid, signal.SIGKILL)
        if not result.exists():
            raise RuntimeError(f"the engine failed: {log.read_text(encoding='utf-8')[-6000:]}")
        return [Answers(**each) for each in pickle.loads(result.read_bytes())]


def random_weights(model_type: str, folder: Path) -> Engine:
    """An engine of a tiny model of the Qwen family with random weights, whose tokenizer is an embedded model's."""
    source = find("qwen2_5_vl")
    theirs = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    config = families.config_of(model_type)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, theirs[name])
    text, vision = config.text_config, config.vision_config
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "hidden_size"):
        setattr(text, name, theirs["text_config"][name])
    text.num_key_value_heads = text.num_attention_heads = 4
    text.head_dim = 32  # the least that vLLM's attention takes on a CPU
    text.rope_parameters["mrope_section"] = [4, 6, 6]
    if model_type == "qwen3_vl":
        text.rope_parameters["mrope_interleaved"] = True
    if model_type == "qwen3_5":  # of whose heads a quarter turns
        text.rope_parameters |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
        text.linear_key_head_dim = text.linear_value_head_dim = 128  # likewise
    setattr(
        vision, "out_hidden_size" if hasattr(vision, "out_hidden_size") else "hidden_size", text.hidden_size
    )
    kind = getattr(transformers, families.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
    torch.manual_seed(0)
    tiny.seed_weights(kind._from_config(config)).save_pretrained(folder)
    for path in source.folder.glob("*token*.json"):
        shutil.copy(path, folder)
    shutil.copy(source.folder / "preprocessor_config.json", folder)
    name = PROCESSOR_MAPPING_NAMES[model_type]
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": name}), encoding="utf-8")
    if model_type in (
        "qwen3_vl",
        "qwen3_5",
    ):  # whose processor of videos is one of its own, and counts the pixels of all frames
        images = json.loads((source.folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        common = {key: images[key] for key in ("patch_size", "temporal_patch_size", "merge_size")}
        sizes = {"size": {"shortest_edge": TILE**2, "longest_edge": 2**16}}
        videos = {"video_processor_type": "Qwen3VLVideoProcessor", **common, **sizes}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(videos), encoding="utf-8")
    return Engine(folder, model_type)


def random_tiles(model_type: str, folder: Path) -> Engine:
    """An engine of a tiny model that cuts images into tiles, with random weights, whose decoder is an embedded model's."""
    source = find("llava")
    theirs = transformers.AutoConfig.from_pretrained(source.folder)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size")
    vision = {**{name: getattr(theirs.vision_config, name) for name in sizes}, "image_size": TILE}
    pinpoints = [[height, width] for height, width in product((TILE, 2 * TILE, 3 * TILE), repeat=2)]
    common = {
        "text_config": theirs.text_config,
        "image_token_index": theirs.image_token_index,
        "image_grid_pinpoints": pinpoints,
        "vision_feature_layer": -1,
    }
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    torch.manual_seed(0)
    if model_type == "llava_next":
        config = transformers.LlavaNextConfig(
            vision_config=transformers.CLIPVisionConfig(**vision),
            vision_feature_select_strategy="default",
            **common,
        )
        kind = transformers.LlavaNextForConditionalGeneration
        square = {"height": TILE, "width": TILE}
        images = transformers.LlavaNextImageProcessor(
            size={"shortest_edge": TILE}, crop_size=square, image_grid_pinpoints=pinpoints
        )
        processor = transformers.LlavaNextProcessor(
            images,
            tokenizer,
            patch_size=vision["patch_size"],
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    else:
        config = transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(**vision),
            video_token_index=tokenizer.unk_token_id,
            vision_feature_select_strategy="full",
            **common,
        )
        kind = transformers.LlavaOnevisionForConditionalGeneration
        images = transformers.LlavaOnevisionImageProcessor(
            size={"height": TILE, "width": TILE}, image_grid_pinpoints=pinpoints
        )
        processor = transformers.LlavaOnevisionProcessor(
            images,
            tokenizer,
            transformers.LlavaOnevisionVideoProcessor(),
            num_image_tokens=(TILE // vision["patch_size"]) ** 2,
            vision_feature_select_strategy="full",
        )
    tiny.seed_weights(kind._from_config(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    # Transformers 5.19 saves a tower under shorter names than released checkpoints have, which vLLM 0.32 asks for.
    weights = load_file(folder / "model.safetensors")
    names = {
        name: re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name)
        for name in weights
    }
    save_file(
        {names[name]: weight for name, weight in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return Engine(folder, model_type)


class Oracle:
    """Gap_triton in transformers, which answers the same requests."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder, attn_implementation="gap_triton", dtype=dtype
        ).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def answer(self, requests: Sequence[Request], batch: int = 32) -> list[list[int]]:
        """Return the tokens that each request is answered with, up to the one that ends it."""
        return [tokens for tokens, _ in self._answers(requests, batch)]

    def compare(
        self, requests: Sequence[Request], tokens: Sequence[list[int]], batch: int = 32
    ) -> tuple[int, float]:
        """Return how many requests have the oracle's ``tokens``, and by how much others were worse in its eyes, at most.

        That is a difference of logits, at the first token of a request that differs: what comes after it has something else
        before it.
        """
        equal, worst = 0, 0.0
        for (own, logits), other in zip(self._answers(requests, batch), tokens, strict=True):
            equal += own == other
            first = next(
                (step for step, pair in enumerate(zip(own, other, strict=False)) if len(set(pair)) > 1), None
            )
            if first is not None:
                worst = max(worst, float(logits[first, own[first]] - logits[first, other[first]]))
        return equal, worst

    def _answers(self, requests: Sequence[Request], batch: int) -> list[tuple[list[int], Tensor]]:
        """Of each request the tokens, and the logits by token."""
        answers: dict[int, tuple[list[int], Tensor]] = {}
        groups: dict[Any, list[int]] = {}
        for number, request in enumerate(requests):
            key = (tuple(sorted(request.options.items())), len(request.images), len(request.videos))
            groups.setdefault(key, []).append(number)
        for numbers in groups.values():
            for start in range(0, len(numbers), batch):
                part = numbers[start : start + batch]
                answers |= zip(part, self._generate([requests[number] for number in part]), strict=True)
        return [answers[number] for number in range(len(requests))]

    def _generate(self, requests: Sequence[Request]) -> list[tuple[list[int], Tensor]]:
        options = {"keep": 1.0, "score": "received", **requests[0].options}
        if isinstance(options["keep"], int):
            # An engine counts the survivors of an image, transformers those of a sample.
            options["keep"] *= len(requests[0].images) + len(requests[0].videos)
        gap_triton.configure(self.model, GapConfig(layer=BEFORE_THE_DECODER, **options))
        pictures: list[Any] = [list(request.images) for request in requests]
        if self.model.config.model_type == "llava_onevision":
            # One list: of several images of one prompt its processor makes no tiles, and vLLM does.
            pictures = [image for images in pictures for image in images]
        given: dict[str, Any] = {"images": pictures} if any(pictures) else {}
        if videos := [video for request in requests for video in request.videos]:
            metadata = [metadata_of(video) for video in videos]
            given |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        inputs = self.processor(
            text=[request.text for request in requests], padding=True, return_tensors="pt", **given
        )
        for name in ("pixel_values", "pixel_values_videos"):
            if name in inputs:
                inputs[name] = inputs[name].to(self.model.dtype)
        with torch.no_grad():
            output = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=ANSWER,
                return_dict_in_generate=True,
                output_logits=True,
            )
        end = self.model.generation_config.eos_token_id
        rows = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        logits = torch.stack(output.logits, dim=1).float()
        return [
            (row[: row.index(end) + 1] if end in row else row, logits[number])
            for number, row in enumerate(rows)
        ]


def same(answers: Answers, expected: Sequence[list[int]]) -> int:
    """How many requests were answered with the same tokens."""
    assert len(answers.tokens) == len(expected)
    return sum(got == wanted for got, wanted in zip(answers.tokens, expected, strict=True))


# --------------------------------------------------------------------------------------------- requests
def questions(name: str, scenes: int | Scenes, **options: Any) -> list[Request]:
    """The demo's question about each of the first held-out scenes, or of ``scenes``."""
    drawn = held_out(scenes) if isinstance(scenes, int) else scenes
    architecture = find(name)
    return [
        Request(architecture.prompt(drawn.question(i)), (drawn.image(i),), options) for i in range(len(drawn))
    ]


def about_two_images(name: str, count: int, **options: Any) -> list[Request]:
    """Questions about pairs of scenes."""
    drawn, architecture = held_out(2 * count), find(name)
    return [
        Request(
            f"{architecture.image_text} {architecture.prompt(drawn.question(2 * i))}",
            (drawn.image(2 * i), drawn.image(2 * i + 1)),
            options,
        )
        for i in range(count)
    ]


def about_videos(name: str, count: int, frames: int = 3, **options: Any) -> list[Request]:
    """Questions about videos, each frame of which shows the next scene, for as long as a model makes one frame of it."""
    drawn, architecture = held_out(count + frames), find(name)
    return [
        Request(
            architecture.prompt(drawn.question(i)).replace("image", "video"),
            options=options,
            videos=(np.stack([np.asarray(drawn.image(i + frame // 2)) for frame in range(2 * frames)]),),
        )
        for i in range(count)
    ]


def about_an_image_and_a_video(name: str, count: int, **options: Any) -> list[Request]:
    """Questions about a video that follows an image."""
    return [
        replace(video, text=f"{find(name).image_text} {video.text}", images=image.images)
        for image, video in zip(questions(name, count), about_videos(name, count, 2, **options), strict=True)
    ]


def of_another_shape(requests: Sequence[Request], size: tuple[int, int]) -> list[Request]:
    """The same requests, their images stretched to so many pixels in width and height."""
    return [replace(each, images=tuple(image.resize(size) for image in each.images)) for each in requests]
