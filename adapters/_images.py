"""Pictures through an image processor: opened safely, each with its geometry and with what the user must know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters._processors import geometry_of
from grounding.adapter import Adapter
from grounding.demo import is_demo
from grounding.errors import ModelError
from grounding.geometry import Geometry
from grounding.images import Picture, open_image

# Below this share of the picture the reader should hear that much of it was cropped away; a 3 : 2 photograph has 0.67.
SEEN_ENOUGH = 0.6


@dataclass(frozen=True, eq=False)
class Prepared:
    """B pictures as a model takes them: `pixel_values` (B, C, H, W), and one geometry and warnings for each."""

    pictures: tuple[Picture, ...]
    geometry: tuple[Geometry, ...]
    pixel_values: Tensor
    warnings: tuple[tuple[str, ...], ...]


def prepare_images(adapter: Adapter, processor: Any, images: Sequence[Any], patch: int | Sequence[int]) -> Prepared:
    """Open, process, and locate pictures for an adapter by its image processor; `patch` is a patch's side in pixels,
    or its (height, width).

    Raises ImageError for a picture that cannot be used, ModelError where pictures of a batch get different sizes.
    """
    pictures = tuple(image if isinstance(image, Picture) else open_image(image) for image in images)
    tensors = [_pixels(processor, picture) for picture in pictures]
    if len({tensor.shape for tensor in tensors}) > 1:
        shapes = ", ".join("x".join(map(str, tensor.shape[-2:])) for tensor in tensors)
        raise ModelError(f"the image processor gives inputs of different sizes ({shapes}): use batch_size=1")
    pixel_values = torch.stack(tensors).to(adapter.device, adapter.dtype)
    height, width = (int(n) for n in pixel_values.shape[-2:])
    down, across = (patch, patch) if isinstance(patch, int) else patch
    rows, columns = height // down, width // across
    size = None if (width, height) == (columns * across, rows * down) else (float(across), float(down))
    geometry = tuple(
        geometry_of(processor, p.width, p.height, (height, width)).with_grid(rows, columns, size) for p in pictures
    )
    doubts = tuple(
        (*picture.warnings, *_doubts(adapter, picture, place))
        for picture, place in zip(pictures, geometry, strict=True)
    )
    return Prepared(pictures, geometry, pixel_values, doubts)


def _pixels(processor: Any, picture: Picture) -> Tensor:
    # Channels are told outright: a picture 1 or 3 pixels wide would be taken for channels-first.
    if hasattr(processor, "preprocess"):
        return processor(picture.image, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
    out = processor(picture.image)
    tensor = out["pixel_values"] if isinstance(out, dict) else out
    return tensor[0] if tensor.ndim == 4 else tensor


def _doubts(adapter: Adapter, picture: Picture, geometry: Geometry) -> list[str]:
    doubts = []
    if geometry.seen_fraction < SEEN_ENOUGH:
        share = f"{geometry.seen_fraction:.0%}" if geometry.seen_fraction >= 0.01 else "less than 1%"
        doubts.append(f"the model saw {share} of the picture; the rest is unseen, not irrelevant")
    config = getattr(adapter.model, "config", None)
    if getattr(config, "demo_world", False) and not is_demo(picture.path, adapter.demo_parts):
        doubts.append(f"{adapter.demo_advice} and says nothing about other pictures; use --model {adapter.example}")
    return doubts
