"""Pictures of an explanation: one map over its picture, and the figure with all of them side by side.

No pyplot: nothing global is touched, no window system is needed, and the same explanation gives the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any, cast

from PIL import Image

from grounding.core.images import Picture
from grounding.explanation.explanation import Explanation, PatchMap
from grounding.explanation.figures.options import _check
from grounding.explanation.figures.painter import Limits, Painter, limits_of
from grounding.explanation.figures.pixels import Style, fit
from grounding.explanation.maps import Scale

LEAST_OVERLAY, LONGEST_OVERLAY, LEAST_SIDE = 768, 1600, 64  # pixels


def overlay(
    entry_map: PatchMap,
    image: Picture | Image.Image,
    *,
    limits: Limits | None = None,
    longest: int | None = None,
    least: int | None = None,
    **style: Any,
) -> Image.Image:
    """One map over its picture, RGB, at the picture's size; `least` to `longest` pixels on its longer side, if given.

    Parameters
    ----------
    picture: the upright picture that the map belongs to.
    limits: raw values at the two ends of the colour map; default the map's own lowest and highest.
    style: cmap, opacity, grid, peak, box, background, signed, cells, as in `figure`.

    A map without evidence gives the picture in grey, marked so. Raises OptionError.
    """
    pil = image if isinstance(image, Image.Image) else image.pil
    size = (pil.height, pil.width)
    wanted = min(max(max(size), least or 0), longest or inf)
    if wanted != max(size):
        size = fit(pil.width, pil.height, int(wanted), inf, inf)
    chosen = Style(**style)
    painter = Painter(pil, entry_map.geometry, size, chosen)
    return Image.fromarray(painter.overlay(entry_map, limits or limits_of([entry_map], chosen)))


def overlays(
    explanation: Explanation,
    *,
    layout: str = "rows",
    scale: str = "entry",
    fixed: Sequence[float] | None = None,
    **style: Any,
) -> Iterator[tuple[int, str, Image.Image]]:
    """One overlay per entry and method that sees the text, as (place of the entry, method's key, RGB picture).

    The keywords are those of `figure`; `layout` has no say. A small picture, as of a line of text, is enlarged until
    it is at least 768 pixels long and, as far as 1600 pixels of length allow, 64 high. Raises as `figure` does.
    """
    chosen = Style(**style)
    _check(layout, scale, fixed)
    limits = None if fixed is None else (float(fixed[0]), float(fixed[1]))
    geometry, image = explanation.geometry, explanation.image.pil
    flat = max(geometry.width, geometry.height) / min(geometry.width, geometry.height)
    wanted = max(geometry.width, geometry.height, LEAST_OVERLAY, LEAST_SIDE * flat)
    size = fit(geometry.width, geometry.height, round(min(wanted, LONGEST_OVERLAY)), inf, inf)
    painter = Painter(image, geometry, size, chosen)
    own = [key for key, column in explanation.methods.items() if not column.shared]
    maps = {key: [explanation.map(i, key) for i in range(len(explanation.entries))] for key in own}
    kind = cast(Scale, scale)
    for entry in range(len(explanation.entries)):
        for key in own:
            shared = maps[key] if scale == "caption" else [maps[key][entry]]
            ends = limits_of(shared, chosen, kind, limits)
            yield entry, key, Image.fromarray(painter.overlay(maps[key][entry], ends))
