"""Hooks on a vision tower, which record what it computes about the visual tokens."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial, update_wrapper
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..introspect import NAME, SCORES
from .finding import ALTERNATIVE, ENCODERS, PIXEL_FIELDS, Tower, last_third, packs
from .recording import Encoded, Needs, Recording, TowerOutput, current_recording
from .sizes import HOST_SIZES, host_sizes

ENCODER_OUTPUTS = "mm_encoder_outputs"  # by modality, what generate() encoded before the forward
ENCODED_ATTRIBUTE = "_gap_encoded"

# Weak: a forward that fails never stops its recorder, and then nothing else holds it.
_current_recorder: ContextVar[weakref.ref[TowerRecorder] | None] = ContextVar(
    "gap_triton_tower_recorder", default=None
)


def check_needs(tower: Tower, needs: Needs) -> None:
    """Raise ValueError if ``tower`` does not have something of ``needs``; the message names what it has."""
    name = type(tower.module).__name__
    if any(need.endswith("cls") for need in needs) and not tower.has_cls:
        raise ValueError(
            f"{name} has no CLS token, whose attention could rank the visual tokens: use score='received', the attention "
            "that each of them receives"
        )
    if "features" in needs and tower.projector is None:
        raise ValueError(
            f"{type(tower.owner).__name__} has no projector that maps the features of {name} one token at a time, so they "
            "can't be combined before it"
        )


class TowerRecorder:
    """Records the vision tower in one forward.

    Args:
        tower: The tower.
        needs: What to record.
    """

    def __init__(self, tower: Tower, needs: Needs):
        self.tower, self.needs = tower, frozenset(needs)
        self.encoded: dict[str, Encoded] = {}
        self.sizes: Any = None
        self._token: Any = None

    def start(self, kwargs: dict[str, Any] | None = None) -> None:
        """Record the encoders that run in this thread until `stop`.

        Args:
            kwargs: The keyword arguments of the owner's forward, among which ``generate()`` passes what it has encoded, and
                under `HOST_SIZES` may be what the host knows of the sizes of images.
        """
        self.encoded = encoder_outputs(kwargs or {})
        self.sizes = (kwargs or {}).get(HOST_SIZES)
        self._token = _current_recorder.set(weakref.ref(self))

    def stop(self) -> None:
        """Stop recording."""
        if self._token is not None:
            _current_recorder.reset(self._token)
            self._token = None

    def output(self) -> TowerOutput:
        """Return what was recorded.

        Raises:
            ValueError: The tower did not run in this forward, or what was encoded before it lacks something.
        """
        parts = [self.encoded[modality] for modality in ENCODERS if modality in self.encoded]
        missing = self.needs.difference(*(part.needs for part in parts)) if parts else self.needs
        if not parts or missing:
            raise ValueError(
                f"{type(self.tower.module).__name__} did not tell {', '.join(map(repr, sorted(missing)))} of this prompt's "
                "visual tokens: pass pixel_values with the prompt, not image features that were encoded before, or "
                f"{ALTERNATIVE}"
            )
        return TowerOutput.concatenate(part.output for part in parts)


def encoder_outputs(kwargs: dict[str, Any]) -> dict[str, Encoded]:
    """Return what was recorded, by modality, of the encoders that ran before a forward with these keyword arguments."""
    outputs = kwargs.get(ENCODER_OUTPUTS) or {}
    encoders = {modality: getattr(output, ENCODED_ATTRIBUTE, None) for modality, output in outputs.items()}
    return {modality: encoded for modality, encoded in encoders.items() if encoded is not None}


def nothing_known() -> None:
    """Return what the host knows of the sizes of images that are encoded outside a recorded forward: nothing."""


def install(
    tower: Tower,
    needs: Callable[[], Needs] = frozenset,
    sizes: Callable[[], dict[str, Any] | None] = nothing_known,
) -> list[Any]:
    """Install the hooks that record ``tower``, and run it under ``"gap_triton"``.

    Args:
        tower: The tower.
        needs: Called when an encoder runs outside a recorded forward, as before one in ``generate()``: what the next forward
            will need. Nothing is recorded where that is nothing.
        sizes: Called there too: what the host knows of the sizes of images.

    Returns:
        Handles, whose ``remove()`` takes everything off again and restores the tower's implementation of attention.
    """
    handles: list[Any] = [_Mark(each) for each in dict.fromkeys([tower.attention, *tower.earlier.values()])]
    for modality, method in ENCODERS.items():
        if hasattr(tower.owner, method):
            handles.append(_Wrapped(tower.owner, method, partial(_encode, tower, modality, needs, sizes)))
    for layer in last_third(tower.layers):
        handles.append(layer.register_forward_hook(_after_layer))
    if tower.projector is not None:
        handles.append(tower.projector.register_forward_pre_hook(_before_projector))
    if tower.module.config._attn_implementation != NAME:
        handles.append(_Switched(tower.module))
    return handles


def record_sizes(owner: PreTrainedModel) -> list[Any]:
    """Let the encoders of ``owner`` record the sizes of their images: `generate` passes these to no other module.

    Returns:
        Handles, whose ``remove()`` takes everything off again.
    """
    methods = [method for method in ENCODERS.values() if hasattr(owner, method)]
    return [_Wrapped(owner, method, _encode_and_record_size) for method in methods]


def _after_layer(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    recording = current_recording.get()
    if recording is not None and "similarity" in recording.needs:
        recording.record_hidden_states(output[0] if isinstance(output, tuple) else output)


def _before_projector(projector: nn.Module, args: tuple[Any, ...]) -> None:
    recording = current_recording.get()
    if recording is not None and "features" in recording.needs:
        recording.record_features(args[0])


def _encode_and_record_size(encoder: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    output = encoder(*args, **kwargs)
    if isinstance(output, ModelOutput):
        bound = inspect.signature(encoder).bind(*args, **kwargs).arguments
        encoded = Encoded(_without_pixels(bound), frozenset(), _count(output), TowerOutput())
        setattr(output, ENCODED_ATTRIBUTE, encoded)
    return output


def _encode(
    tower: Tower,
    modality: str,
    needs: Callable[[], Needs],
    sizes: Callable[[], dict[str, Any] | None],
    encoder: Callable[..., Any],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``encoder(*args, **kwargs)``, recorded for the forward that it is in, or for the one to come."""
    recorder = _recorder_of(tower)
    all_needs = frozenset(needs()) | (frozenset() if recorder is None else recorder.needs)
    if not all_needs or current_recording.get() is not None:
        return encoder(*args, **kwargs)
    recording = Recording(tower, all_needs)
    token = current_recording.set(recording)
    try:
        output = encoder(*args, **kwargs)
    finally:
        current_recording.reset(token)
    bound = dict(inspect.signature(encoder).bind(*args, **kwargs).arguments)
    _refuse_other_features(tower.owner, bound)
    if tower.asks_for_sizes():  # read here, they are known to all who ask later
        bound = host_sizes({**bound, HOST_SIZES: sizes() if recorder is None else recorder.sizes})
    tokens = _count(output)
    recorded = recording.output(bound, None if packs(tower.owner) else tokens)
    encoded = Encoded(_without_pixels(bound), all_needs, tokens, recorded)
    if recorder is not None:
        recorder.encoded[modality] = encoded
    if isinstance(output, ModelOutput):
        # Also where there is a recorder: after an exception it may not be that of the next forward.
        setattr(output, ENCODED_ATTRIBUTE, encoded)
    return output


