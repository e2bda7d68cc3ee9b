"""What differs between the embedded models; everything else in this package is shared by them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoProcessor

from .scenes import GRID

VISUAL = GRID * GRID  # visual tokens of one image
CONTEXT = 512  # tokens, in the decoder's config and the tokenizer's

# The decoder of every architecture: as wide, as deep.
DECODER = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
}


class Architecture(ABC):
    """How to build and save one kind of model, how to put a question to it, and how to feed it while it is trained.

    Attributes:
        name: Its ``model_type`` in transformers.
        folder: The folder of the trained model.
        tokens: The vocabulary; a token's id is its place.
        image_token: Placeholder of a visual token.
        before: Tokens ahead of the visual tokens; the tokenizer puts the first one, ``<s>``, there.
        after: Tokens between the visual tokens and the question.
    """

    name: str
    folder: Path
    tokens: tuple[str, ...]
    image_token: str
    before: tuple[str, ...]
    after: tuple[str, ...]

    def load_processor(self, folder: Path) -> Any:
        """Load the processor of a model that was saved in ``folder``."""
        return AutoProcessor.from_pretrained(folder)

    @property
    def prefix(self) -> tuple[str, ...]:
        """All tokens ahead of the question."""
        return (*self.before, *[self.image_token] * VISUAL, *self.after)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Tokens that decoding leaves out."""
        return tuple(token for token in self.tokens if token.startswith("<") and not token.startswith("<loc"))

    @property
    def image_text(self) -> str:
        """One image in the text for the processor."""
        return f"{''.join(self.before[1:])}{self.image_token}{''.join(self.after)}"

    def prompt(self, question: str) -> str:
        """Return the text for the processor: one question about one image."""
        return f"{self.image_text} {question}"

    def splice(self, words: Tensor, features: Tensor) -> Tensor:
        """Put visual tokens [N, VISUAL, C] where ``words``, embedded tokens [N, L, C], have placeholders."""
        start = len(self.before)
        words = words.clone()
        words[:, start : start + VISUAL] = features.to(words.dtype)
        return words

    @abstractmethod
    def build(self, special: dict[str, int]) -> Any:
        """Build the untrained model from torch's global random state; ``special``: ids of bos, eos and pad."""

    @abstractmethod
    def pixel_values(self, images: Tensor) -> Tensor:
        """Turn uint8 images [N, 3, IMAGE_SIZE, IMAGE_SIZE] into what the image processor makes of them."""

    @abstractmethod
    def visual_features(self, model: Any, pixel_values: Tensor) -> Tensor:
        """Return the visual tokens as the decoder gets them: [N, VISUAL, C]."""

    @abstractmethod
    def position_ids(self, within: Tensor) -> Tensor:
        """Return the position ids of the prefix and of the tokens behind it: [1, L] int64, or [3, 1, L].

        Args:
            within: How far each of the tokens behind the prefix is from the first of its own question, int64.
        """

    @abstractmethod
    def image_processor_file(self) -> dict[str, Any]:
        """Return the content of ``preprocessor_config.json``."""

    @abstractmethod
    def processor_file(self) -> dict[str, Any]:
        """Return the content of ``processor_config.json``."""

    def config_file(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Return ``config.json`` as every supported transformers reads it, from what this one saves."""
        return saved

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``state`` under the names that every supported transformers reads."""
        return state
