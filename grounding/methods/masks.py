"""Masks over the input of a view: what occlusion and RISE hide from the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from grounding.core.geometry import Geometry

# What replaces a hidden pixel: the image blurred, black, or the mean colour of the image.
Baseline = Literal["mean", "blur", "black"]
# Numbers of masks that are made at once to average them over patches.
CHUNK = 20_000_000


@dataclass(frozen=True, eq=False)
class Masks:
    """n masks over the input of a view: 1 keeps a pixel, 0 replaces it by the baseline.

    Parameters
    ----------
    geometry: of the view.
    count: n.
    baseline: what replaces a hidden pixel.
    make: (first, last) -> those masks (last - first, H, W), H and W the `input_height` and `input_width`.
    """

    geometry: Geometry
    count: int
    baseline: Baseline
    make: Callable[[int, int], Float[Tensor, "m H W"]]
    _means: dict[Geometry, Tensor] = field(init=False, repr=False, default_factory=dict)

    def pixels(self, first: int, last: int) -> Float[Tensor, "m H W"]:
        """Return the masks from `first` to `last`; beyond the end the last one is repeated."""
        made = self.make(min(first, self.count - 1), min(last, self.count))
        missing = (last - first) - len(made)
        return made if not missing else torch.cat([made, made[-1:].expand(missing, -1, -1)])

    def over(self, geometry: Geometry) -> Float[Tensor, "n rows columns"]:
        """Return the mean of each mask over the pixels of each patch of a view: of this one, or of another view of the
        same image, through the original pixels."""
        if geometry not in self._means:
            self._means[geometry] = self._mean_over(geometry)
        return self._means[geometry]

    def _mean_over(self, geometry: Geometry) -> Float[Tensor, "n rows columns"]:
        cells = geometry.rows * geometry.columns
        numbers = torch.from_numpy(_numbers_in(self.geometry, geometry)).flatten()
        sizes = torch.bincount(numbers, minlength=cells + 1)[:cells].clamp(min=1)
        step = max(1, CHUNK // len(numbers))
        parts = []
        for first in range(0, self.count, step):
            masks = self.make(first, min(first + step, self.count)).flatten(1)
            sums = masks.new_zeros(len(masks), cells + 1).index_add(1, numbers, masks)
            parts.append(sums[:, :cells] / sizes)
        return torch.cat(parts).reshape(-1, geometry.rows, geometry.columns)


# From a method's options, the geometry of a view, a seed and the precision: the masks.
MakeMasks = Callable[[Mapping[str, Any], Geometry, int, torch.dtype], Masks]


def cell_numbers(geometry: Geometry, height: int, width: int) -> Int[np.ndarray, "height width"]:
    """Return the row-major index of the patch that each input pixel belongs to; rows * columns outside of patches."""
    return _cells(geometry, np.arange(width) + 0.5, np.arange(height) + 0.5)


def _numbers_in(geometry: Geometry, other: Geometry) -> Int[np.ndarray, "height width"]:
    """The index of the patch of another view of the image that shows each input pixel of a view."""
    axes = [np.arange(size) + 0.5 for size in (geometry.input_width, geometry.input_height)]
    if other != geometry:
        moved = [other.points_to_input(geometry.points_to_original(np.stack([axis, axis], -1))) for axis in axes]
        axes = [points[:, axis] for axis, points in enumerate(moved)]
    return _cells(other, *axes)


def _cells(
    geometry: Geometry, across: Float[np.ndarray, "width"], down: Float[np.ndarray, "height"]
) -> Int[np.ndarray, "height width"]:
    """The row-major index of the patch at each pair of input positions; rows * columns outside of patches."""
    cell_width, cell_height = geometry.cell_size
    rows, columns = np.floor(down / cell_height).astype(int), np.floor(across / cell_width).astype(int)
    numbers = rows[:, None] * geometry.columns + columns[None]
    outside = ((rows < 0) | (rows >= geometry.rows))[:, None] | ((columns < 0) | (columns >= geometry.columns))[None]
    numbers[outside] = geometry.rows * geometry.columns
    return numbers


def patch_masks(
    geometry: Geometry, hidden: Bool[np.ndarray, "n rows columns"], baseline: Baseline, dtype: torch.dtype
) -> Masks:
    """Return masks that hide whole patches; pixels outside of patches are kept."""
    numbers = torch.from_numpy(cell_numbers(geometry, geometry.input_height, geometry.input_width))
    kept = F.pad(torch.from_numpy(~hidden).flatten(1).to(dtype), (0, 1), value=1.0)
    return Masks(geometry, len(hidden), baseline, lambda first, last: kept[first:last][:, numbers])


def windows(geometry: Geometry, window: int, stride: int) -> Bool[np.ndarray, "n rows columns"]:
    """Return the seen patches under each position of a window of `window` x `window` patches.

    Positions start at 0, stride, ... until the window reaches the end, where it is cut off. Those without a seen patch
    are left out.
    """
    found = np.zeros((0, geometry.rows, geometry.columns), bool)
    made = []
    for top in _starts(geometry.rows, window, stride):
        for left in _starts(geometry.columns, window, stride):
            one = np.zeros((geometry.rows, geometry.columns), bool)
            one[top : top + window, left : left + window] = True
            made.append(one & geometry.seen_cells)
    return np.stack([one for one in made if one.any()]) if made else found


def _starts(length: int, window: int, stride: int) -> list[int]:
    found = [0]
    while found[-1] + window < length:
        found.append(found[-1] + stride)
    return found


@dataclass(frozen=True, eq=False)
class RandomCells:
    """The random numbers of RISE (Petsiuk et al. 2018, arXiv:1806.07421, section 3.2): n grids of `cells` x `cells`
    bits, each 1 with probability `keep`, and shifts (down, right) of each in pixels."""

    bits: Float[Tensor, "n cells cells"]
    shifts: Int[Tensor, "n 2"]
    height: int
    width: int

    @classmethod
    def draw(
        cls, count: int, cells: int, keep: float, size: tuple[int, int], seed: int, dtype: torch.dtype
    ) -> RandomCells:
        """Draw them from a generator of their own; `size` is the (height, width) of the masks."""
        generator = torch.Generator().manual_seed(seed)
        bits = (torch.rand(count, cells, cells, generator=generator) < keep).to(dtype)
        shifts = [torch.randint(-(-side // cells), (count,), generator=generator) for side in size]
        return cls(bits, torch.stack(shifts, 1), *size)

    def masks(self, first: int, last: int) -> Float[Tensor, "m H W"]:
        """Return the masks: cells enlarged bilinearly to one cell more than the input on each side, and cut out at the
        shift."""
        bits, shifts = self.bits[first:last], self.shifts[first:last]
        down, across = (
            self._enlarged(size)[shifts[:, axis, None] + torch.arange(size)]
            for axis, size in enumerate((self.height, self.width))
        )
        return down @ bits @ across.mT

    def _enlarged(self, size: int) -> Float[Tensor, "large cells"]:
        """The weight of each cell at each pixel of an axis of `size` pixels and one cell: linear interpolation between
        the centres of cells, beyond the outer ones the outer cell."""
        cells = self.bits.shape[-1]
        large = -(-size // cells) * (cells + 1)
        centres = (torch.arange(large, dtype=self.bits.dtype) + 0.5) * (cells / large) - 0.5
        centres = centres.clamp(0, cells - 1)
        return (1 - (centres[:, None] - torch.arange(cells)).abs()).clamp(min=0)
