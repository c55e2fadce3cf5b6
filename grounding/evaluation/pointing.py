"""Pointing game, energy, box overlap and swap test of one image, from boxes and Explanations, without a model.

Pointing game (Zhang et al. 2016, arXiv:1608.00507): a case is a map and the boxes that it should point to; a hit is a
peak inside any of them. The default rules are those of `mention-anybox`, used by ALBEF (Li et al. 2021,
arXiv:2107.07651), AMC (Yang et al. 2023, arXiv:2206.15462) and SelfEQ (He et al. 2024, arXiv:2312.04554): each mention
of a phrase is a case, and a hit lies strictly inside. `protocols` has the other rules. Energy is the energy-based
pointing game of Score-CAM (Wang et al. 2020, arXiv:1910.01279): the share of a map's sum inside the boxes.

Coordinates are original pixels, (x, y), origin top-left; boxes are (x0, y0, x1, y1), half-open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from grounding.core.boxes import Peak, inside, overlap, pixel_mask, seen_points
from grounding.core.geometry import Box, Geometry
from grounding.datasets.records import Phrase, Record, normal
from grounding.evaluation.statistics import mean, pearson
from grounding.explanation.explanation import Explanation, PatchMap
from grounding.explanation.maps import box as box_of

Captions = Literal["first", "all"]
CENTRE, RANDOM = "centre", "random"
POINTING_BASELINES = (CENTRE, RANDOM)
# Share of a map's range above which its box is drawn.
BOX_THRESHOLD = 0.5
# Reason of a phrase whose chain the annotation does not contain.
MISSING = "missing"
# Intersection over union at which a map's box counts as the entity's.
MIN_IOU = 0.5


@dataclass(frozen=True)
class Mention:
    """A phrase that is scored: its explained `text`, its chain and types, and whether it was held out of training."""

    text: str
    chain: str
    types: tuple[str, ...] = ()
    heldout: bool = False


@dataclass(frozen=True)
class PhraseScore:
    """Scores of one method for one mention; None: not defined.

    `hit`: 0 or 1; a probability for the random baseline. `energy`: share of the map's sum inside the boxes, 0 to 1.
    `entity`: 1 if the mean of the map over the chain's boxes is larger than over those of every other chain.
    `overlaps`: threshold -> intersection over union of the map's box and the best box of the chain. `area`: share of
    the seen pixels at or above half the maximum.
    """

    mention: Mention
    hit: float
    energy: float | None = None
    entity: float | None = None
    overlaps: Mapping[float, float] | None = None
    area: float | None = None
    degenerate: bool = False


@dataclass(frozen=True)
class MapScores:
    """Scores of one method on one image: of each mention, and of each pair its swap test and correlation of maps."""

    phrases: tuple[PhraseScore, ...]
    swaps: tuple[float, ...]
    correlations: tuple[float | None, ...] = ()


def mentions_of(
    record: Record, captions: Captions = "first", heldout: frozenset[str] = frozenset()
) -> tuple[list[Mention], Counter[str]]:
    """Return the mentions to score, and counts of the skipped phrases by reason.

    `captions`: of the first usable caption, or of all. A phrase in several captions is one mention in each.
    """
    chosen = record.captions[:1] if captions == "first" else record.captions
    mentions: list[Mention] = []
    skipped: Counter[str] = Counter()
    for phrase in (phrase for caption in chosen for phrase in caption.phrases):
        if phrase.chain in record.boxes:
            mentions.append(mention_of(phrase, heldout))
        else:
            skipped[no_box_reason(record, phrase)] += 1
    return mentions, skipped


def mention_of(phrase: Phrase, heldout: frozenset[str]) -> Mention:
    """Return a phrase as a mention; its text is the phrase alone, in lower case."""
    text = normal(phrase.text)
    return Mention(text, phrase.chain, phrase.types, text in heldout)


def no_box_reason(record: Record, phrase: Phrase) -> str:
    """Return why a phrase has no boxes: `scene`, `nobndbox`, `notvisual` or `missing`."""
    return record.no_box.get(phrase.chain, MISSING)


def score_image(
    boxes: Mapping[str, tuple[Box, ...]],
    mentions: Sequence[Mention],
    explanations: Mapping[str, Explanation],
    peak: Peak = "patch",
    thresholds: Sequence[float] = (BOX_THRESHOLD,),
) -> dict[str, MapScores]:
    """Score the maps of one image: method key -> scores, and the baselines `centre` and `random`.

    `explanations`: text of a mention -> its Explanation, whose first entry is the whole text. Other arguments as in
    `score_maps`.
    """
    keys = explanations[mentions[0].text].methods
    maps = [{key: explanations[mention.text].map(0, key) for key in keys} for mention in mentions]
    return score_maps(boxes, mentions, maps, peak, thresholds)


def score_maps(
    boxes: Mapping[str, tuple[Box, ...]],
    mentions: Sequence[Mention],
    maps: Sequence[Mapping[str, PatchMap]],
    peak: Peak = "patch",
    thresholds: Sequence[float] = (BOX_THRESHOLD,),
    closed: bool = False,
) -> dict[str, MapScores]:
    """Score the maps of one image: method key -> scores, and the baselines `centre` and `random`.

    Parameters
    ----------
    boxes: boxes of all chains of the image.
    mentions: at least one.
    maps: for each mention, method key -> map.
    thresholds: shares of a map's range at which its box is drawn.
    closed: points on the edge of a box are inside.
    """
    geometry = next(iter(maps[0].values())).geometry
    masks = {chain: pixel_mask(own, geometry) for chain, own in boxes.items()}
    seen = geometry.seen_cells
    scores: dict[str, MapScores] = {}
    for key in maps[0]:
        cache: dict[bytes, MapMeasures] = {}  # maps that do not depend on the text are the same for every phrase
        measured = []
        for by_key in maps:
            content = by_key[key].raw.tobytes()
            if content not in cache:
                cache[content] = measure_map(by_key[key], masks, peak, thresholds)
            measured.append(cache[content])
        phrases = tuple(
            _phrase_score(mention, measures, boxes, peak, closed)
            for mention, measures in zip(mentions, measured, strict=True)
        )
        correlations = [pearson(measured[i].raw[seen], measured[j].raw[seen]) for i, j in _pairs(mentions)]
        scores[key] = MapScores(phrases, _swap_hits(phrases), tuple(correlations))
    return scores | baseline_scores(boxes, mentions, geometry, peak, closed)


@dataclass(frozen=True, eq=False)
class MapMeasures:
    """Measures of one map at original size.

    `peak`: (x, y). `means`, `energies`: chain -> mean of the map over its boxes, share of the map's sum inside them.
    `boxes`: threshold -> box of the map. `area`: share of the seen pixels at or above half the maximum.
    """

    raw: Float[np.ndarray, "rows columns"]
    peak: tuple[float, float] | None
    means: Mapping[str, float]
    energies: Mapping[str, float]
    boxes: Mapping[float, tuple[int, int, int, int] | None]
    area: float | None


def measure_map(
    patch_map: PatchMap, masks: Mapping[str, Bool[np.ndarray, "height width"]], peak: Peak, thresholds: Sequence[float]
) -> MapMeasures:
    """Measure a map; a degenerate one has no peak, means, energies, boxes or area.

    `peak`: "patch" takes the centre of the strongest seen patch; "pixel" the centre of the first maximum, in row-major
    order, of the map at original size (bilinear).
    """
    if not patch_map.status:
        return MapMeasures(patch_map.raw, None, {}, {}, dict.fromkeys(thresholds), None)
    heat = patch_map.heat()
    seen = ~np.isnan(heat)
    parts = {chain: heat[mask & seen] for chain, mask in masks.items()}
    means = {chain: float(part.mean()) for chain, part in parts.items() if part.size}
    total = float(heat[seen].sum(dtype=np.float64))
    energies = {c: float(part.sum(dtype=np.float64)) / total for c, part in parts.items()} if total > 0 else {}
    highest = float(heat[seen].max())
    area = float((heat[seen] >= highest / 2).mean()) if highest > 0 else None
    position = patch_map.peak
    if peak == "pixel":
        row, column = np.unravel_index(int(np.nanargmax(heat)), heat.shape)
        position = (float(column) + 0.5, float(row) + 0.5)
    return MapMeasures(patch_map.raw, position, means, energies, {t: box_of(heat, t) for t in thresholds}, area)


def baseline_scores(
    boxes: Mapping[str, tuple[Box, ...]],
    mentions: Sequence[Mention],
    geometry: Geometry,
    peak: Peak,
    closed: bool = False,
) -> dict[str, MapScores]:
    """Score the centre of the image (`centre`) and a uniform draw of a seen patch or pixel (`random`), in expectation.

    The swap test of `random` is that of two independent draws. Its energy is that of a map of independent, identically
    distributed values: the share of the seen pixels inside the boxes. `centre` is a point and has no energy.
    """
    centre = np.array([[geometry.width / 2, geometry.height / 2]])
    seen = geometry.seen_slices()
    share = {chain: float(pixel_mask(own, geometry)[seen].mean()) for chain, own in boxes.items()}
    scores = {}
    for name, points in ((CENTRE, centre), (RANDOM, seen_points(geometry, peak))):
        rate = {chain: float(inside(points, own, peak, closed).mean()) for chain, own in boxes.items()}
        energy = share if name == RANDOM else {}
        phrases = tuple(PhraseScore(m, rate[m.chain], energy.get(m.chain)) for m in mentions)
        scores[name] = MapScores(phrases, _swap_hits(phrases))
    return scores


def _phrase_score(
    mention: Mention, measures: MapMeasures, boxes: Mapping[str, tuple[Box, ...]], peak: Peak, closed: bool
) -> PhraseScore:
    own = boxes[mention.chain]
    return PhraseScore(
        mention,
        float(measures.peak is not None and inside(np.array([measures.peak]), own, peak, closed)[0]),
        # A map without evidence is a miss: a method must not score higher by returning blank maps.
        measures.energies.get(mention.chain, 0.0),
        _entity(mention.chain, measures.means) if len(boxes) > 1 else None,
        {
            threshold: 0.0 if map_box is None else max(overlap(map_box, box) for box in own)
            for threshold, map_box in measures.boxes.items()
        },
        measures.area,
        degenerate=measures.peak is None,
    )


def _entity(chain: str, means: Mapping[str, float]) -> float:
    """Return 1 if the mean over a chain is the largest, else 0; 0 also for a chain outside of the model's view."""
    own = means.get(chain, -np.inf)
    return float(all(own > value for other, value in means.items() if other != chain) and np.isfinite(own))


