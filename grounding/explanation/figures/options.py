"""Options of figures, checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from math import inf
from typing import Any

from grounding.core.errors import OptionError
from grounding.core.registry import did_you_mean
from grounding.explanation.figures.pixels import Style
from grounding.explanation.maps import SCALES

LAYOUTS = ("rows", "panels")


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
