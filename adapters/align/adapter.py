"""Adapter for ALIGN, a convolutional image encoder and a text encoder with a joint embedding (Jia et al. 2021,
arXiv:2102.05918)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AlignModel

from adapters.loading import Checkpoint, model_info, own_parts
from adapters.shared.dual_encoder import DualEncoder
from adapters.shared.images import prepare_images
from adapters.shared.unmodified import has_no_hooks, parents_unmodified
from grounding.adapter.base import ModelInfo, Shortcut
from grounding.adapter.inputs import ImageInputs, Inputs, Targets
from grounding.adapter.patch_tokens import PatchTokens
from grounding.adapter.recorder import find_module
from grounding.adapter.structure import ModelStructure, Stack
from grounding.core.errors import LayerError

BLOCKS = "vision_model.encoder.blocks"
POOLERS = (nn.AvgPool2d, nn.MaxPool2d)


class AlignAdapter(DualEncoder):
    """Adapter around an `AlignModel` and its processor (or its `tokenizer` and `image_processor`).

    Targets: `similarity`; `logits`, the cosine divided by the model's temperature; `norm`. The image encoder is an
    EfficientNet: methods on activations and gradients only. Its layers have grids of their own, each assumed to divide
    the whole input evenly (the padding of convolutions is ignored).
    """

    model: AlignModel

    def __init__(
        self,
        model: AlignModel,
        processor: Any = None,
        *,
        tokenizer: Any = None,
        image_processor: Any = None,
        info: ModelInfo | None = None,
    ) -> None:
        parts = own_parts(self, model, (AlignModel,), processor, tokenizer, image_processor)
        self.model, (self.tokenizer, self.image_processor) = model, parts
        self.info = info or model_info(model, self.image_processor)

    @classmethod
    def from_checkpoint(cls, source: Checkpoint) -> AlignAdapter:
        """Load the parts of a checkpoint and return their adapter. Raises ModelError."""
        image_processor, tokenizer = source.image_processor(), source.tokenizer()
        model = source.model(AlignModel)
        return cls(
            model, tokenizer=tokenizer, image_processor=image_processor, info=source.info(model, image_processor)
        )

    def structure(self, kind: str) -> ModelStructure:  # noqa: ARG002
        """Structure of the image encoder. The default layer is the last block: its feature map is pooled, and the
        result is the image embedding."""
        return self._structure

    @cached_property
    def _structure(self) -> ModelStructure:
        blocks = tuple(f"{BLOCKS}.{i}" for i in range(len(self._blocks)))
        why = "its image encoder is convolutional"
        return ModelStructure({"vision": Stack(blocks)}, blocks[-1], "none", pyramid=True, unrecorded=why)

    def prepare_images(self, images: Sequence[Any]) -> ImageInputs:
        """Inputs with pixel values (B, 3, H, W). Raises LayerError if the last feature map is 1 x 1."""
        return prepare_images(self, self.image_processor, images, patch=self._grid_of)

    def patch_tokens(self, path: str, inputs: Inputs, shape: tuple[int, ...]) -> tuple[PatchTokens, ...]:
        """Feature maps of any block. Raises LayerError for a padded map, whose border lies outside of the image, and
        for the single cell that a block weights its channels by."""
        if isinstance(find_module(self.model, path), nn.ZeroPad2d):
            raise LayerError(f"layer {path!r} is a padded feature map: its border lies outside of the image")
        if ".squeeze_excite." in path:
            raise LayerError(f"layer {path!r} has one cell for the whole image, no patch grid")
        return super().patch_tokens(path, inputs, shape)

    def encode_images(self, images: ImageInputs) -> Float[Tensor, "B E"]:
        """Image embeddings, the pooled feature map."""
        return self.model.get_image_features(pixel_values=images.tensors["pixel_values"]).pooler_output

    def text_features(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "T E"]:
        """Text embeddings, the projected first token."""
        return self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output

    def scale_and_bias(self) -> tuple[float, float]:
        """1 / temperature; there is no bias."""
        return 1 / float(self.model.temperature.detach().double()), 0.0

    def shortcut(self, kind: str) -> Shortcut | None:  # noqa: ARG002
        """The pooled gradient at the last block; None if its parents or the pooling are modified."""
        layer, pooler = self._structure.default_layer, self.model.vision_model.pooler
        if not (parents_unmodified(self.model, layer) and isinstance(pooler, POOLERS) and has_no_hooks(pooler)):
            return None
        return PoolShortcut(self, {layer: ()})

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the last feature map for an input of this size. Raises LayerError if it is 1 x 1."""
        rows, columns = height, width
        for convolution, padding in self._halving():
            left, right, top, bottom = padding.padding
            (down, across), (step_down, step_across) = convolution.kernel_size, convolution.stride
            rows = (rows + top + bottom - down) // step_down + 1
            columns = (columns + left + right - across) // step_across + 1
        if rows * columns <= 1:
            raise LayerError(
                f"an input of {width} x {height} pixels leaves a feature map of {rows} x {columns}, which has no grid "
                "of patches: use an image processor with a larger size"
            )
        return rows, columns

    def _halving(self) -> Iterator[tuple[Any, Any]]:
        """The convolutions that reduce the feature map, each with the padding before it; all others keep its size."""
        stem = self.model.vision_model.embeddings
        yield stem.convolution, stem.padding
        for block in self._blocks:
            if block.depthwise_conv.stride == 2:
                yield block.depthwise_conv.depthwise_conv, block.depthwise_conv.depthwise_conv_pad

    @property
    def _blocks(self) -> Any:
        return self.model.vision_model.encoder.blocks

    @property
    def limit(self) -> int:
        """The largest number of tokens of a text."""
        config: Any = self.model.config
        return min(config.text_config.max_position_embeddings, self.tokenizer.model_max_length)


@dataclass(frozen=True, eq=False)
class PoolShortcut:
    """The pooled gradient at a feature map whose mean (or maximum) over cells is the image embedding.

    A vector added to all cells is added to the embedding: both have the same gradient.
    """

    adapter: AlignAdapter
    layers: Mapping[str, tuple[str, ...]]

    def pooled_gradient(
        self,
        layer: str,
        inputs: Inputs,  # noqa: ARG002
        targets: Targets,
        outputs: Mapping[str, Tensor],
        rule: str | None,  # noqa: ARG002
    ) -> Float[Tensor, "K D"]:
        """The gradient of each target's score at its image embedding; no norm follows, so that no rule changes it."""
        embedded = self.features(layer, outputs[layer].detach())[targets.image.to(outputs[layer].device)]
        with torch.enable_grad():
            embedded.requires_grad_()
            total = self.adapter.score_embeddings(embedded, targets, slice(None)).sum()
        [gradient] = torch.autograd.grad(total, embedded)
        return gradient

    def features(self, layer: str, output: Tensor, images: ImageInputs) -> Float[Tensor, "B E"]:  # noqa: ARG002
        """The image embeddings."""
        return self.adapter.model.vision_model.pooler(output).flatten(1)
