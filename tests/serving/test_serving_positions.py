"""Position ids of prompts whose images are pruned, as an engine computes them: in chunks, twice, some rows cached."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gap_triton.vllm.positions import (
    AXES,
    WIDTH,
    PlacedImage,
    after_encoding,
    offsets_of,
    placed,
    prompt_positions,
    resolve,
    with_offsets,
)

PLACEHOLDER, TEXT = 7, 1
CHANNELS = 4


@dataclass
class Picture:
    """An image of a prompt, or a video whose frames follow each other, and which of its tokens survive.

    A frame of a video between whose frames there is text is an image here, which may have no survivor.
    """

    grid: tuple[int, int]
    survivors: list[int]
    known: bool
    frames: int = 1
    interval: int = 1

    @property
    def offsets(self) -> Tensor:
        height, width = self.grid
        return torch.tensor(
            [
                [frame * self.interval, row, column]
                for frame in range(self.frames)
                for row in range(height)
                for column in range(width)
            ]
        ).T

    @property
    def tokens(self) -> int:
        return self.frames * self.grid[0] * self.grid[1]

    @property
    def whole(self) -> bool:
        return len(self.survivors) == self.tokens


@dataclass
class Prompt:
    """Text before each image, and after the last."""

    texts: list[int]
    pictures: list[Picture]

    @property
    def token_ids(self) -> list[int]:
        ids = [TEXT] * self.texts[0]
        for picture, text in zip(self.pictures, self.texts[1:], strict=True):
            ids += [PLACEHOLDER] * len(picture.survivors) + [TEXT] * text
        return ids

    def starts(self) -> list[int]:
        starts, row = [], 0
        for picture, text in zip(self.pictures, self.texts[:-1], strict=True):
            starts.append(row + text)
            row = starts[-1] + len(picture.survivors)
        return starts

    def placed(self) -> list[PlacedImage]:
        return [
            PlacedImage(
                start=start,
                rows=len(picture.survivors),
                offsets=picture.offsets,
                survivors=torch.tensor(picture.survivors, dtype=torch.int64)
                if picture.known and not picture.whole
                else None,
                compacted=False,
            )
            for start, picture in zip(self.starts(), self.pictures, strict=True)
        ]

    def expected(self) -> tuple[Tensor, int]:
        """Number the whole prompt, token by token, and leave out what is dropped."""
        ids, following, whole = [], 0, 0
        for number, text in enumerate(self.texts):
            for _ in range(text):
                ids.append([following] * AXES)
                following, whole = following + 1, whole + 1
            if number == len(self.pictures):
                break
            picture = self.pictures[number]
            every = (picture.offsets + following).T.tolist()
            ids += [every[survivor] for survivor in picture.survivors]
            following += max(*picture.grid, (picture.frames - 1) * picture.interval + 1)
        return torch.tensor(ids).T, following - len(ids)

    def encoded(self) -> list[Tensor]:
        """What the encoder puts out, by image: a row has the number of its token in all channels."""
        return [
            with_offsets(
                torch.tensor(picture.survivors, dtype=torch.float32)[:, None].expand(-1, CHANNELS),
                picture.offsets[:, picture.survivors],
            )
            for picture in self.pictures
        ]


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    pictures = []
    for _ in range(draw(st.integers(1, 3))):
        grid = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
        picture = Picture(grid, [], draw(st.booleans()), draw(st.integers(1, 3)), draw(st.integers(1, 4)))
        kept = draw(st.integers(0, picture.tokens))
        picture.survivors = sorted(
            random.Random(draw(st.integers(0, 99))).sample(range(picture.tokens), kept)
        )
        pictures.append(picture)
    texts = [draw(st.integers(0, 4)) for _ in pictures] + [draw(st.integers(1, 4))]
    return Prompt(texts, pictures)


def step(
    prompt: Prompt, positions: Tensor, computed: int, scheduled: int
) -> tuple[list[Tensor], Tensor, int]:
    """What the runner does before a step: it gathers what the step reads of the images, and asks."""
    read = []
    for start, encoded in zip(prompt.starts(), prompt.encoded(), strict=True):
        part = encoded[max(computed - start, 0) : max(computed + scheduled - start, 0)]
        if len(part):
            read.append(part)
    return after_encoding(positions, prompt.token_ids, [PLACEHOLDER], read, computed)


@settings(max_examples=150, deadline=None)
@given(prompts(), st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(0, 60))
def test_ids_are_those_without_pruning_however_the_prompt_is_cut(
    prompt: Prompt, cuts: list[int], preempted_after: int
) -> None:
    expected, delta = prompt.expected()
    length = len(prompt.token_ids)
    positions, first_delta = prompt_positions(length, prompt.placed())
    assert first_delta == delta
    computed = 0
    while computed < length:
        scheduled = min(cuts[computed % len(cuts)], length - computed)
        _, resolved, step_delta = step(prompt, positions, computed, scheduled)
        positions.copy_(resolved)  # as the runner does
        window = slice(computed, computed + scheduled)
        assert torch.equal(positions[:, window], expected[:, window])
        assert step_delta == delta
        computed += scheduled
        if preempted_after and computed > preempted_after:  # everything again, or from a row that is cached
            computed, preempted_after = preempted_after % computed, 0
    assert torch.equal(positions, expected)


@settings(max_examples=100, deadline=None)
@given(prompts())
def test_rows_that_a_cache_has_are_never_asked_for(prompt: Prompt) -> None:
    """A prefix hit inside an image: the step begins there, and gets the rest of the embeddings."""
    expected, _ = prompt.expected()
    length = len(prompt.token_ids)
    for computed in range(length):
        positions, _ = prompt_positions(length, prompt.placed())
        _, resolved, _ = step(prompt, positions, computed, length - computed)
        assert torch.equal(resolved[:, computed:], expected[:, computed:])


def test_text_and_deltas_are_known_before_anything_is_encoded() -> None:
    prompt = Prompt([2, 1, 3], [Picture((2, 5), [3, 9], known=False), Picture((4, 1), [0], known=True)])
    positions, delta = prompt_positions(len(prompt.token_ids), prompt.placed())
    assert positions[0].tolist() == [0, 1, -3, -3, 7, 8, 12, 13, 14]
    assert delta == 15 - 9


def test_a_portrait_image_moves_the_text_by_its_height() -> None:
    prompt = Prompt([1, 1], [Picture((9, 2), [0, 17], known=False)])
    positions, _ = prompt_positions(4, prompt.placed())
    assert positions[:, -1].tolist() == [10, 10, 10]


def test_a_video_that_is_long_moves_the_text_by_its_frames() -> None:
    video = Picture((2, 3), [0, 23], known=False, frames=4, interval=2)
    positions, delta = prompt_positions(4, Prompt([1, 1], [video]).placed())
    assert positions[:, -1].tolist() == [8, 8, 8]
    assert delta == 9 - 4


@pytest.mark.parametrize("known", [True, False])
def test_frames_between_which_there_is_text(known: bool) -> None:
    """Each is an image; one of them has lost all of its tokens, and its ids are left out all the same."""
    frame = Picture((2, 3), [], known=False).offsets
    survivors = torch.tensor([1, 5, 12, 13, 14, 15, 16, 17])  # of the last frame all
    images = placed(
        [2, 6, 8], [6, 6, 6], [2, 0, 6], frame.repeat(1, 3), survivors if known else None, compacted=False
    )
    assert [(image.start, image.rows) for image in images] == [(2, 2), (6, 0), (8, 6)]
    positions, delta = prompt_positions(16, images)
    rows = [0, 1, 2, 2, 5, 6, 10, 11, 12, 12, 12, 12, 12, 12, 15, 16]  # text, and the first axis
    if not known:
        rows[2:4] = [-3, -3]
    assert positions[0].tolist() == rows
    assert positions[2, 8:14].tolist() == [12, 13, 14, 12, 13, 14]
    assert delta == 17 - 16
    if known:
        assert positions[1:, 2:4].tolist() == [[2, 3], [3, 4]]
    else:
        resolved = resolve(positions, [1, 1, 7, 7, 1, 1, 1, 1, *[7] * 6, 1, 1], [7], frame[:, [1, 5]], 0)
        assert resolved[1:, 2:4].tolist() == [[2, 3], [3, 4]]
        assert torch.equal(resolved[:, 4:], positions[:, 4:])


def test_compacted_ids_count_the_survivors() -> None:
    image = PlacedImage(1, 3, Picture((3, 3), [0, 4, 8], False).offsets, None, compacted=True)
    positions, delta = prompt_positions(6, [image])
    assert positions.tolist() == [list(range(6))] * AXES
    assert delta == 0


class Untouchable(Sequence[int]):
    """A prompt of which only the length may be asked."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: object) -> int:
        raise AssertionError("the prompt was read")


