"""What ``gap-triton run`` says of an answer, what it reads, and how it samples, loads and lists methods."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support.command_line import cli, refuses, said
from transformers import BatchFeature, GenerationConfig, TextStreamer

import gap_triton
from gap_triton import GapConfig
from gap_triton.demo.architecture import VISUAL
from gap_triton.demo.architectures import QWEN2_5_VL
from gap_triton.demo.native import NativeProcessor
from gap_triton.demo.run import load_embedded_model
from gap_triton.demo.scenes import held_out
from gap_triton.presets import PRESETS
from gap_triton_cli import ask as asking
from gap_triton_cli import loading
from gap_triton_cli.generate import kv_bytes
from gap_triton_cli.prompts import with_images

QUESTION = held_out(1).question(0)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    held_out(1).image(0).save(path)
    return path


@pytest.fixture
def not_loaded(monkeypatch) -> None:
    monkeypatch.setattr(asking, "ask", lambda *arguments: pytest.fail("a model was loaded"))


def run(scene: Path, *options: str):
    result = cli("run", "--model", "embedded", "--image", str(scene), "--prompt", QUESTION, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def objects(result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def answer_of(scenes, config: GapConfig | None) -> str:
    """What the embedded model says, asked in Python."""
    model, processor = load_embedded_model()
    if config is None:
        model.set_attn_implementation("sdpa")
    else:
        gap_triton.configure(model, config)
    image = scenes.image(0)
    inputs = processor(images=image, text=f"<image> {QUESTION}", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(written, skip_special_tokens=True)[0].strip()


# --------------------------------------------------------------------------------------------- what is said
def test_words_are_printed_as_they_come(monkeypatch, scene: Path) -> None:
    pieces: list[str] = []
    monkeypatch.setattr(
        TextStreamer, "on_finalized_text", lambda self, text, stream_end=False: pieces.append(text)
    )
    run(scene)
    assert sum(bool(piece) for piece in pieces) > 2
    (found,) = objects(run(scene, "--json"))
    assert "".join(pieces).strip() == found["answer"]


def test_json_is_all_that_is_printed(scene: Path) -> None:
    (found,) = objects(run(scene, "--json", "--layer", "1", "--keep", "0.25"))
    assert found["answer"] == answer_of(held_out(1), GapConfig(keep=0.25, layer=1))
    assert found["visual_tokens"] == 64
    assert found["kept"] == [{"layer": 1, "visual_tokens": 16}]
    assert (found["prompt"], found["image"], found["ids"]) == (QUESTION, [str(scene)], "kept")
    assert found["prompt_tokens"] == 70
    assert 0 < found["first_token_s"] < found["total_s"]
    rows = 70 + found["new_tokens"] - 1  # the last token is never fed
    dropped_layers, bytes_of_a_row = 4, 2 * 128 * 4
    assert found["kv_bytes"] == (6 * rows - dropped_layers * 48) * bytes_of_a_row
    assert "unpruned" not in found


def test_a_picture_of_nothing_dropped_is_refused(scene: Path) -> None:
    refuses(
        "overlay: nothing was dropped at keep=1.0; leave the overlay out",
        *("run", "--model", "embedded", "--image", str(scene), "--prompt", QUESTION, "--keep", "1.0"),
        *("--overlay", str(scene.with_name("kept.png"))),
    )
    assert "nothing dropped of 64 visual tokens" in said(run(scene, "--keep", "1.0"))


def test_stages_are_told_apart(scene: Path) -> None:
    result = run(scene, "--method", "pyramiddrop", "--keep", "0.5")
    config = GapConfig.preset("pyramiddrop", budget=0.5, layers=6)
    assert said(result).count("after layer") == len(config.stages) == 3
    (found,) = objects(run(scene, "--method", "pyramiddrop", "--keep", "0.5", "--json"))
    assert [each["layer"] for each in found["kept"]] == [each.layer for each in config.stages]


def test_what_an_answer_took_is_said(scene: Path) -> None:
    assert "tokens behind a prompt of 70: first token in" in said(run(scene))


def test_compare_answers_without_pruning_too(scene: Path) -> None:
    result = run(scene, "--compare", "--keep", "0.125", "--layer", "0")
    unpruned, pruned = (answer_of(held_out(1), config) for config in (None, GapConfig(keep=0.125, layer=0)))
    assert unpruned != pruned
    assert [line.strip() for line in result.stdout.splitlines()[:2]] == [
        f"no pruning: {unpruned}",
        f"pruned: {pruned}",
    ]
    assert "no pruning" in result.output
    (found,) = objects(run(scene, "--compare", "--keep", "0.125", "--layer", "0", "--json"))
    assert (found["unpruned"]["answer"], found["answer"]) == (unpruned, pruned)
    assert found["unpruned"]["kv_bytes"] > 2 * found["kv_bytes"]


def test_a_cache_that_holds_more_than_keys_and_values_has_no_size() -> None:
    assert kv_bytes(SimpleNamespace(layers=[SimpleNamespace(conv_states=torch.ones(2))])) is None
    layer = SimpleNamespace(keys=torch.ones(2, 3), values=torch.ones(2, 3))
    assert kv_bytes(SimpleNamespace(layers=[layer, layer])) == 96


# --------------------------------------------------------------------------------------------- many questions
def test_many_questions_are_read_from_a_file(tmp_path) -> None:
    scenes = held_out(3)
    (tmp_path / "images").mkdir()
    lines: list[dict[str, Any]] = []
    for i in range(3):
        scenes.image(i).save(tmp_path / "images" / f"{i}.png")
        lines.append({"id": 10 + i, "image": f"images/{i}.png", "prompt": scenes.question(i)})
    del lines[2]["prompt"]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    options = ("--model", "embedded", "--input", str(file), "--layer", "1")
    result = cli("run", *options, "--prompt", scenes.question(2), "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    found = objects(result)
    assert [each["id"] for each in found] == [10, 11, 12]
    for i, each in enumerate(found):
        alone = cli(
            *("run", "--model", "embedded", "--image", str(tmp_path / "images" / f"{i}.png"), "--layer", "1"),
            *("--prompt", scenes.question(i), "--json"),
        )
        assert each["answer"] == objects(alone)[0]["answer"]
    in_words = cli("run", *options, "--prompt", scenes.question(2))
    assert said(in_words).count("kept 32 of 64 visual tokens") == 3
    assert f"1.png: {scenes.question(1)}" in said(in_words)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("", "is empty: expected a JSON object a line"),
        ("{", "line 1: expected a JSON object, got '{'"),
        ("\n[1]", "line 2: expected a JSON object, got '[1]'"),
        ('{"image": "scene.png"}', "line 1: expected a prompt, as a string, here or by --prompt"),
        ('{"image": "scene.png", "prompt": 3}', "line 1: expected a prompt"),
        ('{"image": "scene.png", "prompt": " "}', "line 1: --prompt ' ': expected a question"),
        ('{"prompt": "where?"}', "line 1: give --image or --video, to say what to look at"),
        ('{"image": 3, "prompt": "where?"}', "line 1: image=3: expected a file or a list of files"),
        ('{"image": [["a"]], "prompt": "where?"}', "line 1: image=[['a']]: expected a file"),
        ('{"image": "none.png", "prompt": "where?"}', "none.png' does not exist"),
        (
            '{"image": "questions.jsonl", "prompt": "where?"}',
            "questions.jsonl' can't be read: cannot identify",
        ),
    ],
)
def test_a_line_that_is_no_question_is_refused(not_loaded, scene: Path, lines: str, sentence: str) -> None:
    file = scene.with_name("questions.jsonl")
    file.write_text(lines)
    refuses(sentence, "run", "--model", "embedded", "--input", str(file))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompt", "where?"], "give --image or --video, to say what to look at"),
        (["--image", "scene.png"], "give --prompt, to say what to ask, or --input for many questions"),
        (["--image", "scene.png", "--input", "scene.png"], "--image and --input both say what to look at"),
        (["--video", "frames", "--prompt", "x"], "'frames': a folder has to hold frames (.png, .jpg,"),
        (
            ["--image", "scene.png", "--prompt", "x", "--top-p", "0.5"],
            "--top-p is for draws: give --temperature",
        ),
        (
            ["--image", "scene.png", "--prompt", "x", "--top-k", "5"],
            "--top-k is for draws: give --temperature",
        ),
        (["--image", "scene.png", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["--image", "scene.png", "--prompt", "x", "--dtype", "int8"], "'int8' is not one of 'float32'"),
        (
            ["--video", "frames", "--image", "scene.png", "--prompt", "x", "--overlay", "a.png"],
            "--overlay draws one image, and 1 are given with videos; leave it out",
        ),
    ],
)
def test_what_can_not_be_asked_is_refused(
    monkeypatch, not_loaded, scene: Path, options: list[str], sentence: str
) -> None:
    monkeypatch.chdir(scene.parent)
    (scene.parent / "frames").mkdir()
    refuses(sentence, "run", "--model", "embedded", *options)


# --------------------------------------------------------------------------------------------- how it is loaded
@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("gpu", "device 'gpu': expected cpu, cuda, cuda:N for the GPU of that number, or auto"),
        ("meta", "device 'meta': expected cpu, cuda"),
        ("cuda:99", "device 'cuda:99': PyTorch finds "),
    ],
)
def test_a_device_that_is_not_there_is_refused(scene: Path, device: str, sentence: str) -> None:
    refuses(
        sentence, "run", "--model", "embedded", "--image", str(scene), "--prompt", "x", "--device", device
    )


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", torch.bfloat16), ("auto", torch.float32), (None, torch.float32)]
)
def test_weights_have_the_dtype_that_was_asked_for(
    monkeypatch, scene: Path, dtype: str | None, expected: torch.dtype
) -> None:
    seen: list[torch.dtype] = []
    original = asking.generate

    def noted(model, processor, inputs, *others):
        seen.extend((model.dtype, inputs["pixel_values"].dtype))
        return original(model, processor, inputs, *others)

    monkeypatch.setattr(asking, "generate", noted)
    run(scene, "--device", "cpu", *(["--dtype", dtype] if dtype else []))
    assert seen == [expected, expected]


def test_revision_and_trust_reach_everything_that_is_loaded(monkeypatch, scene: Path) -> None:
    told: list[dict[str, Any]] = []
    folder = str(loading.EMBEDDED["embedded"].folder)
    for name in ("AutoConfig", "AutoProcessor", "AutoModelForImageTextToText"):
        real = getattr(transformers, name).from_pretrained

        def load(path, real=real, **options):
            told.append(options)
            kept = {key: options[key] for key in options if key not in ("revision", "trust_remote_code")}
            return real(path, **kept)

        monkeypatch.setattr(loading, name, SimpleNamespace(from_pretrained=load))
    named = ("run", "--model", folder, "--image", str(scene), "--prompt", QUESTION)
    assert cli(*named, "--revision", "v1", "--trust-remote-code").exit_code == 0
    assert len(told) == 3
    assert all((each["revision"], each["trust_remote_code"]) == ("v1", True) for each in told)
    told.clear()
    assert cli(*named).exit_code == 0
    assert len(told) == 3
    assert not any(each.keys() & {"revision", "trust_remote_code"} for each in told)


# --------------------------------------------------------------------------------------------- sampling and words
def test_a_model_whose_own_settings_are_beams_is_streamed_all_the_same(scene: Path, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(loading.EMBEDDED["embedded"].folder, folder)
    settings = GenerationConfig.from_pretrained(folder)
    settings.num_beams = 3
    settings.save_pretrained(folder)
    named = ("run", "--model", str(folder), "--image", str(scene), "--prompt", QUESTION)
    result = cli(*named)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "<loc" in result.output


def test_draws_follow_the_seed(scene: Path) -> None:
    options = ("--json", "--temperature", "50", "--top-p", "1", "--top-k", "1000", "--max-new-tokens", "8")
    first, again, other = (
        objects(run(scene, *options, "--seed", seed))[0]["answer"] for seed in ("1", "1", "2")
    )
    assert first == again
    assert first != other


def test_the_seed_is_that_of_random_scores_too(monkeypatch, scene: Path) -> None:
    seen: list[GapConfig] = []
    monkeypatch.setattr(
        asking, "ask", lambda source, questions, config_for, *others: seen.append(config_for(None))
    )
    run(scene, "--score", "random", "--seed", "3")
    run(scene, "--method", "random", "--seed", "3", "--ids", "compacted")
    assert [(each.score, each.seed, each.ids) for each in seen] == [
        ("random", 3, "kept"),
        ("random", 3, "compacted"),
    ]


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        ([], 0.5),
        (["--keep", "16"], 16),
        (["--budget", "0.25"], 0.25),
        (["--method", "visionzip"], GapConfig.preset("visionzip").keep),
        (["--preset", "cls", "--budget", "8"], 8),
    ],
)
def test_keep_and_method_have_two_names_each_and_a_method_its_own_budget(
    monkeypatch, scene: Path, options: list[str], keep: float | int
) -> None:
    seen: list[GapConfig] = []
    monkeypatch.setattr(
        asking, "ask", lambda source, questions, config_for, *others: seen.append(config_for(None))
    )
    run(scene, *options)
    assert [each.keep for each in seen] == [keep]


def test_methods_are_listed_with_what_their_docstrings_say() -> None:
    listed = json.loads(cli("methods", "--json").stdout)
    assert [each["method"] for each in listed] == list(PRESETS)
    assert all(each["keeps"].startswith("Keep") and "arXiv" in each["source"] for each in listed)
    (nuwa,) = (each for each in listed if each["method"] == "nuwa")
    assert nuwa["budget"] == 64
    table = said(cli("methods"))
    assert all(name in table for name in PRESETS)
    assert nuwa["keeps"] in table


# --------------------------------------------------------------------------------------------- video
class VideoProcessor(NativeProcessor):
    """Reads videos of the embedded Qwen2.5-VL as transformers' processor does, which needs torchvision."""

    video_token = "<|video_pad|>"
    asked: list[dict[str, Any]]

    def __call__(self, text, videos, return_tensors, **options):  # type: ignore[override]
        self.asked.append(options)
        (frames,) = videos
        pairs = len(frames) // 2  # two frames are VISUAL tokens
        visual = self.video_token * VISUAL * pairs
        inputs = self.tokenizer([text.replace(self.video_token, visual)], return_tensors=return_tensors)
        placeholder = self.tokenizer.convert_tokens_to_ids(self.video_token)
        pictures = NativeProcessor.__call__(
            self, frames[::2], [f"{QWEN2_5_VL.image_text} x"] * pairs, return_tensors="pt"
        )
        grid = pictures["image_grid_thw"][:1].clone()
        grid[0, 0] = pairs
        extra = {"pixel_values_videos": pictures["pixel_values"], "video_grid_thw": grid}
        if "mm_token_type_ids" in pictures:
            extra["mm_token_type_ids"] = 2 * (inputs["input_ids"] == placeholder).long()
        return BatchFeature({**inputs, **extra})


