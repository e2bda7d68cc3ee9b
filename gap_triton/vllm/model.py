"""What the models share: an image is encoded, its tokens are scored and chosen, and the survivors carry their ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.logger import init_logger
from vllm.sequence import IntermediateTensors

from ..vision.layout import Layout
from ..vision.needs import needs_of_stage
from ..vision_tower import TowerOutput
from .choose import Encoded, choose, prune, survivors_by_view
from .layouts import Family, chunks
from .options import options_of
from .pipeline import IDS, send_ids
from .plan import FIELDS, Plan, plans_of
from .positions import PlacedImage, after_encoding, placed, prompt_positions, with_offsets
from .runner import let_the_runner_ask
from .scores import TowerScores

logger = init_logger(f"vllm.{__name__}")


class GapModel:
    """Mixed into a model of vLLM, in front of it.

    A subclass ends its ``__init__`` with `start_pruning`.
    """

    supports_mrope = True  # what vLLM calls position ids that a model computes
    supports_multimodal_pruning = True
    gap_family: Family

    def start_pruning(
        self,
        vllm_config: VllmConfig,
        family: Family,
        attentions: Mapping[str, nn.Module],
        norms: Sequence[nn.Module] = (),
    ) -> None:
        """Prepare the model.

        Args:
            vllm_config: The engine's.
            family: How it lays out its images.
            attentions: Of the layers of the vision tower that may score, as `TowerScores` takes them; none where this rank
                of a pipeline has no tower.
            norms: Of the tower, those that get the hidden states by which tokens may be compared.

        Raises:
            ValueError: The options don't go with this model or this engine.
        """
        options = options_of(vllm_config.model_config.hf_config.gap)
        block = vllm_config.cache_config.block_size
        if options.block is not None and options.block % block:
            raise ValueError(
                f"hf_overrides['gap']: block={options.block} is no multiple of {block}, the tokens of a block of this "
                "engine's KV cache (--block-size), so an image would not end where a block does"
            )
        self.gap_family = family
        self._gap_most = vllm_config.scheduler_config.max_num_encoder_input_tokens
        let_the_runner_ask(vllm_config)
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            send_ids(self)
        # Every rank of a pipeline has a tower, and profiles memory with it; the first alone encodes what is asked about.
        ranks, total = get_tensor_model_parallel_world_size(), tensor_model_parallel_all_reduce
        whole = tensor_model_parallel_all_gather
        projector = getattr(self, "multi_modal_projector", None)
        self._gap_scores = (
            TowerScores(attentions, family.leading, ranks, total, whole, projector, norms)
            if attentions
            else None
        )
        self._gap_channels = vllm_config.model_config.hf_text_config.hidden_size
        logger.info("gap_triton prunes images before the decoder: %s", options)

    # ------------------------------------------------------------------------------------------- encoding
    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode images or videos, and return the survivors of each: [kept, C + 6], with their ids beside them."""
        name = next((field for field in FIELDS.values() if field in kwargs), None)
        if name is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        plans = plans_of(kwargs.pop(name))
        layouts = self.gap_family.layouts(kwargs, len(plans))
        survivors: list[Tensor] = []
        # The scheduler counts survivors, so it may send more images at once than memory was profiled with.
        for first, after in chunks(layouts, self._gap_most):
            fields = self.gap_family.part(kwargs, first, after)
            survivors += self._encode(fields, plans[first:after], layouts[first:after])
        return tuple(survivors)

    def _encode(
        self, fields: dict[str, Any], plans: Sequence[Plan], layouts: Sequence[Layout]
    ) -> list[Tensor]:
        pruned = [plan for plan, layout in zip(plans, layouts, strict=True) if plan.kept < layout.counts[0]]
        needs = {need for plan in pruned for need in needs_of_stage(plan.stage)}
        assert self._gap_scores is not None  # a model without its tower encodes nothing
        with self._gap_scores.record(needs) as recorded:
            features = super().embed_multimodal(**fields)  # type: ignore[misc]
            by_name = {
                name: self.gap_family.by_image(rows, fields, layouts) for name, rows in recorded.items()
            }
        survivors, projector = [], getattr(self, "multi_modal_projector", None)
        intervals = self.gap_family.intervals(fields, len(plans))
        for image, (plan, layout, rows) in enumerate(zip(plans, layouts, features, strict=True)):
            (tokens,) = layout.counts
            if len(rows) != tokens:
                raise ValueError(f"an image of {tokens} tokens became {len(rows)} rows")
            recorded_of = {name: rows_of[image] for name, rows_of in by_name.items()}
            tower = TowerOutput(**recorded_of, projector=projector)
            # Behind them may be what later layers of the decoder get (deepstack).
            own, behind = rows.split([self._gap_channels, rows.shape[1] - self._gap_channels], dim=1)
            index, own = prune(plan, layout, Encoded(own, tower))
            offsets = self.gap_family.offsets(layout, intervals[image]).to(rows.device)
            if index is not None:
                behind, offsets = behind[index], offsets[:, index]
            rows = torch.cat([own, behind], dim=1) if behind.shape[1] else own
            survivors.append(with_offsets(rows, offsets))
        return survivors

    # ------------------------------------------------------------------------------------------- ids
    def get_mrope_input_positions(
        self, input_tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        """Return the ids of a prompt, [3, L] int64, as far as they are known before it is encoded; and the delta."""
        images: list[PlacedImage] = []
        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            fields = {name: element.data for name, element in feature.data.items()}
            (plan,) = plans_of(fields.pop(FIELDS[feature.modality]))
            (layout,) = self.gap_family.layouts(fields, 1)
            (interval,) = self.gap_family.intervals(fields, 1)
            place = feature.mm_position
            sizes, rows = [layout.counts[0]], [plan.kept]
            starts = [place.offset]
            if feature.modality == "video" and self.gap_family.frame_start is not None:
                sizes = [view.size for view in layout.views]
                rows = (
                    survivors_by_view(plan, layout) or rows
                )  # they are known, or the processor has refused it
                run = range(place.offset, place.offset + place.length)
                starts = [row + 1 for row in run if input_tokens[row] == self.gap_family.frame_start]
            offsets = self.gap_family.offsets(layout, interval)
            known = choose(plan, layout)
            images += placed(starts, sizes, rows, offsets, known, plan.ids == "compacted")
        return prompt_positions(len(input_tokens), images)

    def recompute_mrope_positions(
        self,
        input_ids: Sequence[int],
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Take the ids off the survivors that the next step reads; the runner asks for every request in every step."""
        return after_encoding(
            mrope_positions,
            input_ids,
            self.gap_family.placeholders,
            multimodal_embeddings,
            num_computed_tokens,
        )

    # ------------------------------------------------------------------------------------------- decoding
    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoder, which may have one axis of ids; to a later rank of a pipeline they come with hidden states."""
        if intermediate_tensors is not None and IDS in intermediate_tensors.tensors:
            positions = intermediate_tensors[IDS].T.contiguous()
        axes = positions if self.gap_family.axes == positions.shape[0] else positions[0]
        output = super().forward(input_ids, axes, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]
        if isinstance(output, IntermediateTensors):
            output.tensors[IDS] = positions.T.contiguous()
        return output
