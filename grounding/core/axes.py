"""The arithmetic beneath `geometry`: numbers checked, edges tidied, pixels between them, one axis interpolated."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from grounding.core.errors import GroundingError


class GeometryError(GroundingError):
    """Sizes, scales or indices that cannot belong to one picture and one model input."""


def positive_int(name: str, value: Any) -> int:
    """`value` as an int of at least 1, or GeometryError."""
    try:
        number = operator.index(value)
    except TypeError:
        raise GeometryError(f"{name} must be a whole number, got {value!r}") from None
    if number < 1:
        raise GeometryError(f"{name} must be at least 1, got {number}")
    return number


def pair(name: str, values: Any, positive: bool = False) -> tuple[float, float]:
    """`values` as two finite floats (x, y), or GeometryError."""
    try:
        x, y = (float(v) for v in values)
    except (TypeError, ValueError):
        raise GeometryError(f"{name} must be two numbers (x, y), got {values!r}") from None
    if not (math.isfinite(x) and math.isfinite(y)):
        raise GeometryError(f"{name} must be finite, got {(x, y)}")
    if positive and min(x, y) <= 0:
        raise GeometryError(f"{name} must be positive, got {(x, y)}")
    return x, y


def last_axis(values: Any, size: int) -> np.ndarray:
    """`values` as a float64 array (..., size), or GeometryError."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim < 1 or array.shape[-1] != size:
        raise GeometryError(f"expected an array (..., {size}), got shape {array.shape}")
    return array


def tidy(values: np.ndarray) -> np.ndarray:
    """Whole numbers where only rounding noise is missing, so that an edge at 600 is 600 and a pixel is not lost."""
    whole = np.round(values)
    return np.where(np.abs(values - whole) <= 1e-9 * np.maximum(1.0, np.abs(values)), whole, values)


def pixels_within(low: float, high: float, length: int, pixels: int) -> slice:
    """Pixels of `length` original pixels, sampled at `pixels` of them, whose centres lie in [low, high)."""
    start, stop = (math.ceil(float(tidy(np.array(edge * pixels / length - 0.5)))) for edge in (low, high))
    if start < stop:
        return slice(start, stop)
    middle = min(int((low + high) / 2 * pixels / length), pixels - 1)
    return slice(middle, middle + 1)


def as_float32(maps: Any) -> np.ndarray:
    """A float32 array of a numpy array or of a torch tensor on any device, of any type, with a graph or without."""
    if hasattr(maps, "detach"):
        maps = maps.detach().float().cpu().numpy()
    return np.asarray(maps, dtype=np.float32)


def lerp(values: np.ndarray, axis: int, first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """values[first] + weight * (values[second] - values[first]) along `axis`: a flat map stays exactly flat."""
    low, high = np.take(values, first, axis), np.take(values, second, axis)
    high -= low
    high *= weight if axis == -1 else weight[:, None]
    high += low
    return high
