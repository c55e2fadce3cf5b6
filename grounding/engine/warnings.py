"""Warnings about computed maps: orthogonal gradients, maps that do not depend on the text, maps without evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from grounding.engine.plan import MethodCall
from grounding.explanation.explanation import Entry, MethodMaps

# Reason of the status of such maps; `orthogonal_warnings` warns once for all entries.
ROUNDING = "rounding: <activation, gradient> is 0 at every patch"


def orthogonal_warnings(calls: Sequence[MethodCall], orthogonal: Collection[str]) -> Iterator[str]:
    """Warnings about class activation maps at layers whose gradient is orthogonal to their features."""
    for call in calls:
        paths = [path for path in call.paths if path in orthogonal]
        if paths and call.rule is None:
            what = (
                "ranks rounding: the layer is read through a LayerNorm alone, so its map, <activation, gradient>, is 0 "
                "at every patch (zero to rounding) and shows nothing; use gradcam_ln"
                if call.method.inner
                else "is weak evidence: the layer is read through a LayerNorm alone, so <activation, gradient> = 0 at "
                "every patch (zero to rounding) and the evidence along the features is lost; use gradcam_ln"
            )
            yield f"{call.method.title} at {', '.join(paths)} {what}, the LN-rule, there"


def text_independent_warnings(calls: Sequence[MethodCall], entries: Sequence[Entry]) -> Iterator[str]:
    """Warnings about maps that are the same for every token at a position, where other tokens are in question."""
    if any(entry.kind in ("where", "contrast") for entry in entries):
        for call in calls:
            if not call.method.reads_score:
                yield (
                    f"{call.method.title} shows where the model attended at this position of the text: the map is the "
                    "same for any other token there"
                )


def map_warnings(methods: Mapping[str, MethodMaps], entries: Sequence[Entry]) -> Iterator[str]:
    """Warnings about the computed maps."""
    classes = any(entry.kind == "class" for entry in entries)
    parts, text = ("these classes", "class") if classes else ("the parts of this text", "text")
    titles = Counter(own.title for own in methods.values())
    for own in methods.values():
        title = own.title if titles[own.title] == 1 else f"{own.title} at {own.layer}"
        if not own.shared and len(own.maps) > 1 and not np.ptp(own.maps, axis=0).any():
            yield f"{title} cannot distinguish {parts} here: all entries have the same map; another --layer may"
        if not own.text_conditioned and entries[0].kind != "image":
            yield f"{title} does not depend on the {text} here: one map for all entries"
        for i, status in enumerate(own.status):
            if not status and status.reason != ROUNDING:
                every = "the image" if entries[0].kind == "image" else "all entries"
                label = every if own.shared else repr(entries[i].label)
                yield f"{title} of {label} is no evidence: {status.reason}"
