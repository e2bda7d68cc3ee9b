"""The vision tower of a model: which module it is, and hooks that let it tell about the visual tokens.

There is no list of towers. A tower is taken if it is a pretrained model below the module that receives ``input_ids``, whose
layers each hold one attention module that calls transformers' attention interface and looks both ways.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..introspect import NAME, WATCHED, calls_interface, text_model_of
from .recording import INSTEAD, Encoded, Need, Needs, Recording, TowerOutput, recording_now

__all__ = ["Need", "Tower", "TowerOutput", "TowerWatch", "check_needs", "find_tower", "install", "note_sizes"]

ENCODERS = {"image": "get_image_features", "video": "get_video_features"}
# Arguments that tell frames, rows and columns of patches.
GRID_FIELDS = {"image": "image_grid_thw", "video": "video_grid_thw"}
PIXEL_FIELDS = ("pixel_values", "pixel_values_videos")
ENCODED_AHEAD = "mm_encoder_outputs"  # by modality, what generate() encoded before the forward
ENCODED_ATTRIBUTE = "_gap_encoded"
POOLING_FIELDS = (
    "spatial_merge_size",
    "downsample_factor",
    "scale_factor",
    "hidden_stride",
    "projector_pooling_ratio",
)
CLS_PARAMETERS = ("class_embedding", "cls_token")

# Weak: a forward that fails never stops its watch, and then nothing else holds it.
_watch_now: ContextVar[weakref.ref[TowerWatch] | None] = ContextVar("gap_triton_tower_watch", default=None)


@dataclass(frozen=True, eq=False)
class Tower:
    """The vision tower of a model.

    Attributes:
        owner: The module that receives ``input_ids``, whose ``get_image_features`` runs the tower.
        module: The vision encoder.
        layers: Its layers.
        attention: Attention of the scoring layer: the one whose output becomes the visual features (the deepest, if several
            do); where a tower has windows, the last layer without.
        projector: Maps the tower's features to the width of the decoder one token at a time, None where there is no such
            module.
        has_cls: The tower's first token is a CLS token.
        leading: Number of tokens in front of each image that don't become features.
        merge: Side of the square of patches that become one token, where it is handed them one after the other; else 1.
        window: Side of a window in merged tokens, None where the tower has no windows.
    """

    owner: PreTrainedModel
    module: PreTrainedModel
    layers: tuple[nn.Module, ...]
    attention: nn.Module
    projector: nn.Module | None
    has_cls: bool
    leading: int
    merge: int
    window: int | None

    def to_features(self, rows: Tensor, arguments: dict[str, Any], tokens: int | None) -> Tensor:
        """What the tower tells of its patches, as what it tells of the features: raster order, patches of a token averaged.

        Args:
            rows: [P, ...], the patches of all images in the tower's order.
            arguments: What the encoder was told, by name.
            tokens: F, None where the model adds rows of its own to the features, or leaves some out.

        Returns:
            [F, ...]; ``rows`` where nothing says which patches become one token.
        """
        if self.merge > 1:
            rows = _mean(rows.unflatten(0, (-1, self.merge**2)), (1,))
            if self.window is not None:
                rows = rows[_out_of_windows(_grids_of(arguments), self.merge, self.window).to(rows.device)]
            return rows
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
                _mean(image.unflatten(0, (h // pool, pool, w // pool, pool)), (1, 3)).flatten(0, 1)
                for image, (h, w) in zip(images, sizes, strict=True)
            ]
        )

    def stands(self) -> bool:
        """Whether the model still holds this tower, and none of what was found of it has been replaced."""
        try:
            found = find_tower(self.owner)
        except ValueError:
            return False
        same = all(
            getattr(found, name) is getattr(self, name) for name in ("module", "attention", "projector")
        )
        return same and found.layers == self.layers

    def _sizes(self, arguments: dict[str, Any], patches: int) -> list[tuple[int, int]]:
        """Rows and columns of patches of each image that the tower takes in raster order; empty where they aren't known."""
        if any(name in arguments for name in GRID_FIELDS.values()):
            return [(height, width) for frames, height, width in _grids_of(arguments) for _ in range(frames)]
        images, patch = image_shape(arguments), patch_size_of(self.module.config)
        if images is None or patch is None:
            return []
        if arguments.get("image_sizes") is not None:
            return [
                (height // patch[0], width // patch[1])
                for height, width in torch.as_tensor(arguments["image_sizes"]).tolist()
            ]
        size = (images[1] // patch[0], images[2] // patch[1])
        return [size] * (patches // (size[0] * size[1])) if all(size) else []


def find_tower(owner: PreTrainedModel) -> Tower:
    """The vision tower below ``owner``, the module that receives ``input_ids``.

    Raises:
        ValueError: There is none that could be watched; the sentence says why, and what can be done instead.
    """
    reason = _why_not(owner)
    if reason is not None:
        raise ValueError(
            f"gap_triton can't watch the vision tower of {type(owner).__name__}: {reason}. {INSTEAD.capitalize()}"
        )
    ((module, layers),) = _candidates(owner)
    has_cls = any(name.rsplit(".", 1)[-1] in CLS_PARAMETERS for name, _ in module.named_parameters())
    strategy = getattr(owner.config, "vision_feature_select_strategy", None)
    merge = _merge_of(owner, module)
    window = None
    if getattr(module.config, "fullatt_block_indexes", None) is not None:
        window = module.config.window_size // merge // module.config.patch_size
    return Tower(
        owner=owner,
        module=module,
        layers=tuple(layers),
        attention=_attention_of(layers[_scoring_layer(owner, module, len(layers))])[0],
        projector=_projector_of(owner),
        has_cls=has_cls,
        leading=int(has_cls if strategy is None else strategy == "default"),
        merge=merge,
        window=window,
    )


def check_needs(tower: Tower, needs: Needs) -> None:
    """Raise ValueError if ``tower`` can't tell what is asked of it; the sentence names what it can."""
    name = type(tower.module).__name__
    if "cls" in needs and not tower.has_cls:
        raise ValueError(
            f"{name} has no CLS token, whose attention could rank the visual tokens: use score='received', the attention "
            "that each of them receives"
        )
    if "features" in needs and tower.projector is None:
        raise ValueError(
            f"{type(tower.owner).__name__} has no projector that maps the features of {name} one token at a time, so they "
            "can't be combined before it"
        )


class TowerWatch:
    """What the vision tower tells in one forward.

    Args:
        tower: The tower.
        needs: What it is to tell.
    """

    def __init__(self, tower: Tower, needs: Needs):
        self.tower, self.needs = tower, frozenset(needs)
        self.encoded: dict[str, Encoded] = {}
        self._token: Any = None

    def start(self, kwargs: dict[str, Any] | None = None) -> None:
        """Watch the encoders that run in this thread until `stop`.

        Args:
            kwargs: The keyword arguments of the owner's forward, among which ``generate()`` hands it what it has encoded.
        """
        self.encoded = encoded_ahead(kwargs or {})
        self._token = _watch_now.set(weakref.ref(self))

    def stop(self) -> None:
        """Watch no longer."""
        if self._token is not None:
            _watch_now.reset(self._token)
            self._token = None

    def output(self) -> TowerOutput:
        """What the tower told.

        Raises:
            ValueError: It did not run in this forward, or what was encoded ahead of it lacks something.
        """
        parts = [self.encoded[modality] for modality in ENCODERS if modality in self.encoded]
        missing = self.needs.difference(*(part.needs for part in parts)) if parts else self.needs
        if not parts or missing:
            raise ValueError(
                f"{type(self.tower.module).__name__} did not tell {', '.join(map(repr, sorted(missing)))} of this prompt's "
                "visual tokens: pass pixel_values with the prompt, not image features that were encoded before, or "
                f"{INSTEAD}"
            )
        return TowerOutput.concatenate(part.output for part in parts)


def encoded_ahead(kwargs: dict[str, Any]) -> dict[str, Encoded]:
    """By modality, what was recorded of the encoders that ran before a forward with these keyword arguments."""
    outputs = kwargs.get(ENCODED_AHEAD) or {}
    found = {modality: getattr(output, ENCODED_ATTRIBUTE, None) for modality, output in outputs.items()}
    return {modality: encoded for modality, encoded in found.items() if encoded is not None}


def image_shape(arguments: dict[str, Any]) -> tuple[int | None, int, int] | None:
    """Number of images, or tiles, and their height and width in pixels; None where they aren't of one size.

    The number is None where samples with fewer images than others are filled up.
    """
    pixels = arguments.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.dim() < 4:
        return None
    return len(pixels) if pixels.dim() == 4 else None, pixels.shape[-2], pixels.shape[-1]


def patch_size_of(config: Any) -> tuple[int, int] | None:
    """Height and width in pixels of a patch of a vision tower with this config, None where it does not tell."""
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int):
        return patch, patch
    if isinstance(patch, (list, tuple)) and len(patch) == 2:
        return int(patch[0]), int(patch[1])
    return None


def pooling_of(owner: PreTrainedModel) -> int:
    """Side of the square of patches that become one visual token, as the config tells; 1 where it tells none.

    What a model does besides, such as strided convolutions, shows in another number of tokens than this comes to.
    """
    vision = getattr(owner.config, "vision_config", None)
    for name in POOLING_FIELDS:
        sides = (getattr(config, name, None) for config in (owner.config, vision))
        if (side := next((side for side in sides if isinstance(side, int) and side > 0), None)) is not None:
            return side
    ratio = getattr(owner.config, "downsample_ratio", None)
    if isinstance(ratio, float) and 0 < ratio <= 1 and ratio * round(1 / ratio) == 1:
        return round(1 / ratio)
    tokens, patch = getattr(owner.config, "mm_tokens_per_image", None), patch_size_of(vision)
    if vision is not None and isinstance(tokens, int) and tokens > 0 and patch is not None:
        return max(vision.image_size // patch[0] // math.isqrt(tokens), 1)
    return 1


def resamples(owner: PreTrainedModel) -> bool:
    """Whether ``owner`` makes visual tokens by attention over all patches, as Aria and Idefics 2 do: these stand nowhere."""
    return any(
        calls_interface(module) or isinstance(module, nn.MultiheadAttention)
        for child in owner.children()
        if not isinstance(child, PreTrainedModel)
        for module in child.modules()
    )


def packs(owner: PreTrainedModel) -> bool:
    """Whether ``owner`` puts tiles together and newlines behind their rows, as LLaVA-NeXT does."""
    pack = getattr(owner, "pack_image_features", None)
    return pack is not None and "image_features" in inspect.signature(pack).parameters


def install(tower: Tower, needs: Callable[[], Needs] = frozenset) -> list[Any]:
    """Let ``tower`` report, and run it under ``"gap_triton"``.

    Args:
        tower: The tower.
        needs: Asked when an encoder runs outside a watched forward, as ahead of one in ``generate()``: what the next forward
            will need. Nothing is recorded where that is nothing.

    Returns:
        Handles, whose ``remove()`` takes everything off again and restores the tower's implementation of attention.
    """
    handles: list[Any] = [_Mark(tower.attention)]
    for modality, method in ENCODERS.items():
        if hasattr(tower.owner, method):
            handles.append(_Wrapped(tower.owner, method, partial(_encode, tower, modality, needs)))
    for layer in tower.layers[-1 - len(tower.layers) // 3 :]:
        handles.append(layer.register_forward_hook(_after_layer))
    if tower.projector is not None:
        handles.append(tower.projector.register_forward_pre_hook(_before_projector))
    if tower.module.config._attn_implementation != NAME:
        handles.append(_Switched(tower.module))
    return handles


def note_sizes(owner: PreTrainedModel) -> list[Any]:
    """Let the encoders of ``owner`` note how large their images are, where `generate` runs them ahead and tells nobody else.

    Returns:
        Handles, whose ``remove()`` takes everything off again.
    """
    methods = [method for method in ENCODERS.values() if hasattr(owner, method)]
    return [_Wrapped(owner, method, _encode_and_note) for method in methods]


# --------------------------------------------------------------------------------------------- hooks
def _after_layer(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    recording = recording_now.get()
    if recording is not None and "similarity" in recording.needs:
        recording.layer_done(output[0] if isinstance(output, tuple) else output)


def _before_projector(projector: nn.Module, args: tuple[Any, ...]) -> None:
    recording = recording_now.get()
    if recording is not None and "features" in recording.needs:
        recording.projecting(args[0])


def _encode_and_note(encoder: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    output = encoder(*args, **kwargs)
    if isinstance(output, ModelOutput):
        bound = inspect.signature(encoder).bind(*args, **kwargs).arguments
        noted = Encoded(_without_pixels(bound), frozenset(), _count(output), TowerOutput())
        setattr(output, ENCODED_ATTRIBUTE, noted)
    return output


def _encode(
    tower: Tower,
    modality: str,
    needs: Callable[[], Needs],
    encoder: Callable[..., Any],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``encoder(*args, **kwargs)``, recorded for the watched forward that it is in, or for the one to come."""
    watch = _watch_of(tower)
    wanted = frozenset(needs()) | (frozenset() if watch is None else watch.needs)
    if not wanted or recording_now.get() is not None:
        return encoder(*args, **kwargs)
    recording = Recording(tower, wanted)
    token = recording_now.set(recording)
    try:
        output = encoder(*args, **kwargs)
    finally:
        recording_now.reset(token)
    bound = inspect.signature(encoder).bind(*args, **kwargs).arguments
    _refuse_other_features(tower.owner, bound)
    tokens = _count(output)
    told = recording.output(bound, None if packs(tower.owner) else tokens)
    found = Encoded(_without_pixels(bound), wanted, tokens, told)
    if watch is not None:
        watch.encoded[modality] = found
    if isinstance(output, ModelOutput):
        # Also beside a watch: one that an exception has left behind is not that of the forward to come.
        setattr(output, ENCODED_ATTRIBUTE, found)
    return output


def _watch_of(tower: Tower) -> TowerWatch | None:
    reference = _watch_now.get()
    watch = None if reference is None else reference()
    return watch if watch is not None and watch.tower is tower else None


def _refuse_other_features(owner: PreTrainedModel, arguments: dict[str, Any]) -> None:
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        given, known = arguments.get(name), getattr(owner.config, name, None)
        if given is not None and given != known:
            raise ValueError(
                f"{name}={given!r}: the vision tower is watched for {known!r}; set it in model.config before "
                "pruning is attached"
            )


def _without_pixels(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments`` with pixels of the same shape that take no memory, for as long as a generation lasts."""
    return {
        name: value.to("meta") if name in PIXEL_FIELDS and isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def _count(output: Any) -> int:
    """Number of features in what an encoder puts out, 0 if there are none to be put into the prompt."""
    features = getattr(output, "pooler_output", output)
    if isinstance(features, ModelOutput):
        return 0
    if isinstance(features, (tuple, list)) and not isinstance(features[0], Tensor):
        features = features[0]  # transformers 4: with deepstack features behind
    if isinstance(features, Tensor):
        features = [features]
    return sum(each.shape[:-1].numel() for each in features)


class _Mark:
    """Marks the scoring layer's attention, so that others need no look at a context variable."""

    def __init__(self, attention: nn.Module):
        self.attention = attention
        setattr(attention, WATCHED, True)

    def remove(self) -> None:
        delattr(self.attention, WATCHED)


class _Wrapped:
    """Runs an encoder of this owner through ``run``. No hook runs at a method, and only it is told the sizes of images.

    Several may lie around each other; the last one is removed first.
    """

    def __init__(self, owner: PreTrainedModel, method: str, run: Callable[..., Any]):
        self.owner, self.method = owner, method
        self.previous = vars(owner).get(method)
        encoder = getattr(owner, method)
        setattr(owner, method, update_wrapper(partial(run, encoder), encoder))

    def remove(self) -> None:
        delattr(self.owner, self.method)
        if self.previous is not None:
            setattr(self.owner, self.method, self.previous)


class _Switched:
    """Runs a tower under ``"gap_triton"`` that was loaded with another implementation of attention."""

    def __init__(self, module: PreTrainedModel):
        self.module, self.restore = module, module.config._attn_implementation
        module.set_attn_implementation(NAME)

    def remove(self) -> None:
        self.module.set_attn_implementation(self.restore)


# --------------------------------------------------------------------------------------------- finding
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
        return "found no encoder whose layers each hold one attention module that calls transformers' attention interface"
    if len(candidates) > 1:
        names = " and ".join(type(module).__name__ for module, _ in candidates)
        return f"it has several, {names}"
    module, layers = candidates[0]
    full = getattr(module.config, "fullatt_block_indexes", None)
    if full is not None and not any(index < len(layers) for index in full):
        return f"each of its {len(layers)} layers attends within windows (fullatt_block_indexes={full!r})"
    overlapping = next(
        (m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size > m.stride), None
    )
    if overlapping is not None:
        return f"{type(module).__name__} makes a visual token of patches that belong to others too ({overlapping})"
    if not 0 <= _scoring_layer(owner, module, len(layers)) < len(layers):
        return f"vision_feature_layer={owner.config.vision_feature_layer!r} takes its features from no layer's output"
    return None


def _candidates(owner: PreTrainedModel) -> list[tuple[PreTrainedModel, nn.ModuleList]]:
    text = text_model_of(owner)
    found = []
    for name, child in owner.named_children():
        if (
            not isinstance(child, PreTrainedModel)
            or "audio" in name
            or any(m is text for m in child.modules())
        ):
            continue
        stacks = [m for m in child.modules() if isinstance(m, nn.ModuleList) and _is_encoder(m)]
        if stacks:
            found.append((child, max(stacks, key=len)))
    return found


def _is_encoder(layers: nn.ModuleList) -> bool:
    attentions = [_attention_of(layer) for layer in layers]
    return bool(attentions) and all(
        len(each) == 1 and not getattr(each[0], "is_causal", False) for each in attentions
    )


def _attention_of(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if calls_interface(module)]


def _scoring_layer(owner: PreTrainedModel, module: PreTrainedModel, layers: int) -> int:
    full = getattr(module.config, "fullatt_block_indexes", None)
    if full is not None:
        return max((index for index in full if index < layers), default=layers)
    chosen = getattr(owner.config, "vision_feature_layer", None)
    if chosen is None:
        return layers - 1
    # State 0 enters the first layer, and state i + 1 is what layer i puts out.
    states = [chosen] if isinstance(chosen, int) else list(chosen)
    return max(state + layers if state < 0 else state - 1 for state in states)


def _merge_of(owner: PreTrainedModel, module: PreTrainedModel) -> int:
    if GRID_FIELDS["image"] not in inspect.signature(getattr(owner, ENCODERS["image"])).parameters:
        return 1
    # A tower that merges patches, or has a projector that does, is handed those of one token one after the other. What takes
    # patches in raster order and puts them together (PaddleOCR-VL) goes by other names.
    sizes = (getattr(each, "spatial_merge_size", None) for each in (module, *owner.children()))
    return next((size for size in sizes if isinstance(size, int)), 1)


def _projector_of(owner: PreTrainedModel) -> nn.Module | None:
    projector = owner._modules.get("multi_modal_projector")
    return projector if projector is not None and _maps_single_tokens(projector) else None


def _mean(rows: Tensor, dim: tuple[int, ...]) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).mean(dim=dim).to(rows.dtype)


def _grids_of(arguments: dict[str, Any]) -> list[list[int]]:
    """Frames, rows and columns of patches of each image or video that an encoder was told."""
    return next(arguments[name] for name in GRID_FIELDS.values() if name in arguments).tolist()


def _out_of_windows(grids: list[list[int]], merge: int, window: int) -> Tensor:
    """[F] int64: by feature in raster order, where it stands in a tower that goes window by window through each frame."""
    places, start = [], 0
    for frames, height, width in grids:
        row, column = torch.meshgrid(
            torch.arange(height // merge), torch.arange(width // merge), indexing="ij"
        )
        # A stable sort keeps raster order inside a window.
        in_windows = ((row // window) * width + column // window).flatten().argsort(stable=True)
        for _ in range(frames):
            places.append(in_windows.argsort() + start)
            start += len(in_windows)
    return torch.cat(places)


def _maps_single_tokens(module: nn.Module) -> bool:
    """Whether ``module`` only chains layers that work on the last dimension, as far as its code tells."""
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
