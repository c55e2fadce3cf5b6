"""Geometry of image preprocessing: map points, boxes and patch maps between the original image and the model input.

Resize, crop and pad of an image processor are one affine map per axis. `Geometry` composes them once and resamples a
patch map once. Pixels that the model input does not contain are NaN.

Frames: all coordinates are continuous, (x, y), origin top-left; pixel i covers [i, i + 1), its centre is i + 0.5.
"Original pixels" are those of the image as opened, upright (EXIF orientation applied); "input pixels" those of the
model's input tensor. Boxes are (x0, y0, x1, y1), half-open.
"""

from __future__ import annotations

import math
import operator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64

from grounding.core.errors import GeometryError

Box = tuple[float, float, float, float]
# Names of views of an image: the one that maps are read from, and one of lower resolution beside it.
DETAIL, OVERVIEW = "detail", "overview"


@dataclass(frozen=True)
class Geometry:
    """The affine map from original to input pixels, `input = original * scale + offset`, and the patch grid.

    Parameters
    ----------
    width, height: size of the original image, pixels.
    input_width, input_height: size of the model input, pixels.
    scale, offset: (x, y); the scale in input pixels per original pixel, the offset in input pixels.
    rows, columns: the patch grid over the model input, row-major; it need not be square.
    patch: (width, height) of a patch in input pixels. None: the grid divides the input evenly. Required where the
        patches do not cover the input: 27 patches of 14 pixels leave out the last 6 of 384.

    Raises GeometryError for sizes below 1, scales that are not positive, numbers that are not finite, and maps that
    leave no part of the image in the model input.
    """

    width: int
    height: int
    input_width: int
    input_height: int
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    rows: int = 1
    columns: int = 1
    patch: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("width", "height", "input_width", "input_height", "rows", "columns"):
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))
        object.__setattr__(self, "scale", pair("scale", self.scale, positive=True))
        object.__setattr__(self, "offset", pair("offset", self.offset))
        if self.patch is not None:
            object.__setattr__(self, "patch", pair("patch", self.patch, positive=True))
        x0, y0, x1, y1 = self.seen
        if not (x0 < x1 and y0 < y1):
            raise GeometryError(f"no part of the image is in the model input under {self}")

    @classmethod
    def from_steps(
        cls,
        width: int,
        height: int,
        *,
        resized: tuple[int, int] | None = None,
        crop: tuple[int, int, int, int] | None = None,
        pad: tuple[int, int, int, int] | None = None,
        grid: tuple[int, int] = (1, 1),
    ) -> Geometry:
        """Compose the steps of an image processor, in this order, each in pixels of the step before.

        `resized` is the (width, height) to which the whole image is resized, `crop` the rectangle (x0, y0, width,
        height) that is kept, `pad` the position (x0, y0) of the result on a canvas of (width, height). `grid` is
        (rows, columns). Raises GeometryError if `pad` extends an edge that `crop` cut: one affine map cannot
        represent padding in place of a part of the image.
        """
        geometry = cls(width, height, width, height)
        if resized is not None:
            geometry = geometry.resized(*resized)
        if crop is not None:
            geometry = geometry.cropped(*crop)
        if pad is not None:
            geometry = geometry.cropped(-pad[0], -pad[1], pad[2], pad[3])
        return geometry.with_grid(*grid)

    def resized(self, input_width: int, input_height: int) -> Geometry:
        """The geometry with the model input resized to this size, pixels; its grid is 1 x 1."""
        fx = positive_int("input_width", input_width) / self.input_width
        fy = positive_int("input_height", input_height) / self.input_height
        scale = (self.scale[0] * fx, self.scale[1] * fy)
        offset = (self.offset[0] * fx, self.offset[1] * fy)
        return Geometry(self.width, self.height, input_width, input_height, scale, offset)

    def cropped(self, x0: int, y0: int, width: int, height: int) -> Geometry:
        """The geometry with the model input cropped to the rectangle at (x0, y0), input pixels; its grid is 1 x 1.

        A rectangle that exceeds the input pads it: a negative x0 on the left, and so on. Raises GeometryError if the
        padding is where an earlier crop cut off a part of the image.
        """
        for start, size, old, ends in (
            (x0, width, self.input_width, self._image_in_input(0)),
            (y0, height, self.input_height, self._image_in_input(1)),
        ):
            if (start < 0 and ends[0] < -1e-6) or (start + size > old and ends[1] > old + 1e-6):
                raise GeometryError(
                    f"padding to {width} x {height} after a crop to {self.input_width} x {self.input_height} "
                    "is not one affine map: the padding is where the cut-off part of the image was"
                )
        offset = (self.offset[0] - x0, self.offset[1] - y0)
        return Geometry(self.width, self.height, width, height, self.scale, offset)

    def with_grid(self, rows: int, columns: int, patch: tuple[float, float] | None = None) -> Geometry:
        """The geometry with this patch grid; `patch` is (width, height) in input pixels, None for an even division."""
        return replace(self, rows=rows, columns=columns, patch=patch)

    def of_map(self, rows: int, columns: int) -> Geometry:
        """The geometry of a map of this shape: `self` for its own grid; another grid divides the input evenly."""
        return self if (rows, columns) == (self.rows, self.columns) else self.with_grid(rows, columns)

    @property
    def cell_size(self) -> tuple[float, float]:
        """(width, height) of one cell of the patch grid, input pixels."""
        return self.patch or (self.input_width / self.columns, self.input_height / self.rows)

    @property
    def seen(self) -> Box:
        """The part of the image that the patch grid covers: (x0, y0, x1, y1), original pixels, half-open.

        The few pixels beyond a crop that a resize filter reads are left out. Example: 1600 x 400, shortest edge 224,
        centre crop 224: (600, 0, 1000, 400).
        """
        (x0, x1), (y0, y1) = self._seen_axis(0), self._seen_axis(1)
        return x0, y0, x1, y1

    @property
    def seen_fraction(self) -> float:
        """Area of `seen` divided by the area of the image, in (0, 1]."""
        x0, y0, x1, y1 = self.seen
        return (x1 - x0) * (y1 - y0) / (self.width * self.height)

    def seen_slices(self, size: tuple[int, int] | None = None) -> tuple[slice, slice]:
        """(rows, columns) of the pixels whose centres are in `seen`, where `to_original` is not NaN.

        `size` is the (height, width) at which the whole image is sampled, default its own. If `seen` is so thin that
        it contains no pixel centre, the slices select the one pixel in its middle and are never empty.
        """
        height, width = size or (self.height, self.width)
        columns = pixels_within(*self._seen_axis(0), self.width, width)
        return pixels_within(*self._seen_axis(1), self.height, height), columns

    def cell_box(self, row: int, column: int) -> Box | None:
        """(x0, y0, x1, y1) of a cell in original pixels, clipped to `seen`; None for a cell that is all padding.

        Raises GeometryError for a cell outside the grid.
        """
        if not (0 <= row < self.rows and 0 <= column < self.columns):
            raise GeometryError(f"no cell ({row}, {column}) in a grid of {self.rows} x {self.columns}")
        x0, x1 = (float(edge[column]) for edge in self._cell_edges(0))
        y0, y1 = (float(edge[row]) for edge in self._cell_edges(1))
        return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None

    def cell_centre(self, row: int, column: int) -> tuple[float, float] | None:
        """(x, y) of the centre of a cell's seen part, original pixels; None for a cell that is all padding."""
        box = self.cell_box(row, column)
        return None if box is None else ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)

    @property
    def seen_cells(self) -> Bool[np.ndarray, "rows columns"]:
        """Mask of the cells that contain a part of the image."""
        columns, rows = (np.less(*self._cell_edges(axis)) for axis in (0, 1))
        return rows[:, None] & columns[None, :]

    def cell_at(self, x: float, y: float) -> tuple[int, int] | None:
        """(row, column) of the cell that contains the point (x, y), original pixels; None outside of `seen`."""
        x0, y0, x1, y1 = self.seen
        if not (x0 <= x < x1 and y0 <= y < y1):
            return None
        point = np.array([x, y]) * self.scale + self.offset
        column, row = np.floor(tidy(point / self.cell_size)).astype(int)
        return min(max(int(row), 0), self.rows - 1), min(max(int(column), 0), self.columns - 1)

    def points_to_input(self, points: Any) -> Float64[np.ndarray, "*batch 2"]:
        """Convert points (..., 2), (x, y), from original to input pixels, without clipping."""
        return last_axis(points, 2) * self.scale + self.offset

    def points_to_original(self, points: Any) -> Float64[np.ndarray, "*batch 2"]:
        """Convert points (..., 2), (x, y), from input to original pixels, without clipping."""
        return (last_axis(points, 2) - self.offset) / self.scale

    def boxes_to_input(self, boxes: Any) -> Float64[np.ndarray, "*batch 4"]:
        """Convert boxes (..., 4), (x0, y0, x1, y1), from original to input pixels, without clipping."""
        return last_axis(boxes, 4) * (self.scale * 2) + (self.offset * 2)

    def boxes_to_original(self, boxes: Any) -> Float64[np.ndarray, "*batch 4"]:
        """Convert boxes (..., 4), (x0, y0, x1, y1), from input to original pixels, without clipping."""
        return (last_axis(boxes, 4) - (self.offset * 2)) / (self.scale * 2)

    def to_original(
        self, maps: Any, size: tuple[int, int] | None = None, *, cells: bool = False
    ) -> Float32[np.ndarray, "*batch height width"]:
        """Resample patch maps (..., rows, columns) to the whole image: (..., height, width) float32, NaN where unseen.

        Maps are sampled once, bilinearly, at the pixel centres; values are constant beyond the outermost seen cell
        centres. If the input is the whole image this equals `torch.nn.functional.interpolate(align_corners=False)`.
        Cells that are all padding are never read. A cell that is not finite makes all pixels that read it not finite.
        `size` (height, width) samples the same field of view at another resolution, for drawing. With `cells` every
        pixel has the value of the cell that contains it, without interpolation. Raises GeometryError for maps of
        another grid.
        """
        values = as_float32(maps)
        if values.ndim < 2 or values.shape[-2:] != (self.rows, self.columns):
            raise GeometryError(f"maps of shape {values.shape} do not end in the grid {self.rows} x {self.columns}")
        height, width = (positive_int("size", n) for n in (size or (self.height, self.width)))
        rows, columns = self.seen_slices((height, width))
        across = lerp(values, -1, *self._neighbours(0, columns, self.width / width, cells))
        block = lerp(across, -2, *self._neighbours(1, rows, self.height / height, cells))
        if block.shape[-2:] == (height, width):
            return block
        result = np.full((*values.shape[:-2], height, width), np.nan, dtype=np.float32)
        result[..., rows, columns] = block
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as numbers and lists, for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Geometry:
        """The inverse of `to_dict`. Raises GeometryError for missing, unknown or invalid values."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        try:
            return cls(**fields)
        except TypeError as error:
            raise GeometryError(f"not a geometry: {error}") from None

    def _image_in_input(self, axis: int) -> tuple[float, float]:
        size = (self.width, self.height)[axis]
        return self.offset[axis], self.offset[axis] + size * self.scale[axis]

    def _seen_axis(self, axis: int) -> tuple[float, float]:
        covered = self.cell_size[axis] * (self.columns, self.rows)[axis]
        end = min(covered, (self.input_width, self.input_height)[axis])
        edges = tidy((np.array([0.0, end]) - self.offset[axis]) / self.scale[axis])
        return max(0.0, float(edges[0])), min(float((self.width, self.height)[axis]), float(edges[1]))

    def _cell_edges(self, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """(starts, ends) of the columns or rows, original pixels, clipped to `seen`; end <= start for all padding."""
        edges = np.arange((self.columns, self.rows)[axis] + 1) * self.cell_size[axis]
        original = tidy((edges - self.offset[axis]) / self.scale[axis])
        low, high = self._seen_axis(axis)
        return np.maximum(original[:-1], low), np.minimum(original[1:], high)

    def _neighbours(
        self, axis: int, pixels: slice, step: float, nearest: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each pixel of `step` original pixels, the two cells around its centre and the weight of the second.

        With `nearest` the whole weight is on the cell that contains the centre.
        """
        cells = np.flatnonzero(np.less(*self._cell_edges(axis)))
        centres = (np.arange(pixels.start, pixels.stop) + 0.5) * step
        position = (centres * self.scale[axis] + self.offset[axis]) / self.cell_size[axis] - 0.5
        position = np.clip(np.floor(position + 0.5) if nearest else position, cells[0], cells[-1])
        first = np.floor(position).astype(np.intp)
        weight = position - first
        # A cell with no weight is not read: 0 * NaN would be NaN.
        second = np.where(weight > 0, first + 1, first)
        return first, second, weight.astype(np.float32)


