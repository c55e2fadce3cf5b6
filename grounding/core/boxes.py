"""Points and pixels inside boxes, and the overlap of two boxes.

Frame: original pixels, (x, y), origin top-left; boxes are (x0, y0, x1, y1), half-open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from grounding.core.geometry import Box, Geometry

Peak = Literal["patch", "pixel"]


def inside(
    points: Float[np.ndarray, "n 2"], boxes: Sequence[Box], peak: Peak = "patch", closed: bool = False
) -> Bool[np.ndarray, "n"]:
    """Return which points (n, 2), (x, y) in original pixels, are strictly inside any of the boxes.

    With `closed`, points on the edges count as inside.

    For the peak `pixel` this is the published test on pixel indices with inclusive corners. Strict: xmin < x < xmax,
    so that the outermost pixels of a box are no hits; for pixel centres and half-open boxes that is an inset of half a
    pixel on each side. Closed: xmin <= x <= xmax, every pixel whose centre is in the box. One difference remains: boxes
    are clipped to the image here, so that the outermost pixels of the image are never strict hits.
    """
    inset = 0.5 if peak == "pixel" and not closed else 0.0
    found = np.zeros(len(points), bool)
    for x0, y0, x1, y1 in boxes:
        low, high = np.array([x0, y0]) + inset, np.array([x1, y1]) - inset
        within = (points >= low) & (points <= high) if closed else (points > low) & (points < high)
        found |= within.all(1)
    return found


def seen_points(geometry: Geometry, peak: Peak) -> Float[np.ndarray, "n 2"]:
    """Return all points (x, y) at which a map can peak: centres of the seen patches or pixels, original pixels."""
    if peak == "patch":
        cells = [geometry.cell_centre(int(r), int(c)) for r, c in np.argwhere(geometry.seen_cells)]
        return np.array(cells, np.float64)
    rows, columns = geometry.seen_slices()
    y, x = np.mgrid[rows, columns]
    return np.stack([x.ravel() + 0.5, y.ravel() + 0.5], axis=1)


def pixel_mask(boxes: Sequence[Box], geometry: Geometry) -> Bool[np.ndarray, "height width"]:
    """Return the mask of the pixels whose centres are in the union of the boxes; at least one pixel per box."""
    mask = np.zeros((geometry.height, geometry.width), bool)
    for x0, y0, x1, y1 in boxes:
        mask[_pixels(y0, y1, geometry.height), _pixels(x0, x1, geometry.width)] = True
    return mask


def overlap(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes, in [0, 1]."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return float(width * height / union)


def _pixels(start: float, stop: float, size: int) -> slice:
    """Pixels whose centres are in [start, stop), at least one, within [0, size)."""
    first = min(max(int(np.ceil(start - 0.5)), 0), size - 1)
    return slice(first, max(min(int(np.ceil(stop - 0.5)), size), first + 1))
