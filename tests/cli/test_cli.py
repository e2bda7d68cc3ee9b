"""The command line: what it says at once, what it asks of a model, and how it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image
from rich.console import Console
from support import families
from support.command_line import cli, refuses, said

import gap_triton
import gap_triton.demo.evaluation
from gap_triton import GapConfig, config
from gap_triton.demo import table
from gap_triton.demo.architectures import ARCHITECTURES, LLAVA, QWEN2_5_VL
from gap_triton.demo.grounding import answer_boxes, boxes_from_tokens
from gap_triton.demo.run import load_embedded_model, run_demo
from gap_triton.demo.scenes import SPLITS, Split, held_out
from gap_triton_cli import ask as single
from gap_triton_cli import choices
from gap_triton_cli.loading import EMBEDDED
from gap_triton_cli.prompts import with_images
from gap_triton_cli.refuse import missing

OPTIONS_OF_RUN = ("--model", "embedded", "--prompt", "where is the red triangle?")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"COLUMNS": "500"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    held_out(1).image(0).save(path)
    return path


# --------------------------------------------------------------------------------------------- at once
SAYS_AT_ONCE = """
import sys
from gap_triton_cli import app
try:
    app({arguments}, prog_name="gap-triton")
except SystemExit as end:
    assert end.code == {code}, end.code
