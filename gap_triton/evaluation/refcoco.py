"""RefCOCO, RefCOCO+ and RefCOCOg, in the two forms that they are passed on in: the hub's parquet, and refs and instances.

An expression is a question: an object that three people described counts three times, as everybody counts.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from .question import Question

HUB = {
    "refcoco": "lmms-lab-encoder/RefCOCO",
    "refcoco+": "lmms-lab-encoder/RefCOCOplus",
    "refcocog": "lmms-lab-encoder/RefCOCOg",
}
# Who made the splits, in the name of the file of references; umd before google, whose split of RefCOCOg has no test.
SPLIT_BY = {"refcoco": ("unc",), "refcoco+": ("unc",), "refcocog": ("umd", "google")}
SPLITS = {
    "refcoco": ("val", "test", "testA", "testB"),
    "refcoco+": ("val", "test", "testA", "testB"),
    "refcocog": ("val", "test"),
}
COCO_FOLDERS = ("train2014", "images/train2014", "images/mscoco/images/train2014", "coco/train2014")


def read_refcoco(name: str, split: str, data: Path) -> list[Question]:
    """Return the questions of a split; images are read when they are asked for.

    Args:
        name: ``"refcoco"``, ``"refcoco+"`` or ``"refcocog"``.
        split: One of `SPLITS`.
        data: A parquet file, or a folder: of the data set on the hub, or with ``refs(unc).p`` and ``instances.json``.

    Raises:
        ValueError: There is no such split, or ``data`` holds neither; the message says what to download.
        ImportError: Parquet is to be read, and pyarrow is not installed.
    """
    if split not in SPLITS[name]:
        raise ValueError(f"split {split!r} of {name}: expected one of {', '.join(SPLITS[name])}")
    if data.is_file():
        return read_parquet([data])
    files = sorted(
        each
        for folder in (data, data / "data")
        for each in folder.glob("*.parquet")
        if each.name.split("-")[0] == split or each.stem == split
    )
    if files:
        return read_parquet(files)
    for folder in (data, data / name):
        for split_by in SPLIT_BY[name]:
            for suffix in ("p", "json"):
                refs = folder / f"refs({split_by}).{suffix}"
                if refs.is_file():
                    return read_refs(refs, split, data)
    raise ValueError(what_to_download(name, split, data))


def what_to_download(name: str, split: str, data: Path) -> str:
    """One sentence: what is missing in ``data``, where it can be had and where it goes."""
    hub, split_by = HUB[name], SPLIT_BY[name][0]
    return (
        f"no {name} {split} in {str(data)!r}: expected {split}-*.parquet there or in its folder data, which "
        f"`hf download {hub} --repo-type dataset --local-dir {data}` downloads; or refs({split_by}).p and instances.json of "
        "github.com/lichengunc/refer, with COCO's images of 2014 (images.cocodataset.org/zips/train2014.zip, 13 GB) "
        f"unpacked to {data / COCO_FOLDERS[0]}"
    )


# ------------------------------------------------------------------------------------------------ parquet
COLUMNS, IMAGE = ("question_id", "answer", "bbox"), "image"


def read_parquet(files: list[Path]) -> list[Question]:
    """Return the questions of parquet files as lmms-lab-encoder/RefCOCO has them.

    Columns are ``question_id``, ``image`` (encoded), ``answer`` (expressions) and ``bbox`` (x, y, width and height in
    pixels). Only a group of rows is in memory at a time.

    Raises:
        ValueError: A file is no parquet, or lacks a column.
    """
    questions: list[Question] = []
    rows = 0
    for path in files:
        found, count = _questions_of(path, rows)
        questions += found
        rows += count
    return questions


def _questions_of(path: Path, before: int) -> tuple[list[Question], int]:
    """The questions of one file, and its rows; ``before``: rows of the files before it."""
    import pyarrow  # optional: in the extra "eval"
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} is no parquet file: {error}") from error
    missing = {*COLUMNS, IMAGE} - set(file.schema_arrow.names)
    if missing:
        raise ValueError(
            f"{str(path)!r} has no column {', '.join(sorted(missing))}: expected question_id, image, answer and bbox, as "
            f"{HUB['refcoco']} has them"
        )

    @functools.lru_cache(maxsize=1)  # questions are asked in the order of their rows
    def images_of(group: int) -> list[Any]:
        return file.read_row_group(group, columns=[IMAGE])[IMAGE].to_pylist()

    questions = []
    place = before
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=list(COLUMNS))
        for row, values in enumerate(table.to_pylist()):
            x, y, width, height = map(float, values["bbox"])
            expressions = values["answer"]
            load = functools.partial(_decoded, images_of, group, row)
            for number, text in enumerate([expressions] if isinstance(expressions, str) else expressions):
                # The place of the row comes first: nothing promises that an id of the file comes once.
                identity = f"{place}/{values['question_id']}/{number}"
                questions.append(Question(identity, text, load, box=(x, y, x + width, y + height)))
            place += 1
    return questions, place - before


def _decoded(images_of: Callable[[int], list[Any]], group: int, row: int) -> Image.Image:
    stored = images_of(group)[row]
    content = stored.get("bytes") if isinstance(stored, dict) else stored
    if not isinstance(content, bytes):
        raise ValueError(f"row {row} of group {group} has no image within the file: expected its bytes")
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


# ------------------------------------------------------------------------------------------------ refs and instances
class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, numbers and strings; a pickle that asks for anything else could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}, and references are plain data")


def read_refs(path: Path, split: str, data: Path) -> list[Question]:
    """Return the questions of a split from references and instances, the form of the original release.

    ``instances.json`` is beside ``path``; images are in one of `COCO_FOLDERS` below ``data``. Boxes are those of the
    annotations: x, y, width and height in pixels.

    Raises:
        ValueError: A file can't be read, no reference is of ``split``, or the images are missing.
    """
    try:
        if path.suffix == ".json":
            refs = json.loads(path.read_text(encoding="utf-8"))
        else:
            with path.open("rb") as file:
                refs = _PlainUnpickler(file, encoding="utf-8").load()
        instances = json.loads((path.parent / "instances.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{str(path)!r} and instances.json beside it can't be read: {error}") from error
    boxes = {each["id"]: each["bbox"] for each in instances["annotations"]}
    names = {each["id"]: each["file_name"] for each in instances["images"]}
    # "testA" and "testB" are splits of their own; "test" is both.
    of_split = [
        ref
        for ref in refs
        if ref["split"] == split or (split == "test" and ref["split"] in ("testA", "testB"))
    ]
    if not of_split:
        found = ", ".join(sorted({ref["split"] for ref in refs}))
        raise ValueError(f"split {split!r}: {str(path)!r} has {found}")
    folder = _folder_of_images(data, names[of_split[0]["image_id"]])
    questions = []
    for ref in of_split:
        x, y, width, height = boxes[ref["ann_id"]]
        load = functools.partial(open_rgb, folder / names[ref["image_id"]])
        for number, sentence in enumerate(ref["sentences"]):
            box = (x, y, x + width, y + height)
            questions.append(Question(f"{ref['ref_id']}/{number}", sentence["sent"], load, box=box))
    return questions


def _folder_of_images(data: Path, first: str) -> Path:
    for name in COCO_FOLDERS:
        for parent in (data, data.parent):
            if (parent / name / first).is_file():
                return parent / name
    raise ValueError(
        f"no image {first} in {str(data / COCO_FOLDERS[0])!r}: expected COCO's images of 2014 there, from "
        "images.cocodataset.org/zips/train2014.zip (13 GB)"
    )


def open_rgb(path: Path, *, upright: bool = False) -> Image.Image:
    """Read an image file, as RGB; ``upright``: turned as its EXIF data says, which boxes in pixels do not count with.

    Raises:
        ValueError: It can't be read.
    """
    try:
        with Image.open(path) as image:
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except Exception as error:  # whatever the reader of that format makes of broken bytes
        raise ValueError(f"image {str(path)!r} can't be read: {error}") from error
