"""The vision tower of a model: which module it is, and how its rows become visual tokens.

There is no list of towers. A tower is taken if it is a pretrained model below the module that receives ``input_ids``, whose
layers each hold at most one attention module that calls transformers' attention interface and is not causal, and some do.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..constants import Constants
from ..host import to_device
from ..introspect import calls_interface, text_model_of
from .patches import mean_of_patches, out_of_windows
from .sizes import GRID_FIELDS, POSITIONS, SHAPES, host_sizes

ENCODERS = {"image": "get_image_features", "video": "get_video_features"}
PIXEL_FIELDS = ("pixel_values", "pixel_values_videos")
POOLING_FIELDS = (
    "spatial_merge_size",
    "downsample_factor",
    "scale_factor",
    "hidden_stride",
    "projector_pooling_ratio",
    "pooling_kernel_size",
    "merge_kernel_size",  # rows and columns
)
RATIO_FIELDS = ("downsample_ratio", "pixel_shuffle_ratio")
ALTERNATIVE = "use score='random' or 'text_similarity' (presets 'random', 'text'), or prune in the decoder (preset 'fastv')"
CLS_PARAMETERS = ("class_embedding", "cls_token")
EARLIER = {"middle": 3 / 8, "early": 1 / 4}
"""Layers that methods rank by besides the last: the 9th of 24 (HiPrune, arXiv 2508.00553) and the 6th (VScan, arXiv
2505.22654), as shares of the depth. On Qwen2.5-VL, with full attention in layers 8, 16, 24 and 32, the 16th and the 8th."""
INDICES = 64
"""How many index tensors of a tower stay in memory, each for images of other sizes."""


@dataclass(frozen=True, eq=False)
class Tower:
    """The vision tower of a model.

    Attributes:
        owner: The module that receives ``input_ids``, whose ``get_image_features`` runs the tower.
        module: The vision encoder.
        layers: Its layers.
        attention: Attention of the scoring layer: the one whose output becomes the visual features (the deepest, if several
            do); where a tower has windows, or layers without attention, the last layer that sees the whole image.
        earlier: Attention of layers before it, by the names of `EARLIER`.
        projector: Maps the tower's features to the width of the decoder one token at a time, None where there is no such
            module.
        has_cls: The tower has a CLS token.
        leading: Number of tokens before each image that don't become features.
        trailing: Number of tokens behind each image that don't: 1 where the CLS token comes last (Llama 4).
        patches: How many patches become one token, where the tower gets them one after the other: those of a square, or of a
            row (MiniGPT-v2); else 1.
        window: Side of a window in merged tokens, None where the tower has no windows.
        constants: Index tensors by the sizes of images.
    """

    owner: PreTrainedModel
    module: PreTrainedModel
    layers: tuple[nn.Module, ...]
    attention: nn.Module
    earlier: dict[str, nn.Module]
    projector: nn.Module | None
    has_cls: bool
    leading: int
    trailing: int
    patches: int
    window: int | None
    constants: Constants = field(default_factory=lambda: Constants(INDICES))

    def to_features(self, rows: Tensor, arguments: dict[str, Any], tokens: int | None) -> Tensor:
        """Return the rows of the features from rows of the tower's patches: raster order, the patches of a token averaged.

        Args:
            rows: [P, ...], the patches of all images in the tower's order.
            arguments: Those of the encoder, by name.
            tokens: F, None where the model adds rows of its own to the features, or leaves some out.

        Returns:
            [F, ...]; ``rows`` where it is not known which patches become one token.
        """
        if self.patches > 1:
            rows = mean_of_patches(rows.unflatten(0, (-1, self.patches)), (1,))
            return (
                rows if self.window is None else rows[self._out_of_windows(_grids_of(arguments), rows.device)]
            )
        if not tokens or len(rows) <= tokens:
            return rows
        pool = pooling_of(self.owner)
        sizes = self._sizes(arguments, len(rows))
        if pool**2 * tokens != len(rows) or sum(h * w for h, w in sizes) != len(rows):
            return rows
        if any(height % pool or width % pool for height, width in sizes):
            return rows
        images = rows.split([height * width for height, width in sizes])
        return torch.cat(
            [
                mean_of_patches(image.unflatten(0, (h // pool, pool, w // pool, pool)), (1, 3)).flatten(0, 1)
                for image, (h, w) in zip(images, sizes, strict=True)
            ]
        )

    def of_features(self, tokens: int) -> slice:
        """Return which of the ``tokens`` of an image become features."""
        return slice(self.leading, tokens - self.trailing)

    def is_current(self) -> bool:
        """Return whether the model still holds this tower, and none of its parts has been replaced."""
        try:
            current = find_tower(self.owner)
        except ValueError:
            return False
        same = all(
            getattr(current, name) is getattr(self, name) for name in ("module", "attention", "projector")
        )
        return same and current.layers == self.layers and current.earlier == self.earlier

    def asks_for_sizes(self) -> bool:
        """Return whether `to_features` may ask for the sizes of images."""
        return self.window is not None or (self.patches == 1 and pooling_of(self.owner) > 1)

    def _out_of_windows(self, grids: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        merge, window = math.isqrt(self.patches), self.window
        assert window is not None
        key = ("windows", tuple(map(tuple, grids)), device)
        return self.constants.get(
            key, device, lambda: to_device(out_of_windows(grids, merge, window), device)
        )

    def _sizes(self, arguments: dict[str, Any], patches: int) -> list[tuple[int, int]]:
        """Rows and columns of patches of each image that the tower takes in raster order; empty where they aren't known."""
        if any(name in arguments for name in GRID_FIELDS.values()):
            return [(height, width) for frames, height, width in _grids_of(arguments) for _ in range(frames)]
        for name in (SHAPES, POSITIONS):
            if arguments.get(name) is not None:
                return list(host_sizes(arguments)[name])
        images, patch = image_shape(arguments), patch_size_of(self.module.config)
        if images is None or patch is None:
            return []
        if arguments.get("image_sizes") is not None:
            return [
                (height // patch[0], width // patch[1])
                for height, width in host_sizes(arguments)["image_sizes"]
            ]
        size = (images[1] // patch[0], images[2] // patch[1])
        return [size] * (patches // (size[0] * size[1])) if all(size) else []


def find_tower(owner: PreTrainedModel) -> Tower:
    """Return the vision tower below ``owner``, the module that receives ``input_ids``.

    Raises:
        ValueError: There is none that can be recorded; the message has the reason, and what can be done instead.
    """
    reason = _why_not(owner)
    if reason is not None:
        raise ValueError(
            f"gap_triton can't watch the vision tower of {type(owner).__name__}: {reason}. {ALTERNATIVE.capitalize()}"
        )
    ((module, layers),) = _candidates(owner)
    has_cls = _has_cls(module)
    cls_last = has_cls and bool(_appends_cls(module))
    strategy = getattr(owner.config, "vision_feature_select_strategy", None)
    merge = _merge_of(owner, module)
    window = None
    if getattr(module.config, "fullatt_block_indexes", None) is not None:
        window = module.config.window_size // merge // module.config.patch_size
    seeing = _seeing_layers(module, layers)
    last = _feature_layer(owner, module, len(layers))
    return Tower(
        owner=owner,
        module=module,
        layers=tuple(layers),
        attention=_attention_of(layers[max(index for index in seeing if index <= last)])[0],
        earlier={
            name: _attention_of(layers[index])[0]
            for name, index in earlier_layers(seeing, len(layers)).items()
        },
        projector=_projector_of(owner),
        has_cls=has_cls,
        leading=0 if cls_last else int(has_cls if strategy is None else strategy == "default"),
        trailing=int(cls_last),
        patches=getattr(owner, "patches_per_token", merge**2),
        window=window,
    )


def image_shape(arguments: dict[str, Any]) -> tuple[int | None, int, int] | None:
    """Return the number of images, or tiles, and their height and width in pixels; None where they aren't of one size.

    The number is None where samples with fewer images than others are filled up. Pixels may be given by their shape alone.
    """
    pixels = arguments.get("pixel_values")
    shape = pixels.shape if isinstance(pixels, Tensor) else pixels
    if not isinstance(shape, torch.Size) or len(shape) < 4:
        return None
    return shape[0] if len(shape) == 4 else None, shape[-2], shape[-1]


def patch_size_of(config: Any) -> tuple[int, int] | None:
    """Return the height and width in pixels of a patch of a vision tower with this config, None where it has none."""
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int):
        return patch, patch
    if isinstance(patch, (list, tuple)) and len(patch) == 2:
        return int(patch[0]), int(patch[1])
    return None


def pooling_of(owner: PreTrainedModel) -> int:
    """Return the side of the square of patches that become one visual token, by the config; 1 where it has none.

    Other steps of a model, such as strided convolutions, show in a number of tokens that differs from this one's.
    """
    vision = getattr(owner.config, "vision_config", None)
    for name in POOLING_FIELDS:
        sides = (side_of(getattr(config, name, None)) for config in (owner.config, vision))
        if (side := next(filter(None, sides), None)) is not None:
            return side
    ratios = (getattr(config, name, None) for name in RATIO_FIELDS for config in (owner.config, vision))
    ratio = next((ratio for ratio in ratios if isinstance(ratio, float)), None)
    if ratio is not None and 0 < ratio <= 1 and ratio * round(1 / ratio) == 1:
        return round(1 / ratio)
    tokens, patch = getattr(owner.config, "mm_tokens_per_image", None), patch_size_of(vision)
    if vision is not None and isinstance(tokens, int) and tokens > 0 and patch is not None:
        return max(vision.image_size // patch[0] // math.isqrt(tokens), 1)
    return 1


def side_of(size: Any) -> int | None:
    """Return the side of a square of this ``size``: one number, or two of the same; None if it is no square."""
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) and size > 0 else None


def resamples(owner: PreTrainedModel) -> bool:
    """Return whether ``owner`` makes visual tokens by attention over all patches, as Aria does: these have no position."""
    return any(
        calls_interface(module) or isinstance(module, nn.MultiheadAttention)
        for child in owner.children()
        if not isinstance(child, PreTrainedModel)
        for module in child.modules()
    )


def packs(owner: PreTrainedModel) -> bool:
    """Return whether ``owner`` joins tiles and puts newlines after their rows, as LLaVA-NeXT does."""
    pack = getattr(owner, "pack_image_features", None)
    return pack is not None and "image_features" in inspect.signature(pack).parameters


def _why_not(owner: PreTrainedModel) -> str | None:
    if not hasattr(owner, ENCODERS["image"]):
        return f"it has no {ENCODERS['image']}, in which the tower would run"
    if "image_merge_sizes" in inspect.signature(getattr(owner, ENCODERS["image"])).parameters:
        return "it merges patches by sizes that differ from image to image (image_merge_sizes)"
    if packs(owner) and _projector_of(owner) is None:
        return "it makes its visual tokens of several of the tower's features"
    if resamples(owner):
        return "it makes each of its visual tokens of all patches, by attention"
    candidates = _candidates(owner)
    if not candidates:
        return "found no encoder whose layers hold one attention module that calls transformers' attention interface"
    if len(candidates) > 1:
        names = " and ".join(type(module).__name__ for module, _ in candidates)
        return f"it has several, {names}"
    module, layers = candidates[0]
    if not _seeing_layers(module, layers):
        full = module.config.fullatt_block_indexes
        return f"each of its {len(layers)} layers attends within windows (fullatt_block_indexes={full!r})"
    if _has_cls(module) and _appends_cls(module) is None:
        return (
            f"the code of {type(module).__name__} can't be read, so where it puts its CLS token is not known"
        )
    inside = set(layers.modules())  # there they mix tokens, as attention does
    overlapping = next(
        (
            m
            for m in module.modules()
            if isinstance(m, nn.Conv2d) and m.kernel_size > m.stride and m not in inside
        ),
        None,
    )
    if overlapping is not None:
        return f"{type(module).__name__} makes a visual token of patches that belong to others too ({overlapping})"
    last = _feature_layer(owner, module, len(layers))
    if not _seeing_layers(module, layers)[0] <= last < len(layers):
        return f"vision_feature_layer={owner.config.vision_feature_layer!r} takes its features from no layer's output"
    return None


def _candidates(owner: PreTrainedModel) -> list[tuple[PreTrainedModel, nn.ModuleList]]:
    text = text_model_of(owner)
    encoders = []
    for name, child in owner.named_children():
        if (
            not isinstance(child, PreTrainedModel)
            or "audio" in name
            or any(m is text for m in child.modules())
        ):
            continue
        stacks = [m for m in child.modules() if isinstance(m, nn.ModuleList) and _is_encoder(m)]
        if stacks:
            encoders.append((child, max(stacks, key=len)))
    return encoders


def _is_encoder(layers: nn.ModuleList) -> bool:
    attentions = [_attention_of(layer) for layer in layers]
    return any(attentions) and all(
        len(each) <= 1 and not any(getattr(one, "is_causal", False) for one in each) for each in attentions
    )


def _attention_of(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if calls_interface(module)]


def _seeing_layers(module: PreTrainedModel, layers: nn.ModuleList) -> list[int]:
    """The layers whose attention sees the whole image: others attend within windows, or to nothing (LFM3-VL)."""
    return [
        index for index in layers_without_windows(module.config, len(layers)) if _attention_of(layers[index])
    ]


def layers_without_windows(config: Any, layers: int) -> list[int]:
    """Return those of a tower's ``layers`` that do not attend within windows, by its ``config``."""
    full = getattr(config, "fullatt_block_indexes", None)
    return [index for index in range(layers) if full is None or index in full]


def _feature_layer(owner: PreTrainedModel, module: PreTrainedModel, layers: int) -> int:
    """The layer whose output becomes the visual features; the deepest, if several do."""
    feature_layer = getattr(owner.config, "vision_feature_layer", None)
    if feature_layer is None or getattr(module.config, "fullatt_block_indexes", None) is not None:
        return layers - 1
    # State 0 enters the first layer, and state i + 1 is what layer i puts out.
    states = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    return max(state + layers if state < 0 else state - 1 for state in states)


def last_third(layers: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """Return the layers whose outputs tokens may be compared by: those of the last third, and the one before it."""
    return layers[-1 - len(layers) // 3 :]


def earlier_layers(seeing: Sequence[int], layers: int) -> dict[str, int]:
    """Return the layers before the scoring one that may score too, by the names of `EARLIER`.

    Each is the last of the first share of all layers, or the layer nearest to it that sees the whole image; of two that are
    equally near, the later one.

    Args:
        seeing: Layers whose attention sees the whole image, at least one.
        layers: How many layers the tower has.
    """
    return {name: _nearest(seeing, share * layers - 1) for name, share in EARLIER.items()}


def _nearest(layers: Sequence[int], place: float) -> int:
    return min(layers, key=lambda index: (abs(index - place), -index))


def _merge_of(owner: PreTrainedModel, module: PreTrainedModel) -> int:
    if GRID_FIELDS["image"] not in inspect.signature(getattr(owner, ENCODERS["image"])).parameters:
        return 1
    # A tower that merges patches, or has a projector that does, gets those of one token one after the other. Models that
    # take patches in raster order and merge them (PaddleOCR-VL) use other names.
    sizes = (getattr(each, "spatial_merge_size", None) for each in (module, *owner.children()))
    return next((size for size in sizes if isinstance(size, int)), 1)


def _projector_of(owner: PreTrainedModel) -> nn.Module | None:
    projector = owner._modules.get("multi_modal_projector")
    return projector if projector is not None and _maps_single_tokens(projector) else None


def _grids_of(arguments: dict[str, Any]) -> tuple[tuple[int, int, int], ...]:
    """Frames, rows and columns of patches of each image or video among an encoder's arguments."""
    sizes = host_sizes(arguments)
    grids: tuple[tuple[int, int, int], ...] = next(
        sizes[name] for name in GRID_FIELDS.values() if name in sizes
    )
    return grids


def _has_cls(module: nn.Module) -> bool:
    return any(name.rsplit(".", 1)[-1] in CLS_PARAMETERS for name, _ in module.named_parameters())


def _appends_cls(module: nn.Module) -> bool | None:
    """Whether the CLS token of ``module`` comes behind the patches, by its code.

    None where that names the token, and there is no source. Where modules inside of it do, the token comes first.
    """
    forward = inspect.unwrap(type(module).forward)
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError):
        return False if set(CLS_PARAMETERS).isdisjoint(forward.__code__.co_names) else None
    return any(
        isinstance(node, ast.List) and len(node.elts) > 1 and _names_cls(node.elts[-1])
        for node in ast.walk(code)
    )


def _names_cls(node: ast.expr) -> bool:
    names = (getattr(each, "id", getattr(each, "attr", None)) for each in ast.walk(node))
    return any(name in CLS_PARAMETERS for name in names)


def _maps_single_tokens(module: nn.Module) -> bool:
    """Whether ``module`` only chains layers that work on the last dimension, by its code."""
    children = dict(module.named_children())
    if not children:
        kind = type(module)
        return (
            isinstance(module, (nn.Linear, nn.LayerNorm, nn.Identity))
            or kind.__module__.startswith(("torch.nn.modules.activation", "transformers.activations"))
            or kind.__name__.endswith("RMSNorm")
        )
    names = inspect.unwrap(type(module).forward).__code__.co_names
    return set(names) <= set(children) and all(map(_maps_single_tokens, children.values()))
