"""How well the maps of one picture point: every score from boxes and Explanations, no model in sight.

Pointing is the game of Zhang et al. 2016: a case is a map and the boxes of what it should show, a hit a peak inside any
of them. Without further words the rules are those of `mention-anybox` (ALBEF, AMC, SelfEQ): a case is every mention of
a phrase, a hit is strictly inside; `protocols` has those of another. Energy is the game of Score-CAM (Wang et
al. 2020, energy-based pointing game): how much of a map's heat lies inside. Coordinates are original pixels, (x, y),
origin top-left; boxes (x0, y0, x1, y1), half-open.
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
BASELINES = (CENTRE, RANDOM)
THRESHOLD = 0.5
# Of a phrase whose chain the annotation does not name.
MISSING = "missing"
# An entity is found when its box and the map's overlap by this much (intersection over union).
OVERLAP = 0.5


@dataclass(frozen=True)
class Mention:
    """A phrase that is scored: the `text` that is explained, its chain and types, whether training held it out."""

    text: str
    chain: str
    types: tuple[str, ...] = ()
    heldout: bool = False


@dataclass(frozen=True)
class PhraseScore:
    """One mention under one method; None is no value. `hit` is 0 or 1, for the random baseline a probability.

    `overlaps` maps a threshold to the intersection over union of the map's box there and the chain's best box. `energy`
    is the part of the map's heat that lies in the boxes, from 0 to 1.
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
    """One method on one picture: every mention, the swap of every pair, the correlation of every pair's maps."""

    phrases: tuple[PhraseScore, ...]
    swaps: tuple[float, ...]
    correlations: tuple[float | None, ...] = ()


def mentions_of(
    record: Record, captions: Captions = "first", heldout: frozenset[str] = frozenset()
) -> tuple[list[Mention], Counter[str]]:
    """The mentions that are scored, and how many are not, by reason.

    `captions`: of the first caption that can be read, or of all. A phrase that stands in several captions is a mention
    each time. The text is the phrase alone, lower-cased.
    """
    chosen = record.captions[:1] if captions == "first" else record.captions
    kept: list[Mention] = []
    skipped: Counter[str] = Counter()
    for phrase in (phrase for caption in chosen for phrase in caption.phrases):
        if phrase.chain in record.boxes:
            kept.append(mention_of(phrase, heldout))
        else:
            skipped[why_no_box(record, phrase)] += 1
    return kept, skipped


def mention_of(phrase: Phrase, heldout: frozenset[str]) -> Mention:
    """A phrase as it is scored: in lower case."""
    text = normal(phrase.text)
    return Mention(text, phrase.chain, phrase.types, text in heldout)


def why_no_box(record: Record, phrase: Phrase) -> str:
    """Why a phrase has no boxes: `scene`, `nobndbox`, `notvisual` or `missing`."""
    return record.no_box.get(phrase.chain, MISSING)


def score_image(
    boxes: Mapping[str, tuple[Box, ...]],
    mentions: Sequence[Mention],
    explanations: Mapping[str, Explanation],
    peak: Peak = "patch",
    thresholds: Sequence[float] = (THRESHOLD,),
) -> dict[str, MapScores]:
    """Scores of one picture by column key, and of the baselines `centre` and `random`.

    `explanations` by text have the caption's own entry first; else as in `score_maps`.
    """
    columns = explanations[mentions[0].text].methods
    maps = [{key: explanations[mention.text].map(0, key) for key in columns} for mention in mentions]
    return score_maps(boxes, mentions, maps, peak, thresholds)


