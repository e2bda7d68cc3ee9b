"""Published layers, which are those of decoders of 32 layers, in a decoder of another depth."""

from __future__ import annotations

PUBLISHED_LAYERS = 32


def check_layers(layers: int, stages: int) -> None:
    """Raise ValueError unless a decoder of ``layers`` layers has room for ``stages`` stages."""
    if not isinstance(layers, int) or isinstance(layers, bool) or layers <= stages:
        raise ValueError(
            f"layers={layers!r}: expected the number of decoder layers, an int > {stages}, as in "
            "model.config.get_text_config().num_hidden_layers"
        )


def pruning_layers(entered: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """`GapConfig.layer` of each stage.

    Args:
        entered: By stage, the layer (of 32) that the first layer with fewer tokens is; ascending.
        layers: Number of decoder layers.

    Returns:
        The layer before it, at the same share of the depth, each later than the one before.
    """
    check_layers(layers, len(entered))
    found: list[int] = []
    for number, layer in enumerate(entered):
        scaled = round(layer * layers / PUBLISHED_LAYERS) - 1
        last = (
            layers - 1 - (len(entered) - number)
        )  # a layer is left for every stage to come, and one for the end
        found.append(min(max(scaled, found[-1] + 1 if found else 0), last))
    return tuple(found)


def check_share(budget: object, above: float = 0.0) -> float:
    """``budget`` as a share in (``above``, 1].

    Raises:
        ValueError: It is none.
    """
    if not isinstance(budget, float) or not above < budget <= 1.0:
        raise ValueError(
            f"budget={budget!r}: expected a share of the visual tokens, a float in ({above:g}, 1]"
        )
    return budget
