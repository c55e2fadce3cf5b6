"""CLIP: a vision and a text tower that meet in one embedding (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel

from adapters.clip.leave_one_out import embed_left_out, end_positions
from adapters.loading import Checkpoint, model_info, own_parts
from adapters.shared.images import prepare_images
from adapters.shared.last_block import LastBlock
from adapters.shared.stacks import find_stack
from adapters.shared.text_targets import read_texts, span_ids, text_directions
from adapters.shared.tokenization import pad
from adapters.shared.unmodified import is_unmodified, parents_unmodified
from grounding.adapter.base import Adapter, ModelInfo
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.recorder import Recorder
from grounding.adapter.structure import ModelStructure
from grounding.core.errors import TextError
from grounding.core.text import Asked, Span

TEXT_BATCH = 64


class ClipAdapter(Adapter):
    """`CLIPModel` with its processor (or `tokenizer` and `image_processor` apart).

    Target `similarity`: the cosine of picture and text. A part of a caption is scored by leave-one-out, cosine with the
    whole caption minus cosine with its tokens masked (positions stay), or `alone`, as a text of its own. Every such
    target is one direction in the joint embedding, `data["seeds"]` (K, E): score = <seed, normalised image embedding>.
    """

    kinds = ("similarity",)
    fast_kinds = ("similarity",)
    demo_advice = "this model knows only its cartoon world"
    example = "openai/clip-vit-base-patch16"
    model: CLIPModel

    def __init__(
        self,
        model: CLIPModel,
        processor: Any = None,
        *,
        tokenizer: Any = None,
        image_processor: Any = None,
        info: ModelInfo | None = None,
    ) -> None:
        parts = own_parts(self, model, (CLIPModel,), processor, tokenizer, image_processor)
        self.model, (self.tokenizer, self.image_processor) = model, parts
        self.info = info or model_info(model, self.image_processor)

    @classmethod
    def from_checkpoint(cls, source: Checkpoint) -> ClipAdapter:
        """The adapter of a checkpoint."""
        image_processor, tokenizer = source.image_processor(), source.tokenizer()
        model = source.model(CLIPModel)
        return cls(
            model, tokenizer=tokenizer, image_processor=image_processor, info=source.info(model, image_processor)
        )

    @cached_property
    def structure(self) -> ModelStructure:
        """The default tap is the input of the last block's attention: its output is dead, only the CLS is read."""
        stack = find_stack(self.model, "vision_model")
        return ModelStructure(stacks={"vision": stack}, layer=stack.inputs[-1], pooling="cls", prefix=1)

    def prepare_images(self, images: Sequence[Any]) -> Inputs:
        """Pixel values (B, 3, H, W)."""
        found = prepare_images(self, self.image_processor, images, patch=self._config.vision_config.patch_size)
        tensors = {"pixel_values": found.pixel_values}
        return Inputs(found.images, found.geometry, (), (), tensors, found.warnings)

    def prepare_texts(self, inputs: Inputs, texts: Sequence[Sequence[Asked]]) -> Inputs:
        """Token ids and mask (T, L), padded to the longest text."""
        inputs = read_texts(inputs, self.tokenizer, texts, self._limit, self._pad_id)
        ends = end_positions(self.model, inputs.tensors["input_ids"]).tolist()
        for tokens, end in zip(inputs.tokens, ends, strict=True):
            if end != len(tokens) - 1:
                raise TextError(
                    f"the model would read {tokens.text!r} up to token {end} of {len(tokens)} only: its end token is "
                    "there (an unknown sign, or a tokenizer of another model)"
                )
        return inputs

    def targets(
        self,
        inputs: Inputs,
        spans: Sequence[Sequence[Span]],
        kind: str | None = None,
        token_target: str | None = None,
    ) -> Targets:
        """One direction in the joint embedding per span."""
        kind, token_target = self.check_kind(kind, token_target)
        flat = [(text, span) for text, chosen in enumerate(spans) for span in chosen]
        whole = self.embed_texts(inputs.tensors["input_ids"], inputs.tensors["attention_mask"])
        seeds = text_directions(
            flat,
            token_target,
            whole,
            lambda own: self._embed_alone([span_ids(inputs.tokens[t], span) for t, span in own]),
            lambda own: self._leave_out(inputs, own, whole),
        )
        owner = torch.tensor([text for text, _ in flat])
        return Targets(
            kind=kind,
            image=torch.tensor(inputs.text_image)[owner],
            text=owner,
            spans=tuple(span for _, span in flat),
            data={"seeds": seeds},
            token_target=token_target,
        )

    def encode_images(self, inputs: Inputs) -> Float[Tensor, "B E"]:
        """Normalised image embeddings."""
        pixels = inputs.tensors["pixel_values"]
        size = self._config.vision_config.image_size
        other_size = tuple(pixels.shape[-2:]) != (size, size)
        out = self.model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=other_size)
        return F.normalize(out.pooler_output, dim=-1)

    def score(self, inputs: Inputs, encoded: Float[Tensor, "B E"], targets: Targets) -> Float[Tensor, "K"]:  # noqa: ARG002
        """<seed, normalised image embedding> per target."""
        image = encoded[targets.image.to(encoded.device)]
        return (image * targets.data["seeds"].to(image.dtype)).sum(-1)

    @property
    def fast_taps(self) -> dict[str, tuple[str, ...]]:
        """The input of the last block's attention, and the block before it; both start from the latter's output.

        Empty where the last block has been changed (adapters inside it, hooks of the user's): only running it is right.
        """
        stack = self.structure.stacks["vision"]
        if not (self._last_block().is_unmodified and parents_unmodified(self.model, stack.blocks[-1])):
            return {}
        before = stack.blocks[-2] if len(stack.blocks) > 1 else "vision_model.pre_layrnorm"
        return {stack.inputs[-1]: (before,), before: ()}

    def score_from(
        self,
        layer: str,
        inputs: Inputs,
        targets: Targets,
        shift: Float[Tensor, "K D"],
        outputs: Mapping[str, Tensor] | None = None,
        rule: str | None = None,
    ) -> Float[Tensor, "K"]:
        """The scores with one shift per target added to all patches of the tap; fast at `fast_taps`."""
        if outputs is None or layer not in self.fast_taps:
            return super().score_from(layer, inputs, targets, shift, outputs, rule)
        [before] = self.fast_taps[layer] or (layer,)
        last = self._last_block(rule)
        owner = targets.image.to(shift.device)
        scores = shift.new_empty(len(targets))
        for b in owner.unique().tolist():
            mine = owner == b
            hidden = outputs[before][b].detach()
            patch = torch.ones(len(hidden), dtype=hidden.dtype, device=hidden.device)
            patch[0] = 0
            place = torch.zeros(int(mine.sum()), dtype=torch.long, device=hidden.device)  # the CLS
            row = last.rows(hidden, place, shift[mine], patch, before_norm=layer == before)
            pooled = last.norm(self._vision.post_layernorm, row)
            image = F.normalize(self.model.visual_projection(pooled), dim=-1)
            scores = scores.masked_scatter(mine, (image * targets.data["seeds"][mine].to(image.dtype)).sum(-1))
        return scores

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "T E"]:
        """Normalised text embeddings, as the model itself computes them."""
        with Recorder(self.model):
            parts = [
                self.model.get_text_features(input_ids=i, attention_mask=m).pooler_output
                for i, m in zip(ids.split(TEXT_BATCH), mask.split(TEXT_BATCH), strict=True)
            ]
            return F.normalize(torch.cat(parts), dim=-1)

    def _leave_out(
        self, inputs: Inputs, spans: Sequence[tuple[int, Span]], whole: Float[Tensor, "T E"]
    ) -> Float[Tensor, "K E"]:
        """What each text's embedding loses with a span's tokens masked; prefixes are shared where that is exact."""
        ids, mask = inputs.tensors["input_ids"], inputs.tensors["attention_mask"]
        if not (is_unmodified(self.model.text_model) and is_unmodified(self.model.text_projection)):
            owners = [t for t, _ in spans]
            masks = mask[owners].clone()
            for row, (_, span) in enumerate(spans):
                masks[row, list(span.positions)] = 0
            return whole[owners] - self.embed_texts(ids[owners], masks)
        parts = []
        with Recorder(self.model):
            for first in range(0, len(spans), TEXT_BATCH):
                texts, masked = zip(*[(t, s.positions) for t, s in spans[first : first + TEXT_BATCH]], strict=True)
                used = sorted(set(texts))
                rows = [used.index(t) for t in texts]
                parts.append(whole[list(texts)] - embed_left_out(self.model, ids[used], mask[used], rows, masked))
        return torch.cat(parts)

    def _last_block(self, rule: str | None = None) -> LastBlock:
        block = self._vision.encoder.layers[-1]
        attention = block.self_attn
        return LastBlock(
            before=block.layer_norm1,
            query=attention.q_proj,
            key=attention.k_proj,
            value=attention.v_proj,
            out=attention.out_proj,
            after=block.layer_norm2,
            mlp=block.mlp,
            heads=attention.num_heads,
            parts=(block, self._vision.post_layernorm, self.model.visual_projection),
            rule=rule,
        )

    @property
    def _vision(self) -> Any:
        return self.model.vision_model

    @property
    def _config(self) -> Any:
        return self.model.config

    @property
    def _limit(self) -> int:
        return min(self._config.text_config.max_position_embeddings, self.tokenizer.model_max_length)

    @property
    def _pad_id(self) -> int:
        pad_id = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad_id is None else pad_id

    def _embed_alone(self, sequences: Sequence[Sequence[int]]) -> Float[Tensor, "K E"]:
        return self.embed_texts(*pad(sequences, self._pad_id, self.device))
