"""Select images of a data set: all, the first, or a random sample."""

from __future__ import annotations

import random
from collections.abc import Sequence

from grounding.core.errors import DataError, OptionError
from grounding.datasets.records import Dataset


def chosen_ids(dataset: Dataset, limit: int | None, drawn: int | None, seed: int) -> tuple[str, ...]:
    """Return the ids of a run: all images and then the broken rows, the first `limit` images, or `drawn` random ones.

    Raises OptionError for numbers below 1 or both, DataError for a data set without images.
    """
    if not dataset.ids:
        raise DataError(f"{dataset.layout}: there are no images in split {dataset.split!r}")
    if limit is None and drawn is None:
        return (*dataset.ids, *dataset.broken)
    return picked(dataset.ids, limit, drawn, seed)


def picked(names: Sequence[str], limit: int | None, drawn: int | None, seed: int) -> tuple[str, ...]:
    """Return the first `limit` names, or `drawn` random ones in their order. Raises OptionError as `chosen_ids`."""
    for name, value in (("limit", limit), ("random", drawn)):
        if value is not None and value < 1:
            raise OptionError(f"{name} must be at least 1 image, got {value}")
    if limit is not None and drawn is not None:
        raise OptionError("limit selects the first images, random a sample: choose one")
    if drawn is None:
        return tuple(names[:limit])
    indices = random.Random(seed).sample(range(len(names)), min(drawn, len(names)))
    return tuple(names[index] for index in sorted(indices))