def _recorder_of(tower: Tower) -> TowerRecorder | None:
    reference = _current_recorder.get()
    recorder = None if reference is None else reference()
    return recorder if recorder is not None and recorder.tower is tower else None


def _refuse_other_features(owner: PreTrainedModel, arguments: dict[str, Any]) -> None:
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        given, known = arguments.get(name), getattr(owner.config, name, None)
        if given is not None and given != known:
            raise ValueError(
                f"{name}={given!r}: the vision tower is watched for {known!r}; set it in model.config before "
                "pruning is attached"
            )


def _without_pixels(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments`` with the shape of pixels in their place, as they are kept for a whole generation."""
    return {
        name: value.shape if name in PIXEL_FIELDS and isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def _count(output: Any) -> int:
    """Number of features in what an encoder puts out, 0 if there are none to be put into the prompt."""
    features = getattr(output, "pooler_output", output)
    if features is None:
        features = output.last_hidden_state  # Llama 4 maps it afterwards
    if isinstance(features, ModelOutput):
        return 0
    if isinstance(features, (tuple, list)) and not isinstance(features[0], Tensor):
        features = features[0]  # transformers 4: with deepstack features after them
    if isinstance(features, Tensor):
        features = [features]
    return sum(each.shape[:-1].numel() for each in features)


class _Mark:
    """Marks the attention of a layer that may score, so that the others need not read a context variable."""

    def __init__(self, attention: nn.Module):
        self.attention = attention
        setattr(attention, SCORES, True)

    def remove(self) -> None:
        delattr(self.attention, SCORES)


class _Wrapped:
    """Runs an encoder of this owner through ``run``.

    torch has no hooks on methods, and no other module gets the sizes of images. Several may be wrapped around each other;
    the last one is removed first.
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
