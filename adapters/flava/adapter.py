"""Adapter for FLAVA: an image encoder, a text encoder, and a multimodal encoder over both (Singh et al. 2022,
arXiv:2112.04482)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor
from transformers import FlavaForPreTraining, FlavaModel

from adapters.flava.fusion import BEFORE, Fusion, FusionShortcut, last_block
from adapters.loading import Checkpoint, model_info, own_parts
from adapters.shared.dual_encoder import ClsShortcut, DualEncoder
from adapters.shared.images import prepare_images
from adapters.shared.last_block import LastBlock
from adapters.shared.stacks import find_stack
from adapters.shared.text_targets import Flat, mask_without
from adapters.shared.unmodified import parents_unmodified
from grounding.adapter.base import Features, ModelInfo, Shortcut
from grounding.adapter.inputs import ImageInputs, Inputs, Targets
from grounding.adapter.patch_tokens import PatchTokens
from grounding.adapter.structure import Hop, ModelStructure
from grounding.core.errors import LayerError, TargetError
from grounding.core.text import Span

FUSED = ("matching", "logit")


class FlavaAdapter(DualEncoder):
    """Adapter around a `FlavaModel` or `FlavaForPreTraining` and its processor (or `tokenizer` and `image_processor`).

    Targets: `similarity` and `logits`, as of a dual encoder; `matching`, the log odds that image and text match
    (difference of the matching head's two logits); `logit`, the masked-language logit of each token at its own position
    of the multimodal encoder, with no token masked; `norm`, the norm of the projected image embedding over all tokens
    (`norm.tokens=cls`: of the CLS alone), independent of the text. `matching` and `logit` need `FlavaForPreTraining`.
    """

    target_kinds: ClassVar[tuple[str, ...]] = ("similarity", "logits", "matching", "logit", "norm")
    target_options: ClassVar[Mapping[str, tuple[str, ...]]] = {"norm.tokens": ("all", "cls")}
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
        self._structures: dict[str, ModelStructure] = {}
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

    def structure(self, kind: str) -> ModelStructure:
        """Structure of the image encoder, pooled by its CLS; for `matching` and `logit` also of the multimodal and the
        text encoder.

        The default layer of `logit` is the input of the multimodal encoder's last attention. That of `matching` is the
        input of its first: the matching head reads the CLS alone, and no text token.
        """
        if kind not in self._structures:
            self._structures[kind] = self._fused_structure(kind) if kind in FUSED else self._vision_structure()
        return self._structures[kind]

    def _vision_structure(self) -> ModelStructure:
        vision = find_stack(self.model, f"{self._root}image_model")
        return ModelStructure(
            {"vision": vision},
            vision.inputs[-1],
            "cls",
            path=(Hop("vision"),),
            prefix=1,
            sequence_side=self._sequence_side,
        )

    def _fused_structure(self, kind: str) -> ModelStructure:
        stacks = {"vision": find_stack(self.model, f"{self._root}image_model")}
        for name, part in (("fusion", "multimodal_model"), ("text", "text_model")):
            found = find_stack(self.model, f"{self._root}{part}")
            stacks[name] = replace(found, items="sequence", rows_read_alone=name == "fusion")
        return ModelStructure(
            stacks=stacks,
            default_layer=stacks["fusion"].inputs[-1 if kind == "logit" else 0],
            pooling="sequence",
            # In the last block the matching head reads the CLS alone, and chains start in the rows of the text.
            path=(Hop("fusion", live=-1 if kind == "logit" else -2), Hop("vision")),
            prefix=1,
            sequence_side=self._sequence_side,
        )

    @property
    def _sequence_side(self) -> tuple[str, ...]:
        parts = ("multimodal_model", "text_model", "image_to_mm_projection", "text_to_mm_projection")
        return tuple(f"{self._root}{part}" for part in parts)

    def patch_tokens(self, path: str, inputs: Inputs, shape: tuple[int, ...]) -> tuple[PatchTokens, ...]:
        """Positions of the patches: the multimodal encoder has a CLS of its own before the image's, and the text after
        the patches. Raises LayerError for a layer of the text encoder."""
        if f"{path}.".startswith((f"{self._root}text_model.", f"{self._root}text_to_mm_projection.")):
            raise LayerError(f"layer {path!r} has text tokens only, no patches")
        if not f"{path}.".startswith(f"{self._root}multimodal_model."):
            return super().patch_tokens(path, inputs, shape)
        found = self.regular_patch_tokens(path, inputs, shape, BEFORE, tail=True)
        return tuple(replace(one, prefix=(BEFORE - 1,)) for one in found)  # its CLS is no token of the image

    def prepare_images(self, images: Sequence[Any]) -> ImageInputs:
        """Inputs with pixel values (B, 3, H, W)."""
        return prepare_images(self, self.image_processor, images, patch=self._config.image_config.patch_size)

    def check_target(self, kind: str | None, token_target: str | None = None) -> tuple[str, str | None]:
        """Target kind and token target to use, as in the base class. Raises TargetError, also for a missing head."""
        kind, default = super().check_target(kind, token_target)
        if kind in FUSED and not isinstance(self.model, FlavaForPreTraining):
            raise TargetError(f"target {kind!r} needs the heads of FlavaForPreTraining; this is a FlavaModel")
        if kind in ("logit", "norm"):
            if token_target is not None:
                raise TargetError(f"target {kind!r} has no token target: each token has a score of its own")
            default = None
        return kind, default

    def targets(
        self, inputs: Inputs, spans: Sequence[Sequence[Span]], kind: str, token_target: str | None = None
    ) -> Targets:
        """Directions in the joint embedding, or the sequences of the multimodal encoder, see `Fusion.targets`.

        Raises TargetError.
        """
        kind, token_target = self.check_target(kind, token_target)
        if kind not in FUSED:
            return super().targets(inputs, spans, kind, token_target)
        return self._fusion.targets(inputs, Targets.of_spans(inputs, spans, kind, token_target))

    def encode_images(self, images: ImageInputs) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N D"]]:
        """States of the image encoder before its final norm (the multimodal encoder's input) and after it."""
        pixels, size = images.tensors["pixel_values"], self._config.image_config.image_size
        usual = (size, size) if isinstance(size, int) else tuple(size)
        out = self._towers.image_model(
            pixel_values=pixels,
            interpolate_pos_encoding=tuple(pixels.shape[-2:]) != usual,
            output_hidden_states=True,
            return_dict=True,
        )
        return out.hidden_states[-1], out.last_hidden_state

    def score(self, inputs: Inputs, features: Features, targets: Targets) -> Float[Tensor, "K"]:
        """The scores (K,) of the targets, by kind."""
        before_norm, states = features
        if targets.kind in FUSED:
            return self._fusion.scores(before_norm, targets)
        image = targets.image.to(states.device)
        if targets.kind == "norm":
            states = states[:, :1] if targets.options.get("tokens") == "cls" else states
            return self._towers.image_projection(states).flatten(1).norm(dim=-1)[image]
        return super().score(inputs, self._towers.image_projection(states[:, 0]), targets)

    def shortcut(self, kind: str) -> Shortcut | None:
        """The pooled gradient at the input of the last block's attention and at the block before it: of the image
        encoder for `similarity` and `logits`, of the multimodal encoder for `matching` and `logit`. None if the last
        block is modified."""
        if kind == "norm":
            return None
        fused = kind in FUSED
        stack = self.structure(kind).stacks["fusion" if fused else "vision"]
        make = self._last_fused_block if fused else self._last_image_block
        unmodified = make(None).is_unmodified and parents_unmodified(self.model, stack.blocks[-1])
        if not unmodified or len(stack.blocks) < 2:
            return None
        layers: dict[str, tuple[str, ...]] = {stack.inputs[-1]: (stack.blocks[-2],), stack.blocks[-2]: ()}
        if fused:
            return FusionShortcut(self._fusion, layers, make)
        return ClsShortcut(self, layers, make, self._project)

    def scale_and_bias(self) -> tuple[float, float]:
        """The model's scale; it has no bias."""
        return float(self._towers.logit_scale.detach().double().exp()), 0.0

    def text_features(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "T E"]:
        """Text embeddings, the projected CLS."""
        return self._towers.get_text_features(input_ids=ids, attention_mask=mask).pooler_output[:, 0]

    def leave_out(self, inputs: Inputs, own: Flat, whole: Float[Tensor, "T E"]) -> Float[Tensor, "k E"]:  # noqa: ARG002
        """Text embedding minus the embedding with a span's tokens masked."""
        ids, mask = inputs.tensors["input_ids"], inputs.tensors["attention_mask"]
        texts = [t for t, _ in own]
        return self.embed_texts(ids[texts], mask[texts]) - self.embed_texts(ids[texts], mask_without(mask, own))

    def _last_image_block(self, rule: str | None) -> LastBlock:
        return last_block(self._towers.image_model, (self._towers.image_projection,), rule)

    def _last_fused_block(self, rule: str | None) -> LastBlock:
        model: Any = self.model
        return last_block(self._towers.multimodal_model, (model.itm_head, model.mmm_text_head), rule)

    def _project(self, last: LastBlock, rows: Float[Tensor, "k D"]) -> Float[Tensor, "k E"]:
        return self._towers.image_projection(last.norm(self._towers.image_model.layernorm, rows))

    @property
    def _fusion(self) -> Fusion:
        return Fusion(self.model, self.pad_id)

    @property
    def _config(self) -> Any:
        return self.model.config

    @property
    def pad_id(self) -> int:
        """Id of the token that pads a text."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.sep_token_id, 0)
        return next(i for i in known if i is not None)  # any id will do: padding is masked

    @property
    def _root(self) -> str:
        return "flava." if isinstance(self.model, FlavaForPreTraining) else ""

    @property
    def _towers(self) -> Any:
        return self.model.flava if isinstance(self.model, FlavaForPreTraining) else self.model

    @property
    def limit(self) -> int:
        """The largest number of tokens of a text."""
        return min(self._config.text_config.max_position_embeddings, self.tokenizer.model_max_length)
