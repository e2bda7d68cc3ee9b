"""How models are asked for a box, and how they write it down: a question, a pattern and what its numbers refer to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from ..demo.vocabulary import LOCATIONS

Box = tuple[float, float, float, float]
Frame = Literal["image", "padded", "resized"]

_NUMBER = r"(-?\d*\.?\d+)"
_BRACKETS = r"\[\s*" + r"\s*,\s*".join([_NUMBER] * 4) + r"\s*\]"
_PAIRS = r"\(\s*" + r"\s*\)\s*,\s*\(\s*".join([rf"{_NUMBER}\s*,\s*{_NUMBER}"] * 2) + r"\s*\)"
_HUNDREDTHS = r"\{\s*" + r"\s*".join([r"<\s*(\d{1,3})\s*>"] * 4) + r"\s*\}"
_THOUSANDTHS = r"\s*".join([r"<loc(\d{4})>"] * 4)
_LOCATIONS = r"\s*".join([r"<loc(\d\d)>"] * 4)

XYXY, YXYX = (0, 1, 2, 3), (1, 0, 3, 2)


@dataclass(frozen=True)
class View:
    """The image that an answer speaks of.

    Attributes:
        width: Of the image as the data have it, in pixels.
        height: The same.
        resized: Width and height in pixels to which the image processor scaled it; None where that is not known.
    """

    width: int
    height: int
    resized: tuple[int, int] | None = None

    @property
    def padding(self) -> tuple[int, int]:
        """Pixels on the left and at the top that make the image a square, as LLaVA's ``expand2square`` puts them."""
        side = max(self.width, self.height)
        return (side - self.width) // 2, (side - self.height) // 2


