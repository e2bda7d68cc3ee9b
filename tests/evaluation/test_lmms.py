"""The plug-in for lmms-eval, through its own evaluator: ``make lmms``, which has an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval", reason="needs lmms-eval, which make lmms installs")

from lmms_eval import evaluator
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from support.command_line import cli

import gap_triton
from gap_triton import GapConfig
from gap_triton.demo.grounding import evaluate
from gap_triton.demo.run import load_embedded_model
from gap_triton.demo.scenes import held_out
from gap_triton.evaluation.boxes import FORMATS
from gap_triton.evaluation.synthetic import write_refcoco
from gap_triton.lmms import TASKS, answers, model
from gap_triton.lmms.answers import Asked

COUNT = 48
TASK = "gap_synthetic_val"
ARGUMENTS = "pretrained=embedded,device=cpu"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``--include_path``: the tasks here, on files of our own."""
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("tasks")
    write_refcoco(data, COUNT)
    (folder / f"{TASK}.yaml").write_text(
        f"include: {TASKS / '_gap_refcoco'}\ntask: {TASK}\ndataset_path: {data}\ntest_split: val\n"
    )
    return folder


def measure(tasks: Path, arguments: str, simple: bool = False) -> dict[str, float]:
    manager = TaskManager("ERROR", include_path=str(tasks), include_defaults=False, model_name="gap_triton")
    found = evaluator.simple_evaluate(
        model="gap_triton",
        model_args=f"{ARGUMENTS},{arguments}",
        tasks=[TASK],
        task_manager=manager,
        force_simple=simple,
        batch_size=1,
        device="cpu",
    )
    return {name.split(",")[0]: value for name, value in found["results"][TASK].items()}


