"""Adapter for CLIP, an image and a text encoder with a joint embedding (Radford et al. 2021, arXiv:2103.00020)."""

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
from adapters.shared.last_block import LastBlock, patch_mask
from adapters.shared.stacks import find_stack
from adapters.shared.text_targets import mask_without, prepare_texts, span_ids, text_directions
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
    """Adapter around a `CLIPModel` and its processor (or its `tokenizer` and `image_processor`).

    Target `similarity`: the cosine of image and text. A part of a caption is scored by leave-one-out (cosine with the
    whole caption minus cosine with the part's tokens masked, positions kept) or `alone` (as a text of its own). Every
    target is one direction in the joint embedding, `data["seeds"]` (K, E): score = <seed, normalised image embedding>.
    """

    kinds = ("similarity",)
    fast_kinds = ("similarity",)
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
        """Load the parts of a checkpoint and return their adapter. Raises ModelError."""
        image_processor, tokenizer = source.image_processor(), source.tokenizer()
        model = source.model(CLIPModel)
        return cls(
            model, tokenizer=tokenizer, image_processor=image_processor, info=source.info(model, image_processor)
        )

    @cached_property
    def structure(self) -> ModelStructure:
        """Structure of the image encoder. The default layer is the input of the last block's attention: only the CLS
        of that block's output is read, so no score depends on its patches."""
        stack = find_stack(self.model, "vision_model")
        return ModelStructure(stacks={"vision": stack}, layer=stack.inputs[-1], pooling="cls", prefix=1)

    def prepare_images(self, images: Sequence[Any]) -> Inputs:
        """Inputs with pixel values (B, 3, H, W), without texts."""
        return prepare_images(self, self.image_processor, images, patch=self._config.vision_config.patch_size)

    def prepare_texts(self, inputs: Inputs, texts: Sequence[Sequence[Asked]]) -> Inputs:
        """Inputs with token ids and attention mask (T, L), padded to the longest text.

        Raises TextError for an empty text, and for one that CLIP would read only in part.
        """
        inputs = prepare_texts(inputs, self.tokenizer, texts, self._limit, self._pad_id)
        ends = end_positions(self.model, inputs.tensors["input_ids"]).tolist()
        for tokens, end in zip(inputs.tokens, ends, strict=True):
            if end != len(tokens) - 1:
                raise TextError(
                    f"the model would read {tokens.text!r} up to token {end} of {len(tokens)} only, its first end "
                    "token (an unknown character, or the tokenizer of another model)"
                )
        return inputs

    def targets(
        self,
        inputs: Inputs,
        spans: Sequence[Sequence[Span]],
        kind: str | None = None,
        token_target: str | None = None,
    ) -> Targets:
        """One direction in the joint embedding per span. Raises TargetError."""
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
        """The input of the last block's attention and the block before it, both computed from the latter's output.

        Empty if the last block is modified (adapters or hooks of the user): then only running it is right.
        """
        stack = self.structure.stacks["vision"]
        if not (self._last_block().is_unmodified and parents_unmodified(self.model, stack.blocks[-1])):
            return {}
        before = stack.blocks[-2] if len(stack.blocks) > 1 else "vision_model.pre_layrnorm"
        return {stack.inputs[-1]: (before,), before: ()}

    def shifts(
        self,
        layer: str,
        inputs: Inputs,  # noqa: ARG002
        targets: Targets,
        outputs: Mapping[str, Tensor],
        rule: str | None = None,
    ) -> Float[Tensor, "K D"]:
        """Pooled gradients from the CLS row of the last block, see `LastBlock.pooled_gradients`."""
        [before] = self.fast_taps[layer] or (layer,)
        last, hidden = self._last_block(rule), outputs[before].detach()

        def scores(row: Tensor, mine: Tensor) -> Tensor:
            pooled = last.norm(self._vision.post_layernorm, row)
            image = F.normalize(self.model.visual_projection(pooled), dim=-1)
            return (image * targets.data["seeds"][mine].to(image.dtype)).sum(-1)

        owner = targets.image.to(hidden.device)
        patch = patch_mask(hidden, 1, hidden.shape[1] - 1)
        return last.pooled_gradients(hidden, owner, torch.zeros_like(owner), patch, scores, before_norm=layer == before)

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "T E"]:
        """Normalised text embeddings, computed by the model's own forward pass."""
        with Recorder(self.model):
            parts = [
                self.model.get_text_features(input_ids=i, attention_mask=m).pooler_output
                for i, m in zip(ids.split(TEXT_BATCH), mask.split(TEXT_BATCH), strict=True)
            ]
            return F.normalize(torch.cat(parts), dim=-1)

    def _leave_out(
        self, inputs: Inputs, spans: Sequence[tuple[int, Span]], whole: Float[Tensor, "T E"]
    ) -> Float[Tensor, "K E"]:
        """Text embedding minus the embedding with a span's tokens masked; variants share their prefix where exact."""
        ids, mask = inputs.tensors["input_ids"], inputs.tensors["attention_mask"]
        if not (is_unmodified(self.model.text_model) and is_unmodified(self.model.text_projection)):
            owners = [t for t, _ in spans]
            return whole[owners] - self.embed_texts(ids[owners], mask_without(mask, spans))
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
