"""Choice of the images of a data set: all, the first, or some at random."""

from __future__ import annotations

import random
from collections.abc import Sequence

from grounding.core.errors import DataError, OptionError
from grounding.datasets.records import Dataset


def chosen_ids(dataset: Dataset, limit: int | None, drawn: int | None, seed: int) -> tuple[str, ...]:
    """The pictures of a run: all of them and then the broken rows, or the first `limit`, or `drawn` at random.

    Raises OptionError for numbers below 1, DataError for a data set without pictures.
    """
    if not dataset.ids:
        raise DataError(f"{dataset.layout}: there are no pictures in split {dataset.split!r}")
    if limit is None and drawn is None:
        return (*dataset.ids, *dataset.broken)
    return picked(dataset.ids, limit, drawn, seed)


def picked(names: Sequence[str], limit: int | None, drawn: int | None, seed: int) -> tuple[str, ...]:
    """The first `limit` of the names, or `drawn` at random, in their order. Raises OptionError for numbers below 1."""
    for name, value in (("limit", limit), ("random", drawn)):
        if value is not None and value < 1:
            raise OptionError(f"{name} must be at least 1 picture, got {value}")
    if limit is not None and drawn is not None:
        raise OptionError("limit takes the first pictures, random draws them: choose one")
    if drawn is None:
        return tuple(names[:limit])
    places = random.Random(seed).sample(range(len(names)), min(drawn, len(names)))
    return tuple(names[place] for place in sorted(places))
