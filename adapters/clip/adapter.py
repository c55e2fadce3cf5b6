"""Adapter for CLIP, an image and a text encoder with a joint embedding (Radford et al. 2021, arXiv:2103.00020), and for
the architectures that have its image encoder: MetaCLIP 2, Chinese-CLIP, AltCLIP."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AltCLIPModel, ChineseCLIPModel, CLIPModel, MetaClip2Model

from adapters.clip.families import MODELS, configured_family, family_of
from adapters.clip.leave_one_out import embed_left_out, end_positions
from adapters.loading import Checkpoint, model_info, own_parts
from adapters.shared.dual_encoder import TEXT_BATCH, ClsShortcut, DualEncoder
from adapters.shared.images import prepare_images
from adapters.shared.last_block import LastBlock
from adapters.shared.stacks import find_stack
from adapters.shared.text_targets import Flat
from adapters.shared.unmodified import is_unmodified, parents_unmodified
from grounding.adapter.base import ModelInfo, Shortcut
from grounding.adapter.inputs import ImageInputs, Inputs
from grounding.adapter.recorder import Recorder
from grounding.adapter.structure import Hop, ModelStructure
from grounding.core.errors import TextError
from grounding.core.text import Query


class ClipAdapter(DualEncoder):
    """Adapter around a `CLIPModel`, `MetaClip2Model`, `ChineseCLIPModel` or `AltCLIPModel`, and its processor (or its
    `tokenizer` and `image_processor`)."""

    model: CLIPModel | MetaClip2Model | ChineseCLIPModel | AltCLIPModel

    def __init__(
        self,
        model: CLIPModel | MetaClip2Model | ChineseCLIPModel | AltCLIPModel,
        processor: Any = None,
        *,
        tokenizer: Any = None,
        image_processor: Any = None,
        info: ModelInfo | None = None,
    ) -> None:
        parts = own_parts(self, model, MODELS, processor, tokenizer, image_processor)
        self.model, (self.tokenizer, self.image_processor) = model, parts
        self.info = info or model_info(model, self.image_processor)
        self._family = family_of(model)

    @classmethod
    def from_checkpoint(cls, source: Checkpoint) -> ClipAdapter:
        """Load the parts of a checkpoint and return their adapter. Raises ModelError."""
        image_processor, tokenizer = source.image_processor(), source.tokenizer()
        model = source.model(configured_family(source.config()).model)
        return cls(
            model, tokenizer=tokenizer, image_processor=image_processor, info=source.info(model, image_processor)
        )

    def structure(self, kind: str) -> ModelStructure:  # noqa: ARG002
        """Structure of the image encoder. The default layer is the input of the last block's attention: only the CLS
        of that block's output is read, so no score depends on its patches."""
        return self._structure

    @cached_property
    def _structure(self) -> ModelStructure:
        stack = find_stack(self.model, "vision_model")
        return ModelStructure({"vision": stack}, stack.inputs[-1], "cls", path=(Hop("vision"),), prefix=1)

    def prepare_images(self, images: Sequence[Any]) -> ImageInputs:
        """Inputs with pixel values (B, 3, H, W)."""
        return prepare_images(self, self.image_processor, images, patch=self._config.vision_config.patch_size)

    def prepare_texts(self, images: ImageInputs, queries: Sequence[Sequence[Query]]) -> Inputs:
        """Inputs with token ids and attention mask (T, L), padded to the longest text.

        Raises TextError for an empty text, and for one of which a causal text encoder would read only a part.
        """
        inputs = super().prepare_texts(images, queries)
        if not self._family.causal:
            return inputs
        ends = end_positions(self.model, inputs.tensors["input_ids"]).tolist()
        for text, end in zip(inputs.texts, ends, strict=True):
            if end != len(text) - 1:
                raise TextError(
                    f"the model would read {text.text!r} up to token {end} of {len(text)} only, its first end "
                    "token (an unknown character, or the tokenizer of another model)"
                )
        return inputs

    def encode_images(self, images: ImageInputs) -> Float[Tensor, "B E"]:
        """Image embeddings."""
        pixels = images.tensors["pixel_values"]
        size = self._config.vision_config.image_size
        other_size = tuple(pixels.shape[-2:]) != (size, size)
        return self.model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=other_size).pooler_output

    def shortcut(self, kind: str) -> Shortcut | None:
        """The pooled gradient at the input of the last block's attention and at the block before it, both from the
        latter's output; None if the last block is modified (adapters or hooks of the user)."""
        stack = self.structure(kind).stacks["vision"]
        if not (self._last_block().is_unmodified and parents_unmodified(self.model, stack.blocks[-1])):
            return None
        before = stack.blocks[-2] if len(stack.blocks) > 1 else "vision_model.pre_layrnorm"
        return ClsShortcut(self, {stack.inputs[-1]: (before,), before: ()}, self._last_block, self._project)

    def text_features(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "T E"]:
        """Text embeddings, computed by the model's own forward pass."""
        return self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output

    def leave_out(self, inputs: Inputs, own: Flat, whole: Float[Tensor, "T E"]) -> Float[Tensor, "k E"]:
        """Text embedding minus the embedding with a span's tokens masked; variants share their prefix where exact."""
        parts_unmodified = is_unmodified(self.model.text_model) and is_unmodified(self.model.text_projection)
        if not (self._family.causal and parts_unmodified):
            return super().leave_out(inputs, own, whole)
        ids, mask = inputs.tensors["input_ids"], inputs.tensors["attention_mask"]
        parts = []
        with Recorder(self.model):
            for first in range(0, len(own), TEXT_BATCH):
                texts, masked = zip(*[(t, s.positions) for t, s in own[first : first + TEXT_BATCH]], strict=True)
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

    def _project(self, last: LastBlock, rows: Float[Tensor, "k D"]) -> Float[Tensor, "k E"]:
        """Image embeddings from output rows of the last block."""
        return self.model.visual_projection(last.norm(self._vision.post_layernorm, rows))

    @property
    def _vision(self) -> Any:
        return self.model.vision_model

    @property
    def _config(self) -> Any:
        return self.model.config

    @property
    def limit(self) -> int:
        """The largest number of tokens of a text."""
        return min(self._family.limit(self._config.text_config), self.tokenizer.model_max_length)
