"""One map over its picture: from an `PatchMap` to pixels."""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import Float
from PIL import Image

from grounding.core.errors import OptionError
from grounding.core.geometry import Geometry
from grounding.explanation import maps as mapping
from grounding.explanation.explanation import PatchMap
from grounding.explanation.figures.pixels import (  # fmt: skip
    FADE_TO,
    Rgb,
    Style,
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


def with_sign(entry_map: PatchMap, style: Style) -> bool:
    """Whether a map is drawn around zero, negative values included."""
    return style.signed and entry_map.method.signed


def drawn_values(entry_map: PatchMap, style: Style) -> Float[np.ndarray, "rows columns"]:
    """What is drawn of a map, on the patch grid; NaN where no patch was seen."""
    values = entry_map.raw if with_sign(entry_map, style) else entry_map.view
    return np.where(entry_map.geometry.seen_cells, values, np.nan)


def limits_of(
    entry_maps: list[PatchMap], style: Style, scale: mapping.Scale = "entry", fixed: Limits | None = None
) -> Limits:
    """The values at the ends of the colour map that these maps share; maps without evidence have no say.

    A map drawn with its sign has them at the same distance from zero, whatever the scale. Equal limits mean: nothing
    to draw.
    """
    telling = [m for m in entry_maps if m.status]
    low, high = mapping.limits([drawn_values(m, style) for m in telling], scale, fixed)
    if any(with_sign(m, style) for m in telling):
        reach = max(abs(low), abs(high))
        return -reach, reach
    return low, high


def clipped(entry_map: PatchMap, style: Style, limits: Limits) -> tuple[float, float]:
    """Which parts of the seen patches lie below and above the ends of the colour map, as fractions."""
    values = drawn_values(entry_map, style)
    values = values[np.isfinite(values)]
    return float((values < limits[0]).mean()), float((values > limits[1]).mean())


@lru_cache(maxsize=2)
def _box_of(entry_map: PatchMap) -> tuple[int, int, int, int] | None:
    """Found once for heat map and overlay."""
    return entry_map.box


class Painter:
    """Draws maps of one picture at one size, (height, width); the work on the picture is done once.

    `image` is the whole upright picture. The patch grid is left to others with `grid` False, whatever the style.
    Raises OptionError where the picture's shape is not the geometry's.
    """

    def __init__(
        self, image: Image.Image, geometry: Geometry, size: tuple[int, int], style: Style, *, grid: bool = True
    ) -> None:
        if image.size != (geometry.width, geometry.height):
            raise OptionError(
                f"the picture has {image.width} x {image.height} pixels, the map belongs to one of "
                f"{geometry.width} x {geometry.height}"
            )
        self.geometry, self.size, self.style, self.grid = geometry, size, style, grid and style.grid
        self.image: Rgb = resized(image, size)

    @cached_property
    def _ground(self) -> Rgb:
        return ground(self.image, self.style.background)

    @cached_property
    def _pale(self) -> Rgb:
        return faded(self.image)

    def overlay(self, entry_map: PatchMap, limits: Limits) -> Rgb:
        """The heat over the picture."""
        if not has_evidence(entry_map, limits):
            return self._without_evidence(self._pale)
        unit = self._unit(entry_map, limits)
        weight = np.abs(2 * unit - 1) if with_sign(entry_map, self.style) else unit
        panel = blend(self._ground, self._tint(entry_map, unit), self.style.opacity, weight)
        return self._marked(panel, self._pale, entry_map)

    def heat(self, entry_map: PatchMap, limits: Limits) -> Rgb:
        """The heat alone, in the colour map's own colours."""
        plain = np.full((*self.size, 3), FADE_TO, np.uint8)
        if not has_evidence(entry_map, limits):
            return self._without_evidence(plain)
        return self._marked(self._tint(entry_map, self._unit(entry_map, limits)), plain, entry_map)

    def _unit(self, entry_map: PatchMap, limits: Limits) -> Float[np.ndarray, "height width"]:
        values = entry_map.raw if with_sign(entry_map, self.style) else entry_map.view
        heat = entry_map.geometry.to_original(values, size=self.size, cells=self.style.cells)
        return mapping.rescale(heat, *limits)

    def _tint(self, entry_map: PatchMap, unit: Float[np.ndarray, "height width"]) -> Rgb:
        return colours(unit, self.style.diverging if with_sign(entry_map, self.style) else self.style.cmap)

    def _without_evidence(self, pale: Rgb) -> Rgb:
        return draw_note(hatch(pale, pale, self._unseen), "no evidence")

    @cached_property
    def _unseen(self) -> np.ndarray:
        unseen = np.ones(self.size, bool)
        unseen[self.geometry.seen_slices(self.size)] = False
        return unseen

    def _marked(self, panel: Rgb, pale: Rgb, entry_map: PatchMap) -> Rgb:
        panel = hatch(panel, pale, self._unseen)
        if self.grid:
            panel = draw_grid(panel, entry_map.geometry)
        height, width = self.size
        across, down = width / self.geometry.width, height / self.geometry.height
        peak = entry_map.peak if self.style.peak else None
        if peak is not None:
            panel = draw_peak(panel, (peak[0] * across, peak[1] * down))
        # One truth for figure, table and JSON: the map's own box, in original pixels.
        box = _box_of(entry_map) if self.style.box else None
        if box is not None:
            x0, y0, x1, y1 = (round(n * scale) for n, scale in zip(box, (across, down) * 2, strict=True))
            panel = draw_box(panel, (x0, y0, x1, y1))
        return panel


def has_evidence(entry_map: PatchMap, limits: Limits) -> bool:
    """Whether there is anything to draw."""
    return bool(entry_map.status) and limits[1] > limits[0]
