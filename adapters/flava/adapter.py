"""Adapter for FLAVA: an image encoder, a text encoder, and a multimodal encoder over both (Singh et al. 2022,
arXiv:2112.04482)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import FlavaForPreTraining, FlavaModel

from adapters.flava.fusion import BEFORE, Fusion, last_block
from adapters.loading import Checkpoint, model_info, own_parts
from adapters.shared.images import prepare_images
from adapters.shared.last_block import LastBlock, patch_mask
from adapters.shared.stacks import find_stack
from adapters.shared.text_targets import Flat, mask_without, prepare_texts, span_ids, text_directions
from adapters.shared.tokenization import pad
from adapters.shared.unmodified import parents_unmodified
from grounding.adapter.base import Adapter, ModelInfo
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.recorder import Recorder
from grounding.adapter.structure import ModelStructure
from grounding.core.errors import LayerError, OptionError, TargetError
from grounding.core.text import Asked, Span

FUSED = ("matching", "logit")


class FlavaAdapter(Adapter):
    """Adapter around a `FlavaModel` or `FlavaForPreTraining` and its processor (or `tokenizer` and `image_processor`).

    Targets: `similarity`, the cosine of image and text; `matching`, the log odds that image and text match (difference
    of the matching head's two logits); `logit`, the masked-language logit of each token at its own position of the
    multimodal encoder, with no token masked; `norm`, the norm of the projected image embedding over all tokens
    (`norm.tokens=cls`: of the CLS alone), independent of the text. `matching` and `logit` need `FlavaForPreTraining`.
    """

    kinds = ("similarity", "matching", "logit", "norm")
    fast_kinds = ("similarity", "matching", "logit")
    model: FlavaModel | FlavaForPreTraining

    def __init__(
        self,
        model: FlavaModel | FlavaForPreTraining,
        processor: Any = None,
        *,
        tokenizer: Any = None,
        image_processor: Any = None,
        info: ModelInfo | None = None,
    ) -> None:
        parts = own_parts(self, model, (FlavaModel, FlavaForPreTraining), processor, tokenizer, image_processor)
        self.model, (self.tokenizer, self.image_processor) = model, parts
        self.kind, self.norm_tokens = self.kinds[0], "all"
        self.info = info or model_info(model, self.image_processor)

    @classmethod
    def from_checkpoint(cls, source: Checkpoint) -> FlavaAdapter:
        """Load the parts of a checkpoint and return their adapter, with the heads if it has them. Raises ModelError.

        Weights of the image codebook may be missing: no target depends on it.
        """
        image_processor, tokenizer = source.image_processor(), source.tokenizer()
        heads = "FlavaForPreTraining" in (source.config().architectures or [])
        model = source.model(FlavaForPreTraining if heads else FlavaModel, unused=("image_codebook.",))
        return cls(
            model, tokenizer=tokenizer, image_processor=image_processor, info=source.info(model, image_processor)
        )

    def aimed(self, kind: str | None, options: Mapping[str, Any] | None = None) -> FlavaAdapter:
        """A copy of the adapter with the structure for this kind of target: `matching` and `logit` read the multimodal
        encoder. Raises TargetError, OptionError."""
        kind, _ = self.check_kind(kind)
        other = copy.copy(self)
        other.__dict__.pop("structure", None)
        other.kind, other.norm_tokens = kind, "all"
        for key, value in (options or {}).items():
            if key != "norm.tokens" or value not in ("all", "cls"):
                raise OptionError(f"target option {key}={value}: there is norm.tokens, all (default) or cls")
            if kind != "norm":
                raise OptionError(f"option {key} belongs to the target norm, not to {kind}")
            other.norm_tokens = value
        return other

    @cached_property
    def structure(self) -> ModelStructure:
        """Structure of the image encoder, pooled by its CLS, for `similarity` and `norm`; for `matching` and `logit`
        also of the multimodal and the text encoder.

        The default layer of `logit` is the input of the multimodal encoder's last attention. That of `matching` is the
        input of its first: the matching head reads the CLS alone, and no text token.
        """
        vision = find_stack(self.model, f"{self._root}image_model")
        if self.kind not in FUSED:
            return ModelStructure({"vision": vision}, layer=vision.inputs[-1], pooling="cls", prefix=1)
        fusion = find_stack(self.model, f"{self._root}multimodal_model")
        text = find_stack(self.model, f"{self._root}text_model")
        return ModelStructure(
            stacks={"vision": vision, "fusion": fusion, "text": text},
            layer=fusion.inputs[-1 if self.kind == "logit" else 0],
            pooling="fusion",
            prefix=1,
            text_stacks=frozenset({"fusion"}),
            text_side=tuple(
                f"{self._root}{part}"
                for part in ("multimodal_model", "text_model", "image_to_mm_projection", "text_to_mm_projection")
            ),
        )

    def sequence(self, path: str) -> tuple[int, bool]:
        """Number of tokens before the patches, and whether others follow: the multimodal encoder has a CLS of its own
        before the image's, and the text after the patches. Raises LayerError for a layer of the text encoder."""
        if f"{path}.".startswith((f"{self._root}text_model.", f"{self._root}text_to_mm_projection.")):
            raise LayerError(f"layer {path!r} has text tokens only, no patches")
        inside = f"{path}.".startswith(f"{self._root}multimodal_model.")
        return (BEFORE, True) if inside else super().sequence(path)

    def prepare_images(self, images: Sequence[Any]) -> Inputs:
        """Inputs with pixel values (B, 3, H, W), without texts."""
        return prepare_images(self, self.image_processor, images, patch=self._config.image_config.patch_size)

    def prepare_texts(self, inputs: Inputs, texts: Sequence[Sequence[Asked]]) -> Inputs:
        """Inputs with token ids and attention mask (T, L), padded to the longest text. Raises TextError."""
        return prepare_texts(inputs, self.tokenizer, texts, self._limit, self._pad_id)

    def check_kind(self, kind: str | None, token_target: str | None = None) -> tuple[str, str | None]:
        """Target kind and token target to use, as in the base class. Raises TargetError, also for a missing head."""
        kind, default = super().check_kind(kind or self.kind, token_target)
        if kind in FUSED and not isinstance(self.model, FlavaForPreTraining):
            raise TargetError(f"target {kind!r} needs the heads of FlavaForPreTraining; this is a FlavaModel")
        if kind in ("logit", "norm"):
            if token_target is not None:
                raise TargetError(f"target {kind!r} has no token target: each token has a score of its own")
            default = None
        return kind, default

    def targets(
        self,
        inputs: Inputs,
        spans: Sequence[Sequence[Span]],
        kind: str | None = None,
        token_target: str | None = None,
    ) -> Targets:
        """Directions in the joint embedding, or the sequences of the multimodal encoder, see `Fusion.targets`.

        Raises TargetError.
        """
        kind, token_target = self.check_kind(kind, token_target)
        flat = [(text, span) for text, chosen in enumerate(spans) for span in chosen]
        owner = torch.tensor([text for text, _ in flat])
        targets = Targets(
            kind=kind,
            image=torch.tensor(inputs.text_image)[owner],
            text=owner,
            spans=tuple(span for _, span in flat),
            token_target=token_target,
        )
        if kind == "similarity":
            ids, mask = inputs.tensors["input_ids"], inputs.tensors["attention_mask"]
            whole = self.embed_texts(ids, mask)
            seeds = text_directions(
                flat, token_target, whole, lambda own: self._alone(inputs, own), lambda own: self._left_out(inputs, own)
            )
            return replace(targets, data={"seeds": seeds})
        return self._fusion.targets(inputs, flat, targets) if kind in FUSED else targets

    def encode_images(self, inputs: Inputs) -> Float[Tensor, "B 2 N D"]:
        """States of the image encoder before its final norm (the multimodal encoder's input) and after it."""
        pixels, size = inputs.tensors["pixel_values"], self._config.image_config.image_size
        usual = (size, size) if isinstance(size, int) else tuple(size)
        out = self._towers.image_model(
            pixel_values=pixels,
            interpolate_pos_encoding=tuple(pixels.shape[-2:]) != usual,
            output_hidden_states=True,
            return_dict=True,
        )
        return torch.stack([out.hidden_states[-1], out.last_hidden_state], 1)

    def score(self, inputs: Inputs, encoded: Float[Tensor, "B 2 N D"], targets: Targets) -> Float[Tensor, "K"]:  # noqa: ARG002
        """The scores (K,) of the targets, by kind."""
        if targets.kind in FUSED:
            return self._fusion.scores(encoded, targets)
        image = targets.image.to(encoded.device)
        if targets.kind == "norm":
            states = encoded[:, 1] if self.norm_tokens == "all" else encoded[:, 1, :1]
            return self._towers.image_projection(states).flatten(1).norm(dim=-1)[image]
        embedded = F.normalize(self._towers.image_projection(encoded[:, 1, 0]), dim=-1)[image]
        return (embedded * targets.data["seeds"].to(embedded.dtype)).sum(-1)

    @property
    def fast_taps(self) -> Mapping[str, tuple[str, ...]]:
        """The input of the last block's attention and the block before it: of the image encoder for `similarity`, of
        the multimodal encoder for `matching` and `logit`. Empty if the last block is modified."""
        if self.kind not in self.fast_kinds:
            return {}
        stack = self.structure.stacks["fusion" if self.kind in FUSED else "vision"]
        unmodified = self._last_block().is_unmodified and parents_unmodified(self.model, stack.blocks[-1])
        if not unmodified or len(stack.blocks) < 2:
            return {}
        return {stack.inputs[-1]: (stack.blocks[-2],), stack.blocks[-2]: ()}

    def shifts(
        self,
        layer: str,
        inputs: Inputs,
        targets: Targets,
        outputs: Mapping[str, Tensor],
        rule: str | None = None,
    ) -> Float[Tensor, "K D"]:
        """Pooled gradients from the rows of the last block that the heads read, see `LastBlock.pooled_gradients`."""
        [before] = self.fast_taps[layer] or (layer,)
        last, hidden = self._last_block(rule), outputs[before].detach()
        patch = patch_mask(hidden, self.sequence(layer)[0], inputs.geometry[0].rows * inputs.geometry[0].columns)
        if targets.kind in FUSED:
            return self._fusion.shifts(last, hidden, targets, patch, before_norm=layer == before)

        def scores(row: Tensor, mine: Tensor) -> Tensor:
            embedded = self._towers.image_projection(last.norm(self._towers.image_model.layernorm, row))
            return (F.normalize(embedded, dim=-1) * targets.data["seeds"][mine].to(row.dtype)).sum(-1)

        owner = targets.image.to(hidden.device)
        return last.pooled_gradients(hidden, owner, torch.zeros_like(owner), patch, scores, before_norm=layer == before)

    def chain_start(self, targets: Targets) -> Float[Tensor, "K Q"]:
        """Weights of the text's own positions in the multimodal sequence."""
        return targets.data["start"]

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "T E"]:
        """Normalised text embeddings, the projected CLS."""
        with Recorder(self.model):
            out = self._towers.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
            return F.normalize(out[:, 0], dim=-1)

    def _alone(self, inputs: Inputs, own: Flat) -> Float[Tensor, "k E"]:
        pieces = [span_ids(inputs.tokens[t], span) for t, span in own]
        return self.embed_texts(*pad(pieces, self._pad_id, self.device))

    def _left_out(self, inputs: Inputs, own: Flat) -> Float[Tensor, "k E"]:
        ids, mask = inputs.tensors["input_ids"], inputs.tensors["attention_mask"]
        texts = [t for t, _ in own]
        return self.embed_texts(ids[texts], mask[texts]) - self.embed_texts(ids[texts], mask_without(mask, own))

    def _last_block(self, rule: str | None = None) -> LastBlock:
        model: Any = self.model
        if self.kind in FUSED:
            return last_block(self._towers.multimodal_model, (model.itm_head, model.mmm_text_head), rule)
        return last_block(self._towers.image_model, (self._towers.image_projection,), rule)

    @property
    def _fusion(self) -> Fusion:
        return Fusion(self.model, self._pad_id)

    @property
    def _config(self) -> Any:
        return self.model.config

    @property
    def _pad_id(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.sep_token_id, 0)
        return next(i for i in known if i is not None)  # any id will do: padding is masked

    @property
    def _root(self) -> str:
        return "flava." if isinstance(self.model, FlavaForPreTraining) else ""

    @property
    def _towers(self) -> Any:
        return self.model.flava if isinstance(self.model, FlavaForPreTraining) else self.model

    @property
    def _limit(self) -> int:
        return min(self._config.text_config.max_position_embeddings, self.tokenizer.model_max_length)
