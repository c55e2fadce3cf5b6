"""Scores of masked images, for any adapter: pixels are hidden in the model's input, or in the image before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter

import cv2
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from grounding.adapter.base import Adapter, Features
from grounding.adapter.inputs import ImageInputs, Inputs, Targets
from grounding.adapter.recorder import Recorder
from grounding.adapter.vision_cache import map_features
from grounding.core.errors import NumericError
from grounding.core.geometry import Geometry
from grounding.methods.masks import Baseline, Masks, cell_numbers

# Standard deviation of the blur, as a fraction of the short side of the model input.
BLUR = 1 / 16
# Numbers of the model's image input that are made at once; what the model makes of them is about ten times as much.
BUDGET = 5_000_000
PIXELS = "pixel_values"
Masker = Callable[[Sequence[Tensor]], ImageInputs]


def masked_scores(
    adapter: Adapter, inputs: Inputs, features: Features, targets: Targets, masks: Sequence[Masks]
) -> Float[Tensor, "K n"]:
    """Return the score of each target on its image under each mask; `masks[b]` are those of image b.

    n is the largest number of masks; of an image with fewer, the last is repeated. `features` are those of the whole
    images. Texts are the given ones, also where the model generated them. Runs without gradients. Raises NumericError
    for NaN or Inf.
    """
    count, images = max(one.count for one in masks), inputs.images
    size = sum(tensor.numel() for tensor in images.tensors.values()) or 1
    step = max(1, BUDGET // size)
    columns = []
    with Recorder(adapter.model):
        masked = masker(adapter, images, masks)
        for first in range(0, count, step):
            altered = masked([one.pixels(first, min(first + step, count)) for one in masks])
            for own, encoded in _encoded(adapter, altered, len(images), features):
                # Notes of an adapter may be about the whole image.
                columns.append(adapter.score(replace(inputs, images=own, notes={}), encoded, targets))
    found = torch.stack(columns, 1)
    if not torch.isfinite(found).all():
        raise NumericError("scores of masked images are NaN or Inf: the model's numbers cannot be explained")
    return found


def masker(adapter: Adapter, images: ImageInputs, masks: Sequence[Masks]) -> Masker:
    """Return a function from n masks (n, H, W) of each of B images to n versions of the images, version by version:
    x M + b (1 - M), b the baseline of `masks[b]`.

    M is in pixels of the detail view's input. If the model reads these pixels themselves, x is the model's input. Else
    (patches in a sequence, tiles, several views) x is the image as opened, 8 bits per channel, which is prepared again.
    """
    if not reads_pixels(images):
        opened = [_MaskedImage(images, b, one) for b, one in enumerate(masks)]

        def prepared(keep: Sequence[Tensor]) -> ImageInputs:
            versions = zip(*keep, strict=True)
            return adapter.prepare_images(
                [image.under(mask) for masks in versions for image, mask in zip(opened, masks, strict=True)]
            )

        return prepared
    pixels = images.tensors[PIXELS]
    baselines = torch.stack([baseline_pixels(adapter, images, b, one.baseline) for b, one in enumerate(masks)])

    def masked(keep: Sequence[Tensor]) -> ImageInputs:
        shown = torch.stack([mask.to(pixels) for mask in keep], 1)[:, :, None]  # (n, B, 1, H, W)
        versions = (shown * pixels + (1 - shown) * baselines).flatten(0, 1)
        altered = images.select([b for _ in range(len(shown)) for b in range(len(images))])
        return replace(altered, tensors={**altered.tensors, PIXELS: versions})

    return masked


def reads_pixels(images: ImageInputs) -> bool:
    """Whether the model's only image input is `pixel_values` (B, C, H, W), each image as its one view shows it."""
    if set(images.tensors) != {PIXELS} or images.packed or len(images.views) != len(images):
        return False
    shape = tuple(images.tensors[PIXELS].shape)
    sizes = {(view.geometry.input_height, view.geometry.input_width) for view in images.views}
    return len(shape) == 4 and shape[0] == len(images) and sizes == {shape[-2:]}


