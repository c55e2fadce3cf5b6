"""Means with confidence intervals, and correlation: the few statistics that scores are reported with.

Values come in groups, one per picture: phrases of a picture are not independent, so pictures are what is resampled.
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
    """A mean over `count` values with its interval; None where there is nothing to take it over.

    The interval needs two pictures: one says nothing of how pictures differ.
    """

    value: float | None
    interval: tuple[float, float] | None
    count: int


def mean(groups: Groups, seed: int = 0) -> Estimate:
    """The mean over all values of all groups (None is no value), with the bootstrap interval over groups."""
    kept = [[value for value in group if value is not None] for group in groups]
    kept = [group for group in kept if group]
    return ratio([sum(group) for group in kept], [len(group) for group in kept], seed)


def ratio(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Estimate:
    """sum(above) / sum(below), one item of each per picture; None where the sum below is not positive.

    Interval: percentile bootstrap (Efron 1979), RESAMPLES draws of as many pictures with replacement, 95 %. Draws
    whose sum below is not positive are left out. `count` is the sum below, rounded.
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
    # How often each picture is drawn: the same numbers as drawing indices, in one matrix.
    draws = np.random.default_rng(seed).multinomial(len(top), np.full(len(top), 1 / len(top)), size=RESAMPLES)
    above, below = draws @ top, draws @ bottom
    usable = below > 0
    if not usable.any():
        return None
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(above[usable] / below[usable], [tail, 100 - tail])
    return float(low), float(high)


def pearson(a: Float[np.ndarray, "..."], b: Float[np.ndarray, "..."]) -> float | None:
    """Pearson's correlation of arrays of one shape; None where one is constant (to rounding). Equal ones give 1.0."""
    x, y = (np.asarray(v, np.float64).ravel() for v in (a, b))
    if any(v.size == 0 or v.max() - v.min() <= FLAT * np.abs(v).max() for v in (x, y)):
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -1, 1))
