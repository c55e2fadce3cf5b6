"""Measure the geometry of any image preprocessing from its response to grey ramps.

For an image that is a grey ramp along x, the level of a model input pixel gives the original x that it was computed
from; likewise along y. Resizing filters keep straight lines straight, so that one line per axis is the whole geometry;
ProbeError is raised for any other response. A black and a white image give the normalisation and the padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from grounding.core.errors import ProbeError
from grounding.core.geometry import Geometry

# Filters read pixels on both sides of a point: with fewer pixels there is no line to fit.
SMALLEST = 8
# 8-bit levels of the ramps. Along the other axis they tilt by TILT levels, and noise of up to NOISE levels is added, so
# that rounding differs between pixels and their mean is finer than 8 bits. (Filters round between their two passes:
# without noise a plain 2 : 1 reduction was measured 0.1 to 0.25 pixels off.)
DARKEST, BRIGHTEST, TILT, NOISE = 19, 236, 6, 12
Preprocess = Callable[[Image.Image], Any]


def measure_geometry(preprocess: Preprocess, width: int, height: int, mode: str = "RGB") -> Geometry:
    """Measure how `preprocess` maps an image of width x height pixels to the model input.

    `preprocess` turns a PIL image of this `mode` ("RGB" or "L") into an array or tensor (C, H, W) or (1, C, H, W),
    or into a mapping with one under `pixel_values`. Its normalisation may be any affine map per channel. It is called
    12 to 26 times. The patch grid of the result is 1 x 1.

    Accuracy of `Geometry.seen`, in pixels of the coarser frame (input pixels if the image is reduced, original pixels
    if it is enlarged): 0.05 for smooth resize filters, 0.3 for nearest-neighbour, 0.6 if the image covers fewer than
    8 input pixels.

    Raises ProbeError for images with a side below 8 pixels and for preprocessing that is random, mirrors, rotates or
    tiles the image, pads it after a crop, or is not affine along an axis.
    """
    if min(width, height) < SMALLEST:
        raise ProbeError(f"cannot measure with a {width} x {height} image: each side needs {SMALLEST} pixels")
    camera = _Camera.calibrated(preprocess, width, height, mode)
    lines = [_measure_axis(camera, axis) for axis in (0, 1)]
    top, bottom, left, right = camera.box
    for name, (slope, start), length, low, high, end in (
        ("x", lines[0], width, left, right, camera.white.shape[-1]),
        ("y", lines[1], height, top, bottom, camera.white.shape[-2]),
    ):
        first, last = max(0.0, -start / slope), min(float(end), (length - start) / slope)
        if max(abs(first - low), abs(last - high)) > max(1.5, 0.3 / slope):
            raise ProbeError(
                f"along {name} the image should fill input pixels {first:.1f} to {last:.1f} but fills {low} to "
                f"{high}: it was cropped and then padded, which is not one affine map"
            )
    scale = (1 / lines[0][0], 1 / lines[1][0])
    offset = (-lines[0][1] * scale[0], -lines[1][1] * scale[1])
    return Geometry(width, height, camera.white.shape[-1], camera.white.shape[-2], scale, offset)


@dataclass(frozen=True, eq=False)
class _Camera:
    """`preprocess` with its normalisation undone.

    `black` and `white` (C, H, W) are its results for a black and a white image, `box` (top, bottom, left, right) the
    input pixels that depend on the image; the others are padding.
    """

    preprocess: Preprocess
    width: int
    height: int
    mode: str
    black: np.ndarray
    white: np.ndarray
    box: tuple[int, int, int, int]

    @classmethod
    def calibrated(cls, preprocess: Preprocess, width: int, height: int, mode: str) -> _Camera:
        black, white = (_pixels(preprocess(Image.new("L", (width, height), grey).convert(mode))) for grey in (0, 255))
        if black.shape != white.shape:
            raise ProbeError(f"two images of one size came out as {black.shape} and {white.shape}")
        contrast = np.abs(white - black).max(axis=0)
        if not contrast.max() > 1e-6:
            raise ProbeError("a black and a white image come out alike: brightness is normalised per image")
        shown = contrast > 0.5 * contrast.max()
        rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
        box = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
        if not shown[box[0] : box[1], box[2] : box[3]].all():
            raise ProbeError("the image does not fill one rectangle of the model input: tiles or a mask")
        return cls(preprocess, width, height, mode, black, white, box)

    def levels(self, image: np.ndarray) -> np.ndarray:
        """Return the grey levels (H, W) inside `box`, 0 to 255, for a grey `image` (height, width) uint8."""
        answer = _pixels(self.preprocess(Image.fromarray(image).convert(self.mode)))
        if answer.shape != self.white.shape:
            raise ProbeError(f"two images of one size came out as {self.white.shape} and {answer.shape}")
        top, bottom, left, right = self.box
        span = (self.white - self.black)[:, top:bottom, left:right]
        level = (answer - self.black)[:, top:bottom, left:right]
        # Channels are weighted by their contrast: a constant one has no information.
        return 255 * (level * span).sum(axis=0) / (span * span).sum(axis=0)


def _pixels(answer: Any) -> np.ndarray:
    """Return the (C, H, W) float64 array in the result of a preprocessing. Raises ProbeError."""
    if hasattr(answer, "keys"):
        if "pixel_values" not in answer:
            raise ProbeError(f"the preprocessing returns {sorted(answer.keys())}, no pixel_values")
        answer = answer["pixel_values"]
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    if hasattr(answer, "detach"):
        answer = answer.detach().float().cpu().numpy()
    array = np.asarray(answer, dtype=np.float64)
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[-1] in (1, 3, 4) and array.shape[0] not in (1, 3, 4):
        raise ProbeError(f"pixel values of shape {array.shape} have their channels last, not first")
    if array.ndim != 3:
        raise ProbeError(f"pixel values of shape {array.shape} are not one image (channels, height, width)")
    return array


def _measure_axis(camera: _Camera, axis: int) -> tuple[float, float]:
    """Return (slope, start): original coordinate = start + slope * input coordinate, both continuous."""
    low, high = _window(camera, axis)
    up, down = (_ramp(camera, axis, low, high, dither) for dither in (1, -1))
    # The second ramp is negated: rounding up or truncation then has the opposite sign.
    answers = [camera.levels(up), 255 - camera.levels(255 - down)]
    again = [camera.levels(up), 255 - camera.levels(255 - down)]
    if not np.allclose(answers, again, atol=1e-3):
        raise ProbeError("two answers to one image differ: the preprocessing is random")
    where = _coordinates(np.mean(answers, axis=0), low, high)
    slope, start = _fit(camera, axis, where)
    _check(camera, axis, where, slope, start, level=(high - low) / (BRIGHTEST - DARKEST))
    return slope, start


def _window(camera: _Camera, axis: int) -> tuple[float, float]:
    """Return the part of the axis that the model input contains, with a margin: the ramp covers it."""
    length = float((camera.width, camera.height)[axis])
    low, high = 0.0, length
    for _ in range(8):
        where = _coordinates(camera.levels(_ramp(camera, axis, low, high, 0)), low, high)
        slope, start = _fit(camera, axis, where)
        first, last = sorted(start + slope * edge for edge in _edges(camera, axis))
        margin = max(2.0, 0.01 * (high - low), 0.1 * (last - first))
        new_low, new_high = max(0.0, first - margin), min(length, last + margin)
        if new_high - new_low > 0.7 * (high - low) or new_high - new_low < 1:
            break
        low, high = new_low, new_high
    return low, high


def _ramp(camera: _Camera, axis: int, low: float, high: float, dither: int) -> np.ndarray:
    """Return a grey ramp (height, width) uint8, dark at `low`, bright at `high` (original pixels), constant beyond.

    Tilt and noise are multiplied by `dither` (1, 0 or -1).
    """
    along, across = ((np.arange(n) + 0.5, n) for n in (camera.width, camera.height)[:: 1 - 2 * axis])
    level = DARKEST + np.clip((along[0] - low) / (high - low), 0, 1) * (BRIGHTEST - DARKEST)
    lift = TILT * (2 * across[0] / across[1] - 1)
    noise = np.random.default_rng(0).uniform(-NOISE, NOISE, (across[1], along[1]))
    image = np.floor(level + dither * (lift[:, None] + noise) + 0.5).astype(np.uint8)
    return np.ascontiguousarray(image if axis == 0 else image.T)


def _coordinates(level: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the original coordinates at which `_ramp` has these levels."""
    return low + (level - DARKEST) / (BRIGHTEST - DARKEST) * (high - low)