@pytest.fixture(scope="module")
def by_ids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What ``eval --dataset`` finds."""
    output = tmp_path_factory.mktemp("output")
    options = ("--model", "embedded", "--layer", "1", "--budget", "0.5", "--limit", str(COUNT))
    result = cli("eval", "--dataset", "synthetic", *options, "--output", str(output))
    assert result.exit_code == 0, (result.output, result.exception)
    rows = json.loads((output / "results.json").read_text())["rows"]
    return {"unpruned" if row["budget"] is None else row["ids"]: row for row in rows}


# --------------------------------------------------------------------------------------------- the same from all three
@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
@pytest.mark.parametrize(
    ("ids", "arguments", "config"),
    [
        ("unpruned", "keep=1.0,layer=0", GapConfig(1.0, 0)),
        ("kept", "budget=0.5,layer=1", GapConfig(0.5, 1)),
        ("compacted", "keep=0.5,layer=1,ids=compacted", GapConfig(0.5, 1, ids="compacted")),
    ],
)
def test_accuracy_is_the_demos_and_that_of_eval(
    tasks: Path, by_ids: dict[str, dict], ids: str, arguments: str, config: GapConfig, simple: bool
) -> None:
    embedded, processor = load_embedded_model(torch.device("cpu"))
    gap_triton.configure(embedded, config)
    demo = evaluate(embedded, processor, held_out(COUNT))
    found = measure(tasks, arguments, simple)
    assert found["refcoco_ACC@0.5"] == by_ids[ids]["accuracy"] == int((demo >= 0.5).sum()) / COUNT
    assert found["refcoco_IoU"] == pytest.approx(float(demo.mean()), abs=1e-6)
    assert found["gap_no_box"] == by_ids[ids]["failures"] / COUNT
    assert 0.0 <= found["gap_no_box"] < 0.2


def test_a_method_is_a_preset_for_the_model(tasks: Path) -> None:
    lm = model.Pruned.create_from_arg_string(f"{ARGUMENTS},method=nuwa,budget=16,ids=compacted")
    attached = gap_triton.GapConfig.preset("nuwa", budget=16, model=lm.model)
    assert model.config_of({"method": "nuwa", "budget": 16, "ids": "compacted"}, lm.model) == GapConfig(
        **{**vars(attached), "ids": "compacted"}
    )
    assert not lm.is_simple
    assert model.SimplePruned.create_from_arg_string(ARGUMENTS).is_simple


def test_lmms_eval_finds_the_model() -> None:
    assert "gap_triton" in {each.name for each in entry_points(group="lmms_eval.models")}
    assert get_model("gap_triton") is model.Pruned
    assert get_model("gap_triton", force_simple=True) is model.SimplePruned


# --------------------------------------------------------------------------------------------- a refusal ends the run
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("layer=9", "GapConfig.layer=9: this model's decoder has 6 layers"),
        ("method=nuva", "preset 'nuva': expected one of"),
        ("method=nuwa,layer=1", "layer is part of method=nuwa"),
        ("score=best", "GapConfig.score='best'"),
        ("format=yolo", "format 'yolo': expected one of"),
        ("unheard_of=1", "unheard_of"),
    ],
)
def test_what_cannot_be_built_ends_the_run(arguments: str, sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence) as ended:
        model.Pruned.create_from_arg_string(f"{ARGUMENTS},{arguments}")
    assert ended.value.code not in (0, None)


def test_a_checkpoint_is_needed() -> None:
    with pytest.raises(SystemExit, match="pretrained is missing: expected pretrained=FOLDER_OR_HUB_ID"):
        model.Pruned.create_from_arg_string("method=nuwa")


@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
def test_an_error_of_generate_ends_the_run_instead_of_an_empty_answer(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, simple: bool
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise ValueError("this prompt can't be pruned")

    monkeypatch.setattr("transformers.models.clip.modeling_clip.CLIPVisionEmbeddings.forward", refuse)
    with pytest.raises(SystemExit, match="gap_triton: this prompt can't be pruned"):
        measure(tasks, "keep=0.5", simple)
    # What it would come to without that.
    monkeypatch.setattr(model, "end_the_run_on_errors", lambda loaded: None)
    assert measure(tasks, "keep=0.5", simple)["refcoco_ACC@0.5"] == 0.0


def test_the_process_of_a_refusal_fails(tasks: Path) -> None:
    options = ("--model", "gap_triton", "--model_args", f"{ARGUMENTS},layer=9", "--tasks", TASK)
    ended = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *options, "--include_path", str(tasks)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 1, ended.stdout[-2000:]
    assert "gap_triton: GapConfig.layer=9" in ended.stderr


# --------------------------------------------------------------------------------------------- coordinates
DOC = {
    "question_id": "1",
    "answer": "the man",
    "image": Image.new("RGB", (640, 426)),
    "image_width": 640,
    "image_height": 426,
    "bbox": [0.1, 0.2, 0.5, 0.75],
}


def iou_of(answer: str) -> float:
    return evaluator_iou(answers.process_results(DOC, [answer])["refcoco_IoU"])


def evaluator_iou(result: dict) -> float:
    from lmms_eval.tasks.refcoco.utils_rec import compute_iou

    return compute_iou(result["bbox"], result["pred"])


def test_boxes_on_the_padded_square_are_taken_back() -> None:
    answers.remember(Asked(FORMATS["llava"], SimpleNamespace(image_mean=(0.5, 0.4, 0.3))))
    (image,) = answers.doc_to_visual(DOC)
    assert image.size == (640, 640)
    assert image.getpixel((0, 0)) == (127, 102, 76)
    assert iou_of("[0.1, 0.3003125, 0.5, 0.66640625]") == pytest.approx(1.0)
    assert answers.doc_to_text(DOC).endswith("this sentence describes: the man")


def test_pixels_of_the_resized_image_are_taken_back() -> None:
    class Scales:
        patch_size = 14

        def __call__(self, images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
            assert images[0].size == (640, 426)
            return {"image_grid_thw": torch.tensor([[1, 30, 46]])}

    answers.remember(Asked(FORMATS["qwen2.5-vl"], Scales()))
    assert iou_of('[{"bbox_2d": [64.4, 84, 322, 315]}]') == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("answer", "no_box"), [("", 1.0), ("I can't see it", 1.0), ("[0.5, 0.7, 0.1, 0.2]", 0.0)]
)
def test_an_answer_without_a_box_is_wrong_and_counted(answer: str, no_box: float) -> None:
    answers.remember(Asked(FORMATS["shares"], None))
    found = answers.process_results(DOC, [answer])
    assert found["gap_no_box"] == no_box
    assert evaluator_iou(found["refcoco_IoU"]) == 0.0


def test_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_asked", [])
    with pytest.raises(ValueError, match="expected --model gap_triton, with format=NAME"):
        answers.doc_to_text(DOC)


def test_every_task_here_can_be_loaded() -> None:
    manager = TaskManager("ERROR", include_path=str(TASKS), include_defaults=False)
    assert len(manager.all_tasks) == len(list(TASKS.glob("*.yaml"))) == 9
