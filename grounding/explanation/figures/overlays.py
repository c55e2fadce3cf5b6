"""Overlays: one map drawn over its image, as an RGB image of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from typing import Any

from PIL import Image

from grounding.core.geometry import DETAIL
from grounding.core.images import Picture
from grounding.explanation.explanation import Explanation, PatchMap
from grounding.explanation.figures.explanation_panels import caption_limits
from grounding.explanation.figures.options import FigureOptions
from grounding.explanation.figures.painter import Limits, Painter, limits_of
from grounding.explanation.figures.pixels import fit

LEAST_OVERLAY, LONGEST_OVERLAY, LEAST_SIDE = 768, 1600, 64  # pixels


def overlay(
    patch_map: PatchMap,
    image: Picture | Image.Image,
    *,
    limits: Limits | None = None,
    longest: int | None = None,
    least: int | None = None,
    **options: Any,
) -> Image.Image:
    """Draw one map over its image, RGB, at the image's size.

    Parameters
    ----------
    image: the upright image that the map belongs to.
    limits: raw values at the two ends of the colour map; default: the map's own lowest and highest.
    longest, least: bounds of the longer side of the result, in pixels.
    options: those of `FigureOptions`; `layout` and `oversampling` are ignored.

    A map without evidence gives the image in grey, marked as such. Raises OptionError.
    """
    pil = image if isinstance(image, Image.Image) else image.pil
    size = (pil.height, pil.width)
    side = min(max(max(size), least or 0), longest or inf)
    if side != max(size):
        size = fit(pil.width, pil.height, int(side), inf, inf)
    chosen = FigureOptions.of(options)
    painter = Painter(pil, patch_map.geometry, size, chosen)
    return Image.fromarray(painter.overlay(patch_map, limits or limits_of([patch_map], chosen)))


def overlays(explanation: Explanation, **options: Any) -> Iterator[tuple[int, str, Image.Image]]:
    """Draw one overlay per entry and method that depends on the text: (index of the entry, method key, RGB image).

    `options` are those of `FigureOptions`; `layout` and `oversampling` are ignored. A small image, such as a line of
    text, is enlarged to a longer side of at least 768 pixels and, up to a longer side of 1600 pixels, a shorter side of
    64. Raises as `figure` does.
    """
    return draw(explanation, FigureOptions.of(options))


def draw(
    explanation: Explanation, options: FigureOptions, view: str = DETAIL
) -> Iterator[tuple[int, str, Image.Image]]:
    """The overlays of `overlays` in one view, from validated options; those of the overview have no peak and box."""
    geometry, image = explanation.geometry, explanation.image.pil
    if view != DETAIL:
        assert explanation.overview is not None
        geometry, options = explanation.overview, replace(options, peak=False, box=False)
    flat = max(geometry.width, geometry.height) / min(geometry.width, geometry.height)
    side = max(geometry.width, geometry.height, LEAST_OVERLAY, LEAST_SIDE * flat)
    size = fit(geometry.width, geometry.height, round(min(side, LONGEST_OVERLAY)), inf, inf)
    painter = Painter(image, geometry, size, options)
    shared = caption_limits([explanation], options)
    for entry in range(len(explanation.entries)):
        for key in explanation.separate:
            found = explanation.map(entry, key)
            one = found if view == DETAIL else found.overview
            if one is not None:
                limits = shared[key, view] if shared else limits_of([one], options)
                yield entry, key, Image.fromarray(painter.overlay(one, limits))
