"""Around the engine: the user's nested lists in, Explanations with their doubts and provenance out."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from grounding.adapter.base import Adapter, Chance
from grounding.adapter.inputs import Inputs, Targets
from grounding.core.errors import GroundingError, NumericError, OptionError
from grounding.core.text import Asked, Span
from grounding.engine.plan import Column, Selection
from grounding.explanation.explanation import SCHEMA_VERSION, Entry, Explanation, MapColumn
from grounding.explanation.maps import Status, diagnose

# Why such a map is no evidence; the warning of `cancelled` says it once for all entries.
ROUNDING = "rounding: <activation, gradient> is 0 at every patch"


def map_column(
    adapter: Adapter,
    column: Column,
    targets: Targets,
    inputs: Inputs,
    image: int,
    maps: np.ndarray,
    members: list[int],
    orthogonal: Collection[str] = (),
) -> MapColumn:
    """What one text's entries (`members` of K) got from one column; `orthogonal` as in `Computed`.

    Raises NumericError where a method gave NaN.
    """
    conditioned = adapter.text_conditioned(targets.kind, column.method.reads_gradient)
    chosen = maps[members] if conditioned else maps[[image]]
    if not np.isfinite(chosen).all():
        raise NumericError(f"{column.method.title} gives NaN or Inf: the model's numbers cannot be explained")
    seen = inputs.geometry[image].of_map(*chosen.shape[1:]).seen_cells
    status = tuple(diagnose(raw, seen, signed=column.method.signed) for raw in chosen)
    if column.method.inner and column.method.rule is None and column.paths and set(column.paths) <= set(orthogonal):
        status = tuple(Status("degenerate", ROUNDING) for _ in chosen)
    return MapColumn(
        column.key,
        column.name,
        column.method.title,
        column.layer,
        column.options,
        column.method.signed,
        conditioned,
        chosen,
        status,
    )


def entry_of(span: Span, score: float, chance: Chance | None) -> Entry:
    """The entry of a scored span, with the probability of its token where it has one."""
    probability, others = chance or (None, ())
    return Entry(span.label, span.kind, span.start, span.end, score, span.token_id, probability, others)


def cancelled(plan: Sequence[Column], orthogonal: Collection[str]) -> Iterator[str]:
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


def unasked(plan: Sequence[Column], entries: Sequence[Entry]) -> Iterator[str]:
    """What to say of maps that are the same whatever token is asked for at a place of the text."""
    if any(entry.kind in ("where", "contrast") for entry in entries):
        for column in plan:
            if not column.method.reads_gradient:
                yield (
                    f"{column.method.title} shows where the model looked at this place of the text, the same for any "
                    "token that is asked for there"
                )


def doubts(made: Mapping[str, MapColumn], entries: Sequence[Entry]) -> Iterator[str]:
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


def provenance_of(adapter: Adapter, seed: int) -> dict[str, Any]:
    """Everything needed to make the same maps again."""
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": {name: version(name) for name in ("grounding", "torch", "transformers")}
        | {"python": platform.python_version()},
        "model": adapter.info.id,
        "revision": adapter.info.revision,
        "processor": dict(adapter.info.processor),
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "device": adapter.device.type,
        "seed": seed,
    }


def selections_of(
    select: Selection | Sequence[Sequence[Selection]] | None, texts: Sequence[Sequence[Any]]
) -> list[list[Selection]]:
    """One selection per text of each picture, from one for all (None: the default) or from as many."""
    if select is None or isinstance(select, Selection):
        return [[select or Selection()] * len(own) for own in texts]
    if [len(own) for own in select] != [len(own) for own in texts]:
        raise OptionError("select must be one Selection, or one list per picture with a Selection per text")
    return [list(own) for own in select]


def flatten(images: Any, texts: Any, asked: Callable[[Any], Asked]) -> tuple[list[Any], list[list[Asked]], Any]:
    """Pictures, the texts of each, and how to give results back in the shape the user's arguments had.

    `asked` checks a text, or what the architecture takes in its place; no texts at all are None for every picture.

    Pictures that were seen already (`Adapter.see`) stand for their list, or for one picture where there is one.
    """
    if isinstance(images, Inputs):
        images = list(images.pictures) if len(images.pictures) > 1 else images.pictures[0]
    many = isinstance(images, (list, tuple))
    pictures = list(images) if many else [images]
    if texts is None:
        asked(None)
    shared = texts is None or isinstance(texts, Asked)
    per_picture = list(texts) if many and not shared else [texts] * len(pictures)
    if not pictures:
        raise GroundingError("no picture was given")
    if len(per_picture) != len(pictures):
        raise GroundingError(
            f"{len(pictures)} pictures but {len(per_picture)} texts: give one item of texts per picture"
        )
    single = [not isinstance(item, (list, tuple)) for item in per_picture]

    captions = [[asked(t) for t in ([item] if one else item)] for item, one in zip(per_picture, single, strict=True)]
    if not all(captions):
        raise GroundingError("a picture has an empty list of texts")

    def rebuild(results: list[list[Explanation]]) -> Any:
        shaped = [found[0] if one else found for found, one in zip(results, single, strict=True)]
        return shaped if many else shaped[0]

    return pictures, captions, rebuild
