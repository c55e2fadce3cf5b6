"""Layout of the patch grid in a layer's output: feature maps (channels first or last) or a sequence of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

# Axes of a layer's output, as einops patterns.
CHANNELS_FIRST, CHANNELS_LAST, TOKENS = "b d r c", "b r c d", "b n d"


@dataclass(frozen=True)
class Layout:
    """A grid of `rows` x `columns` patches along `axes`; in a token sequence `prefix` tokens precede the patches."""

    axes: str
    rows: int
    columns: int
    prefix: int = 0

    def fold(self, hidden: Float[Tensor, "..."]) -> Float[Tensor, "B rows columns D"]:
        """Return the patches of a layer's output, in any layout."""
        if self.axes == TOKENS:
            patches = hidden[:, self.prefix : self.prefix + self.rows * self.columns]
            return rearrange(patches, "b (r c) d -> b r c d", r=self.rows)
        return rearrange(hidden, f"{self.axes} -> b r c d")

    def shifted(self, hidden: Float[Tensor, "..."], shift: Float[Tensor, "K D"]) -> Float[Tensor, "..."]:
        """Return the output with vector k added to all patches of item k, for the first K items."""
        if self.axes == TOKENS:
            index = torch.arange(hidden.shape[1], device=hidden.device) - self.prefix
            patches = (index >= 0) & (index < self.rows * self.columns)
            moved = patches[None, :, None] * shift[:, None, :]
        else:
            moved = (shift[:, :, None, None] if self.axes == CHANNELS_FIRST else shift[:, None, None, :]).expand(
                -1, *hidden.shape[1:]
            )
        own = torch.arange(len(shift), device=hidden.device)
        return hidden + torch.zeros_like(hidden).index_add(0, own, moved)


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