def score_maps(
    boxes: Mapping[str, tuple[Box, ...]],
    mentions: Sequence[Mention],
    maps: Sequence[Mapping[str, PatchMap]],
    peak: Peak = "patch",
    thresholds: Sequence[float] = (THRESHOLD,),
    closed: bool = False,
) -> dict[str, MapScores]:
    """Scores of one picture by column key, and of the baselines `centre` and `random`.

    `boxes` are those of all its chains, `maps` for each of the mentions (at least one) those of all columns.
    `thresholds`: at which parts of a map's range boxes are cut. `closed`: the edge of a box belongs to it.
    """
    geometry = next(iter(maps[0].values())).geometry
    masks = {chain: pixel_mask(own, geometry) for chain, own in boxes.items()}
    seen = geometry.seen_cells
    scores: dict[str, MapScores] = {}
    for key in maps[0]:
        known: dict[bytes, MapMeasures] = {}  # maps that do not see the text are the same for every phrase
        readings = []
        for own in maps:
            content = own[key].raw.tobytes()
            if content not in known:
                known[content] = read(own[key], masks, peak, thresholds)
            readings.append(known[content])
        phrases = tuple(
            _phrase_score(mention, reading, boxes, peak, closed)
            for mention, reading in zip(mentions, readings, strict=True)
        )
        correlations = [pearson(readings[i].raw[seen], readings[j].raw[seen]) for i, j in _pairs(mentions)]
        scores[key] = MapScores(phrases, _swaps(phrases), tuple(correlations))
    return scores | baselines(boxes, mentions, geometry, peak, closed)


@dataclass(frozen=True, eq=False)
class MapMeasures:
    """Read off one map: peak (x, y), mean heat and share of all heat by chain, box by threshold, share of the seen area
    that is hot."""

    raw: Float[np.ndarray, "rows columns"]
    peak: tuple[float, float] | None
    means: Mapping[str, float]
    energies: Mapping[str, float]
    boxes: Mapping[float, tuple[int, int, int, int] | None]
    area: float | None


def read(
    found: PatchMap, masks: Mapping[str, Bool[np.ndarray, "height width"]], peak: Peak, thresholds: Sequence[float]
) -> MapMeasures:
    """Read a map; a degenerate one has no peak, no means, no energies, no box, no area.

    `patch`: the peak is the centre of the strongest seen patch. `pixel`: the first maximum in row-major order of the
    map at original size (bilinear), as the centre of that pixel.
    """
    if not found.status:
        return MapMeasures(found.raw, None, {}, {}, dict.fromkeys(thresholds), None)
    heat = found.heat()
    seen = ~np.isnan(heat)
    parts = {chain: heat[mask & seen] for chain, mask in masks.items()}
    means = {chain: float(part.mean()) for chain, part in parts.items() if part.size}
    total = float(heat[seen].sum(dtype=np.float64))
    energies = {c: float(part.sum(dtype=np.float64)) / total for c, part in parts.items()} if total > 0 else {}
    highest = float(heat[seen].max())
    area = float((heat[seen] >= highest / 2).mean()) if highest > 0 else None
    where = found.peak
    if peak == "pixel":
        row, column = np.unravel_index(int(np.nanargmax(heat)), heat.shape)
        where = (float(column) + 0.5, float(row) + 0.5)
    return MapMeasures(found.raw, where, means, energies, {t: box_of(heat, t) for t in thresholds}, area)


def baselines(
    boxes: Mapping[str, tuple[Box, ...]],
    mentions: Sequence[Mention],
    geometry: Geometry,
    peak: Peak,
    closed: bool = False,
) -> dict[str, MapScores]:
    """`centre`: the centre of the picture. `random`: any seen patch centre (seen pixel) alike, the exact expectation.

    The swap of `random` is that of two independent draws, its energy that of a map of independent random values: the
    part of the seen pixels that lies in the boxes. A point has no energy.
    """
    centre = np.array([[geometry.width / 2, geometry.height / 2]])
    seen = geometry.seen_slices()
    share = {chain: float(pixel_mask(own, geometry)[seen].mean()) for chain, own in boxes.items()}
    made = {}
    for name, points in ((CENTRE, centre), (RANDOM, seen_points(geometry, peak))):
        rate = {chain: float(inside(points, own, peak, closed).mean()) for chain, own in boxes.items()}
        energy = share if name == RANDOM else {}
        phrases = tuple(PhraseScore(m, rate[m.chain], energy.get(m.chain)) for m in mentions)
        made[name] = MapScores(phrases, _swaps(phrases))
    return made


def _phrase_score(
    mention: Mention, reading: MapMeasures, boxes: Mapping[str, tuple[Box, ...]], peak: Peak, closed: bool
) -> PhraseScore:
    own = boxes[mention.chain]
    return PhraseScore(
        mention,
        float(reading.peak is not None and inside(np.array([reading.peak]), own, peak, closed)[0]),
        # No evidence is a miss: a method must not gain by being blank.
        reading.energies.get(mention.chain, 0.0),
        _entity(mention.chain, reading.means) if len(boxes) > 1 else None,
        {
            threshold: 0.0 if found is None else max(overlap(found, box) for box in own)
            for threshold, found in reading.boxes.items()
        },
        reading.area,
        degenerate=reading.peak is None,
    )


