"""Adapter for SigLIP 2 NaFlex, whose images keep their aspect ratio (Tschannen et al. 2025, arXiv:2502.14786).

Each image is resized to a patch grid of its own. Its patches, row by row, are followed by padding up to a common
number of slots, which a mask excludes from attention and pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Siglip2Model
from transformers.image_processing_utils import BaseImageProcessor

from adapters.shared.images import image_inputs, open_images, run_processor
from adapters.siglip.adapter import SiglipAdapter
from adapters.siglip.pooling_head import PATCH_MASK
from grounding.adapter.inputs import ImageInputs, Inputs
from grounding.adapter.patch_tokens import PatchTokens, row_major
from grounding.core.errors import LayerError, ModelError
from grounding.core.geometry import Geometry

PIXELS, SHAPES = "pixel_values", "spatial_shapes"
OUTPUTS = (PIXELS, PATCH_MASK, SHAPES)


class Siglip2Adapter(SiglipAdapter):
    """Adapter around a `Siglip2Model` and its processor (or its `tokenizer` and `image_processor`).

    A batch has images of any grids, in one forward pass. Raises ModelError also for an image processor that does not
    make patches (`Siglip2ImageProcessor` does), or that does not resize images.
    """

    model_class: ClassVar[type] = Siglip2Model

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        processor = self.image_processor
        made = getattr(processor, "model_input_names", ())
        makes_patches = isinstance(processor, BaseImageProcessor) and set(OUTPUTS) <= set(made)
        if not (makes_patches and getattr(processor, "do_resize", False)):
            raise ModelError(
                f"{type(self).__name__} needs an image processor that resizes images and returns {', '.join(OUTPUTS)} "
                f"(Siglip2ImageProcessor with do_resize=True), got {type(processor).__name__}"
            )

    def prepare_images(self, images: Sequence[Any]) -> ImageInputs:
        """Inputs with patches (B, P, 3 * side * side), their mask (B, P) and grids (B, 2): rows, columns.

        Each image is seen as a whole, with a scale of its own along each axis. Raises ImageError, and ModelError if the
        patches of the processor are not those of the model.
        """
        opened, side = open_images(images), self._vision_config.patch_size
        found = [run_processor(self.image_processor, one.pil) for one in opened]
        tensors = {name: torch.cat([one[name] for one in found]) for name in OUTPUTS}
        width = self._vision_config.num_channels * side * side
        if tensors[PIXELS].shape[-1] != width:
            raise ModelError(
                f"the image processor makes patches of {tensors[PIXELS].shape[-1]} values, the model needs {width} "
                f"({side} x {side} pixels): set its patch_size to {side}"
            )
        tensors[PIXELS] = tensors[PIXELS].to(self.dtype)
        geometry = [
            Geometry.from_steps(one.width, one.height, resized=(columns * side, rows * side), grid=(rows, columns))
            for one, (rows, columns) in zip(opened, tensors[SHAPES].tolist(), strict=True)
        ]
        return image_inputs(self, opened, geometry, {name: one.to(self.device) for name, one in tensors.items()})

    def encode_images(self, images: ImageInputs) -> Float[Tensor, "B E"]:
        """Image embeddings."""
        return self.model.get_image_features(**{name: images.tensors[name] for name in OUTPUTS}).pooler_output

    def patch_tokens(self, path: str, inputs: Inputs, shape: tuple[int, ...]) -> tuple[PatchTokens, ...]:
        """Positions of the patches of each image, row by row from the first slot; padding is not among them.

        Raises LayerError for an output without a slot for each patch and padding.
        """
        slots = inputs.images.tensors[PATCH_MASK].shape[1]
        if len(shape) != 3 or shape[1] != slots:
            raise LayerError(
                f"a layer output of shape {shape} is no patch grid: {path!r} does not have the {slots} patch slots"
            )
        return tuple(
            PatchTokens(view, view, row_major(own.geometry.rows, own.geometry.columns))
            for view, own in enumerate(inputs.images.views)
        )
