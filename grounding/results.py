"""Around the engine: the user's nested lists in, Explanations with their doubts and provenance out."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from grounding.adapter import Adapter, Chance
from grounding.errors import GroundingError, NumericError, TextError
from grounding.explanation import SCHEMA_VERSION, Entry, Explanation, MapColumn
from grounding.maps import diagnose
from grounding.plan import Column
from grounding.text import Generate, Span, check_text
from grounding.types import Inputs, Targets


def map_column(
    adapter: Adapter, column: Column, targets: Targets, inputs: Inputs, image: int, maps: np.ndarray, members: list[int]
) -> MapColumn:
    """What one text's entries (`members` of K) got from one column. Raises NumericError where a method gave NaN."""
    conditioned = adapter.text_conditioned(targets.kind, column.method.reads_gradient)
    chosen = maps[members] if conditioned else maps[[image]]
    if not np.isfinite(chosen).all():
        raise NumericError(f"{column.method.title} gives NaN or Inf: the model's numbers cannot be explained")
    seen = inputs.geometry[image].seen_cells
    status = tuple(diagnose(raw, seen, signed=column.method.signed) for raw in chosen)
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
            yield (
                f"{column.method.title} at {', '.join(paths)} is weak evidence: the layer is read through a LayerNorm "
                "alone, so <activation, gradient> = 0 at every patch (zero to rounding) and the evidence along the "
                f"features is lost; use gradcam_ln, the LN-rule, there"
            )


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
    for column in made.values():
        if not column.shared and len(column.maps) > 1 and not np.ptp(column.maps, axis=0).any():
            yield (
                f"{column.title} cannot tell the parts of this text apart here: all entries have the same map; another "
                "--layer may"
            )
        if not column.text_conditioned:
            yield f"{column.title} does not see the text here: one map for all entries"
        for place, status in enumerate(column.status):
            if not status:
                label = "all entries" if column.shared else repr(entries[place].label)
                yield f"{column.title} of {label} is no evidence: {status.reason}"


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


def flatten(images: Any, texts: Any, *, generates: bool = False) -> tuple[list[Any], list[list[str | Generate]], Any]:
    """Pictures, the texts of each, and how to give results back in the shape the user's arguments had.

    With `generates`, None and `Generate` are texts, too, and no texts at all are one of them per picture.

    Pictures that were seen already (`Adapter.see`) stand for their list, or for one picture where there is one.
    """
    if isinstance(images, Inputs):
        images = list(images.pictures) if len(images.pictures) > 1 else images.pictures[0]
    many = isinstance(images, (list, tuple))
    pictures = list(images) if many else [images]
    if texts is None and not generates:
        raise TextError("nothing to ground: this model writes no text itself, give it one")
    shared = texts is None or isinstance(texts, str | Generate)
    per_picture = list(texts) if many and not shared else [texts] * len(pictures)
    if not pictures:
        raise GroundingError("no picture was given")
    if len(per_picture) != len(pictures):
        raise GroundingError(
            f"{len(pictures)} pictures but {len(per_picture)} texts: give one item of texts per picture"
        )
    single = [not isinstance(item, (list, tuple)) for item in per_picture]

    def checked(text: Any) -> str | Generate:
        if generates and (text is None or isinstance(text, Generate)):
            return text or Generate()
        return check_text(text)

    captions = [[checked(t) for t in ([item] if one else item)] for item, one in zip(per_picture, single, strict=True)]
    if not all(captions):
        raise GroundingError("a picture has an empty list of texts")

    def rebuild(results: list[list[Explanation]]) -> Any:
        shaped = [found[0] if one else found for found, one in zip(results, single, strict=True)]
        return shaped if many else shaped[0]

    return pictures, captions, rebuild
