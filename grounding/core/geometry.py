"""Where a model input's pixels and patches lie in the original picture.

Resize, crop and pad of an image processor are one affine map per axis. `Geometry` composes them once and brings a
patch map back with one sampling. What the model never saw stays NaN.

Frames. All coordinates are continuous, (x, y), origin top-left: pixel i covers [i, i + 1) and has its centre at
i + 0.5. "Original pixels" belong to the upright picture as it was opened, "input pixels" to the tensor that the model
reads. Boxes are (x0, y0, x1, y1), half-open.
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


@dataclass(frozen=True)
class Geometry:
    """One affine map per axis from original to input pixels: `input = original * scale + offset`.

    Parameters
    ----------
    width, height: size of the original picture, pixels.
    input_width, input_height: size of the model input, pixels.
    scale, offset: (x, y); the scale in input pixels per original pixel, the offset in input pixels.
    rows, columns: the patch grid over the model input, row-major; it need not be square.
    patch: (width, height) of a patch in input pixels. None: the grid divides the input evenly. Say it where the grid
        leaves a rest: 27 patches of 14 pixels never read the last 6 of 384.

    Raises GeometryError for sizes below 1, scales that are not positive, numbers that are not finite, and maps under
    which the model sees nothing of the picture.
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
            raise GeometryError(f"the model sees nothing of the picture under {self}")

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
        """Compose the steps of an image processor, in this order.

        `resized` is the (width, height) that the whole picture is resized to, `crop` the (x0, y0, width, height) that
        is cut out of it, `pad` the (x0, y0, width, height) of a canvas and where on it the result is put, all in
        pixels of the step before. `grid` is (rows, columns). Raises GeometryError where `pad` re-opens an edge that
        `crop` cut: what lies there is padding and not the picture, and one affine map cannot say so.
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
        """The model input, resized to this size (pixels). The grid is forgotten."""
        fx = positive_int("input_width", input_width) / self.input_width
        fy = positive_int("input_height", input_height) / self.input_height
        scale = (self.scale[0] * fx, self.scale[1] * fy)
        offset = (self.offset[0] * fx, self.offset[1] * fy)
        return Geometry(self.width, self.height, input_width, input_height, scale, offset)

    def cropped(self, x0: int, y0: int, width: int, height: int) -> Geometry:
        """The rectangle of the model input at (x0, y0), input pixels; beyond its edges there is padding.

        A negative x0 pads on the left, and so on. The grid is forgotten. Raises GeometryError where padding would
        stand for a part of the picture that an earlier crop cut off.
        """
        for start, size, old, ends in (
            (x0, width, self.input_width, self._image_in_input(0)),
            (y0, height, self.input_height, self._image_in_input(1)),
        ):
            if (start < 0 and ends[0] < -1e-6) or (start + size > old and ends[1] > old + 1e-6):
                raise GeometryError(
                    f"padding to {width} x {height} after a crop to {self.input_width} x {self.input_height} "
                    "is not one affine map: the padding lies where the cut-off part of the picture was"
                )
        offset = (self.offset[0] - x0, self.offset[1] - y0)
        return Geometry(self.width, self.height, width, height, self.scale, offset)

    def with_grid(self, rows: int, columns: int, patch: tuple[float, float] | None = None) -> Geometry:
        """The same map with a patch grid; `patch` is (width, height) in input pixels, None for an even division."""
        return replace(self, rows=rows, columns=columns, patch=patch)

    def of_map(self, rows: int, columns: int) -> Geometry:
        """The geometry of a map of so many cells: another grid than its own divides the input evenly."""
        return self if (rows, columns) == (self.rows, self.columns) else self.with_grid(rows, columns)

    @property
    def cell_size(self) -> tuple[float, float]:
        """(width, height) of one cell of the patch grid, input pixels."""
        return self.patch or (self.input_width / self.columns, self.input_height / self.rows)

    @property
    def seen(self) -> Box:
        """What the model saw of the picture: (x0, y0, x1, y1), original pixels, half-open.

        The picture, cut to the part of the model input that the grid covers. The few pixels more that a resize filter
        reaches beyond a crop do not count. 1600 x 400, shortest edge 224, centre crop 224: (600, 0, 1000, 400).
        """
        (x0, x1), (y0, y1) = self._seen_axis(0), self._seen_axis(1)
        return x0, y0, x1, y1

    @property
    def seen_fraction(self) -> float:
        """Area of `seen` over area of the picture, in (0, 1]."""
        x0, y0, x1, y1 = self.seen
        return (x1 - x0) * (y1 - y0) / (self.width * self.height)

    def seen_slices(self, size: tuple[int, int] | None = None) -> tuple[slice, slice]:
        """(rows, columns) of the pixels whose centres lie within `seen`: where `to_original` is not NaN.

        `size` is the (height, width) at which the whole picture is sampled, default its own. Where `seen` is so thin
        that it holds no pixel centre, the one pixel in its middle counts, so that nothing is ever wholly unseen.
        """
        height, width = size or (self.height, self.width)
        columns = pixels_within(*self._seen_axis(0), self.width, width)
        return pixels_within(*self._seen_axis(1), self.height, height), columns

    def cell_box(self, row: int, column: int) -> Box | None:
        """(x0, y0, x1, y1) of a cell in original pixels, cut to `seen`; None for a cell of nothing but padding."""
        if not (0 <= row < self.rows and 0 <= column < self.columns):
            raise GeometryError(f"no cell ({row}, {column}) in a grid of {self.rows} x {self.columns}")
        x0, x1 = (float(edge[column]) for edge in self._cell_edges(0))
        y0, y1 = (float(edge[row]) for edge in self._cell_edges(1))
        return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None

    def cell_centre(self, row: int, column: int) -> tuple[float, float] | None:
        """(x, y) of the middle of a cell's seen part, original pixels; None for a cell of nothing but padding."""
        box = self.cell_box(row, column)
        return None if box is None else ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)

    @property
    def seen_cells(self) -> Bool[np.ndarray, "rows columns"]:
        """Which cells show any of the picture."""
        columns, rows = (np.less(*self._cell_edges(axis)) for axis in (0, 1))
        return rows[:, None] & columns[None, :]

    def cell_at(self, x: float, y: float) -> tuple[int, int] | None:
        """(row, column) of the cell that saw the point (x, y), original pixels; None where it was not seen."""
        x0, y0, x1, y1 = self.seen
        if not (x0 <= x < x1 and y0 <= y < y1):
            return None
        point = np.array([x, y]) * self.scale + self.offset
        column, row = np.floor(tidy(point / self.cell_size)).astype(int)
        return min(max(int(row), 0), self.rows - 1), min(max(int(column), 0), self.columns - 1)

    def points_to_input(self, points: Any) -> Float64[np.ndarray, "*batch 2"]:
        """(..., 2) points (x, y), original pixels -> input pixels. Nothing is clipped."""
        return last_axis(points, 2) * self.scale + self.offset

    def points_to_original(self, points: Any) -> Float64[np.ndarray, "*batch 2"]:
        """(..., 2) points (x, y), input pixels -> original pixels. Nothing is clipped."""
        return (last_axis(points, 2) - self.offset) / self.scale

    def boxes_to_input(self, boxes: Any) -> Float64[np.ndarray, "*batch 4"]:
        """(..., 4) boxes (x0, y0, x1, y1), original pixels -> input pixels. Nothing is clipped."""
        return last_axis(boxes, 4) * (self.scale * 2) + (self.offset * 2)

    def boxes_to_original(self, boxes: Any) -> Float64[np.ndarray, "*batch 4"]:
        """(..., 4) boxes (x0, y0, x1, y1), input pixels -> original pixels. Nothing is clipped."""
        return (last_axis(boxes, 4) - (self.offset * 2)) / (self.scale * 2)

    def to_original(
        self, maps: Any, size: tuple[int, int] | None = None, *, cells: bool = False
    ) -> Float32[np.ndarray, "*batch height width"]:
        """Patch maps (..., rows, columns) -> (..., height, width) float32 on the whole picture, NaN where unseen.

        One bilinear sampling at the pixel centres, values held constant beyond the outermost seen cell centres. Where
        the input is the whole picture this is `torch.nn.functional.interpolate(align_corners=False)`. A cell of
        nothing but padding is never read. A cell that is not finite makes every pixel that reads it not finite.
        `size` (height, width) samples the same field of view at another resolution, for drawing. With `cells` nothing
        is interpolated: every pixel has the value of the cell it lies in.
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
        """Plain numbers and lists, ready for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Geometry:
        """The inverse of `to_dict`; raises GeometryError for missing, unknown or impossible values."""
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
        """(start, end) of each column or row, original pixels, cut to `seen`; end <= start where it is padding."""
        edges = np.arange((self.columns, self.rows)[axis] + 1) * self.cell_size[axis]
        original = tidy((edges - self.offset[axis]) / self.scale[axis])
        low, high = self._seen_axis(axis)
        return np.maximum(original[:-1], low), np.minimum(original[1:], high)

    def _neighbours(
        self, axis: int, pixels: slice, step: float, nearest: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each pixel the two cells it lies between and the weight of the second; `step` original pixels each.

        With `nearest` all of the weight is on the cell it lies in.
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
    """(rows, columns) of the patches of a token sequence, from the input size (pixels) and the patch size.

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