def test_a_folder_of_frames_is_a_video(monkeypatch, tmp_path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(4):
        held_out(4).image(i).save(folder / f"{i}.png")
    _, native = load_embedded_model(name="qwen2_5_vl")
    processor = VideoProcessor(native.tokenizer, QWEN2_5_VL)
    processor.asked = []
    monkeypatch.setattr(type(QWEN2_5_VL), "load_processor", lambda self, folder: processor)
    result = cli("run", "--model", "embedded-mrope", "--video", str(folder), "--prompt", QUESTION)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "kept 64 of 128 visual tokens after layer 2" in said(result)
    assert processor.asked == [{"do_sample_frames": False}]  # the frames are what was chosen


def test_a_model_without_videos_says_so(scene: Path) -> None:
    frames = str(scene.parent)
    refuses(
        "of this model has no video token, so it can't take a video",
        *("run", "--model", "embedded", "--video", frames, "--prompt", QUESTION),
    )


def test_video_tokens_go_in_front() -> None:
    processor: Any = SimpleNamespace(image_token="<i>", video_token="<v>", chat_template=None)
    assert with_images(processor, "where?", 1, None, 2) == "<i><v><v> where?"
    assert with_images(processor, "<v>, <i>?", 1, None, 1) == "<v>, <i>?"
    with pytest.raises(ValueError, match=r"prompt has <v> 2 times, and 1 videos are given"):
        with_images(processor, "<v><v>?", 0, None, 1)
    with pytest.raises(ValueError, match="images or its videos alone"):
        with_images(processor, "<i>?", 1, None, 1)
    processor.chat_template = "any"
    processor.apply_chat_template = lambda messages, add_generation_prompt: messages[0]["content"]
    assert [part["type"] for part in with_images(processor, "where?", 1, None, 1)] == [
        "image",
        "video",
        "text",
    ]  # type: ignore[index]