def test_a_step_that_decodes_touches_nothing() -> None:
    positions = torch.tensor([[0, -2, -2, 9]] * AXES)
    features, same, delta = after_encoding(positions, Untouchable(), [PLACEHOLDER], [], 4)
    assert features == []
    assert same is positions
    assert delta == 6


def test_a_step_whose_ids_are_known_does_not_read_the_prompt() -> None:
    positions = torch.tensor([[0, 1, 3, 9]] * AXES)
    encoded = with_offsets(torch.ones(2, CHANNELS), torch.zeros(AXES, 2, dtype=torch.int64))
    features, same, _ = after_encoding(positions, Untouchable(), [PLACEHOLDER], [encoded], 0)
    assert [each.shape for each in features] == [(2, CHANNELS)]
    assert same is positions


def test_more_embeddings_than_tokens_are_an_error() -> None:
    positions = torch.tensor([[0, -2, 9]] * AXES)
    encoded = with_offsets(torch.ones(2, CHANNELS), torch.zeros(AXES, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="2 tokens of images were encoded, and the prompt has 1 more"):
        after_encoding(positions, [TEXT, PLACEHOLDER, TEXT], [PLACEHOLDER], [encoded], 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_offsets_survive_narrow_floats(dtype: torch.dtype) -> None:
    numbers = torch.tensor([0, 1, 255, 256, 257, 511, 2047, 4097, 65535])
    offsets = torch.stack([numbers, numbers.flip(0), numbers.roll(1)])
    embeddings = torch.randn(len(numbers), CHANNELS).to(dtype)
    joined = with_offsets(embeddings, offsets)
    assert joined.dtype == dtype
    assert joined.shape == (len(numbers), CHANNELS + WIDTH)
    assert torch.equal(joined[:, :-WIDTH], embeddings)
    assert torch.equal(offsets_of(joined), offsets)