slow = {{"torch", "transformers", "numpy", "matplotlib"}} & set(sys.modules)
assert not slow, slow
"""


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "Usage: gap-triton"),
        (["--version"], 0, "gap-triton "),
        (["run", "--help"], 0, "permut"),
        (["eval", "-h"], 0, "--coverage"),
        (["demo", "--help"], 0, "results.json"),
        (["run", "--model", "x", "--image", "missing.png", "--prompt", "x"], 2, "missing.png"),
        (["run", "--model", "x", "--image", __file__, "--prompt", "x"], 2, "can't be read"),
        (["run", "--model", "x", "--image", __file__, "--prompt", "x", "--score", "best"], 2, "'best'"),
    ],
)
def test_what_needs_no_model_needs_no_torch(arguments: list[str], code: int, text: str) -> None:
    ended = python(SAYS_AT_ONCE.format(arguments=arguments, code=code))
    assert ended.returncode == 0, ended.stderr
    assert text in ended.stdout + ended.stderr


def test_version() -> None:
    assert cli("--version").output.strip() == f"gap-triton {gap_triton.__version__}"


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "gap_triton", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"gap-triton {gap_triton.__version__}\n"


def test_choices_and_defaults_are_those_of_the_library() -> None:
    assert get_args(choices.Score) == get_args(config.Score)
    assert get_args(choices.Ids) == get_args(config.Ids)
    assert (GapConfig.keep, GapConfig.layer, GapConfig.score) == (choices.KEEP, choices.LAYER, choices.SCORE)
    assert get_args(choices.Split) == get_args(Split) == tuple(SPLITS)
    assert tuple(ARCHITECTURES) == choices.ARCHITECTURES
    help_of_run = said(cli("run", "--help"))
    assert all(f"'{name}'" in help_of_run for name in EMBEDDED)


# --------------------------------------------------------------------------------------------- run
@pytest.mark.parametrize(("model", "architecture"), EMBEDDED.items())
def test_run_answers_as_the_demo_does(tmp_path, model: str, architecture) -> None:
    scenes = held_out(4)
    pruned, processor = load_embedded_model(name=architecture.name)
    gap_triton.configure(pruned, GapConfig(keep=0.5, layer=1))
    expected = answer_boxes(pruned, processor, scenes)
    for i in range(len(scenes)):
        path = tmp_path / f"{i}.png"
        scenes.image(i).save(path)
        arguments = ("--image", str(path), "--prompt", scenes.question(i), "--layer", "1")
        result = cli("run", "--model", model, *arguments)
        assert result.exit_code == 0, (result.output, result.exception)
        answer = result.stdout.splitlines()[0]
        assert boxes_from_tokens([answer])[0].tolist() == pytest.approx(expected[i].tolist(), nan_ok=True)
        assert "kept 32 of 64 visual tokens after layer 1, ids kept" in result.output


def test_an_image_of_any_size_is_stretched_for_both_embedded_models(tmp_path) -> None:
    path = tmp_path / "wide.png"
    held_out(1).image(0).resize((331, 257)).save(path)
    for model in EMBEDDED:
        result = cli("run", "--model", model, "--image", str(path), "--prompt", held_out(1).question(0))
        assert result.exit_code == 0, (result.output, result.exception)
        assert "<loc" in result.output


def test_two_images_are_two(scene: Path, tmp_path) -> None:
    other = tmp_path / "other.png"
    held_out(2).image(1).save(other)
    result = cli("run", *OPTIONS_OF_RUN, "--image", str(scene), "--image", str(other))
    assert result.exit_code == 0, (result.output, result.exception)
    assert "kept 64 of 128 visual tokens" in result.output


def test_images_keep_their_order(monkeypatch, scene: Path, tmp_path) -> None:
    dark = tmp_path / "dark.png"
    Image.new("RGB", (8, 8)).save(dark)
    sizes = []
    monkeypatch.setattr(
        single,
        "ask",
        lambda source, questions, *others: sizes.extend(each.size for each in questions[0].open_images()),
    )
    assert cli("run", *OPTIONS_OF_RUN, "--image", str(dark), "--image", str(scene)).exit_code == 0
    assert sizes == [(8, 8), (64, 64)]


def test_an_image_is_turned_as_its_camera_was(monkeypatch, tmp_path) -> None:
    path = tmp_path / "turned.jpg"
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    image.save(path, exif=exif)
    seen = []
    monkeypatch.setattr(
        single, "ask", lambda source, questions, *others: seen.extend(questions[0].open_images())
    )
    assert cli("run", *OPTIONS_OF_RUN, "--image", str(path)).exit_code == 0
    assert [each.size for each in seen] == [(4, 8)]


class Processor:
    image_token = "<image>"
    chat_template = None

    def apply_chat_template(self, messages: list, add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        return json.dumps([part["type"] for part in messages[0]["content"]])


def test_image_tokens_are_put_in_front_where_they_are_missing() -> None:
    processor = Processor()
    assert with_images(processor, "where?", 2) == "<image><image> where?"
    assert with_images(processor, "where?", 2, "<a><image><b>") == "<a><image><b><a><image><b> where?"
    assert with_images(processor, "<image>, then <image>", 2) == "<image>, then <image>"
    with pytest.raises(ValueError, match=r"prompt has <image> 1 times, and 2 images are given"):
        with_images(processor, "<image> where?", 2)
    processor.chat_template = "any"  # type: ignore[assignment]
    assert with_images(processor, "where?", 2) == '["image", "image", "text"]'
    assert with_images(processor, "<image> where?", 1) == "<image> where?"


# --------------------------------------------------------------------------------------------- refusals
def a_folder(folder: Path) -> Path:
    return folder


def a_missing_file(folder: Path) -> Path:
    return folder / "missing.png"


def no_image(folder: Path) -> Path:
    return Path(__file__)


def an_empty_file(folder: Path) -> Path:
    (folder / "empty.png").touch()
    return folder / "empty.png"


def half_an_image(folder: Path) -> Path:
    path = folder / "half.png"
    held_out(1).image(0).resize((400, 400)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def broken_bytes(folder: Path) -> Path:
    path = folder / "broken.png"
    held_out(1).image(0).save(path)
    found = bytearray(path.read_bytes())
    found[40:60] = bytes(20)
    path.write_bytes(found)
    return path


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (a_missing_file, "missing.png' does not exist"),
        (a_folder, "is a directory"),
        (no_image, "cannot identify image file"),
        (an_empty_file, "cannot identify image file"),
        (half_an_image, "half.png' can't be read: "),
        (broken_bytes, "broken.png' can't be read: "),
    ],
)
def test_what_is_no_image_is_refused_before_a_model_is_loaded(
    tmp_path, monkeypatch, image: Callable[[Path], Path], sentence: str
) -> None:
    monkeypatch.setattr(single, "ask", lambda *arguments: pytest.fail("a model was loaded"))
    refuses(sentence, "run", *OPTIONS_OF_RUN, "--image", str(image(tmp_path)))


def test_a_decompression_bomb_is_refused(monkeypatch, scene: Path) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)  # pillow refuses twice that
    refuses("could be decompression bomb", "run", *OPTIONS_OF_RUN, "--image", str(scene))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompt", ""], "--prompt '': expected a question or a request, in words"),
        (["--prompt", " \n"], r"--prompt ' \n': expected a question"),
        (["--prompt", "<image><image> where?"], "prompt has <image> 2 times, and 1 images are given"),
        (["--keep", "half"], "--keep 'half': expected a share such as 0.25 or a count such as 64"),
        (["--keep", "0"], "GapConfig.keep=0: an int counts"),
        (["--keep", "1.5"], "GapConfig.keep=1.5: expected a float in (0, 1]"),
        (["--keep", "nan"], "GapConfig.keep=nan"),
        (["--layer", "-2"], "GapConfig.layer=-2: expected a decoder layer"),
        (["--model", "embedded-mrope", "--image", "scene.png"], "expected one in each prompt"),
        (["--layer", "5"], "this model's decoder has 6 layers; expected -1 to 4"),
        (["--layer", "one"], "Invalid value for '--layer'"),
        (["--score", "best"], "'best' is not one of 'last_token'"),
        (["--ids", "shifted"], "'shifted' is not one of 'kept'"),
        (["--method", "nuva"], "preset 'nuva': expected one of 'prumerge'"),
        (["--method", "feather", "--keep", "16"], "budget=16: expected a share"),
        (["--method", "nuwa", "--layer", "1"], "--layer is part of a method: leave it out, or --method"),
        (["--method", "nuwa", "--score", "cls"], "--score is part of a method"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--overlay", "nowhere/kept.png"], "--overlay 'nowhere/kept.png': expected a .png file in a folder"),
        (["--overlay", "kept.jpg"], "--overlay 'kept.jpg': expected a .png file"),
        (
            ["--model", "embedded-mrope", "--overlay", "kept.png"],
            "Invalid value: overlay: kept tokens can be drawn for",
        ),
        (["--model", "nobody/has-this-model"], "model 'nobody/has-this-model' can't be loaded: "),
        (["--model", "no/such/folder"], "model 'no/such/folder' can't be loaded: "),
        (["--model", ""], "model '' can't be loaded: "),
    ],
)
def test_run_refuses(monkeypatch, scene: Path, options: list[str], sentence: str) -> None:
    monkeypatch.chdir(scene.parent)
    refuses(sentence, "run", *OPTIONS_OF_RUN, "--image", str(scene), *options)


def test_an_overlay_of_two_images_is_refused(monkeypatch, scene: Path) -> None:
    monkeypatch.chdir(scene.parent)
    images = ("--image", str(scene), "--image", str(scene))
    refuses(
        "--overlay draws one image, and 2 are given",
        *("run", *OPTIONS_OF_RUN, *images, "--overlay", "kept.png"),
    )


LLAMA = json.loads((LLAVA.folder / "config.json").read_text())["text_config"]


def of_another_type(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: of_another_type(folder, model_type="llama"), "LlamaConfig"),
        (lambda folder: of_another_type(folder, model_type="unheard_of"), "model type `unheard_of`"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").unlink(), "model_type"),
        (lambda folder: (folder / "processor_config.json").write_text("{"), "processor_config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "line 1 column 2"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(bytes(99)), "invalid JSON in header"),
        (lambda folder: families.config_of("mllama").save_pretrained(folder), "cross-attention"),
        (
            lambda folder: of_another_type(folder, text_config={**LLAMA, "hidden_size": 64}),
            "mismatch",
        ),
    ],
)
def test_a_folder_that_holds_no_model_that_runs_is_refused(
    tmp_path, scene: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(LLAVA.folder, folder)
    spoil(folder)
    result = cli("run", *OPTIONS_OF_RUN, "--image", str(scene), "--model", str(folder))
    assert result.exit_code == 2, (result.output, result.exception)
    assert f"model '{folder}' can't be loaded: " in said(result)
    assert sentence in said(result)


@pytest.mark.parametrize("command", ["demo", "eval"])
def test_output_that_can_be_no_folder_is_refused(
    command: str, monkeypatch, scene: Path, one_round_is_too_much
) -> None:
    refuses("--output", command, "--output", str(scene))
    refuses("--output", command, "--output", str(scene / "within"))


@pytest.fixture
def one_round_is_too_much(monkeypatch) -> None:
    monkeypatch.setattr(gap_triton.demo.run, "run_demo", lambda *arguments: pytest.fail("it ran"))
    monkeypatch.setattr(gap_triton.demo.evaluation.Evaluation, "run", lambda self: pytest.fail("it ran"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--layers", ""], "--layers '': expected comma-separated ints"),
        (["--scores", ""], "GapConfig.score=''"),
        (["--ids", ""], "GapConfig.ids=''"),
        (["--budgets", ""], "--budgets '': expected a share"),
        (["--model", ""], "--model '': expected all"),
    ],
)
def test_an_empty_list_is_not_the_default(one_round_is_too_much, options: list[str], sentence: str) -> None:
    refuses(sentence, "eval", *options)


# --------------------------------------------------------------------------------------------- missing packages
def without(monkeypatch, *names: str) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] in names:
            monkeypatch.delitem(sys.modules, name)
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_a_demo_without_matplotlib_has_no_pictures(monkeypatch, tmp_path) -> None:
    without(monkeypatch, "matplotlib")
    monkeypatch.setattr(table, "PREFILL_ROUNDS", 1)
    console = Console(record=True, width=80)
    run_demo(tmp_path, samples=4, console=console)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    sentence = "left out overlay.png and accuracy.png: matplotlib is not installed: pip install matplotlib"
    assert sentence in console.export_text()


def test_an_evaluation_without_matplotlib_has_no_pictures(monkeypatch, tmp_path) -> None:
    without(monkeypatch, "matplotlib")
    monkeypatch.setattr(table, "PREFILL_ROUNDS", 1)
    options = ("--methods", "cls", "--coverage", "--budgets", "0.5", "--samples", "2")
    result = cli("eval", *options, "--output", str(tmp_path))
    assert result.exit_code == 0, (result.output, result.exception)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".jsonl", ".md"}
    for name in ("methods.png", "coverage.png"):
        assert f"left out {name}: matplotlib is not installed: pip install matplotlib" in result.output


def test_an_overlay_without_matplotlib_is_refused_before_a_model_is_loaded(monkeypatch, scene: Path) -> None:
    without(monkeypatch, "matplotlib")
    monkeypatch.setattr(single, "ask", lambda *arguments: pytest.fail("a model was loaded"))
    refuses(
        "run needs matplotlib for this, and it is not installed: pip install matplotlib",
        *("run", *OPTIONS_OF_RUN, "--image", str(scene), "--overlay", str(scene.with_name("kept.png"))),
    )


def test_a_processor_that_wants_torchvision_says_so(monkeypatch, scene: Path) -> None:
    # The files of the second embedded model, with transformers' own processor.
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("torchvision is installed")
    refuses(
        "run needs torchvision for this, and it is not installed: pip install torchvision, the build that goes with torch",
        *("run", *OPTIONS_OF_RUN, "--image", str(scene), "--model", str(QWEN2_5_VL.folder)),
    )


MISSING = """
import sys
sys.modules[{name!r}] = None
from gap_triton_cli import app
app({arguments}, prog_name="gap-triton")
"""


@pytest.mark.parametrize(
    ("name", "command"),
    [("torch", "demo"), ("torch", "info"), ("transformers", "eval"), ("triton", "run"), ("PIL", "run")],
)
def test_every_command_says_what_is_missing(name: str, command: str, scene: Path) -> None:
    arguments = [command]
    if command == "run":
        arguments += [*OPTIONS_OF_RUN, "--image", str(scene)]
    ended = python(MISSING.format(name=name, arguments=arguments))
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    pip_name = {"PIL": "pillow"}.get(name, name)
    assert f"needs {pip_name}" in line
    assert f"pip install {pip_name}" in line.replace("'", "")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            ModuleNotFoundError("No module named 'PIL.Image'", name="PIL.Image"),
            "gap-triton run needs pillow for this, and it is not installed: pip install pillow",
        ),
        (
            ImportError(
                "\nA requires the SentencePiece library but it was not found in your environment. See\n..."
            ),
            "gap-triton run needs sentencepiece for this, and it is not installed: pip install sentencepiece",
        ),
        (
            ImportError("Using a `device_map` requires Accelerate: `pip install 'accelerate>=1.1'`\nMore."),
            "gap-triton run: Using a `device_map` requires Accelerate: `pip install 'accelerate>=1.1'`",
        ),
    ],
)
def test_an_import_error_in_one_sentence(error: ImportError, sentence: str) -> None:
    assert missing("gap-triton run", error) == sentence


@pytest.mark.parametrize(
    ("cause", "sentence"),
    [
        (
            ModuleNotFoundError("No module named 'einops'", name="einops"),
            "gap-triton run needs einops for this, and it is not installed: pip install einops",
        ),
        (  # torchvision for CUDA beside a torch for the CPU
            RuntimeError("operator torchvision::nms does not exist"),
            "gap-triton run: Could not import module 'PreTrainedModel'. (operator torchvision::nms does not exist)",
        ),
    ],
)
def test_an_import_error_with_a_cause(cause: Exception, sentence: str) -> None:
    # As transformers raises it, with a sentence that does not say what is missing.
    error = ModuleNotFoundError("Could not import module 'PreTrainedModel'.")
    error.__cause__ = cause
    assert missing("gap-triton run", error) == sentence


def test_a_mistake_of_our_own_keeps_its_traceback(monkeypatch, scene: Path) -> None:
    monkeypatch.setitem(sys.modules, "gap_triton_cli.ask", None)
    result = cli("run", *OPTIONS_OF_RUN, "--image", str(scene))
    assert isinstance(result.exception, ModuleNotFoundError)
