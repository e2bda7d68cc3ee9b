"""In front of a model's multimodal processor: fewer placeholders for an image, and the plan of which of its tokens stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFieldConfig

from .options import PREFIX, Options, options_of, without_options
from .plan import FIELD, plans_of, rows_of

logger = init_logger(f"vllm.{__name__}")


class ImagesAlone:
    """Mixed into a model's processing information: it takes no videos."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return that no more than 0 of anything but images is taken."""
        limits: Mapping[str, int | None] = super().get_supported_mm_limits()  # type: ignore[misc]
        return {modality: limit if modality == "image" else 0 for modality, limit in limits.items()}


class GapProcessor(ABC):
    """Mixed into a model's multimodal processor.

    Options are in ``hf_overrides["gap"]``, and per request in ``mm_processor_kwargs`` under names that begin with ``gap_``.
    Processors of transformers refuse names that they don't know, so ours are taken out before each of them is asked.

    Attributes:
        has_cls: The vision tower has a CLS token.
    """

    has_cls = False

    @abstractmethod
    def image_tokens(self, processed: Mapping[str, Any]) -> list[int]:
        """Return how many tokens each image has unpruned, from what the processor of transformers made of it."""

    def check_images(self, processed: Mapping[str, Any], options: Options) -> None:
        """Raise ValueError if one of the images can't be pruned by ``options``."""
        return

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return what memory is profiled with: images that keep everything, as a request may ask for."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        everything = {f"{PREFIX}preset": None, f"{PREFIX}keep": 1.0}
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, **everything})

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Process a prompt.

        Raises:
            ValueError: The options are wrong, or the prompt ends in a pruned image: its last token, whose logits are read,
                may be none of the survivors.
        """
        processed = super().apply(inputs, *args, **kwargs)  # type: ignore[misc]
        length = len(processed["prompt_token_ids"])
        ends = [place.offset + place.length for place in processed["mm_placeholders"].get("image", ())]
        # A prompt of nothing but images is what memory is profiled with.
        if length in ends and not self._options(inputs.hf_processor_mm_kwargs).keeps_everything:
            raise ValueError(
                "the prompt ends in a pruned image, whose last token may not survive: put some text after it, or send "
                f"mm_processor_kwargs={{'{PREFIX}keep': 1.0}}"
            )
        return processed

    def _options(self, kwargs: Mapping[str, Any]) -> Options:
        context = self.info.ctx  # type: ignore[attr-defined]
        merged = context.get_mm_config().merge_mm_processor_kwargs(kwargs)
        options = options_of(self.info.get_hf_config().gap, merged)  # type: ignore[attr-defined]
        if options.config.score == "cls" and not self.has_cls:
            raise ValueError(
                "score='cls': the vision tower of this model has no CLS token, whose attention could rank visual tokens: "
                "use score='received', the attention that each of them receives"
            )
        return options

    def _get_mm_hashes(self, inputs: Any) -> Any:
        # Engines that share a cache, and requests that say what the engine says anyway: an image is the same where, and only
        # where, the same is kept of it.
        factors = self._options(inputs.hf_processor_mm_kwargs).factors()
        kwargs = {**inputs.hf_processor_mm_kwargs, **factors}
        return super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=kwargs))  # type: ignore[misc]

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        processed = super()._apply_hf_processor_main(mm_items, without_options(hf_kwargs))  # type: ignore[misc]
        if "image_embeds" in processed:
            raise ValueError(
                "image_embeds: their tokens can't be told apart, because nothing is known of the encoder that made them; "
                "pass the images"
            )
        tokens = self.image_tokens(processed)
        if tokens:
            options = self._options(hf_kwargs)
            self.check_images(processed, options)
            processed[FIELD] = rows_of(options, tokens)
            # Also what the engine keeps by default, which is so said at start, of the largest image.
            for count, how in product(sorted(set(tokens)), (self._options({}), options)):
                if how.kept(count) < count:
                    logger.info_once("gap_triton: an image of %d tokens keeps %d", count, how.kept(count))
        return processed

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, without_options(hf_processor_mm_kwargs))  # type: ignore[misc]
        # It says how much there is to do, so it's read on the host.
        return {**fields, FIELD: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, without_options(hf_processor_mm_kwargs), out_mm_kwargs
        )
        return [_shortened(each, out_mm_kwargs) for each in updates if each.modality == "image"]


def _shortened(update: Any, fields: Any) -> Any:
    """``update`` with as many placeholders as an image keeps tokens."""
    whole = update.replacement

    def replacement(image: int) -> list[int]:
        placeholders: list[int] = whole(image) if callable(whole) else whole
        if not isinstance(placeholders, list) or len(set(placeholders)) != 1:
            raise TypeError(
                f"an image becomes {placeholders!r}: expected a list of one placeholder, again and again"
            )
        (plan,) = plans_of(fields["image"][image][FIELD].data)
        return placeholders[: plan.kept]

    return replace(update, replacement=replacement)