@dataclass(frozen=True)
class BoxFormat:
    """One way to ask for a box and to read the answer.

    Attributes:
        name: What ``--format`` calls it.
        question: What to ask; ``{}`` is the expression that names the thing, and ``<image>``, where it stands, the image.
        pattern: Four numbers; the first match in an answer counts.
        scale: The number that stands for the far edge of the frame; None = numbers are pixels of it.
        frame: What the numbers refer to: ``"image"``, the image itself; ``"padded"``, the image padded to a square;
            ``"resized"``, the image as the processor scaled it.
        source: Where question and numbers are described.
        order: Places of x0, y0, x1, y1 among the four numbers.
        pads: Whether the model sees the image padded to a square.
    """

    name: str
    question: str
    pattern: str
    scale: float | None
    frame: Frame
    source: str
    order: tuple[int, int, int, int] = XYXY
    pads: bool = False

    def read(self, answer: str, view: View) -> Box | None:
        """Return the first box in ``answer`` as x0, y0, x1, y1 in pixels of the image; None where there is none.

        Nothing is put right: corners in the wrong order make a box without area, which meets no other.

        Raises:
            ValueError: The numbers are pixels of the resized image, and ``view`` does not say its size.
        """
        match = re.search(self.pattern, answer)
        if match is None:
            return None
        numbers = [float(match[place + 1]) for place in self.order]
        sides, before = (view.width, view.height), (0, 0)
        if self.frame == "padded":
            sides, before = (max(sides), max(sides)), view.padding
        if self.scale is not None:
            scales = (self.scale, self.scale)
        elif view.resized is not None:
            scales = view.resized
        else:
            raise ValueError(
                f"format {self.name!r} writes pixels of the resized image, and its size is not known: expected a View "
                "with resized=(width, height)"
            )
        x0, y0, x1, y1 = (
            number * sides[axis % 2] / scales[axis % 2] - before[axis % 2]
            for axis, number in enumerate(numbers)
        )
        return x0, y0, x1, y1

    def prepare(self, image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
        """Return what to hand to the processor: the image itself, or padded to a square with ``background``.

        Padding is done here, for the processors of LLaVA-1.5 checkpoints on the hub do none (``do_pad`` is off, and the
        CLIP one that they name has no such option).
        """
        if not self.pads or image.width == image.height:
            return image
        side = max(image.size)
        square = Image.new("RGB", (side, side), background)
        square.paste(image, View(*image.size).padding)
        return square


_LLAVA_QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {}"

_ALL = (
    BoxFormat(
        "llava",
        _LLAVA_QUESTION,
        _BRACKETS,
        1,
        "padded",
        "LLaVA-1.5, arXiv 2310.03744, appendix A, and llava_v1_5_mix665k.json; github.com/haotian-liu/LLaVA/issues/606",
        pads=True,
    ),
    # Trained on the boxes of LLaVA-1.5, which refer to the padded square, while its processor pads no overview
    # (github.com/haotian-liu/LLaVA/issues/1158 asks whether they were changed, and has no answer).
    BoxFormat(
        "llava-next",
        _LLAVA_QUESTION,
        _BRACKETS,
        1,
        "padded",
        "LLaVA-NeXT, llava-vl.github.io/blog/2024-01-30-llava-next: the data of LLaVA-1.5 and more",
    ),
    BoxFormat(
        "shares",
        "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
        "All values are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of the "
        "region this sentence describes: {}",
        _BRACKETS,
        1,
        "image",
        "lmms-eval, tasks/refcoco, refcoco_bbox_rec",
    ),
    BoxFormat(
        "qwen2-vl",
        "Locate <|object_ref_start|>{}<|object_ref_end|> in this image and output the bbox coordinates.",
        _PAIRS,
        1000,
        "image",
        "Qwen2-VL, arXiv 2409.12191, section 2.2 (numbers and reference tokens; it prints no question)",
    ),
    BoxFormat(
        "qwen2.5-vl",
        "Locate {} in this image and output the bbox coordinates in JSON format.",
        _BRACKETS,
        None,
        "resized",
        "Qwen2.5-VL, arXiv 2502.13923, section 2.1.2; question: the authors, github.com/QwenLM/Qwen3-VL/issues/991",
    ),
    BoxFormat(
        "qwen3-vl",
        'Locate every object that matches the description "{}" in the image. Report bbox coordinates in JSON format.',
        _BRACKETS,
        1000,
        "image",
        "Qwen3-VL, arXiv 2511.21631; question: the authors, github.com/QwenLM/Qwen3-VL/issues/1721",
    ),
    BoxFormat(
        "shikra",
        "In the given <image>, could you find and tell me the coordinates of {}?",
        _BRACKETS,
        1,
        "padded",
        "Shikra, arXiv 2306.15195, its templates for referring expressions; three decimals on the padded square",
        pads=True,
    ),
    BoxFormat(
        "minigpt-v2",
        "[refer] give me the location of {}",
        _HUNDREDTHS,
        100,
        "image",
        "MiniGPT-v2, arXiv 2310.09478, section 3.1; github.com/Vision-CAIR/MiniGPT-4, eval_scripts/eval_ref.py",
    ),
    BoxFormat(
        "internvl",
        "Please provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>",
        _BRACKETS,
        1000,
        "image",
        "InternVL, github.com/OpenGVLab/InternVL, internvl_chat/eval/refcoco/evaluate_grounding.py",
    ),
    BoxFormat(
        "paligemma",
        "detect {}",
        _THOUSANDTHS,
        1024,
        "image",
        "PaliGemma, arXiv 2407.07726, section 3.2: y before x, in 1024ths",
        order=YXYX,
    ),
    BoxFormat(
        "embedded",
        "where is {}",
        _LOCATIONS,
        LOCATIONS - 1,
        "image",
        "gap_triton.demo.vocabulary",
    ),
)
FORMATS: dict[str, BoxFormat] = {each.name: each for each in _ALL}

# What checkpoints of these types of transformers were trained on. Others need --format.
BY_MODEL_TYPE = {
    "llava": "llava",
    "llava_next": "llava-next",
    "qwen2_vl": "qwen2-vl",
    "qwen2_5_vl": "qwen2.5-vl",
    "qwen3_vl": "qwen3-vl",
    "qwen3_vl_moe": "qwen3-vl",
    "internvl": "internvl",
    "paligemma": "paligemma",
}


def find_format(name: str | None, model_type: str) -> BoxFormat:
    """Return the format of that name; that of the type of the model where the name is None.

    Raises:
        ValueError: There is no such format, or none is known for the type.
    """
    if name is None:
        if model_type not in BY_MODEL_TYPE:
            raise ValueError(
                f"model_type={model_type!r}: how such a model writes a box is not known; name the format, one of "
                f"{', '.join(FORMATS)}"
            )
        name = BY_MODEL_TYPE[model_type]
    if name not in FORMATS:
        raise ValueError(f"format {name!r}: expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def resized_by(processor_output: Any, patch_size: int, sample: int) -> tuple[int, int] | None:
    """Return width and height in pixels of a resized image, from the grid of patches that Qwen-VL processors return."""
    grid = processor_output.get("image_grid_thw")
    if grid is None:
        return None
    _, rows, columns = grid[sample].tolist()
    return columns * patch_size, rows * patch_size
