"""Options of figures, validated once, before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Any

from grounding.core.errors import OptionError
from grounding.core.registry import did_you_mean
from grounding.explanation.figures.pixels import DIVERGING, colour_table
from grounding.explanation.maps import SCALES

LAYOUTS = ("rows", "panels")
BACKGROUNDS = ("picture", "edges")
DIVERGING_NAMES = frozenset(
    (
        *("PiYG", "PRGn", "BrBG", "PuOr", "RdGy", "RdBu", "RdYlBu", "RdYlGn", "Spectral"),
        *("coolwarm", "bwr", "seismic", "berlin", "managua", "vanimo"),
    )
)


@dataclass(frozen=True)
class FigureOptions:
    """How the maps of an explanation are drawn.

    Parameters
    ----------
    layout: "rows": the image, then one row per entry and one column per method; a map shared by all entries is drawn
        once, beside the image. "panels": image, heat map and overlay of each entry and method.
    scale: which maps share the ends of the colour map: "entry" (each map its own), "caption" (one range per method
        over all entries) or "fixed" (the range `fixed` for all maps).
    fixed: raw (low, high) values at the ends of the colour map, for scale "fixed" only.
    cmap: a matplotlib colour map.
    opacity: of the heat, 0 to 1.
    grid: draw the outlines of the patches.
    peak: draw a ring around the centre of the strongest patch.
    box: draw the box of the largest region above half of the range.
    background: "picture" or "edges", what is drawn under the heat.
    signed: draw signed maps with their sign, zero at the centre of a diverging colour map (`cmap` if it is one).
    cells: draw one flat colour per patch; default: interpolate between patches.
    oversampling: panel pixels per figure pixel; 2 keeps panels sharp when the figure is printed at 300 dpi.

    Raises OptionError.
    """

    layout: str = "rows"
    scale: str = "entry"
    fixed: Sequence[float] | None = None
    cmap: str = "magma"
    opacity: float = 0.6
    grid: bool = False
    peak: bool = True
    box: bool = True
    background: str = "picture"
    signed: bool = False
    cells: bool = False
    oversampling: float = 2.0

    def __post_init__(self) -> None:
        colour_table(self.cmap)
        if not 0 <= self.opacity <= 1:
            raise OptionError(f"opacity must be from 0 to 1, got {self.opacity}")
        if not 0 < self.oversampling < inf:
            raise OptionError(f"oversampling must be a number above 0, got {self.oversampling}")
        for option, value, known in (
            ("background", self.background, BACKGROUNDS),
            ("layout", self.layout, LAYOUTS),
            ("scale", self.scale, SCALES),
        ):
            if value not in known:
                raise OptionError(
                    f"unknown {option} {value!r}{did_you_mean(value, list(known))} (there are: {', '.join(known)})"
                )
        self._check_fixed()

    def _check_fixed(self) -> None:
        if self.scale != "fixed":
            if self.fixed is not None:
                raise OptionError(
                    f"limits (--fixed LOW HIGH) are only for scale 'fixed', not for {self.scale!r}; got {self.fixed}"
                )
        elif self.fixed is None:
            raise OptionError("a fixed scale needs its limits: --fixed LOW HIGH, low < high")
        elif len(self.fixed) != 2 or not -inf < self.fixed[0] < self.fixed[1] < inf:
            raise OptionError(f"a fixed scale needs two numbers, low < high (--fixed LOW HIGH); got {self.fixed}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> FigureOptions:
        """Options from keyword arguments. Raises OptionError, also for an unknown name."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise OptionError(
                    f"no figure option {name!r}{did_you_mean(name, known)} (there are: {', '.join(known)})"
                )
        return cls(**options)

    @property
    def limits(self) -> tuple[float, float] | None:
        """`fixed` as (low, high); None for other scales."""
        return None if self.fixed is None else (float(self.fixed[0]), float(self.fixed[1]))

    @property
    def diverging(self) -> str:
        """The colour map of maps drawn with their sign: `cmap` if it is a diverging one."""
        return self.cmap if self.cmap.removesuffix("_r") in DIVERGING_NAMES else DIVERGING