def _edges(camera: _Camera, axis: int) -> tuple[int, int]:
    top, bottom, left, right = camera.box
    return (left, right) if axis == 0 else (top, bottom)


def _interior(camera: _Camera, axis: int) -> slice:
    """The pixels whose filters do not reach an edge: three pixels of the coarser frame away, if there are so many."""
    low, high = _edges(camera, axis)
    enlarged = (high - low) / (camera.width, camera.height)[axis]
    margin = min(3 * max(1.0, enlarged), 0.3 * (high - low))
    return slice(int(margin), max(high - low - int(margin), int(margin) + 1))


def _inside(camera: _Camera, axis: int, where: np.ndarray) -> np.ndarray:
    """The interior of `where` (H, W), with `axis` last."""
    inside = where[_interior(camera, 1), _interior(camera, 0)]
    return inside if axis == 0 else inside.T


def _fit(camera: _Camera, axis: int, where: np.ndarray) -> tuple[float, float]:
    """Least squares line through the mean over the other axis; `where` (H, W) in original pixels."""
    inside = _interior(camera, axis)
    profile = _inside(camera, axis, where).mean(axis=0)
    centres = np.arange(inside.start, inside.stop) + 0.5 + _edges(camera, axis)[0]
    if len(centres) < 2:
        low, high = _edges(camera, axis)
        raise ProbeError(f"the image fills {high - low} input pixels along {'xy'[axis]}: too few to fit a line")
    slope, start = np.polyfit(centres, profile, 1)
    return float(slope), float(start)


def _check(camera: _Camera, axis: int, where: np.ndarray, slope: float, start: float, level: float) -> None:
    """Raise ProbeError for coordinates `where` (H, W) that depend on the other axis or do not follow a rising line.

    `level` is one 8-bit step in original pixels. Nearest-neighbour is off by half a pixel of the coarser frame.
    """
    name = "xy"[axis]
    low, high = _edges(camera, axis)
    one, inside = _interior(camera, axis), _inside(camera, axis, where)
    profile = inside.mean(axis=0)
    if np.abs(inside - profile).max() > 2 * level + 0.1 * max(1.0, abs(slope)):
        raise ProbeError(
            f"a ramp along {name} comes out as more than a ramp along {name}: turned, tiled, or brightness is bent"
        )
    if slope * (high - low) < -4 * level:
        raise ProbeError(f"the image is mirrored along {name}")
    centres = np.arange(one.start, one.stop) + 0.5 + low
    residual = float(np.abs(profile - (start + slope * centres)).max())
    allowed = 1.5 * level + 0.75 * max(1.0, abs(slope))
    if slope <= 0 or residual > allowed:
        raise ProbeError(
            f"along {name} the model input does not follow a line of the image (off by up to {residual:.1f} original "
            f"pixels, {allowed:.1f} allowed): it is not made by resize, crop and pad"
        )
