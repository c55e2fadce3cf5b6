"""Means with bootstrap confidence intervals, and Pearson correlation.

Values come in groups, one per image. Phrases of an image are not independent, so images are resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from grounding.explanation.maps import FLAT

RESAMPLES = 1000
CONFIDENCE = 0.95

Groups = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` values with its interval; None without values.

    The interval is None for a single image: it needs the variation between images.
    """

    value: float | None
    interval: tuple[float, float] | None
    count: int


def mean(groups: Groups, seed: int = 0) -> Estimate:
    """Return the mean over the values of all groups, None left out, with the bootstrap interval over groups."""
    kept = [[value for value in group if value is not None] for group in groups]
    kept = [group for group in kept if group]
    return ratio([sum(group) for group in kept], [len(group) for group in kept], seed)


def ratio(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Estimate:
    """Return sum(above) / sum(below), one item of each per image; None unless the denominator is positive.

    Interval: percentile bootstrap (Efron 1979, doi:10.1214/aos/1176344552) at level CONFIDENCE, from RESAMPLES draws
    of as many images with replacement; draws without a positive denominator are left out. `count` is the denominator,
    rounded.
    """
    top, bottom = np.asarray(above, np.float64), np.asarray(below, np.float64)
    total = float(bottom.sum())
    if not total > 0:
        return Estimate(None, None, 0)
    value = float(top.sum() / total)
    if len(top) < 2:
        return Estimate(value, None, round(total))
    return Estimate(value, _interval(top, bottom, seed), round(total))


def _interval(top: NDArray[np.float64], bottom: NDArray[np.float64], seed: int) -> tuple[float, float] | None:
    # Multinomial counts per image: the same distribution as drawing indices, in one matrix.
    draws = np.random.default_rng(seed).multinomial(len(top), np.full(len(top), 1 / len(top)), size=RESAMPLES)
    above, below = draws @ top, draws @ bottom
    usable = below > 0
    if not usable.any():
        return None
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(above[usable] / below[usable], [tail, 100 - tail])
    return float(low), float(high)


def pearson(a: Float[np.ndarray, "..."], b: Float[np.ndarray, "..."]) -> float | None:
    """Return Pearson's correlation of two arrays of one shape (1.0 if equal); None if one is constant to rounding."""
    x, y = (np.asarray(v, np.float64).ravel() for v in (a, b))
    if any(v.size == 0 or v.max() - v.min() <= FLAT * np.abs(v).max() for v in (x, y)):
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -1, 1))
