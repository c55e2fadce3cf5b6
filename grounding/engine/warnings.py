"""Around the engine: the user's nested lists in, Explanations with their doubts and provenance out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from grounding.engine.plan import MethodCall
from grounding.explanation.explanation import Entry, MethodMaps

# Why such a map is no evidence; the warning of `orthogonal_warnings` says it once for all entries.
ROUNDING = "rounding: <activation, gradient> is 0 at every patch"


def orthogonal_warnings(plan: Sequence[MethodCall], orthogonal: Collection[str]) -> Iterator[str]:
    """What to say of class activation maps at taps whose gradient is at right angles to their features."""
    for column in plan:
        paths = [path for path in column.paths if path in orthogonal]
        if paths and column.method.rule is None:
            what = (
                "ranks rounding: the layer is read through a LayerNorm alone, so its map, <activation, gradient>, is 0 "
                "at every patch (zero to rounding) and shows nothing; use gradcam_ln"
                if column.method.inner
                else "is weak evidence: the layer is read through a LayerNorm alone, so <activation, gradient> = 0 at "
                "every patch (zero to rounding) and the evidence along the features is lost; use gradcam_ln"
            )
            yield f"{column.method.title} at {', '.join(paths)} {what}, the LN-rule, there"


def text_independent_warnings(plan: Sequence[MethodCall], entries: Sequence[Entry]) -> Iterator[str]:
    """What to say of maps that are the same whatever token is asked for at a place of the text."""
    if any(entry.kind in ("where", "contrast") for entry in entries):
        for column in plan:
            if not column.method.reads_gradient:
                yield (
                    f"{column.method.title} shows where the model looked at this place of the text, the same for any "
                    "token that is asked for there"
                )


def map_warnings(made: Mapping[str, MethodMaps], entries: Sequence[Entry]) -> Iterator[str]:
    """What a reader of these maps must know."""
    classes = any(entry.kind == "class" for entry in entries)
    parts, asked = ("these classes", "class") if classes else ("the parts of this text", "text")
    titles = Counter(column.title for column in made.values())
    for column in made.values():
        title = column.title if titles[column.title] == 1 else f"{column.title} at {column.layer}"
        if not column.shared and len(column.maps) > 1 and not np.ptp(column.maps, axis=0).any():
            yield (f"{title} cannot tell {parts} apart here: all entries have the same map; another --layer may")
        if not column.text_conditioned:
            yield f"{title} does not see the {asked} here: one map for all entries"
        for place, status in enumerate(column.status):
            if not status and status.reason != ROUNDING:
                label = "all entries" if column.shared else repr(entries[place].label)
                yield f"{title} of {label} is no evidence: {status.reason}"