def _encoded(
    adapter: Adapter, altered: ImageInputs, images: int, whole: Features
) -> Iterator[tuple[ImageInputs, Features]]:
    """Versions of the images and their features, one version at a time; encoded together where these can be told
    apart."""
    parts = [altered.select(range(first, first + images)) for first in range(0, len(altered), images)]
    if len(parts) > 1 and _counts(whole, images):
        features = adapter.encode_images(altered)
        if _counts(features, len(altered)):
            for number, part in enumerate(parts):
                own = slice(number * images, (number + 1) * images)
                yield part, map_features(features, itemgetter(own))
            return
    for part in parts:
        yield part, adapter.encode_images(part)


def _counts(features: Features, images: int) -> bool:
    """Whether the leading axis of all features counts images."""
    every = features if isinstance(features, tuple) else (features,)
    return all(tensor.ndim > 0 and len(tensor) == images for tensor in every)


# ---------------------------------------------------------------- baselines


def baseline_pixels(adapter: Adapter, images: ImageInputs, image: int, kind: Baseline) -> Float[Tensor, "C H W"]:
    """Return the pixels of the model's input that replace hidden ones: the mean colour of the image's seen pixels, the
    image blurred, or black (preprocessed)."""
    pixels, geometry = images.tensors[PIXELS][image], images.geometry(image)
    if kind == "mean":
        seen = np.append(geometry.seen_cells.ravel(), False)[cell_numbers(geometry, *pixels.shape[-2:])]
        return pixels[:, torch.from_numpy(seen).to(pixels.device)].mean(1)[:, None, None].expand_as(pixels)
    if kind == "black":
        picture = images.images[image]
        return adapter.prepare_images([Image.new("RGB", (picture.width, picture.height))]).tensors[PIXELS][0]
    array = pixels.detach().cpu().float().movedim(0, -1).contiguous().numpy()
    blurred = cv2.GaussianBlur(array, (0, 0), BLUR * min(array.shape[:2]))
    return torch.from_numpy(blurred.reshape(array.shape)).movedim(-1, 0).to(pixels)


class _MaskedImage:
    """An image as opened, under masks over the input of its detail view; pixels that the view does not show stay."""

    def __init__(self, images: ImageInputs, image: int, masks: Masks) -> None:
        geometry = images.geometry(image)
        self.pixels = np.asarray(images.images[image].pil, np.float32)
        self.baseline = _baseline_image(self.pixels, geometry, masks.baseline)
        height, width = self.pixels.shape[:2]
        centres = [np.arange(size) + 0.5 for size in (width, height)]
        points = [np.stack([axis, axis], -1) for axis in centres]
        across, down = (geometry.points_to_input(own)[:, axis] for axis, own in enumerate(points))
        # The input pixel that shows each pixel of the image.
        self.columns, self.rows = np.floor(across).astype(int), np.floor(down).astype(int)
        self.seen = ((self.rows >= 0) & (self.rows < geometry.input_height))[:, None] & (
            (self.columns >= 0) & (self.columns < geometry.input_width)
        )
        self.rows, self.columns = (
            self.rows.clip(0, geometry.input_height - 1),
            self.columns.clip(0, geometry.input_width - 1),
        )

    def under(self, mask: Float[Tensor, "H W"]) -> Image.Image:
        """Return the image under a mask."""
        keep = mask.cpu().float().numpy()[self.rows[:, None], self.columns[None]]
        keep = np.where(self.seen, keep, 1)[..., None]
        return Image.fromarray((keep * self.pixels + (1 - keep) * self.baseline + 0.5).astype(np.uint8))


def _baseline_image(
    pixels: Float[np.ndarray, "height width 3"], geometry: Geometry, kind: Baseline
) -> Float[np.ndarray, "height width 3"]:
    if kind == "black":
        return np.zeros_like(pixels)
    if kind == "mean":
        rows, columns = geometry.seen_slices()
        return np.broadcast_to(pixels[rows, columns].mean((0, 1)), pixels.shape)
    sigma = BLUR * min(geometry.input_height, geometry.input_width)
    return cv2.GaussianBlur(pixels, (0, 0), sigma / geometry.scale[0], sigmaY=sigma / geometry.scale[1])
