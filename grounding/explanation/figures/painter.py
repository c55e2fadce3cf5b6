"""Draw one patch map over its image: heat, overlay, colour limits and marks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import cast

import numpy as np
from jaxtyping import Float
from PIL import Image

from grounding.core.errors import OptionError
from grounding.core.geometry import Geometry
from grounding.explanation import maps as mapping
from grounding.explanation.explanation import PatchMap
from grounding.explanation.figures.options import FigureOptions
from grounding.explanation.figures.pixels import (  # fmt: skip
    FADE_TO,
    Rgb,
    blend,
    colours,
    draw_box,
    draw_grid,
    draw_note,
    draw_peak,
    faded,
    ground,
    hatch,
    resized,
)

Limits = tuple[float, float]


def with_sign(patch_map: PatchMap, options: FigureOptions) -> bool:
    """Whether a map is drawn with its negative values, zero at the centre of the colour map."""
    return options.signed and patch_map.method.signed


def drawn_values(patch_map: PatchMap, options: FigureOptions) -> Float[np.ndarray, "rows columns"]:
    """The values of a map that are drawn, on the patch grid; NaN where no patch was seen."""
    values = patch_map.raw if with_sign(patch_map, options) else patch_map.view
    return np.where(patch_map.geometry.seen_cells, values, np.nan)


def limits_of(patch_maps: Sequence[PatchMap], options: FigureOptions) -> Limits:
    """The values at the ends of the colour map that these maps share; maps without evidence are ignored.

    The limits of maps drawn with their sign are symmetric around zero, whatever the scale. Equal limits mean that
    there is nothing to draw.
    """
    usable = [m for m in patch_maps if m.status]
    values = [drawn_values(m, options) for m in usable]
    low, high = mapping.limits(values, cast(mapping.Scale, options.scale), options.limits)
    if any(with_sign(m, options) for m in usable):
        reach = max(abs(low), abs(high))
        return -reach, reach
    return low, high


def clipped(patch_map: PatchMap, options: FigureOptions, limits: Limits) -> tuple[float, float]:
    """Fractions of the seen patches with values below and above the ends of the colour map."""
    values = drawn_values(patch_map, options)
    values = values[np.isfinite(values)]
    return float((values < limits[0]).mean()), float((values > limits[1]).mean())


@lru_cache(maxsize=2)
def _box_of(patch_map: PatchMap) -> tuple[int, int, int, int] | None:
    """The box of a map, computed once for heat map and overlay."""
    return patch_map.box


class Painter:
    """Draws maps of one image at one size (height, width); the image is processed once.

    `image` is the whole upright image. With `grid` False the patch grid is not drawn, whatever the options.
    Raises OptionError if the image's size is not that of the geometry.
    """

    def __init__(
        self,
        image: Image.Image,
        geometry: Geometry,
        size: tuple[int, int],
        options: FigureOptions,
        *,
        grid: bool = True,
    ) -> None:
        if image.size != (geometry.width, geometry.height):
            raise OptionError(
                f"the image has {image.width} x {image.height} pixels, the map belongs to one of "
                f"{geometry.width} x {geometry.height}"
            )
        self.geometry, self.size, self.options = geometry, size, options
        self.grid = grid and options.grid
        self.image: Rgb = resized(image, size)

    @cached_property
    def _ground(self) -> Rgb:
        return ground(self.image, self.options.background)

    @cached_property
    def _pale(self) -> Rgb:
        return faded(self.image)

    def overlay(self, patch_map: PatchMap, limits: Limits) -> Rgb:
        """The heat over the image."""
        if not has_evidence(patch_map, limits):
            return self._without_evidence(self._pale)
        unit = self._unit(patch_map, limits)
        weight = np.abs(2 * unit - 1) if with_sign(patch_map, self.options) else unit
        panel = blend(self._ground, self._tinted(patch_map, unit), self.options.opacity, weight)
        return self._marked(panel, self._pale, patch_map)

    def heat(self, patch_map: PatchMap, limits: Limits) -> Rgb:
        """The heat alone, in the colour map's own colours."""
        plain = np.full((*self.size, 3), FADE_TO, np.uint8)
        if not has_evidence(patch_map, limits):
            return self._without_evidence(plain)
        return self._marked(self._tinted(patch_map, self._unit(patch_map, limits)), plain, patch_map)

    def _unit(self, patch_map: PatchMap, limits: Limits) -> Float[np.ndarray, "height width"]:
        values = patch_map.raw if with_sign(patch_map, self.options) else patch_map.view
        heat = patch_map.geometry.to_original(values, size=self.size, cells=self.options.cells)
        return mapping.rescale(heat, *limits)

    def _tinted(self, patch_map: PatchMap, unit: Float[np.ndarray, "height width"]) -> Rgb:
        return colours(unit, self.options.diverging if with_sign(patch_map, self.options) else self.options.cmap)

    def _without_evidence(self, pale: Rgb) -> Rgb:
        return draw_note(hatch(pale, pale, self._unseen), "no evidence")

    @cached_property
    def _unseen(self) -> np.ndarray:
        unseen = np.ones(self.size, bool)
        unseen[self.geometry.seen_slices(self.size)] = False
        return unseen

    def _marked(self, panel: Rgb, pale: Rgb, patch_map: PatchMap) -> Rgb:
        panel = hatch(panel, pale, self._unseen)
        if self.grid:
            panel = draw_grid(panel, patch_map.geometry)
        height, width = self.size
        across, down = width / self.geometry.width, height / self.geometry.height
        peak = patch_map.peak if self.options.peak else None
        if peak is not None:
            panel = draw_peak(panel, (peak[0] * across, peak[1] * down))
        # The map's own box, in original pixels: the same as in the table and in the JSON.
        box = _box_of(patch_map) if self.options.box else None
        if box is not None:
            x0, y0, x1, y1 = (round(n * scale) for n, scale in zip(box, (across, down) * 2, strict=True))
            panel = draw_box(panel, (x0, y0, x1, y1))
        return panel


def has_evidence(patch_map: PatchMap, limits: Limits) -> bool:
    """Whether a map has heat to draw."""
    return bool(patch_map.status) and limits[1] > limits[0]
