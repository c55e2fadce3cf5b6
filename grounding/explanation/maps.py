"""Views of raw patch maps for figures and scores: diagnosis, ReLU and threshold, rescaling, peak and box.

Stored maps are never changed. All maps are NumPy arrays; NaN marks unseen values, which are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy.typing import NDArray

from grounding.core.geometry import Geometry

SCALES = ("entry", "caption", "fixed")
Scale = Literal["entry", "caption", "fixed"]


# A map whose range is below this fraction of its magnitude is rounding (float32: 1.2e-7 per operation).
FLAT = 1e-6


@dataclass(frozen=True)
class Status:
    """Whether a map is evidence: `status` is "ok" or "degenerate", for the `reason` given."""

    status: Literal["ok", "degenerate"] = "ok"
    reason: str | None = None

    def __bool__(self) -> bool:
        return self.status == "ok"


def diagnose(raw: Float[np.ndarray, "rows columns"], seen: Bool[np.ndarray, "rows columns"], *, signed: bool) -> Status:
    """Detect maps without evidence: zero everywhere, constant, or (signed) nowhere positive."""
    values = raw[seen]
    if values.size == 0:
        return Status("degenerate", "no patch covers the image")
    size = float(np.abs(values).max())
    if size == 0:
        return Status("degenerate", "zero everywhere: the score does not depend on this layer")
    if values.size > 1 and float(values.max() - values.min()) <= FLAT * size:
        return Status("degenerate", "flat: all patches have the same value")
    if signed and float(values.max()) <= 0:
        return Status("degenerate", "all negative: no patch supports this entry")
    return Status()


def view(raw: Float[np.ndarray, "*shape"], *, signed: bool, threshold: float = 0.0) -> Float[np.ndarray, "*shape"]:
    """The evidence for the entry in a raw map, >= 0: values of signed maps below `threshold` x maximum become zero.

    With threshold 0 this is the ReLU of Grad-CAM (Selvaraju et al. 2017). Unsigned maps are returned unchanged.
    """
    if not signed:
        return raw
    positive = np.maximum(raw, 0)
    if threshold <= 0 or not np.isfinite(positive).any():
        return positive
    return np.where(positive < threshold * np.nanmax(positive), 0, positive)


def limits(maps: list[NDArray[np.floating]], scale: Scale, fixed: tuple[float, float] | None) -> tuple[float, float]:
    """The values drawn as 0 and 1, for maps that share a scale. Equal limits mean that there is nothing to draw."""
    if scale == "fixed":
        if fixed is None or not fixed[0] < fixed[1]:
            raise ValueError(f"a fixed scale needs its limits, low < high; got {fixed}")
        return fixed
    finite = [m[np.isfinite(m)] for m in maps]
    finite = [m for m in finite if m.size]
    if not finite:
        return 0.0, 0.0
    return min(float(m.min()) for m in finite), max(float(m.max()) for m in finite)


def rescale(values: Float[np.ndarray, "*shape"], low: float, high: float) -> Float[np.ndarray, "*shape"]:
    """Map values from [low, high] to [0, 1], clipped; NaN stays NaN. Equal limits give 0."""
    if not high > low:
        return np.where(np.isnan(values), np.nan, 0.0).astype(values.dtype)
    return np.clip((values - low) / (high - low), 0, 1)


def peak_cell(raw: Float[np.ndarray, "rows columns"], seen: Bool[np.ndarray, "rows columns"]) -> tuple[int, int] | None:
    """(row, column) of the strongest seen patch, the first of equal ones in row-major order; None if none is seen."""
    values = np.where(seen & ~np.isnan(raw), raw, -np.inf)
    if not np.isfinite(values).any():
        return None
    row, column = np.unravel_index(int(np.argmax(values)), values.shape)
    return int(row), int(column)


def peak(raw: Float[np.ndarray, "rows columns"], geometry: Geometry) -> tuple[float, float] | None:
    """Centre of the strongest seen patch, (x, y) in original pixels, origin top-left; None if no patch is seen."""
    cell = peak_cell(raw, geometry.seen_cells)
    return None if cell is None else geometry.cell_centre(*cell)


def otsu(values: NDArray[np.floating]) -> float:
    """Otsu's threshold (1979) of values in [0, 1]: values at or above it are foreground."""
    quantised = np.round(values * 255).astype(np.uint8).reshape(1, -1)
    # OpenCV's foreground is above its level, and levels are 1 / 255 apart.
    return (float(cv2.threshold(quantised, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[0]) + 0.5) / 255


def box(
    heat: Float[np.ndarray, "height width"], threshold: float | Literal["otsu"] = 0.5
) -> tuple[int, int, int, int] | None:
    """Box of the largest connected region of a heat map at or above `threshold` of its range over seen pixels.

    (x0, y0, x1, y1), original pixels, origin top-left, half-open; None for an empty or flat map.
    """
    low, high = limits([heat], "entry", None)
    if not high > low:
        return None
    scaled = np.nan_to_num(rescale(heat, low, high), nan=-1.0)
    level = otsu(scaled[scaled >= 0]) if threshold == "otsu" else float(threshold)
    mask: UInt8[np.ndarray, "height width"] = (scaled >= level).astype(np.uint8)
    count, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count < 2:
        return None
    largest = stats[1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))]
    x, y = int(largest[cv2.CC_STAT_LEFT]), int(largest[cv2.CC_STAT_TOP])
    return x, y, x + int(largest[cv2.CC_STAT_WIDTH]), y + int(largest[cv2.CC_STAT_HEIGHT])
