"""Positions of image patches in a layer's output: index matrices into tokens, or feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import log

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

# Axes of a layer's output, as einops patterns.
CHANNELS_FIRST, CHANNELS_LAST, TOKENS = "b d r c", "b r c d", "b n d"


@dataclass(frozen=True, eq=False)
class PatchTokens:
    """Where the patches of one view are in a layer's output.

    Parameters
    ----------
    view: index in `ImageInputs.views`.
    item: index on the leading axis of the output; on the sequence side of a model the index of the text. None: no item
        is this view's alone. The tokens of all images are packed into one axis, or the view is a mosaic of tiles.
    index: position on the token axis of the patch in each row and column; where `item` is None, in the tokens of all
        items, one after the other. Padding and tokens that are no patches do not occur in it. None: the output is a
        feature map (B, D, rows, columns).
    prefix: positions of the other tokens of this view (CLS, registers).
    cells: (rows, columns) of a feature map.
    channels_last: the feature map is (B, rows, columns, D).
    """

    view: int
    item: int | None
    index: Int[np.ndarray, "rows columns"] | None
    prefix: tuple[int, ...] = ()
    cells: tuple[int, int] = (0, 0)
    channels_last: bool = False

    @cached_property
    def grid(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.cells if self.index is None else (int(self.index.shape[0]), int(self.index.shape[1]))

    @cached_property
    def first(self) -> int | None:
        """Position of the first patch if all follow it in order, row by row; else None."""
        if self.index is None:
            return None
        first = int(self.index.flat[0])
        return first if (self.index.ravel() == np.arange(first, first + self.index.size)).all() else None

    @property
    def positions(self) -> list[int]:
        """Positions of all tokens of the view: the prefix, then the patches row by row."""
        assert self.index is not None
        return [*self.prefix, *self.index.ravel().tolist()]


def fold(hidden: Float[Tensor, "..."], places: Sequence[PatchTokens]) -> Float[Tensor, "n rows columns D"]:
    """Return the patches of n views of the same grid from a layer's output."""
    one = places[0]
    if one.index is None:
        axes = CHANNELS_LAST if one.channels_last else CHANNELS_FIRST
        return rearrange(_items(hidden, places), f"{axes} -> b r c d")
    if one.item is None:
        index = np.stack([place.index for place in places if place.index is not None])
        return hidden.reshape(-1, hidden.shape[-1])[torch.from_numpy(index).to(hidden.device)]
    shared = all(place.index is one.index for place in places)
    if shared and one.first is not None:
        patches = _items(hidden, places)[:, one.first : one.first + one.index.size]
        return rearrange(patches, "b (r c) d -> b r c d", r=one.index.shape[0])
    index = np.stack([place.index for place in places if place.index is not None])
    items = torch.tensor([place.item for place in places], device=hidden.device)
    return hidden[items[:, None, None], torch.from_numpy(index).to(hidden.device)]


def shifted(
    hidden: Float[Tensor, "..."], places: Sequence[PatchTokens], shift: Float[Tensor, "n D"]
) -> Float[Tensor, "..."]:
    """Return the output with vector n added to all patches of view n."""
    added = torch.zeros_like(hidden)
    for place, one in zip(places, shift, strict=True):
        if place.index is None:
            own = one if place.channels_last else one[:, None, None].expand(hidden.shape[1:])
            added = added.index_add(
                0, torch.tensor([place.item], device=hidden.device), own.expand(hidden.shape[1:])[None]
            )
        else:
            mask = torch.zeros(hidden.shape[:-1], dtype=hidden.dtype, device=hidden.device)
            index = torch.from_numpy(place.index.ravel().copy()).to(hidden.device)
            if place.item is None:
                mask.view(-1)[index] = 1
                added = added + mask[..., None] * one
            else:
                mask[place.item, index] = 1
                own = mask[place.item, :, None] * one
                added = added.index_add(0, torch.tensor([place.item], device=hidden.device), own[None])
    return hidden + added


def _items(hidden: Tensor, places: Sequence[PatchTokens]) -> Tensor:
    """The items of n views; no copy where these are all of the leading axis."""
    items = [place.item for place in places]
    return hidden if items == list(range(len(hidden))) else hidden[items]


@lru_cache(maxsize=256)
def row_major(rows: int, columns: int, first: int = 0) -> Int[np.ndarray, "rows columns"]:
    """Return the index matrix of patches that follow each other row by row from position `first` on; the same array
    for the same arguments."""
    index = first + np.arange(rows * columns).reshape(rows, columns)
    index.flags.writeable = False
    return index


@dataclass(frozen=True)
class Layout:
    """A grid of `rows` x `columns` patches along `axes`; in a token sequence `prefix` tokens precede the patches.

    It describes an output in which all images have the same grid.
    """

    axes: str
    rows: int
    columns: int
    prefix: int = 0

    def tokens(self, view: int, item: int) -> PatchTokens:
        """Return the positions of the patches of one view, which is an item of the leading axis."""
        if self.axes != TOKENS:
            last = self.axes == CHANNELS_LAST
            return PatchTokens(view, item, None, cells=(self.rows, self.columns), channels_last=last)
        index = row_major(self.rows, self.columns, self.prefix)
        return PatchTokens(view, item, index, tuple(range(self.prefix)))

    def fold(self, hidden: Float[Tensor, "..."]) -> Float[Tensor, "B rows columns D"]:
        """Return the patches of an output, in any layout."""
        return fold(hidden, [self.tokens(0, item) for item in range(len(hidden))])


def find_layout(
    shape: tuple[int, ...], grid: tuple[int, int], prefix: int, *, tail: bool = False, pyramid: bool = False
) -> Layout | None:
    """Return the layout of an output of this shape, None if it is no patch grid.

    `grid` is that of the default layer, `prefix` the number of tokens before the patches; with `tail`, other tokens may
    follow them. With `pyramid` a layer may have another grid over the same image: 4^k times as many tokens, or feature
    maps whose sides have about the same ratio.
    """
    rows, columns = grid
    last = prefix + rows * columns
    if len(shape) == 4:
        return Layout(CHANNELS_FIRST, *grid) if tuple(shape[-2:]) == grid else _maps(shape, grid) if pyramid else None
    if len(shape) != 3:
        return None
    if shape[1] > last if tail else shape[1] == last:
        return Layout(TOKENS, rows, columns, prefix)
    times = (shape[1] - prefix) / (rows * columns)
    factor = 2 ** round(log(times, 4)) if pyramid and times > 1 else 0
    if factor and times == factor * factor:
        return Layout(TOKENS, rows * factor, columns * factor, prefix)
    return None


def _maps(shape: tuple[int, ...], grid: tuple[int, int]) -> Layout | None:
    """Feature maps, channels first or last: the layout whose sides are closer to the grid's ratio; None for neither."""
    found = [Layout(CHANNELS_FIRST, *shape[2:]), Layout(CHANNELS_LAST, *shape[1:3])]
    fitting = [layout for layout in found if layout.rows * layout.columns > 1 and _same_image(layout, grid)]
    # min() returns the first of equals: channels first, the convention of torch.
    return min(fitting, key=lambda one: abs(log(one.rows / grid[0]) - log(one.columns / grid[1])), default=None)


def _same_image(layout: Layout, grid: tuple[int, int]) -> bool:
    """Whether one scale factor relates both grids, with each side rounded to whole cells."""
    sides = list(zip((layout.rows, layout.columns), grid, strict=True))
    low = max((own - 1) / other for own, other in sides)
    high = min((own + 1) / max(other - 1, 0.5) for own, other in sides)
    return low <= high
