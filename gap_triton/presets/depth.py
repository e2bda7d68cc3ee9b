"""Published layers, which are those of decoders of 32 layers, in a decoder of another depth."""

from __future__ import annotations

from fractions import Fraction

from ..plain import is_int, plain, shown

PUBLISHED_LAYERS = 32


def check_layers(layers: object, stages: int) -> int:
    """``layers``, the number of layers of a decoder that has room for ``stages`` stages.

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


def pruning_layers(entered: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """`GapConfig.layer` of each stage.

    Args:
        entered: By stage, the layer (of 32) that the first layer with fewer tokens is; ascending.
        layers: Number of decoder layers.

    Returns:
        The layer before it, at the same share of the depth, each later than the one before.
    """
    layers = check_layers(layers, len(entered))
    found: list[int] = []
    for number, layer in enumerate(entered):
        scaled = round(Fraction(layer * layers, PUBLISHED_LAYERS)) - 1
        last = (
            layers - 1 - (len(entered) - number)
        )  # a layer is left for every stage to come, and one for the end
        found.append(min(max(scaled, found[-1] + 1 if found else 0), last))
    return tuple(found)
