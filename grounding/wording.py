"""The words of the figure: what is said of picture, scale, marks, scores and columns. Plain text, no layout."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import floor
from typing import Any

from grounding.drawing import Style
from grounding.explanation import EntryMap, Explanation, MapColumn
from grounding.lettering import printable
from grounding.maps import Scale
from grounding.panel import Limits, clipped, with_sign

LONGEST_NAME = 60


def number(value: float) -> str:
    """Three digits, with a true minus sign."""
    return f"{value:.3g}".replace("-", "−")


def span(limits: Limits) -> str:
    """low to high."""
    return f"{number(limits[0])} to {number(limits[1])}"


def percent(fraction: float) -> str:
    """Of something that is there: never 0%, and 100% only for all of it."""
    return f"{floor(100 * fraction)}%" if fraction >= 0.01 else "less than 1%"


def picture_name(explanation: Explanation) -> str:
    """The last part of path or address, shortened in its middle: enough to find the file again."""
    path = (explanation.picture.path or "").rstrip("\\/")
    name = re.split(r"[\\/]", path)[-1] or "picture from memory"
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def facts(explanation: Explanation) -> str:
    """Picture, model, target and score in one line."""
    geometry = explanation.geometry
    how = f" ({explanation.token_target})" if explanation.token_target else ""
    parts = [
        f"{picture_name(explanation)}, {geometry.width} x {geometry.height} pixels",
        f"model {explanation.model.get('id') or 'unnamed'}",
        f"target {explanation.target}{how}",
        *([] if explanation.score is None else [f"score {number(explanation.score)}"]),
    ]
    return " · ".join(parts)


def scale_note(columns: Iterable[MapColumn], style: Style, scale: Scale, fixed: Limits | None) -> str:
    """Which values have the ends of the colour map, and what becomes of negative ones."""
    kinds = {column.signed for column in columns}
    around = style.signed and True in kinds
    signed = "" if not around else "signed maps as far below zero as above" if False in kinds else "zero in the middle"
    if scale == "fixed":
        reach = max(map(abs, fixed or (0.0,)))
        symmetric = f"all maps from {span((-reach, reach))}" if False not in kinds else ""
        text = f"Scale fixed: {symmetric or 'all maps from ' + span(fixed or (0.0, 0.0))}"
        signed = f"signed maps from {span((-reach, reach))}" if around and not symmetric else signed
        text = text if around else f"Scale fixed: all maps from {span(fixed or (0.0, 0.0))}"
    elif scale == "caption":
        text = "Scale per caption: one range per method over all entries, given with its name"
    elif around and False not in kinds:
        text = "Scale per entry: each map to its own largest value, as far below zero as above"
        signed = "compare the raw numbers"
    else:
        text = "Scale per entry: each map from its own lowest to its own highest value"
        signed = f"{signed}; compare the raw numbers" if signed else "compare the raw numbers"
    parts = [text, signed, "negative values are drawn as zero" if True in kinds and not around else ""]
    if around and style.diverging != style.cmap != Style.cmap:
        parts.append(f"{style.cmap} has no middle: signed maps are drawn in {style.diverging}")
    return "; ".join(part for part in parts if part) + "."
