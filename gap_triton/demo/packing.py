"""All the questions about one image in a single sequence, exactly as if each had been asked alone.

The sequence is ``[bos, visual tokens, Q1 A1, Q2 A2, ...]``. Position ids restart after the image for every question,
and the attention mask lets a question see the image and itself only. The visual tokens, by far the longest part, are
then computed once for all questions: several times the supervision for little more time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gap_triton.demo.grounding import location_ids
from gap_triton.demo.scenes import COLOURS, GRID, IMAGE_SIZE, MOST_OBJECTS, SHAPES, Scenes
from gap_triton.demo.vocabulary import BOS, EOS, IMAGE, token_id

VISUAL = GRID * GRID
PREFIX = 1 + VISUAL
QUESTION = 5  # where is the COLOUR SHAPE
ANSWER = 4  # x0 y0 x1 y1; the closing eos is predicted, never fed
BLOCK = QUESTION + ANSWER
PREDICTED = 1 + ANSWER + 1  # the SHAPE after its COLOUR, the answer, eos
IGNORED = -100  # the label that cross_entropy leaves out


@dataclass(frozen=True)
class Packed:
    """Model inputs for ``N`` scenes with all ``M`` questions each; ``L = PREFIX + M * BLOCK``.

    Attributes:
        input_ids: int64 ``[N, L]``.
        pixel_values: float32 ``[N, 3, IMAGE_SIZE, IMAGE_SIZE]`` in -1..1.
        position_ids: int64 ``[1, L]``.
        attention_mask: bool ``[1, 1, L, L]``, True where a row (dim 2) sees a column (dim 3).
        predicting: int64 ``[M * PREDICTED]``, the positions whose logits are supervised.
        labels: int64 ``[N, M * PREDICTED]``; ``IGNORED`` for the questions about absent objects.
    """

    input_ids: Tensor
    pixel_values: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    predicting: Tensor
    labels: Tensor


def pixel_values(images: Tensor) -> Tensor:
    """Turn uint8 pixels into the model's -1..1 range: what the image processor does to a native-size image."""
    return images.float() / 127.5 - 1


def pack(scenes: Scenes) -> Packed:
    """Pack one question per object slot behind each image."""
    count = len(scenes)
    template = torch.tensor([token_id(word) for word in ("where", "is", "the", "red", "circle")])
    questions = template.expand(count, MOST_OBJECTS, QUESTION).clone()
    questions[..., 3] = scenes.colours + token_id(COLOURS[0])
    questions[..., 4] = scenes.shapes + token_id(SHAPES[0])
    answers = location_ids(scenes.boxes / IMAGE_SIZE)
    prefix = torch.tensor([token_id(BOS)] + [token_id(IMAGE)] * VISUAL).expand(count, PREFIX)
    blocks = torch.cat([questions, answers], 2)
    # Which shape follows "red" is there to be seen: the shortest way to learn that words speak of visual tokens.
    labels = torch.cat([questions[..., -1:], answers, torch.full((count, MOST_OBJECTS, 1), token_id(EOS))], 2)
    labels = labels.masked_fill(~scenes.present[..., None], IGNORED)

    # Block 0 is the prefix, which everyone sees; a question sees no other question.
    block = torch.cat(
        [torch.zeros(PREFIX, dtype=torch.int64), torch.arange(1, MOST_OBJECTS + 1).repeat_interleave(BLOCK)]
    )
    length = len(block)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = causal & ((block[None, :] == 0) | (block[:, None] == block[None, :]))
    within = torch.arange(BLOCK).repeat(MOST_OBJECTS)
    position_ids = torch.cat([torch.arange(PREFIX), PREFIX + within])
    start = PREFIX + BLOCK * torch.arange(MOST_OBJECTS)[:, None]
    predicting = (start + QUESTION - 2 + torch.arange(PREDICTED)).flatten()
    return Packed(
        torch.cat([prefix, blocks.flatten(1)], 1),
        pixel_values(scenes.images),
        position_ids[None],
        visible[None, None],
        predicting,
        labels.flatten(1),
    )


def with_wrong_answers(packed: Packed, step: int) -> Packed:
    """Feed every other question, in turns, the answer to another scene's question; the labels stay.

    A model that is fed the true ``x0`` can find ``y0 x1 y1`` without the question: it looks for the object whose edge
    is there. Then a single token of four teaches it to tell objects apart, which takes it very long. Where the fed
    answer is wrong, only the question leads to the labels.
    """
    blocks = packed.input_ids[:, PREFIX:].unflatten(1, (MOST_OBJECTS, BLOCK))
    others = torch.cat([blocks[..., :QUESTION], blocks.roll(1, 0)[..., QUESTION:]], 2)
    turn = torch.arange(len(blocks))[:, None] + torch.arange(MOST_OBJECTS) + step
    mixed = torch.where((turn % 2 == 0)[..., None], others, blocks)
    return replace(packed, input_ids=torch.cat([packed.input_ids[:, :PREFIX], mixed.flatten(1)], 1))
