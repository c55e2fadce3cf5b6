"""Convert and check method options: values, or texts of a command line, to the annotated types."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

# Option of signed methods: the view shows values above this fraction of the map's maximum. 0 is the ReLU of the papers.
THRESHOLD = "threshold"
# Option of methods that read a gradient: the backward rule of LayerNorm and RMSNorm (`grounding.adapter.layernorm`).
NORM_RULE = "norm_rule"
NormRule = Literal["none", "detach"]


@dataclass(frozen=True)
class Interval:
    """Valid range of an option: `Annotated[float, Interval(0, 1)]` means 0 <= value < 1."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        return f"{self.low:g} or more" if self.high == math.inf else f"a fraction in [{self.low:g}, {self.high:g})"


Fraction = Annotated[float, Interval(0, 1)]
NotNegative = Annotated[float, Interval(0)]
Probability = Annotated[float, Interval(0.01, 1)]
Count = Annotated[int, Interval(1)]


def convert(value: Any, hint: Any) -> Any:
    """Convert `value` (or its text on a command line) to the annotated type. Raises ValueError with what is valid."""
    if typing.get_origin(hint) is Annotated:
        hint, limits = typing.get_args(hint)
        value = convert(value, hint)
        if not limits.low <= value < limits.high:
            raise ValueError(f"expected {limits}, got {value}")
        return value
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None or str(value).lower() == "none":
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{value!r} is none of {', '.join(typing.get_args(hint))}")
        return value
    if hint is bool:
        return _boolean(value)
    try:
        converted = hint(value)
    except (TypeError, ValueError):
        raise ValueError(f"expected {hint.__name__}, got {value!r}") from None
    if converted != converted or (hint is int and converted != float(value)):
        raise ValueError(f"expected {hint.__name__}, got {value!r}")
    return converted


def _boolean(value: Any) -> bool:
    named = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(value).lower() not in named:
        raise ValueError(f"expected true or false, got {value!r}")
    return named[str(value).lower()]
