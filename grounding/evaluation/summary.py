"""From the scores of all pictures to the numbers that are reported, each over the same cases, with its interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from grounding.evaluation.pointing import OVERLAP, MapScores, Mention, PhraseScore
from grounding.evaluation.statistics import mean


def summary(pictures: Sequence[MapScores], threshold: float | None, seed: int) -> dict[str, Any]:
    """All numbers of one method, fractions from 0 to 1; null where a number makes no sense for it."""
    baseline = threshold is None
    phrases = [picture.phrases for picture in pictures]
    found = [[_overlap(p, threshold) for p in picture] for picture in phrases]
    energy = mean([[p.energy for p in picture] for picture in phrases], seed)
    iou50 = [[None if o is None else float(o >= OVERLAP) for o in picture] for picture in found]
    types = Counter(kind for picture in phrases for phrase in picture for kind in phrase.mention.types)
    entity = mean([[p.entity for p in picture] for picture in phrases], seed)
    area_found = mean(iou50, seed)
    swap = mean([picture.swaps for picture in pictures], seed)
    return {
        **_pointing(phrases, seed),
        "entity": entity.value,
        "entity_ci": entity.interval,
        "iou50": area_found.value,
        "iou50_ci": area_found.interval,
        "mean_iou": mean(found, seed).value,
        "energy": energy.value,
        "energy_ci": energy.interval,
        "threshold": threshold,
        "area": mean([[p.area for p in picture] for picture in phrases], seed).value,
        "swap": swap.value,
        "swap_ci": swap.interval,
        "swap_pairs": swap.count,
        "caption_swap_correlation": mean([picture.correlations for picture in pictures], seed).value,
        "degenerate": None if baseline else sum(p.degenerate for picture in phrases for p in picture),
        "by_type": {kind: _pointing(_only(phrases, kind=kind), seed) for kind, _ in types.most_common()},
        "heldout": _part(_only(phrases, heldout=True), seed),
        "not_heldout": _part(_only(phrases, heldout=False), seed) if any(_only(phrases, heldout=True)) else None,
    }


def _overlap(phrase: PhraseScore, threshold: float | None) -> float | None:
    return None if threshold is None or phrase.overlaps is None else phrase.overlaps[threshold]


def _pointing(phrases: Sequence[Sequence[PhraseScore]], seed: int) -> dict[str, Any]:
    estimate = mean([[p.hit for p in picture] for picture in phrases], seed)
    return {"pointing": estimate.value, "ci": estimate.interval, "phrases": estimate.count}


def _part(phrases: Sequence[Sequence[PhraseScore]], seed: int) -> dict[str, Any] | None:
    return _pointing(phrases, seed) if any(phrases) else None


def _only(
    phrases: Iterable[Sequence[PhraseScore]], kind: str | None = None, heldout: bool | None = None
) -> list[list[PhraseScore]]:
    def wanted(mention: Mention) -> bool:
        return (kind is None or kind in mention.types) and (heldout is None or heldout == mention.heldout)

    return [[p for p in picture if wanted(p.mention)] for picture in phrases]


def best_threshold(scored: Sequence[Mapping[str, MapScores]], key: str, thresholds: Sequence[float]) -> float:
    """The threshold with the most boxes at IoU 0.5, then the higher mean IoU, then the lower threshold."""

    def worth(threshold: float) -> tuple[float, float, float]:
        found = [o for picture in scored for p in picture[key].phrases if (o := _overlap(p, threshold)) is not None]
        return float(np.mean([o >= OVERLAP for o in found])), float(np.mean(found)), -threshold

    return max(thresholds, key=worth)
