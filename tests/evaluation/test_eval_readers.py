"""Questions as they lie on disk: the hub's RefCOCO, the original release, questions in words; and what is missing."""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from support.command_line import cli

from gap_triton.demo.scenes import held_out
from gap_triton.evaluation.refcoco import HUB, SPLITS, read_refcoco
from gap_triton.evaluation.synthetic import write_refcoco
from gap_triton.evaluation.vqa import is_right, read_vqa


def encoded(colour: tuple[int, int, int], size: tuple[int, int] = (20, 10)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format="PNG")
    return file.getvalue()


# --------------------------------------------------------------------------------------------- parquet
@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two files of a split in the hub's form, groups of two rows; an id comes twice."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [
        {
            "question_id": str(i // 2),
            "image": {"bytes": encoded((i, 0, 0)), "path": None},
            "answer": [f"thing {i}", f"the other name of {i}"][: 1 + i % 2],
            "bbox": [1.0 * i, 2.0, 3.0, 4.5],
        }
        for i in range(5)
    ]
    for number, part in enumerate((rows[:3], rows[3:])):
        table = pa.Table.from_pylist(part)
        parquet.write_table(table, data / f"val-0000{number}-of-00002.parquet", row_group_size=2)
    parquet.write_table(pa.Table.from_pylist(rows[:1]), data / "testA-00000-of-00001.parquet")
    return tmp_path


def test_every_expression_of_the_hubs_files_is_a_question(shards: Path) -> None:
    questions = read_refcoco("refcoco", "val", shards)
    texts = [name for i in range(5) for name in [f"thing {i}", f"the other name of {i}"][: 1 + i % 2]]
    assert [question.text for question in questions] == texts
    assert len({question.id for question in questions}) == len(questions)
    for question in questions:
        i = int(question.text.split()[-1])
        assert question.box == (i, 2.0, i + 3.0, 6.5)
        assert question.load().getpixel((0, 0)) == (i, 0, 0)
    assert [question.text for question in read_refcoco("refcoco", "testA", shards)] == ["thing 0"]
    assert len(read_refcoco("refcoco", "val", shards / "data" / "val-00000-of-00002.parquet")) == 4


def test_the_synthetic_set_is_the_scenes(tmp_path: Path) -> None:
    scenes = held_out(5)
    write_refcoco(tmp_path, 5, "val")
    questions = read_refcoco("refcoco", "val", tmp_path)
    for i, question in enumerate(questions):
        assert question.text == f"the {scenes.name(i)}"
        assert question.box == tuple(map(float, scenes.target_boxes[i]))
        assert question.load().tobytes() == scenes.image(i).tobytes()
    columns = parquet.ParquetFile(next(tmp_path.rglob("*.parquet"))).schema_arrow
    assert {
        "question_id",
        "image",
        "question",
        "answer",
        "segmentation",
        "bbox",
        "iscrowd",
        "file_name",
    } == set(columns.names)


@pytest.mark.parametrize("name", HUB)
def test_missing_files_are_said_with_what_to_download(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"no {name.replace('+', '.')} val in ") as error:
        read_refcoco(name, "val", tmp_path)
    said = str(error.value)
    assert f"hf download {HUB[name]} --repo-type dataset --local-dir {tmp_path}" in said
    assert "instances.json" in said
    assert "train2014.zip" in said


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split 'testA' of refcocog: expected one of val, test"):
        read_refcoco("refcocog", "testA", tmp_path)
    assert {"val", "testA", "testB"} <= set(SPLITS["refcoco+"])


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "val.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="is no parquet file"):
        read_refcoco("refcoco", "val", tmp_path)
    parquet.write_table(pa.table({"question_id": ["1"], "answer": [["a"]]}), path)
    with pytest.raises(
        ValueError, match="has no column bbox, image: expected question_id, image, answer and bbox"
    ):
        read_refcoco("refcoco", "val", path)


def test_an_image_that_is_only_a_path_is_refused(tmp_path: Path) -> None:
    row = {
        "question_id": "1",
        "image": {"bytes": None, "path": "1.jpg"},
        "answer": ["a"],
        "bbox": [0, 0, 1, 1],
    }
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "val.parquet")
    (question,) = read_refcoco("refcoco", "val", tmp_path)
    with pytest.raises(ValueError, match="row 0 of group 0 has no image within the file"):
        question.load()


def test_without_pyarrow_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_refcoco(tmp_path, 1)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    options = ("--dataset", "refcoco", "--data", str(tmp_path), "--model", "x", "--output", str(tmp_path))
    result = cli("eval", *options)
    assert result.exit_code == 2
    assert "eval needs pyarrow for this, and it is not installed: pip install pyarrow" in result.output


