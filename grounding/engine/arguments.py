"""Arguments of `explain`: nested lists of images and texts flattened, results nested again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grounding.adapter.inputs import ImageInputs
from grounding.core.errors import GroundingError, OptionError
from grounding.core.text import Query
from grounding.engine.queries import ONE_TEXT
from grounding.engine.selection import Selection


def selections_of(
    select: Selection | Sequence[Sequence[Selection]] | None, texts: Sequence[Sequence[Any]]
) -> list[list[Selection]]:
    """One selection per text of each image, from one for all (None: the default) or from as many.

    Raises OptionError where the numbers differ.
    """
    if select is None or isinstance(select, Selection):
        return [[select or Selection()] * len(own) for own in texts]
    if [len(own) for own in select] != [len(own) for own in texts]:
        raise OptionError("select must be one Selection, or one list per image with a Selection per text")
    return [list(own) for own in select]


def flatten(images: Any, texts: Any, check: Callable[[Any], Query]) -> tuple[list[Any], list[list[Query]], Any]:
    """Images, the queries about each, and a function that nests results as the arguments are nested.

    `check` checks a text, or what the architecture takes in its place; None for all texts means None for every image.
    Prepared images (`Adapter.prepare_images`) mean their list, or the one image that there is. Raises GroundingError.
    """
    if isinstance(images, ImageInputs):
        images = list(images.images) if len(images.images) > 1 else images.images[0]
    many = isinstance(images, (list, tuple))
    listed = list(images) if many else [images]
    if texts is None:
        check(None)
    shared = texts is None or isinstance(texts, ONE_TEXT)
    per_image = list(texts) if many and not shared else [texts] * len(listed)
    if not listed:
        raise GroundingError("no image was given")
    if len(per_image) != len(listed):
        raise GroundingError(f"{len(listed)} images but {len(per_image)} texts: give one item of texts per image")
    single = [not isinstance(item, (list, tuple)) for item in per_image]

    queries = [[check(t) for t in ([item] if one else item)] for item, one in zip(per_image, single, strict=True)]
    if not all(queries):
        raise GroundingError("an image has an empty list of texts")

    def rebuild(results: list[list[Any]]) -> Any:
        shaped = [found[0] if one else found for found, one in zip(results, single, strict=True)]
        return shaped if many else shaped[0]

    return listed, queries, rebuild
