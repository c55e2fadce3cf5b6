"""Adapter for SigLIP, a dual encoder with a sigmoid loss (Zhai et al. 2023, arXiv:2303.15343).

The checkpoints of SigLIP 2 (Tschannen et al. 2025, arXiv:2502.14786) with a fixed image size are of the same
architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import SiglipModel

from adapters.loading import Checkpoint, model_info, own_parts
from adapters.shared.dual_encoder import DualEncoder
from adapters.shared.images import prepare_images
from adapters.shared.stacks import find_stack
from adapters.shared.text_targets import Flat, scored_as
from adapters.shared.tokenization import tokenize
from adapters.shared.unmodified import is_unmodified, parents_unmodified
from adapters.siglip.pooling_head import ATTENTION, HEAD, NORM, PoolingHeadShortcut
from adapters.siglip.sentencepiece_offsets import with_offsets
from adapters.siglip.texts import first_position, pad_to, without
from grounding.adapter.base import ModelInfo, Shortcut, TokenProbability
from grounding.adapter.inputs import ImageInputs, Inputs, Targets
from grounding.adapter.structure import Hop, ModelStructure, Stack
from grounding.adapter.vision_cache import Features
from grounding.core.errors import ModelError
from grounding.core.text import Query, check_text


class SiglipAdapter(DualEncoder):
    """Adapter around a `SiglipModel` and its processor (or its `tokenizer` and `image_processor`).

    Texts are padded to the full length without a mask, as the model was trained: it attends to padding, and pools the
    last position, which may be padding.

    Raises ModelError for a model without attention pooling, or a tokenizer without character offsets.
    """

    model_class: ClassVar[type] = SiglipModel

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        *,
        tokenizer: Any = None,
        image_processor: Any = None,
        info: ModelInfo | None = None,
    ) -> None:
        own = with_offsets(tokenizer or getattr(processor, "tokenizer", None))
        parts = own_parts(self, model, (self.model_class,), processor, own, image_processor)
        self.model, (self.tokenizer, self.image_processor) = model, parts
        if not hasattr(model.vision_model, "head"):
            raise ModelError(f"{type(self).__name__} needs a model with attention pooling (vision_use_head)")
        self.info = info or model_info(model, self.image_processor)

    @classmethod
    def from_checkpoint(cls, source: Checkpoint) -> SiglipAdapter:
        """Load the parts of a checkpoint and return their adapter. Raises ModelError."""
        image_processor, tokenizer = source.image_processor(), source.tokenizer()
        model = source.model(cls.model_class)
        return cls(
            model, tokenizer=tokenizer, image_processor=image_processor, info=source.info(model, image_processor)
        )

    def structure(self, kind: str) -> ModelStructure:  # noqa: ARG002
        """Structure of the image encoder: its blocks, then a pooling head in which one learned query attends to all
        patches.

        The default layer is the norm before that head. Every patch of the last block's output is read too, but through
        this norm alone, so that its gradient is orthogonal to its features.
        """
        return self._structure

    @cached_property
    def _structure(self) -> ModelStructure:
        stacks = {
            "vision": find_stack(self.model, "vision_model"),
            "head": Stack(blocks=(HEAD,), inputs=(NORM,), attention=(ATTENTION,)),
        }
        path = (Hop("head", "pool", keys=NORM), Hop("vision"))
        return ModelStructure(stacks, NORM, "attention_pool", path=path)

    def prepare_images(self, images: Sequence[Any]) -> ImageInputs:
        """Inputs with pixel values (B, 3, H, W)."""
        return prepare_images(self, self.image_processor, images, patch=self._vision_config.patch_size)

    def prepare_texts(self, images: ImageInputs, queries: Sequence[Sequence[Query]]) -> Inputs:
        """Inputs with token ids (T, L), padded to the full length, and a mask of ones: the model attends to padding.

        The tokenized texts have no padding. Raises TextError.
        """
        texts = tuple(tokenize(self.tokenizer, check_text(query.text), self.limit) for own in queries for query in own)
        ids = self._padded([text.ids for text in texts])
        owner = tuple(b for b, own in enumerate(queries) for _ in own)
        return Inputs(images, texts, owner, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def encode_images(self, images: ImageInputs) -> Float[Tensor, "B E"]:
        """Image embeddings."""
        pixels, size = images.tensors["pixel_values"], self._vision_config.image_size
        other_size = list(pixels.shape[-2:]) != ([size, size] if isinstance(size, int) else list(size))
        return self.model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=other_size).pooler_output

    def probabilities(self, inputs: Inputs, features: Features, targets: Targets) -> Sequence[TokenProbability | None]:
        """The sigmoid of the model's logit for texts and for parts scored as a text of their own; None for
        leave-one-out, whose target is a difference."""
        if targets.kind in self.text_independent:
            return [None] * len(targets)
        scale, bias = self.scale_and_bias()
        with torch.no_grad():
            scores = self.score(inputs, features, targets).double()
        logits = scores if targets.kind == "logits" else scores * scale + bias
        return [
            None if scored_as(span, targets.token_target) == "left out" else (probability, ())
            for span, probability in zip(targets.spans, logits.sigmoid().tolist(), strict=True)
        ]

    def shortcut(self, kind: str) -> Shortcut | None:
        """The pooled gradient at the norm before the pooling head and at the last block's output; None if one of the
        modules after that output is modified (adapters or hooks of the user)."""
        last = self.structure(kind).stacks["vision"].blocks[-1]
        head, norm = self.model.get_submodule(HEAD), self.model.get_submodule(NORM)
        unmodified = is_unmodified(head) and is_unmodified(norm)
        if not (unmodified and parents_unmodified(self.model, last, HEAD)):
            return None
        return PoolingHeadShortcut(self, head, norm, {NORM: (ATTENTION,), last: (NORM, ATTENTION)})

    # ------------------------------------------------------------------ texts

    def text_features(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "T E"]:
        """Text embeddings, computed by the model's own forward pass; a mask of ones is left out."""
        own = None if bool(mask.all()) else mask
        return self.model.get_text_features(input_ids=ids, attention_mask=own).pooler_output

    def embed_alone(self, sequences: Sequence[Sequence[int]]) -> Float[Tensor, "k E"]:
        """Normalised embeddings of texts given by their token ids."""
        ids = self._padded(sequences)
        return self.embed_texts(ids, torch.ones_like(ids))

    def leave_out(self, inputs: Inputs, own: Flat, whole: Float[Tensor, "T E"]) -> Float[Tensor, "k E"]:
        """Text embedding minus the embedding with a span's tokens masked; all other positions, padding included, are
        attended to."""
        ids, owner = inputs.tensors["input_ids"], [t for t, _ in own]
        length, side = ids.shape[1], self.tokenizer.padding_side
        firsts = [first_position(len(inputs.texts[t]), length, side) for t in owner]
        masks = without(torch.ones_like(ids[owner]), [span.positions for _, span in own], firsts)
        return whole[owner] - self.embed_texts(ids[owner], masks)

    def scale_and_bias(self) -> tuple[float, float]:
        """The model's scale and bias: its logits are the cosine times the scale plus the bias."""
        return super().scale_and_bias()[0], float(self.model.logit_bias.detach())

    @property
    def limit(self) -> int:
        """The number of tokens of every text, padding included."""
        return min(self.model.config.text_config.max_position_embeddings, self.tokenizer.model_max_length)

    def _padded(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        return pad_to(sequences, self.limit, self.pad_id, self.tokenizer.padding_side, self.device)

    @property
    def _vision_config(self) -> Any:
        return self.model.config.vision_config
