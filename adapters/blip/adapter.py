"""Adapter for BLIP image-text retrieval: an image encoder, and a text encoder that attends to the image for matching
(Li et al. 2022, arXiv:2201.12086)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipForImageTextRetrieval

from adapters.loading import Checkpoint, model_info, own_parts
from adapters.shared.dual_encoder import ClsShortcut, DualEncoder
from adapters.shared.images import prepare_images
from adapters.shared.last_block import LastBlock
from adapters.shared.stacks import decoder_stacks, find_stack
from adapters.shared.text_sequences import SequenceBatch, sequence_targets
from adapters.shared.unmodified import parents_unmodified
from grounding.adapter.base import Features, ModelInfo, Shortcut
from grounding.adapter.inputs import ImageInputs, Inputs, Targets
from grounding.adapter.patch_tokens import PatchTokens
from grounding.adapter.structure import Hop, ModelStructure
from grounding.core.errors import LayerError
from grounding.core.text import Span

VISION, TEXT = "vision_model", "text_encoder"
# Its output has the keys of the cross-attention.
KEYS = f"{VISION}.post_layernorm"


class BlipAdapter(DualEncoder):
    """Adapter around a `BlipForImageTextRetrieval` and its processor (or its `tokenizer` and `image_processor`).

    Targets: `matching`, the log odds that image and text match (logit 1 minus logit 0 of the matching head); and as of
    a dual encoder `similarity` and `norm`. This model has no scale, so that there is no target `logits`.

    Token ids are those of the tokenizer, as in the model's own forward pass: for matching the first token is not
    replaced by the [ENC] token of the original implementation.
    """

    target_kinds: ClassVar[tuple[str, ...]] = ("matching", "similarity", "norm")
    model: BlipForImageTextRetrieval

    def __init__(
        self,
        model: BlipForImageTextRetrieval,
        processor: Any = None,
        *,
        tokenizer: Any = None,
        image_processor: Any = None,
        info: ModelInfo | None = None,
    ) -> None:
        parts = own_parts(self, model, (BlipForImageTextRetrieval,), processor, tokenizer, image_processor)
        self.model, (self.tokenizer, self.image_processor) = model, parts
        self.info = info or model_info(model, self.image_processor)
        self._structures: dict[bool, ModelStructure] = {}

    @classmethod
    def from_checkpoint(cls, source: Checkpoint) -> BlipAdapter:
        """Load the parts of a checkpoint and return their adapter. Raises ModelError."""
        image_processor, tokenizer = source.image_processor(), source.tokenizer()
        model = source.model(BlipForImageTextRetrieval)
        return cls(
            model, tokenizer=tokenizer, image_processor=image_processor, info=source.info(model, image_processor)
        )

    def structure(self, kind: str) -> ModelStructure:
        """Structure of the image encoder, pooled by its CLS; for `matching` also of the text encoder.

        The default layer of `matching` is the norm behind the last block, whose output has the keys of the
        cross-attention: the score depends on every patch there. That of the other kinds is the input of the last
        block's attention.
        """
        matching = kind == "matching"
        if matching not in self._structures:
            self._structures[matching] = self._matching_structure() if matching else self._vision_structure()
        return self._structures[matching]

    def _vision_structure(self) -> ModelStructure:
        vision = find_stack(self.model, VISION)
        return ModelStructure({"vision": vision}, vision.inputs[-1], "cls", path=(Hop("vision"),), prefix=1)

    def _matching_structure(self) -> ModelStructure:
        found = decoder_stacks(self.model, TEXT)
        text, cross = (replace(found[name], rows_read_alone=False) for name in ("decoder", "cross"))
        # Chains start in the rows of the words; of the last block the matching head reads the first row alone.
        live = -2 if len(cross.blocks) > 1 else -1
        return ModelStructure(
            {"vision": find_stack(self.model, VISION), "text": text, "cross": cross},
            default_layer=KEYS,
            pooling="sequence",
            path=(Hop("cross", "cross", among="text", keys=KEYS, live=live), Hop("vision")),
            prefix=1,
            sequence_side=(TEXT,),
        )

    def patch_tokens(self, path: str, inputs: Inputs, shape: tuple[int, ...]) -> tuple[PatchTokens, ...]:
        """Positions of the patches. Raises LayerError for a layer of the text encoder."""
        if f"{path}.".startswith(f"{TEXT}."):
            raise LayerError(f"layer {path!r} has text tokens only, no patches")
        return super().patch_tokens(path, inputs, shape)

    def prepare_images(self, images: Sequence[Any]) -> ImageInputs:
        """Inputs with pixel values (B, 3, H, W)."""
        return prepare_images(self, self.image_processor, images, patch=self._config.vision_config.patch_size)

    def targets(
        self, inputs: Inputs, spans: Sequence[Sequence[Span]], kind: str, token_target: str | None = None
    ) -> Targets:
        """Directions in the joint embedding, or the texts of the matching head, see `sequence_targets`.

        Raises TargetError.
        """
        kind, token_target = self.check_target(kind, token_target)
        if kind != "matching":
            return super().targets(inputs, spans, kind, token_target)
        return sequence_targets(
            inputs, Targets.of_spans(inputs, spans, kind, token_target), self.pad_id, self.model.dtype
        )

    def encode_images(self, images: ImageInputs) -> Float[Tensor, "B N D"]:
        """States of the image encoder after its last norm, as `vision_model` computes them.

        Its parts are run one by one: the whole runs the norm a second time on the CLS, for an output that no score
        reads, and a layer that runs twice cannot be recorded.
        """
        pixels, size = images.tensors["pixel_values"], self._config.vision_config.image_size
        other_size = tuple(pixels.shape[-2:]) != (size, size)
        hidden = self._vision.embeddings(pixels, interpolate_pos_encoding=other_size)
        return self._vision.post_layernorm(self._vision.encoder(inputs_embeds=hidden).last_hidden_state)

    def score(self, inputs: Inputs, features: Features, targets: Targets) -> Float[Tensor, "K"]:
        """The scores (K,) of the targets, by kind."""
        assert isinstance(features, Tensor)
        if targets.kind != "matching":
            return super().score(inputs, self.model.vision_proj(features[:, 0]), targets)
        batch = SequenceBatch.of(targets, features.device)
        states = features[targets.image.to(features.device)[batch.rows]]
        odds = self.model.itm_head(self._read(targets.data["ids"][batch.rows], batch.mask, states))
        return batch.differences(odds[:, 1] - odds[:, 0])

    def shortcut(self, kind: str) -> Shortcut | None:
        """The pooled gradient at the input of the last image block's attention and at the block before it, for
        `similarity` and `norm`; None if the last block is modified.

        None for `matching`: cross-attention reads the patches in every block of the text encoder.
        """
        if kind == "matching":
            return None
        stack = self.structure(kind).stacks["vision"]
        unmodified = self._last_block().is_unmodified and parents_unmodified(self.model, stack.blocks[-1])
        if not unmodified or len(stack.blocks) < 2:
            return None
        layers: dict[str, tuple[str, ...]] = {stack.inputs[-1]: (stack.blocks[-2],), stack.blocks[-2]: ()}
        return ClsShortcut(self, layers, self._last_block, self._project)

    def text_features(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "T E"]:
        """Text embeddings, the projected first token, from a pass of the text encoder without the image."""
        return self.model.text_proj(self._read(ids, mask))

    def _read(self, ids: Tensor, mask: Tensor, states: Tensor | None = None) -> Float[Tensor, "R D"]:
        """First row of the text encoder's output, with cross-attention to image states (R, N, D) if given."""
        image = {}
        if states is not None:
            seen = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
            image = {"encoder_hidden_states": states, "encoder_attention_mask": seen}
        return self.model.text_encoder(input_ids=ids, attention_mask=mask, **image).last_hidden_state[:, 0]

    def _last_block(self, rule: str | None = None) -> LastBlock:
        block = self._vision.encoder.layers[-1]
        attention = block.self_attn
        query, key, value = (_Rows(attention.qkv, third) for third in range(3))
        return LastBlock(
            before=block.layer_norm1,
            query=query,
            key=key,
            value=value,
            out=attention.projection,
            after=block.layer_norm2,
            mlp=block.mlp,
            heads=attention.num_heads,
            parts=(block, self._vision.post_layernorm, self.model.vision_proj),
            rule=rule,
        )

    def _project(self, last: LastBlock, rows: Float[Tensor, "k D"]) -> Float[Tensor, "k E"]:
        """Image embeddings from output rows of the last block."""
        return self.model.vision_proj(last.norm(self._vision.post_layernorm, rows))

    @property
    def _vision(self) -> Any:
        return self.model.vision_model

    @property
    def _config(self) -> Any:
        return self.model.config

    @property
    def limit(self) -> int:
        """The largest number of tokens of a text."""
        return min(self._config.text_config.max_position_embeddings, self.tokenizer.model_max_length)


@dataclass(frozen=True, eq=False)
class _Rows:
    """A third of the outputs of the linear layer that computes queries, keys and values, as a linear layer."""

    whole: nn.Linear
    third: int

    def __call__(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        bias = self.whole.bias
        return F.linear(x, self.weight, None if bias is None else bias[self._own])

    @property
    def weight(self) -> Float[Tensor, "D D"]:
        """Its rows of the weight."""
        return self.whole.weight[self._own]

    @property
    def out_features(self) -> int:
        """The width of a query."""
        return self.whole.out_features // 3

    @property
    def _own(self) -> slice:
        return slice(self.third * self.out_features, (self.third + 1) * self.out_features)
