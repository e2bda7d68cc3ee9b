"""Published layers, which are those of decoders of 32 layers, in a decoder of another depth.

The authors' code has the same numbers for every decoder, also for the 40 layers of 13B: 8, 16, 24; 16; 2, 6, 15. Here they
are the same share of the depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from ..plain import is_int, plain, shown

PUBLISHED_LAYERS = 32


def check_layers(layers: object, stages: int) -> int:
    """Return ``layers``, the number of layers of a decoder that has room for ``stages`` stages.

    Raises:
        ValueError: It has none, or that is no number of layers.
    """
    value = plain(layers)
    if not is_int(value) or value <= stages:
        raise ValueError(
            f"layers={shown(layers)}: expected the number of decoder layers, an int > {stages}, as in "
            "model.config.get_text_config().num_hidden_layers"
        )
    return value


def pruning_layers(first_layers: Sequence[int | Fraction], layers: int) -> tuple[int, ...]:
    """Return `GapConfig.layer` of each stage.

    Args:
        first_layers: By stage, the first layer (of 32) with fewer tokens, ascending.
        layers: Number of decoder layers.

    Returns:
        The layer before it, at the same share of the depth, each later than the one before.
    """
    layers = check_layers(layers, len(first_layers))
    scaled_layers: list[int] = []
    for number, layer in enumerate(first_layers):
        scaled = round(Fraction(layer) * layers / PUBLISHED_LAYERS) - 1
        # A layer is left for every stage to come, and one for the end.
        last = layers - 1 - (len(first_layers) - number)
        scaled_layers.append(min(max(scaled, scaled_layers[-1] + 1 if scaled_layers else 0), last))
    return tuple(scaled_layers)
