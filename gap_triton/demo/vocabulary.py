"""The demo's words and location tokens: one list that fixes every token id.

A box is written as four location tokens ``x0 y0 x1 y1``. Location ``i`` stands for the share ``i / (LOCATIONS - 1)``
of the image's width or height, so answers do not depend on the size of the image file.

Punctuation has no tokens. The noun is then the last word before the answer, so it is the noun itself that looks for
the thing: a question mark in its place would first have to fetch the noun, which such a small model learns too slowly.
"""

from __future__ import annotations

from .scenes import COLOURS, GRID, SHAPES

PAD, UNKNOWN, BOS, EOS, IMAGE = "<pad>", "<unk>", "<s>", "</s>", "<image>"
LOCATIONS = 2 * GRID + 1  # one step is half a visual token
LOCATION_TOKENS = tuple(f"<loc{i:02d}>" for i in range(LOCATIONS))
TOKENS = (PAD, UNKNOWN, BOS, EOS, IMAGE, "where", "is", "the", *COLOURS, *SHAPES, *LOCATION_TOKENS)
# What Qwen2.5-VL's prompts and processor need, behind the rest: a token has the same id in every vocabulary.
VISION_START, IMAGE_PAD, VISION_END, VIDEO_PAD = (
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|video_pad|>",
)
MORE_TOKENS = (*TOKENS, VISION_START, IMAGE_PAD, VISION_END, VIDEO_PAD)

_IDS = {token: index for index, token in enumerate(MORE_TOKENS)}


def token_id(token: str) -> int:
    """Return the id of one token of the vocabulary."""
    if token not in _IDS:
        raise ValueError(f"token is {token!r}; it must be one of {', '.join(MORE_TOKENS)}")
    return _IDS[token]