def _pairs(mentions: Sequence[Mention]) -> list[tuple[int, int]]:
    """Return index pairs of mentions with different chains and different texts; each (text, chain) counts once."""
    first: dict[tuple[str, str], int] = {}
    for index, mention in enumerate(mentions):
        first.setdefault((mention.text, mention.chain), index)
    pairs = combinations(first.items(), 2)
    return [(i, j) for ((text, chain), i), ((text2, chain2), j) in pairs if chain != chain2 and text != text2]


def _swap_hits(phrases: Sequence[PhraseScore]) -> tuple[float, ...]:
    """Return for each pair the product of its hits: 1 where each of the two maps peaks in its own boxes."""
    return tuple(phrases[i].hit * phrases[j].hit for i, j in _pairs([phrase.mention for phrase in phrases]))


def summary(images: Sequence[MapScores], threshold: float | None, seed: int) -> dict[str, Any]:
    """Return all numbers of one method, fractions from 0 to 1; None where a number is not defined for the method.

    `threshold`: the one of the map boxes; None for a baseline. `seed`: of the bootstrap.
    """
    phrases = [image.phrases for image in images]
    overlaps = [[_overlap(p, threshold) for p in image] for image in phrases]
    energy = mean([[p.energy for p in image] for image in phrases], seed)
    types = Counter(kind for image in phrases for phrase in image for kind in phrase.mention.types)
    entity = mean([[p.entity for p in image] for image in phrases], seed)
    iou50 = mean([[None if o is None else float(o >= MIN_IOU) for o in image] for image in overlaps], seed)
    swap = mean([image.swaps for image in images], seed)
    heldout = _filtered(phrases, heldout=True)
    return {
        **_pointing(phrases, seed),
        "entity": entity.value,
        "entity_ci": entity.interval,
        "iou50": iou50.value,
        "iou50_ci": iou50.interval,
        "mean_iou": mean(overlaps, seed).value,
        "energy": energy.value,
        "energy_ci": energy.interval,
        "threshold": threshold,
        "area": mean([[p.area for p in image] for image in phrases], seed).value,
        "swap": swap.value,
        "swap_ci": swap.interval,
        "swap_pairs": swap.count,
        "caption_swap_correlation": mean([image.correlations for image in images], seed).value,
        "degenerate": None if threshold is None else sum(p.degenerate for image in phrases for p in image),
        "by_type": {kind: _pointing(_filtered(phrases, kind=kind), seed) for kind, _ in types.most_common()},
        "heldout": _pointing_or_none(heldout, seed),
        "not_heldout": _pointing_or_none(_filtered(phrases, heldout=False), seed) if any(heldout) else None,
    }


