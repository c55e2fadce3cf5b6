"""Pictures of an explanation: one map over its picture, and the figure with all of them side by side.

No pyplot: nothing global is touched, no window system is needed, and the same explanation gives the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from math import inf
from typing import Any, cast

from matplotlib.figure import Figure
from PIL import Image

from grounding.core.errors import OptionError
from grounding.core.images import Picture
from grounding.core.registry import did_you_mean
from grounding.explanation.explanation import EntryMap, Explanation
from grounding.explanation.figures.comparison import Comparison
from grounding.explanation.figures.painter import Limits, Painter, limits_of
from grounding.explanation.figures.pixels import Style, fit
from grounding.explanation.maps import SCALES, Scale

LAYOUTS = ("rows", "panels")
LEAST_OVERLAY, LONGEST_OVERLAY, LEAST_SIDE = 768, 1600, 64  # pixels


def overlay(
    entry_map: EntryMap,
    picture: Picture | Image.Image,
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
    image = picture if isinstance(picture, Image.Image) else picture.image
    size = (image.height, image.width)
    wanted = min(max(max(size), least or 0), longest or inf)
    if wanted != max(size):
        size = fit(image.width, image.height, int(wanted), inf, inf)
    chosen = Style(**style)
    painter = Painter(image, entry_map.geometry, size, chosen)
    return Image.fromarray(painter.overlay(entry_map, limits or limits_of([entry_map], chosen)))


def figure(
    explanation: Explanation,
    *,
    layout: str = "rows",
    scale: str = "entry",
    fixed: Sequence[float] | None = None,
    cmap: str = "magma",
    opacity: float = 0.6,
    grid: bool = False,
    peak: bool = True,
    box: bool = True,
    background: str = "picture",
    signed: bool = False,
    cells: bool = False,
) -> Figure:
    """All maps of an explanation side by side.

    Parameters
    ----------
    layout: "rows": the picture, then one row per entry and one column per method; a map that is the same for all
        entries is drawn once, beside the picture. "panels": picture, heat map and overlay of each entry and method.
    scale: which maps share the ends of the colour map: "entry" (each map its own), "caption" (one per method over all
        entries) or "fixed" (`fixed` = raw (low, high) for all). Raw minimum and maximum stand under every map.
    cmap: any matplotlib colour map. `opacity` of the heat, 0 to 1, the same everywhere.
    grid, peak, box: outlines of the patches; centre of the strongest patch; largest region above half of the range.
    background: "picture", or "edges" for its edges alone.
    signed: draw maps that have a sign with it, zero in the middle of a diverging colour map (`cmap` if it is one).
    cells: draw the coarse map as it is, one flat colour per patch, in place of one interpolated between them.

    What the model never saw is hatched, a map without evidence says so and has no colour. Raises OptionError, and
    GroundingError where the picture of a loaded explanation is gone.
    """
    style = Style(cmap, opacity, grid, peak, box, background, signed, cells)
    _check(layout, scale, fixed)
    limits = None if fixed is None else (float(fixed[0]), float(fixed[1]))
    return Comparison(explanation, style, cast(Scale, scale), limits, layout).draw()


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
    geometry, image = explanation.geometry, explanation.picture.image
    flat = max(geometry.width, geometry.height) / min(geometry.width, geometry.height)
    wanted = max(geometry.width, geometry.height, LEAST_OVERLAY, LEAST_SIDE * flat)
    size = fit(geometry.width, geometry.height, round(min(wanted, LONGEST_OVERLAY)), inf, inf)
    painter = Painter(image, geometry, size, chosen)
    own = [key for key, column in explanation.columns.items() if not column.shared]
    maps = {key: [explanation.map(i, key) for i in range(len(explanation.entries))] for key in own}
    kind = cast(Scale, scale)
    for entry in range(len(explanation.entries)):
        for key in own:
            shared = maps[key] if scale == "caption" else [maps[key][entry]]
            ends = limits_of(shared, chosen, kind, limits)
            yield entry, key, Image.fromarray(painter.overlay(maps[key][entry], ends))


def check_options(
    *, layout: str = "rows", scale: str = "entry", fixed: Sequence[float] | None = None, **style: Any
) -> None:
    """The keywords of `figure`, checked before there is anything to draw. Raises OptionError."""
    known = [field.name for field in fields(Style)]
    unknown = next((name for name in style if name not in known), None)
    if unknown is not None:
        known = ["layout", "scale", "fixed", *known]
        raise OptionError(f"no figure option {unknown!r}{did_you_mean(unknown, known)} (there are: {', '.join(known)})")
    Style(**style)
    _check(layout, scale, fixed)


def _check(layout: str, scale: str, fixed: Sequence[float] | None) -> None:
    for what, name, known in (("layout", layout, LAYOUTS), ("scale", scale, SCALES)):
        if name not in known:
            raise OptionError(
                f"unknown {what} {name!r}{did_you_mean(name, list(known))} (there are: {', '.join(known)})"
            )
    if scale != "fixed":
        if fixed is not None:
            raise OptionError(f"limits (--fixed LOW HIGH) are only for scale 'fixed', not for {scale!r}; got {fixed}")
    elif fixed is None:
        raise OptionError("a fixed scale needs its limits: --fixed LOW HIGH, low < high")
    elif len(fixed) != 2 or not -inf < fixed[0] < fixed[1] < inf:
        raise OptionError(f"a fixed scale needs two numbers, low < high (--fixed LOW HIGH); got {fixed}")
