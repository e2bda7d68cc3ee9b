"""Boxes as models write them: what each format's numbers refer to, and the padded square of LLaVA-1.5."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from gap_triton.evaluation.boxes import BY_MODEL_TYPE, FORMATS, View, find_format, resized_by

# A box of an image of 640 x 426 pixels: at 0.1 and 0.5 of its width, 0.2 and 0.75 of its height.
WIDE = View(640, 426, resized=(644, 420))
BOX = (64.0, 85.2, 320.0, 319.5)
# The same box after 107 rows of padding, of a square of 640.
ON_SQUARE = "[0.1, 0.3003125, 0.5, 0.66640625]"
ANSWERS = {
    "llava": ON_SQUARE,
    "llava-next": ON_SQUARE,
    "shares": "It is at [0.1, 0.2, 0.5, 0.75].",
    "qwen2-vl": "the man in red(100,200),(500,750)",
    "qwen2.5-vl": '```json\n[\n\t{"bbox_2d": [64.4, 84, 322, 315], "label": "the man in red"}\n]\n```',
    "qwen3-vl": '[{"bbox_2d": [100, 200, 500, 750], "label": "the man"}, {"bbox_2d": [1, 2, 3, 4]}]',
    "shikra": "[0.1,0.3003125,0.5,0.66640625]",
    "minigpt-v2": "<p>the man</p> {<10><20><50><75>}",
    "internvl": "the man in red[[100, 200, 500, 750]]",
    "paligemma": "<loc0256><loc0128><loc0768><loc0512> the man",
    "embedded": "<loc02> <loc04> <loc08> <loc12>",
}
COARSE = {  # boxes that their numbers can't say exactly
    "paligemma": (640 / 8, 426 / 4, 640 / 2, 426 * 3 / 4),
    "embedded": (640 / 8, 426 / 4, 640 / 2, 426 * 3 / 4),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_reads_its_own_answers(name: str) -> None:
    assert FORMATS[name].read(ANSWERS[name], WIDE) == pytest.approx(COARSE.get(name, BOX))


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_without_a_box_has_none(name: str) -> None:
    for nothing in ("", "I can't see it.", "[0.1, 0.2, 0.3]", "[a, b, c, d]", "<loc0001>", "(1,2)"):
        assert FORMATS[name].read(nothing, WIDE) is None


def test_corners_in_the_wrong_order_stay_so() -> None:
    assert FORMATS["shares"].read("[0.5, 0.75, 0.1, 0.2]", View(10, 20)) == pytest.approx((5, 15, 1, 4))


def test_a_negative_number_and_one_without_a_zero() -> None:
    assert FORMATS["shares"].read("[-0.1, .5, 1, 1.0]", View(10, 20)) == pytest.approx((-1, 10, 10, 20))


def test_pixels_of_an_unknown_size_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"format 'qwen2\.5-vl' writes pixels of the resized image, and its size"
    ):
        FORMATS["qwen2.5-vl"].read("[1, 2, 3, 4]", View(640, 426))


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (91, 40), (64, 64)])
def test_the_box_on_the_padded_square_is_found_again(size: tuple[int, int]) -> None:
    """What is white in the image is looked for in the square that the model sees, and read back."""
    box = (10, 20, 31, 38)
    image = Image.new("RGB", size, (10, 20, 30))
    image.paste((255, 255, 255), box)
    form = FORMATS["llava"]
    square = form.prepare(image, (122, 116, 104))
    side = max(size)
    assert square.size == (side, side)
    shares = [each / side for each in square.getchannel("R").point(lambda red: 255 * (red == 255)).getbbox()]
    assert form.read(str(shares), View(*size)) == pytest.approx(box)
    if size[0] != size[1]:
        assert square.getpixel((0, 0)) == (122, 116, 104)


def test_only_those_trained_on_padded_images_get_them() -> None:
    image = Image.new("RGB", (90, 40))
    padded = {name for name, form in FORMATS.items() if form.prepare(image, (0, 0, 0)).size == (90, 90)}
    assert padded == {"llava", "shikra"}


def test_every_format_asks_for_the_expression_and_says_its_source() -> None:
    for name, form in FORMATS.items():
        assert form.question.count("{}") == 1, name
        assert form.source


def test_formats_are_found_by_name_and_by_type() -> None:
    assert find_format(None, "qwen2_5_vl").name == "qwen2.5-vl"
    assert find_format("internvl", "llava").name == "internvl"
    assert set(BY_MODEL_TYPE.values()) <= set(FORMATS)
    with pytest.raises(ValueError, match="format 'yolo': expected one of llava, "):
        find_format("yolo", "llava")
    with pytest.raises(ValueError, match="model_type='idefics3': how such a model writes a box is not known"):
        find_format(None, "idefics3")


def test_the_resized_size_is_what_the_processor_made() -> None:
    inputs = {"image_grid_thw": torch.tensor([[1, 30, 46], [1, 4, 6]])}
    assert resized_by(inputs, 14, 0) == (644, 420)
    assert resized_by(inputs, 14, 1) == (84, 56)
    assert resized_by({}, 14, 0) is None
