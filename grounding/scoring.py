"""How well the maps of one picture point: every score from boxes and Explanations, no model in sight.

Pointing is the game of Zhang et al. 2016 under the rules of `mention-anybox` (ALBEF, AMC, SelfEQ): every mention of a
phrase is a case, a hit is a peak strictly inside any of the boxes of what the phrase names. Coordinates are original
pixels, (x, y), origin top-left; boxes (x0, y0, x1, y1), half-open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from grounding.explanation import EntryMap, Explanation
from grounding.geometry import Box, Geometry
from grounding.maps import box as box_of
from grounding.records import Record, normal
from grounding.resampling import pearson

Peak = Literal["patch", "pixel"]
Captions = Literal["first", "all"]
CENTRE, RANDOM = "centre", "random"
BASELINES = (CENTRE, RANDOM)
THRESHOLD = 0.5
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

    `overlaps` maps a threshold to the intersection over union of the map's box there and the chain's best box.
    """

    mention: Mention
    hit: float
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
            text = normal(phrase.text)
            kept.append(Mention(text, phrase.chain, phrase.types, text in heldout))
        else:
            skipped[record.no_box.get(phrase.chain, "missing")] += 1
    return kept, skipped


def score_picture(
    boxes: Mapping[str, tuple[Box, ...]],
    mentions: Sequence[Mention],
    explanations: Mapping[str, Explanation],
    peak: Peak = "patch",
    thresholds: Sequence[float] = (THRESHOLD,),
) -> dict[str, MapScores]:
    """Scores of one picture by column key, and of the baselines `centre` and `random`.

    `boxes` are those of all its chains, `explanations` by text have the caption's own entry first. `thresholds`: at
    which parts of a map's range boxes are cut.
    """
    geometry = explanations[mentions[0].text].geometry
    masks = {chain: pixel_mask(own, geometry) for chain, own in boxes.items()}
    scores: dict[str, MapScores] = {}
    for key in explanations[mentions[0].text].columns:
        known: dict[bytes, Reading] = {}  # maps that do not see the text are the same for every phrase
        readings = {}
        for text in dict.fromkeys(mention.text for mention in mentions):
            found = explanations[text].map(0, key)
            content = found.raw.tobytes()
            if content not in known:
                known[content] = read(found, masks, peak, thresholds)
            readings[text] = known[content]
        phrases = tuple(_phrase_score(mention, readings[mention.text], boxes, peak) for mention in mentions)
        seen = geometry.seen_cells
        correlations = [pearson(readings[a.text].raw[seen], readings[b.text].raw[seen]) for a, b in _pairs(mentions)]
        scores[key] = MapScores(phrases, _swaps(phrases), tuple(correlations))
    return scores | baselines(boxes, mentions, geometry, peak)


@dataclass(frozen=True, eq=False)
class Reading:
    """Read off one map: peak (x, y), mean heat by chain, box by threshold, share of the seen area that is hot."""

    raw: Float[np.ndarray, "rows columns"]
    peak: tuple[float, float] | None
    means: Mapping[str, float]
    boxes: Mapping[float, tuple[int, int, int, int] | None]
    area: float | None


def read(
    found: EntryMap, masks: Mapping[str, Bool[np.ndarray, "height width"]], peak: Peak, thresholds: Sequence[float]
) -> Reading:
    """Read a map; a degenerate one has no peak, no means, no box, no area.

    `patch`: the peak is the centre of the strongest seen patch. `pixel`: the first maximum in row-major order of the
    map at original size (bilinear), as the centre of that pixel.
    """
    if not found.status:
        return Reading(found.raw, None, {}, dict.fromkeys(thresholds), None)
    heat = found.heat()
    seen = ~np.isnan(heat)
    means = {chain: float(heat[mask & seen].mean()) for chain, mask in masks.items() if (mask & seen).any()}
    highest = float(heat[seen].max())
    area = float((heat[seen] >= highest / 2).mean()) if highest > 0 else None
    where = found.peak
    if peak == "pixel":
        row, column = np.unravel_index(int(np.nanargmax(heat)), heat.shape)
        where = (float(column) + 0.5, float(row) + 0.5)
    return Reading(found.raw, where, means, {t: box_of(heat, t) for t in thresholds}, area)