# --------------------------------------------------------------------------------------------- refs and instances
REFS = [
    {
        "ref_id": 7,
        "ann_id": 70,
        "image_id": 1,
        "split": "val",
        "file_name": "COCO_train2014_000000000001_70.jpg",
        "sentences": [{"sent": "left man", "raw": "Left man"}, {"sent": "man in red", "raw": "man in red"}],
    },
    {"ref_id": 8, "ann_id": 80, "image_id": 2, "split": "testA", "sentences": [{"sent": "dog"}]},
    {"ref_id": 9, "ann_id": 80, "image_id": 2, "split": "testB", "sentences": [{"sent": "cat"}]},
]
INSTANCES = {
    "annotations": [{"id": 70, "bbox": [1.5, 2.0, 10.0, 4.0]}, {"id": 80, "bbox": [0, 0, 5, 5]}],
    "images": [
        {"id": 1, "file_name": "COCO_train2014_000000000001.jpg"},
        {"id": 2, "file_name": "COCO_train2014_000000000002.jpg"},
    ],
}


@pytest.fixture(params=["p", "json"])
def release(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The layout of github.com/lichengunc/refer, without its images."""
    folder = tmp_path / "refcoco"
    folder.mkdir()
    if request.param == "p":
        (folder / "refs(unc).p").write_bytes(pickle.dumps(REFS, protocol=2))
    else:
        (folder / "refs(unc).json").write_text(json.dumps(REFS))
    (folder / "instances.json").write_text(json.dumps(INSTANCES))
    return tmp_path


def add_images(data: Path, where: str) -> None:
    (data / where).mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (30, 20), (number, 0, 0)).save(
            data / where / f"COCO_train2014_00000000000{number}.jpg", quality=100
        )


@pytest.mark.parametrize("where", ["train2014", "images/mscoco/images/train2014"])
def test_the_original_release_is_read(release: Path, where: str) -> None:
    add_images(release, where)
    first, second = read_refcoco("refcoco", "val", release)
    assert (first.text, second.text) == ("left man", "man in red")
    assert first.box == second.box == (1.5, 2.0, 11.5, 6.0)
    assert (first.id, second.id) == ("7/0", "7/1")
    assert first.load().size == (30, 20)
    assert [each.text for each in read_refcoco("refcoco", "testA", release)] == ["dog"]
    assert [each.text for each in read_refcoco("refcoco", "test", release)] == ["dog", "cat"]


def test_missing_images_are_said(release: Path) -> None:
    with pytest.raises(ValueError, match=r"no image COCO_train2014_000000000001.jpg in .*train2014.zip"):
        read_refcoco("refcoco", "val", release)


class Runs:
    def __reduce__(self):
        return (print, ("code of a pickle ran",))


def test_a_pickle_that_would_run_code_is_refused(release: Path, capsys: pytest.CaptureFixture) -> None:
    for old in (release / "refcoco").glob("refs*"):
        old.unlink()
    (release / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([Runs()], protocol=2))
    with pytest.raises(ValueError, match=r"it holds __builtin__\.print, and references are plain data"):
        read_refcoco("refcoco", "val", release)
    assert "ran" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- questions in words
def test_questions_in_words(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(encoded((1, 2, 3)))
    lines = [
        {"image": "1.png", "question": "What colour?", "answer": "Black."},
        {"image": "1.png", "question": "How many?", "answer": ["2", "two"], "id": "b"},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = read_vqa(tmp_path)
    assert (first.id, first.text, first.answers, first.box) == ("1", "What colour?", ("Black.",), None)
    assert (second.id, second.answers) == ("b", ("2", "two"))
    assert first.load().getpixel((0, 0)) == (1, 2, 3)
    assert read_vqa(tmp_path / "questions.jsonl")[0].text == first.text


@pytest.mark.parametrize(
    ("line", "sentence"),
    [("{", "line 1: expected a line as in"), ('{"image": "1.png"}', "KeyError"), ("[]", "line 1")],
)
def test_a_line_that_is_no_question_is_refused(tmp_path: Path, line: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"no questions in .* expected questions\.jsonl there"):
        read_vqa(tmp_path)
    (tmp_path / "questions.jsonl").write_text(line)
    with pytest.raises(ValueError, match=sentence):
        read_vqa(tmp_path)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("A cup.", True),
        ("the CUP", True),
        ("cups", False),
        ("", False),
        ("a cup of tea", False),
        ("mug", True),
    ],
)
def test_words_are_compared_without_case_articles_and_punctuation(answer: str, right: bool) -> None:
    assert is_right(answer, ("cup", "a mug")) is right


def test_numbers_keep_their_points() -> None:
    assert is_right("3.5", ("3.5",))
    assert not is_right("35", ("3.5",))
    assert is_right("10:30.", ("10:30",))
