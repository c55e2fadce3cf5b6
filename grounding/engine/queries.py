"""Queries: check what a caller asks about images, and let the model generate a text or predict a class where asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from grounding.adapter.base import Adapter, Classifies, Generates
from grounding.adapter.inputs import ImageInputs, Inputs
from grounding.adapter.recorder import Recorder
from grounding.adapter.vision_cache import Features
from grounding.core.errors import TargetError, TextError
from grounding.core.text import Classes, Generate, Query, TokenizedText, check_text
from grounding.engine.passes import encode

# Values that stand for one text.
ONE_TEXT = (str, Generate, Classes, Query)


def check_query(adapter: Adapter, value: Any, kind: str) -> Query:
    """Return the checked query for a text, or for what the architecture takes in its place.

    A text, a `Query`, `Generate` or None for a model that generates; for a classifier a class by name or index,
    `Classes`, or None for the predicted class; None for a target that no text can change. Raises TextError,
    TargetError.
    """
    if isinstance(value, Query):
        return replace(value, text=_checked_text(adapter, value.text, kind))
    return Query(_checked_text(adapter, value, kind))


def needs_text(adapter: Adapter, target: Any) -> bool:
    """Whether a text must be given for a target, as `explain` takes it (None: the default). Raises TargetError for an
    unknown kind of target."""
    if isinstance(adapter, Classifies | Generates):
        return False
    kind, _ = adapter.check_target(split_target(adapter, target, None)[0])
    return kind not in adapter.text_independent


def split_target(adapter: Adapter, target: Any, texts: Any) -> tuple[str | None, Any]:
    """Return the kind of target and the texts, from the arguments `target` and `texts` of `explain`.

    A classifier takes classes as targets: by name, index, or several of them. Raises TargetError for a name that is
    neither class nor kind, and for one that is both.
    """
    if isinstance(adapter, Classifies):
        return _split_classes(adapter, adapter.target_kinds, target, texts)
    if target is not None and not isinstance(target, str):
        kinds = ", ".join(adapter.target_kinds)
        raise TargetError(f"{adapter.info.type} has targets {kinds} and no classes, got {target!r}")
    return target, texts


def _split_classes(adapter: Classifies, kinds: Sequence[str], target: Any, texts: Any) -> tuple[str | None, Any]:
    """`split_target` for a model that scores classes, with these kinds of targets."""
    names = adapter.class_names
    if isinstance(target, str) and target in kinds and texts is None and names.contains(target):
        raise TargetError(
            f"{target!r} is this model's kind of target and the name of a class: ask for the class by its index "
            f"or as [{target!r}], for the predicted class without a target"
        )
    if target is None or (isinstance(target, str) and (texts is not None or target in kinds)):
        return target, texts
    if texts is not None:
        raise TargetError(f"classes were given twice: {target!r} as targets, {texts!r} in place of texts")
    target = target.tolist() if hasattr(target, "tolist") else target  # arrays and their numbers
    many = isinstance(target, list | tuple | range)
    if many and not len(target):
        raise TargetError("an empty list of classes was given: leave the target out for the predicted class")
    # Checked before any image is opened; an index may be of any integer type.
    if isinstance(target, str):
        names.find(target, f"; this model's kind of target is {', '.join(kinds)}")
    chosen = [one if isinstance(one, str) else names.find(one) for one in (target if many else [target])]
    return kinds[0], _checked_classes(adapter, Classes(tuple(chosen)))


def needs_features(adapter: Adapter, queries: Sequence[Sequence[Query]]) -> bool:
    """Whether these queries can be completed only with image features: to generate a text or to predict a class."""
    texts = [query.text for own in queries for query in own]
    return isinstance(adapter, Generates) or any(isinstance(text, Classes) and not text.asked for text in texts)


def prepare_inputs(adapter: Adapter, images: ImageInputs, queries: Sequence[Sequence[Query]]) -> Inputs:
    """Return the inputs of prepared images and the queries about each; texts are generated and classes predicted from
    the cached image features. Raises TextError, ModelError."""
    if needs_features(adapter, queries):
        queries = _completed(adapter, images, encode(adapter, images), queries)
    if all(query.text is None for own in queries for query in own):
        return without_texts(images, queries)
    return adapter.prepare_texts(images, queries)


def without_texts(images: ImageInputs, queries: Sequence[Sequence[Query]]) -> Inputs:
    """Return the inputs of images for targets that no text can change: a text without tokens for each query."""
    owner = tuple(b for b, own in enumerate(queries) for _ in own)
    return Inputs(images, (TokenizedText.of_image(),) * len(owner), owner)


def prepare(adapter: Adapter, images: Sequence[Any], texts: Sequence[Sequence[Any]], kind: str | None = None) -> Inputs:
    """Return the inputs of images and the texts of each, for a kind of target (None: the default).

    Raises GroundingError.
    """
    kind, _ = adapter.check_target(kind)
    queries = [[check_query(adapter, text, kind) for text in own] for own in texts]
    return prepare_inputs(adapter, adapter.prepare_images(images), queries)


def _completed(
    adapter: Adapter, images: ImageInputs, features: Features, queries: Sequence[Sequence[Query]]
) -> list[list[Query]]:
    """The queries with generated texts and predicted classes."""
    flat = [(b, query) for b, own in enumerate(queries) for query in own]
    if isinstance(adapter, Generates):
        with Recorder(adapter.model):
            texts = adapter.generate(images, features, flat)
        done = [replace(query, text=text) for (_, query), text in zip(flat, texts, strict=True)]
    else:
        assert isinstance(adapter, Classifies)
        best = adapter.logits(features).argmax(-1).tolist()
        done = [
            replace(query, text=Classes((best[b],), predicted=True)) if query.text == Classes() else query
            for b, query in flat
        ]
    rest = iter(done)
    return [[next(rest) for _ in own] for own in queries]


def _checked_text(adapter: Adapter, text: Any, kind: str) -> str | Generate | Classes | None:
    if isinstance(adapter, Classifies):
        return _checked_classes(adapter, text)
    if kind in adapter.text_independent:
        return None
    if isinstance(adapter, Generates) and (text is None or isinstance(text, Generate)):
        return text or Generate()
    if text is None:
        raise TextError("no text was given, and this model generates no text: give one")
    return check_text(text)


def _checked_classes(adapter: Classifies, text: Any) -> Classes:
    classes = text if isinstance(text, Classes) else Classes() if text is None else Classes((text,))
    for one in classes.asked:
        adapter.class_names.find(one)
    return classes
