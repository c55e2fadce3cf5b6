"""Arguments of `explain`: nested lists of images and texts flattened, results nested again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grounding.adapter.inputs import Inputs
from grounding.core.errors import GroundingError, OptionError
from grounding.core.text import Asked
from grounding.engine.selection import Selection
from grounding.explanation.explanation import Explanation


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

    Pictures that were seen already (`Adapter.prepare_images`) stand for their list, or for one picture where there is one.
    """
    if isinstance(images, Inputs):
        images = list(images.images) if len(images.images) > 1 else images.images[0]
    many = isinstance(images, (list, tuple))
    listed = list(images) if many else [images]
    if texts is None:
        asked(None)
    shared = texts is None or isinstance(texts, Asked)
    per_image = list(texts) if many and not shared else [texts] * len(listed)
    if not listed:
        raise GroundingError("no picture was given")
    if len(per_image) != len(listed):
        raise GroundingError(f"{len(listed)} images but {len(per_image)} texts: give one item of texts per picture")
    single = [not isinstance(item, (list, tuple)) for item in per_image]

    captions = [[asked(t) for t in ([item] if one else item)] for item, one in zip(per_image, single, strict=True)]
    if not all(captions):
        raise GroundingError("a picture has an empty list of texts")

    def rebuild(results: list[list[Explanation]]) -> Any:
        shaped = [found[0] if one else found for found, one in zip(results, single, strict=True)]
        return shaped if many else shaped[0]

    return listed, captions, rebuild
