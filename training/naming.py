"""Aligning visual tokens with words: every patch of an object learns to name its colour and its shape.

This stands in for the language-aligned vision tower that a large LLaVA starts from (CLIP's contrastive training).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gap_triton.demo.scenes import COLOURS, MOST_OBJECTS, SHAPES, Scenes
from gap_triton.demo.vocabulary import token_id

SHARPNESS = 10.0  # cosine similarities are multiplied by this, an inverse temperature


def naming_loss(features: Tensor, embedding: Tensor, scenes: Scenes) -> tuple[Tensor, float]:
    """Compare the visual tokens that show an object with the embeddings of all colour words and all shape words.

    Args:
        features: Projected visual tokens [N, GRID * GRID, C].
        embedding: The decoder's token embeddings [vocabulary, C].
        scenes: The ``N`` scenes that the features come from.

    Returns:
        The cross-entropy of the right words, and the share of tokens whose two words are both right.
    """
    owners = scenes.owners.flatten(1)
    row, token = (owners < MOST_OBJECTS).nonzero(as_tuple=True)
    slot = owners[row, token]
    shown = F.normalize(features[row, token].float(), dim=-1)
    loss = torch.zeros(())
    right = torch.ones(len(row), dtype=torch.bool)
    for words, labels in ((COLOURS, scenes.colours), (SHAPES, scenes.shapes)):
        known = F.normalize(embedding[[token_id(word) for word in words]].float(), dim=-1)
        similarity = SHARPNESS * shown @ known.T
        loss = loss + F.cross_entropy(similarity, labels[row, slot])
        right &= similarity.argmax(-1) == labels[row, slot]
    return loss, right.float().mean().item()