def _overlap(phrase: PhraseScore, threshold: float | None) -> float | None:
    return None if threshold is None or phrase.overlaps is None else phrase.overlaps[threshold]


def _pointing(phrases: Sequence[Sequence[PhraseScore]], seed: int) -> dict[str, Any]:
    estimate = mean([[p.hit for p in image] for image in phrases], seed)
    return {"pointing": estimate.value, "ci": estimate.interval, "phrases": estimate.count}


def _pointing_or_none(phrases: Sequence[Sequence[PhraseScore]], seed: int) -> dict[str, Any] | None:
    return _pointing(phrases, seed) if any(phrases) else None


def _filtered(
    phrases: Iterable[Sequence[PhraseScore]], kind: str | None = None, heldout: bool | None = None
) -> list[list[PhraseScore]]:
    """Return the phrases of each image with this type, or with this value of `heldout`."""

    def matches(mention: Mention) -> bool:
        return (kind is None or kind in mention.types) and (heldout is None or heldout == mention.heldout)

    return [[p for p in image if matches(p.mention)] for image in phrases]


def best_threshold(scored: Sequence[Mapping[str, MapScores]], key: str, thresholds: Sequence[float]) -> float:
    """Return the threshold with the most boxes at IoU 0.5; ties go to the higher mean IoU, then to the lower value."""

    def rank(threshold: float) -> tuple[float, float, float]:
        overlaps = [o for image in scored for p in image[key].phrases if (o := _overlap(p, threshold)) is not None]
        return float(np.mean([o >= MIN_IOU for o in overlaps])), float(np.mean(overlaps)), -threshold

    return max(thresholds, key=rank)