def _entity(chain: str, means: Mapping[str, float]) -> float:
    """Whether a chain is hotter on average than every other; one that was not seen is not."""
    own = means.get(chain, -np.inf)
    return float(all(own > value for other, value in means.items() if other != chain) and np.isfinite(own))


def _pairs(mentions: Sequence[Mention]) -> list[tuple[int, int]]:
    """Pairs of mentions of different chains, by place, each phrase once; the same words twice cannot be told apart by
    text."""
    first: dict[tuple[str, str], int] = {}
    for place, mention in enumerate(mentions):
        first.setdefault((mention.text, mention.chain), place)
    chosen = combinations(first.items(), 2)
    return [(i, j) for ((text, chain), i), ((other, chain_too), j) in chosen if chain != chain_too and text != other]


def _swaps(phrases: Sequence[PhraseScore]) -> tuple[float, ...]:
    """For each pair: whether the peak of either phrase lies on what that phrase names."""
    return tuple(phrases[i].hit * phrases[j].hit for i, j in _pairs([phrase.mention for phrase in phrases]))


def summary(images: Sequence[MapScores], threshold: float | None, seed: int) -> dict[str, Any]:
    """All numbers of one method, fractions from 0 to 1; null where a number makes no sense for it."""
    baseline = threshold is None
    phrases = [image.phrases for image in images]
    found = [[_overlap(p, threshold) for p in image] for image in phrases]
    energy = mean([[p.energy for p in image] for image in phrases], seed)
    iou50 = [[None if o is None else float(o >= OVERLAP) for o in image] for image in found]
    types = Counter(kind for image in phrases for phrase in image for kind in phrase.mention.types)
    entity = mean([[p.entity for p in image] for image in phrases], seed)
    area_found = mean(iou50, seed)
    swap = mean([image.swaps for image in images], seed)
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
        "area": mean([[p.area for p in image] for image in phrases], seed).value,
        "swap": swap.value,
        "swap_ci": swap.interval,
        "swap_pairs": swap.count,
        "caption_swap_correlation": mean([image.correlations for image in images], seed).value,
        "degenerate": None if baseline else sum(p.degenerate for image in phrases for p in image),
        "by_type": {kind: _pointing(_only(phrases, kind=kind), seed) for kind, _ in types.most_common()},
        "heldout": _part(_only(phrases, heldout=True), seed),
        "not_heldout": _part(_only(phrases, heldout=False), seed) if any(_only(phrases, heldout=True)) else None,
    }


def _overlap(phrase: PhraseScore, threshold: float | None) -> float | None:
    return None if threshold is None or phrase.overlaps is None else phrase.overlaps[threshold]


def _pointing(phrases: Sequence[Sequence[PhraseScore]], seed: int) -> dict[str, Any]:
    estimate = mean([[p.hit for p in image] for image in phrases], seed)
    return {"pointing": estimate.value, "ci": estimate.interval, "phrases": estimate.count}


def _part(phrases: Sequence[Sequence[PhraseScore]], seed: int) -> dict[str, Any] | None:
    return _pointing(phrases, seed) if any(phrases) else None


def _only(
    phrases: Iterable[Sequence[PhraseScore]], kind: str | None = None, heldout: bool | None = None
) -> list[list[PhraseScore]]:
    def wanted(mention: Mention) -> bool:
        return (kind is None or kind in mention.types) and (heldout is None or heldout == mention.heldout)

    return [[p for p in image if wanted(p.mention)] for image in phrases]


def best_threshold(scored: Sequence[Mapping[str, MapScores]], key: str, thresholds: Sequence[float]) -> float:
    """The threshold with the most boxes at IoU 0.5, then the higher mean IoU, then the lower threshold."""

    def worth(threshold: float) -> tuple[float, float, float]:
        found = [o for image in scored for p in image[key].phrases if (o := _overlap(p, threshold)) is not None]
        return float(np.mean([o >= OVERLAP for o in found])), float(np.mean(found)), -threshold

    return max(thresholds, key=worth)