def grid_of(
    tokens: int, prefix: int, input_height: int, input_width: int, patch: int | tuple[int, int]
) -> tuple[int, int]:
    """Return (rows, columns) of the patches in a token sequence, from the input size (pixels) and the patch size.

    `prefix` tokens (CLS, registers) come before the patches; `patch` is one side or (height, width) in input pixels.
    Raises GeometryError unless tokens = prefix + rows x columns.
    """
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    rows, columns = input_height // patch_height, input_width // patch_width
    if tokens != prefix + rows * columns or rows < 1 or columns < 1:
        raise GeometryError(
            f"{tokens} tokens are not {prefix} + {rows} x {columns}: an input {input_height} high and {input_width} "
            f"wide with patches {patch_height} high and {patch_width} wide makes {prefix + rows * columns}"
        )
    return rows, columns


def positive_int(name: str, value: Any) -> int:
    """Return `value` as an int of at least 1. Raises GeometryError."""
    try:
        number = operator.index(value)
    except TypeError:
        raise GeometryError(f"{name} must be a whole number, got {value!r}") from None
    if number < 1:
        raise GeometryError(f"{name} must be at least 1, got {number}")
    return number


def pair(name: str, values: Any, positive: bool = False) -> tuple[float, float]:
    """Return `values` as two finite floats (x, y). Raises GeometryError."""
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
    """Return `values` as a float64 array (..., size). Raises GeometryError."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim < 1 or array.shape[-1] != size:
        raise GeometryError(f"expected an array (..., {size}), got shape {array.shape}")
    return array


def tidy(values: np.ndarray) -> np.ndarray:
    """Round values within 1e-9 (relative) of a whole number, so that rounding noise cannot lose a pixel at an edge."""
    whole = np.round(values)
    return np.where(np.abs(values - whole) <= 1e-9 * np.maximum(1.0, np.abs(values)), whole, values)


def pixels_within(low: float, high: float, length: int, pixels: int) -> slice:
    """Return the pixels, `pixels` over `length` original pixels, whose centres are in [low, high) (original pixels)."""
    start, stop = (math.ceil(float(tidy(np.array(edge * pixels / length - 0.5)))) for edge in (low, high))
    if start < stop:
        return slice(start, stop)
    middle = min(int((low + high) / 2 * pixels / length), pixels - 1)
    return slice(middle, middle + 1)


def as_float32(maps: Any) -> np.ndarray:
    """Convert a numpy array or a torch tensor (any device and dtype, with or without a graph) to a float32 array."""
    if hasattr(maps, "detach"):
        maps = maps.detach().float().cpu().numpy()
    return np.asarray(maps, dtype=np.float32)


def lerp(values: np.ndarray, axis: int, first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return values[first] + weight * (values[second] - values[first]) along `axis`; a flat map stays exactly flat."""
    low, high = np.take(values, first, axis), np.take(values, second, axis)
    high -= low
    high *= weight if axis == -1 else weight[:, None]
    high += low
    return high
