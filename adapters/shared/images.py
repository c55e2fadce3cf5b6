"""Pictures through an image processor: opened safely, each with its geometry and with what the user must know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from adapters.shared.processors import geometry_of
from grounding.adapter.base import Adapter
from grounding.core.demo import is_demo
from grounding.core.errors import ModelError
from grounding.core.geometry import Geometry
from grounding.core.images import Picture, open_image

# Below this share of the picture the reader should hear that much of it was cropped away; a 3 : 2 photograph has 0.67.
SEEN_ENOUGH = 0.6


@dataclass(frozen=True, eq=False)
class Prepared:
    """B pictures as a model takes them: `pixel_values` (B, C, H, W), and one geometry and warnings for each."""

    images: tuple[Picture, ...]
    geometry: tuple[Geometry, ...]
    pixel_values: Tensor
    warnings: tuple[tuple[str, ...], ...]


# (height, width) of a model input -> (rows, columns) of the grid that divides it evenly.
GridOf = Callable[[int, int], tuple[int, int]]


def prepare_images(
    adapter: Adapter,
    processor: Any,
    images: Sequence[Any],
    patch: int | Sequence[int] | GridOf,
    mode: str = "RGB",
    moves: Callable[[Image.Image], Any] | None = None,
) -> Prepared:
    """Open, process, and locate pictures for an adapter by its image processor (or any callable: PIL picture of this
    `mode` -> pixel values); `patch` is a patch's side in pixels, or its (height, width), or gives the grid of an input;
    `moves` is measured in place of a callable.

    Raises ImageError for a picture that cannot be used, ModelError where pictures of a batch get different sizes.
    """
    opened = tuple(image if isinstance(image, Picture) else open_image(image) for image in images)
    tensors = [pixels_of(processor, one.pil if mode == "RGB" else one.pil.convert(mode)) for one in opened]
    if len({tensor.shape for tensor in tensors}) > 1:
        shapes = ", ".join("x".join(map(str, tensor.shape[-2:])) for tensor in tensors)
        what = "the image processor" if isinstance(processor, BaseImageProcessor) else "preprocess"
        raise ModelError(f"{what} gives inputs of different sizes ({shapes}): use batch_size=1")
    pixel_values = torch.stack(tensors).to(adapter.device, adapter.dtype)
    height, width = (int(n) for n in pixel_values.shape[-2:])
    rows, columns, size = _grid(height, width, patch)
    geometry = tuple(
        geometry_of(moves or processor, p.width, p.height, (height, width), mode=mode).with_grid(rows, columns, size)
        for p in opened
    )
    doubts = tuple((*one.warnings, *_doubts(adapter, one, place)) for one, place in zip(opened, geometry, strict=True))
    return Prepared(opened, geometry, pixel_values, doubts)


def _grid(height: int, width: int, patch: int | Sequence[int] | GridOf) -> tuple[int, int, tuple[float, float] | None]:
    """(rows, columns, patch size where the patches leave a rest)."""
    if callable(patch):
        return *patch(height, width), None
    down, across = (patch, patch) if isinstance(patch, int) else patch
    rows, columns = height // down, width // across
    return rows, columns, None if (width, height) == (columns * across, rows * down) else (float(across), float(down))


def pixels_of(processor: Any, image: Image.Image) -> Tensor:
    """Pixel values (C, H, W) of one picture. Raises ModelError where a callable gives anything else."""
    if isinstance(processor, BaseImageProcessor):
        # Channels are told outright: a picture 1 or 3 pixels wide would be taken for channels-first.
        takes = inspect.signature(processor.preprocess).parameters.values()
        told: dict[str, Any] = (
            {"input_data_format": "channels_last"} if any(p.kind is p.VAR_KEYWORD for p in takes) else {}
        )
        return processor(image, return_tensors="pt", **told)["pixel_values"][0]
    out = processor(image.copy())  # it may work in place
    out = out["pixel_values"] if hasattr(out, "keys") and "pixel_values" in out else out
    try:
        tensor = out if isinstance(out, Tensor) else torch.as_tensor(np.asarray(out))
    except (TypeError, ValueError):
        what = f"a dict with the keys {sorted(map(str, out))}" if hasattr(out, "keys") else f"a {type(out).__name__}"
        raise ModelError(f"preprocess gives {what}, expected pixel values (channels, height, width)") from None
    tensor = tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor
    if tensor.ndim != 3:
        raise ModelError(f"preprocess gives {tuple(tensor.shape)}, expected (channels, height, width) of one picture")
    return tensor


def _doubts(adapter: Adapter, image: Picture, geometry: Geometry) -> list[str]:
    doubts = []
    if geometry.seen_fraction < SEEN_ENOUGH:
        share = f"{geometry.seen_fraction:.0%}" if geometry.seen_fraction >= 0.01 else "less than 1%"
        doubts.append(f"the model saw {share} of the picture; the rest is unseen, not irrelevant")
    config = getattr(adapter.model, "config", None)
    if getattr(config, "demo_world", False) and not is_demo(image.path, adapter.demo_parts):
        doubts.append(f"{adapter.demo_advice} and says nothing about other pictures; use --model {adapter.example}")
    return doubts
