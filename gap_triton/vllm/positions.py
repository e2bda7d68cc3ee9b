"""Position ids of a prompt whose images are pruned.

Survivors keep their ids, so those of all text, and of every generated token, follow from the sizes of the images alone: they
are known before anything is encoded. Only the ids of the survivors wait for that, where their choice does. Until then such a
row holds ``-1 - base``, with the first id of its image; `resolve` makes ``base + offset`` of it, and leaves a row alone that
has its id already. So a chunk, a hit in a cache or a second run of the same rows changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AXES = 3  # time, height, width
DIGITS, BASE = 2, 256  # bfloat16 holds whole numbers to 256
WIDTH = AXES * DIGITS
"""Channels that ids take beside an embedding."""


@dataclass(frozen=True)
class PlacedImage:
    """One image in a prompt, or one frame of a video where text stands between frames.

    Attributes:
        start: The row of its first token.
        rows: How many tokens of it the prompt has.
        offsets: [3, N] int64, the ids of all its tokens, counted from its first.
        survivors: [rows] int64, which of them the prompt has; None = the encoder has to say, or all of them.
        compacted: It is numbered as if it had never had more tokens.
    """

    start: int
    rows: int
    offsets: Tensor
    survivors: Tensor | None
    compacted: bool

    def ids(self, base: int) -> Tensor:
        """Return [3, rows] int64, its ids, counted from ``base``; ``-1 - base`` where they aren't known."""
        if self.compacted:
            return torch.arange(base, base + self.rows).expand(AXES, -1)
        if self.survivors is not None:
            return base + self.offsets[:, self.survivors]
        if self.rows == self.offsets.shape[1]:
            return base + self.offsets
        return torch.full((AXES, self.rows), -1 - base)

    @property
    def extent(self) -> int:
        """How many ids it takes."""
        return self.rows if self.compacted else int(self.offsets.max()) + 1


def prompt_positions(length: int, images: Sequence[PlacedImage]) -> tuple[Tensor, int]:
    """Return the ids of a prompt, and what is added to the number of a generated token to get its id.

    Args:
        length: Tokens of the prompt.
        images: In order.

    Returns:
        [3, length] int64, and an int.
    """
    parts, row, following = [], 0, 0
    for image in images:
        text = image.start - row
        base = following + text
        parts += [torch.arange(following, base).expand(AXES, -1), image.ids(base)]
        row, following = image.start + image.rows, base + image.extent
    after = length - row
    parts.append(torch.arange(following, following + after).expand(AXES, -1))
    return torch.cat(parts, 1), following + after - length


def placed(
    starts: Sequence[int],
    sizes: Sequence[int],
    rows: Sequence[int],
    offsets: Tensor,
    survivors: Tensor | None,
    compacted: bool,
) -> list[PlacedImage]:
    """Return an image in its place, or a video whose frames stand apart, frame by frame.

    Args:
        starts: The row of the first token of each frame.
        sizes: How many tokens each has unpruned, N together.
        rows: How many of them the prompt has.
        offsets: [3, N] int64, their ids, counted from the first of their frame.
        survivors: [K] int64, which of the N the prompt has, ascending; None = the encoder has to say, or all of them.
        compacted: They are numbered as if there had never been more.
    """
    images, before = [], 0
    for start, size, kept in zip(starts, sizes, rows, strict=True):
        own = offsets[:, before : before + size]
        inside = None
        if survivors is not None:
            inside = survivors[(survivors >= before) & (survivors < before + size)] - before
        images.append(PlacedImage(start, kept, own, inside, compacted))
        before += size
    return images


def with_offsets(embeddings: Tensor, offsets: Tensor) -> Tensor:
    """Return ``embeddings`` [K, C] with their offsets [3, K] beside them, [K, C + 6], as digits that 16 bits hold."""
    digits = torch.cat([offsets // BASE**digit % BASE for digit in range(DIGITS)])
    return torch.cat([embeddings, digits.T.to(embeddings.device, embeddings.dtype)], 1)


def offsets_of(embeddings: Tensor) -> Tensor:
    """Return the offsets [3, K] int64 that `with_offsets` put beside embeddings, [K, C + 6] together."""
    digits = embeddings[:, -WIDTH:].T.long().unflatten(0, (DIGITS, AXES))
    powers = BASE ** torch.arange(DIGITS, device=digits.device)
    return (digits * powers[:, None, None]).sum(0)


def after_encoding(
    positions: Tensor,
    token_ids: Sequence[int] | Tensor,
    media: Sequence[int],
    embeddings: Sequence[Tensor],
    computed: int,
) -> tuple[list[Tensor], Tensor, int]:
    """Take the ids off what was encoded of a prompt.

    A step that reads no image, as every step that decodes, changes nothing and does not touch the prompt.

    Args:
        positions: [3, L] int64.
        token_ids: [L], the tokens of the prompt.
        media: The tokens that stand for images.
        embeddings: Those of the images that the step reads, each [K, C + 6], or the part of it that the step reads.
        computed: How many tokens of the prompt were computed before.

    Returns:
        The embeddings, each [K, C]; the ids [3, L] int64; and what is added to a generated token's number to get its id.
    """
    delta = int(positions[0, -1]) + 1 - len(token_ids)  # a prompt ends in text, or in a whole image
    features = [each[:, :-WIDTH] for each in embeddings]
    # What is known already is not read from the device again.
    if embeddings and bool((positions[0, computed:] < 0).any()):
        offsets = torch.cat([offsets_of(each) for each in embeddings], 1).to(positions.device)
        positions = resolve(positions, token_ids, media, offsets, computed)
    return features, positions, delta


def resolve(
    positions: Tensor, token_ids: Sequence[int] | Tensor, media: Sequence[int], offsets: Tensor, computed: int
) -> Tensor:
    """Return the ids of a prompt where some of its images have been encoded.

    Args:
        positions: [3, L] int64.
        token_ids: [L], the tokens of the prompt.
        media: The tokens that stand for images.
        offsets: [3, K] int64, of the first K tokens of images from ``computed`` on.
        computed: How many tokens of the prompt were computed before.

    Returns:
        [3, L] int64, a new tensor.
    """
    ids = torch.as_tensor(token_ids[computed:]).to(positions.device)
    rows = torch.isin(ids, torch.tensor(media, device=ids.device)).nonzero()[: offsets.shape[1], 0] + computed
    if len(rows) != offsets.shape[1]:
        raise ValueError(
            f"{offsets.shape[1]} tokens of images were encoded, and the prompt has {len(rows)} more"
        )
    old = positions[:, rows]
    positions = positions.clone()
    positions[:, rows] = torch.where(old < 0, -1 - old + offsets.to(positions), old)
    return positions
