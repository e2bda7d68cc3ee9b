"""All the questions about one image in a single sequence, exactly as if each had been asked alone.

The sequence is [prefix, Q1 A1, Q2 A2, ...]; the visual tokens are in the prefix. Position ids restart behind it for
every question, and the attention mask lets a question see the prefix and itself only. The visual tokens, by far the
longest part, are then computed once for all questions: several times the supervision for little more time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gap_triton.demo.architecture import Architecture
from gap_triton.demo.grounding import location_ids
from gap_triton.demo.scenes import COLOURS, IMAGE_SIZE, MOST_OBJECTS, SHAPES, Scenes
from gap_triton.demo.vocabulary import EOS, token_id

QUESTION = 5  # where is the COLOUR SHAPE
ANSWER = 4  # x0 y0 x1 y1; the closing eos is predicted, never fed
BLOCK = QUESTION + ANSWER
PREDICTED = 1 + ANSWER + 1  # the SHAPE after its COLOUR, the answer, eos
IGNORED = -100  # the label that cross_entropy leaves out


@dataclass(frozen=True)
class Packed:
    """Model inputs for ``N`` scenes with all ``M`` questions each; ``L = prefix + M * BLOCK``.

    Attributes:
        input_ids: [N, L] int64.
        prefix: Number of tokens ahead of the first question.
        pixel_values: float32, -1..1, in the shape that the architecture's image processor gives them.
        position_ids: [1, L] int64, or [3, 1, L] (time, height, width) with M-RoPE.
        attention_mask: [1, 1, L, L] bool, True where a row (dim 2) sees a column (dim 3).
        predicting: [M * PREDICTED] int64, the positions whose logits are supervised.
        labels: [N, M * PREDICTED] int64; ``IGNORED`` for the questions about absent objects.
    """

    input_ids: Tensor
    prefix: int
    pixel_values: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    predicting: Tensor
    labels: Tensor


def pack(scenes: Scenes, architecture: Architecture) -> Packed:
    """Pack one question per object slot behind each image."""
    count, prefix = len(scenes), len(architecture.prefix)
    template = torch.tensor([token_id(word) for word in ("where", "is", "the", "red", "circle")])
    questions = template.expand(count, MOST_OBJECTS, QUESTION).clone()
    questions[..., 3] = scenes.colours + token_id(COLOURS[0])
    questions[..., 4] = scenes.shapes + token_id(SHAPES[0])
    answers = location_ids(scenes.boxes / IMAGE_SIZE)
    ahead = torch.tensor([token_id(token) for token in architecture.prefix]).expand(count, prefix)
    blocks = torch.cat([questions, answers], 2)
    # Which shape follows "red" is there to be seen: the shortest way to learn that words speak of visual tokens.
    labels = torch.cat([questions[..., -1:], answers, torch.full((count, MOST_OBJECTS, 1), token_id(EOS))], 2)
    labels = labels.masked_fill(~scenes.present[..., None], IGNORED)

    # Block 0 is the prefix, which everyone sees; a question sees no other question.
    block = torch.cat(
        [torch.zeros(prefix, dtype=torch.int64), torch.arange(1, MOST_OBJECTS + 1).repeat_interleave(BLOCK)]
    )
    length = len(block)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = causal & ((block[None, :] == 0) | (block[:, None] == block[None, :]))
    start = prefix + BLOCK * torch.arange(MOST_OBJECTS)[:, None]
    predicting = (start + QUESTION - 2 + torch.arange(PREDICTED)).flatten()
    return Packed(
        torch.cat([ahead, blocks.flatten(1)], 1),
        prefix,
        architecture.pixel_values(scenes.images),
        architecture.position_ids(torch.arange(BLOCK).repeat(MOST_OBJECTS)),
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
    ahead, blocks = packed.input_ids.tensor_split([packed.prefix], 1)
    blocks = blocks.unflatten(1, (MOST_OBJECTS, BLOCK))
    others = torch.cat([blocks[..., :QUESTION], blocks.roll(1, 0)[..., QUESTION:]], 2)
    turn = torch.arange(len(blocks))[:, None] + torch.arange(MOST_OBJECTS) + step
    mixed = torch.where((turn % 2 == 0)[..., None], others, blocks)
    return replace(packed, input_ids=torch.cat([ahead, mixed.flatten(1)], 1))
