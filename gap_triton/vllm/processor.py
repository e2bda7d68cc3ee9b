"""In front of a model's multimodal processor: fewer placeholders for an image, and the plan of which of its tokens stay.

What is said of images holds for videos, where a model takes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptUpdateDetails

from .options import PREFIX, Options, options_of, without_options
from .plan import FIELDS, Plan, plans_of, rows_of, shortened

logger = init_logger(f"vllm.{__name__}")


class ImagesAlone:
    """Mixed into a model's processing information: it takes no videos.

    Attributes:
        why: The reason, to be read after a comma.
    """

    why = "because this model was never tried with them"

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return that no more than 0 of anything but images is taken."""
        limits: Mapping[str, int | None] = super().get_supported_mm_limits()  # type: ignore[misc]
        return {modality: limit if modality == "image" else 0 for modality, limit in limits.items()}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        """Raise ValueError, with the reason for what the model would take without the plug-in."""
        taken: Mapping[str, int | None] = super().get_supported_mm_limits()  # type: ignore[misc]
        if modality in taken and modality != "image" and num_items:
            raise ValueError(
                f"gap_triton in vLLM takes no {modality} here, {self.why}: send images, or use the model's own architecture "
                "without 'gap'"
            )
        super().validate_num_items(modality, num_items)  # type: ignore[misc]


class GapProcessor(ABC):
    """Mixed into a model's multimodal processor.

    Options are in ``hf_overrides["gap"]``, and per request in ``mm_processor_kwargs`` under names that begin with ``gap_``.
    Processors of transformers refuse names that they don't know, so ours are taken out before each of them is asked.

    Attributes:
        has_cls: The vision tower has a CLS token.
        recurrent: Some layers of the decoder carry a state.
        whole_tower: The vision tower is built to its last layer.
    """

    has_cls = False
    recurrent = False
    whole_tower = False

    @abstractmethod
    def image_tokens(self, processed: Mapping[str, Any]) -> dict[str, list[int]]:
        """Return how many tokens each image has unpruned, and each video, from what the processor of transformers made."""

    def check_images(self, processed: Mapping[str, Any], options: Options) -> None:
        """Raise ValueError if one of the images can't be pruned by ``options``."""
        return

    def rows_of_image(self, modality: str, fields: Mapping[str, Any], plan: Plan) -> list[int]:
        """Return how many tokens survive of each part of an image between which there is text: of its only part.

        Args:
            modality: Whether it is a video.
            fields: What the processor of transformers made of this one.
            plan: What is kept of it.
        """
        return [plan.kept]

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
        ends = [
            place.offset + place.length
            for places in processed["mm_placeholders"].values()
            for place in places
            if place.is_embed is None or bool(place.is_embed[-1])
        ]
        # A prompt of nothing but images is what memory is profiled with.
        if length in ends and not self._options(inputs.hf_processor_mm_kwargs).keeps_everything:
            raise ValueError(
                "the prompt ends in a pruned image or video, whose last token may not survive: put some text after it, or "
                f"send mm_processor_kwargs={{'{PREFIX}keep': 1.0}}"
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
        if options.config.merge == "aggregation" and not self.whole_tower:
            raise ValueError(
                "merge='aggregation' in vLLM: it compares tokens by hidden states of the last third of the vision tower's "
                "layers, of which vLLM builds none behind the one whose features a LLaVA takes: use another merge, or "
                "gap_triton in transformers"
            )
        if options.config.ids == "compacted" and self.recurrent:
            raise ValueError(
                "ids='compacted': some decoder layers of this model carry a state, and renumbering was never tried with "
                "these: use ids='kept'"
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
        for modality in FIELDS:
            if f"{modality}_embeds" in processed:
                raise ValueError(
                    f"{modality}_embeds: their tokens can't be told apart, because nothing is known of the encoder that "
                    f"made them; pass the {modality}s"
                )
        tokens = {modality: counts for modality, counts in self.image_tokens(processed).items() if counts}
        if not tokens:
            return processed
        options = self._options(hf_kwargs)
        self.check_images(processed, options)
        for modality, counts in tokens.items():
            processed[FIELDS[modality]] = rows_of(options, counts)
            # Also what the engine keeps by default, which is so said at start, of the largest image.
            for count, how in product(sorted(set(counts)), (self._options({}), options)):
                if how.kept(count) < count:
                    article = "an" if modality == "image" else "a"
                    logger.info_once(
                        "gap_triton: %s %s of %d tokens keeps %d", article, modality, count, how.kept(count)
                    )
        return processed

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, without_options(hf_processor_mm_kwargs))  # type: ignore[misc]
        # They say how much there is to do, so they're read on the host.
        plans = {
            name: MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
            for modality, name in FIELDS.items()
        }
        return {**fields, **plans}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, without_options(hf_processor_mm_kwargs), out_mm_kwargs
        )
        return [self._shortened(each, out_mm_kwargs) for each in updates if each.modality in FIELDS]

    def _shortened(self, update: Any, every: Any) -> Any:
        """``update`` with as many placeholders as an image keeps tokens; ``every``: fields of all images and videos."""
        whole, modality = update.replacement, update.modality

        def replacement(image: int) -> Any:
            fields = {name: element.data for name, element in every[modality][image].items()}
            (plan,) = plans_of(fields[FIELDS[modality]])
            found = whole(image) if callable(whole) else whole
            rows = self.rows_of_image(modality, fields, plan)
            if isinstance(found, PromptUpdateDetails) and found.is_embed is not None:
                return replace(found, full=shortened(found.full, found.is_embed(found.full).tolist(), rows))
            if not isinstance(found, list) or len(set(found)) != 1:
                raise TypeError(f"an image becomes {found!r}: expected one placeholder, again and again")
            return shortened(found, [True] * len(found), rows)

        return replace(update, replacement=replacement)
