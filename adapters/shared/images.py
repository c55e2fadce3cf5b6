"""Prepare images for a model: open them, run the image processor, and compute the geometry of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from adapters.shared.processors import geometry_of
from grounding.adapter.base import Adapter
from grounding.adapter.inputs import ImageInputs, View
from grounding.core.demo import is_demo
from grounding.core.errors import ModelError
from grounding.core.geometry import Geometry
from grounding.core.images import Picture, open_image

# Warn of cropping below this share of the image; a 3 : 2 photograph cropped to a square has 0.67.
SEEN_ENOUGH = 0.6
# (height, width) of a model input -> (rows, columns) of the grid that divides it evenly.
GridOf = Callable[[int, int], tuple[int, int]]


def prepare_images(
    adapter: Adapter,
    processor: Any,
    images: Sequence[Any],
    patch: int | Sequence[int] | GridOf,
    mode: str = "RGB",
    moves: Callable[[Image.Image], Any] | None = None,
) -> ImageInputs:
    """Inputs of B images: `pixel_values` (B, C, H, W), one view of each image, and warnings.

    Parameters
    ----------
    processor: a Hugging Face image processor, or any callable: PIL image of this `mode` -> pixel values.
    images: anything that `open_image` takes, or images it has opened.
    patch: side of a patch in input pixels, or its (height, width), or a function from the (height, width) of the model
        input to the (rows, columns) of the patch grid.
    moves: measured in place of a callable `processor`: the same geometry, without its changes of pixel values.

    Raises ImageError for an image that cannot be used, ModelError if the images of a batch get different sizes.
    """
    opened = open_images(images)
    tensors = [pixels_of(processor, one.pil if mode == "RGB" else one.pil.convert(mode)) for one in opened]
    if len({tensor.shape for tensor in tensors}) > 1:
        shapes = ", ".join("x".join(map(str, tensor.shape[-2:])) for tensor in tensors)
        what = "the image processor" if isinstance(processor, BaseImageProcessor) else "preprocess"
        raise ModelError(f"{what} returns inputs of different sizes ({shapes}): use batch_size=1")
    pixel_values = torch.stack(tensors).to(adapter.device, adapter.dtype)
    height, width = (int(n) for n in pixel_values.shape[-2:])
    rows, columns, size = _grid(height, width, patch)
    geometry = tuple(
        geometry_of(moves or processor, p.width, p.height, (height, width), mode=mode).with_grid(rows, columns, size)
        for p in opened
    )
    return image_inputs(adapter, opened, geometry, {"pixel_values": pixel_values})


def open_images(images: Sequence[Any]) -> tuple[Picture, ...]:
    """Opened images, from anything that `open_image` takes or images it has opened. Raises ImageError."""
    return tuple(image if isinstance(image, Picture) else open_image(image) for image in images)


def image_inputs(
    adapter: Adapter, opened: Sequence[Picture], geometry: Sequence[Geometry], tensors: Mapping[str, Tensor]
) -> ImageInputs:
    """Inputs of B images with one view each, and the warnings about them."""
    warnings = tuple((*one.warnings, *_warnings(adapter, one, own)) for one, own in zip(opened, geometry, strict=True))
    views = tuple(View(b, own) for b, own in enumerate(geometry))
    return ImageInputs(tuple(opened), views, tensors, warnings)


def _grid(height: int, width: int, patch: int | Sequence[int] | GridOf) -> tuple[int, int, tuple[float, float] | None]:
    """(rows, columns, patch size). The size is None if the patches cover the input without a remainder."""
    if callable(patch):
        return *patch(height, width), None
    down, across = (patch, patch) if isinstance(patch, int) else patch
    rows, columns = height // down, width // across
    return rows, columns, None if (width, height) == (columns * across, rows * down) else (float(across), float(down))


def pixels_of(processor: Any, image: Image.Image) -> Tensor:
    """Pixel values (C, H, W) of one image. Raises ModelError if a callable returns anything else."""
    if isinstance(processor, BaseImageProcessor):
        return run_processor(processor, image)["pixel_values"][0]
    out = processor(image.copy())  # it may work in place
    out = out["pixel_values"] if hasattr(out, "keys") and "pixel_values" in out else out
    try:
        tensor = out if isinstance(out, Tensor) else torch.as_tensor(np.asarray(out))
    except (TypeError, ValueError):
        what = f"a dict with the keys {sorted(map(str, out))}" if hasattr(out, "keys") else f"a {type(out).__name__}"
        raise ModelError(f"preprocess returns {what}, expected pixel values (channels, height, width)") from None
    tensor = tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor
    if tensor.ndim != 3:
        raise ModelError(f"preprocess returns {tuple(tensor.shape)}, expected (channels, height, width) of one image")
    return tensor


def run_processor(processor: BaseImageProcessor, image: Image.Image) -> Mapping[str, Tensor]:
    """The tensors that a Hugging Face image processor makes of one image, with a leading axis of length 1."""
    # Name the channel axis: an image 1 or 3 pixels wide would be taken for channels-first.
    parameters = inspect.signature(processor.preprocess).parameters.values()
    channels: dict[str, Any] = (
        {"input_data_format": "channels_last"} if any(p.kind is p.VAR_KEYWORD for p in parameters) else {}
    )
    return processor(image, return_tensors="pt", **channels)


def _warnings(adapter: Adapter, image: Picture, geometry: Geometry) -> list[str]:
    warnings = []
    if geometry.seen_fraction < SEEN_ENOUGH:
        share = f"{geometry.seen_fraction:.0%}" if geometry.seen_fraction >= 0.01 else "less than 1%"
        warnings.append(f"the model saw {share} of the image; the rest is unseen, not irrelevant")
    world = getattr(getattr(adapter.model, "config", None), "demo_world", None)
    if isinstance(world, Mapping) and not is_demo(image.path, world["images"]):
        warnings.append(world["advice"])
    return warnings