def baselines(
    boxes: Mapping[str, tuple[Box, ...]], mentions: Sequence[Mention], geometry: Geometry, peak: Peak
) -> dict[str, MapScores]:
    """`centre`: the centre of the picture. `random`: any seen patch centre (seen pixel) alike, the exact expectation.

    The swap of `random` is that of two independent draws.
    """
    centre = np.array([[geometry.width / 2, geometry.height / 2]])
    made = {}
    for name, points in ((CENTRE, centre), (RANDOM, seen_points(geometry, peak))):
        rate = {chain: float(inside(points, own, peak).mean()) for chain, own in boxes.items()}
        phrases = tuple(PhraseScore(mention, rate[mention.chain]) for mention in mentions)
        made[name] = MapScores(phrases, _swaps(phrases))
    return made


def inside(points: Float[np.ndarray, "n 2"], boxes: Sequence[Box], peak: Peak = "patch") -> Bool[np.ndarray, "n"]:
    """Whether points (x, y) lie strictly inside any of the boxes.

    For `pixel` the published test on pixel indices: xmin < x < xmax with inclusive corners, so the outermost pixels
    of a box are no hits; with pixel centres and half-open boxes that is half a pixel less on each side. Boxes were cut
    to the picture before, which the published test does not do: it can hit on the picture's own outermost pixels.
    """
    inset = 0.5 if peak == "pixel" else 0.0
    found = np.zeros(len(points), bool)
    for x0, y0, x1, y1 in boxes:
        low, high = np.array([x0, y0]) + inset, np.array([x1, y1]) - inset
        found |= ((points > low) & (points < high)).all(1)
    return found


def seen_points(geometry: Geometry, peak: Peak) -> Float[np.ndarray, "n 2"]:
    """The points (x, y) that a peak can be: the centres of the seen patches, or of the seen pixels."""
    if peak == "patch":
        cells = [geometry.cell_centre(int(r), int(c)) for r, c in np.argwhere(geometry.seen_cells)]
        return np.array(cells, np.float64)
    rows, columns = geometry.seen_slices()
    y, x = np.mgrid[rows, columns]
    return np.stack([x.ravel() + 0.5, y.ravel() + 0.5], axis=1)


def pixel_mask(boxes: Sequence[Box], geometry: Geometry) -> Bool[np.ndarray, "height width"]:
    """The pixels of the picture whose centres lie in the union of the boxes; at least one for each box."""
    mask = np.zeros((geometry.height, geometry.width), bool)
    for x0, y0, x1, y1 in boxes:
        mask[_pixels(y0, y1, geometry.height), _pixels(x0, x1, geometry.width)] = True
    return mask


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return float(width * height / union)


def _phrase_score(mention: Mention, reading: Reading, boxes: Mapping[str, tuple[Box, ...]], peak: Peak) -> PhraseScore:
    own = boxes[mention.chain]
    return PhraseScore(
        mention,
        float(reading.peak is not None and inside(np.array([reading.peak]), own, peak)[0]),
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


def _pairs(mentions: Sequence[Mention]) -> list[tuple[Mention, Mention]]:
    """Pairs of mentions of different chains, each phrase once; the same words twice cannot be told apart by text."""
    single = {(mention.text, mention.chain): mention for mention in mentions}
    return [(a, b) for a, b in combinations(single.values(), 2) if a.chain != b.chain and a.text != b.text]


def _swaps(phrases: Sequence[PhraseScore]) -> tuple[float, ...]:
    """For each pair: whether the peak of either phrase lies on what that phrase names."""
    hits = {(phrase.mention.text, phrase.mention.chain): phrase.hit for phrase in phrases}
    pairs = _pairs([phrase.mention for phrase in phrases])
    return tuple(hits[a.text, a.chain] * hits[b.text, b.chain] for a, b in pairs)


def _pixels(start: float, stop: float, size: int) -> slice:
    """Pixels whose centres lie in [start, stop), at least one, within [0, size)."""
    first = min(max(int(np.ceil(start - 0.5)), 0), size - 1)
    return slice(first, max(min(int(np.ceil(stop - 0.5)), size), first + 1))
