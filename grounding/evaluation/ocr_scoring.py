"""Character error rate of generated lines, and pointing scores of the maps of their tokens, without a model.

A case is a visible token of a line that was recognised exactly. Its own box is that of its character (several
characters: any of their boxes). A hit is a peak, the centre of the strongest seen patch, inside: x0 <= x < x1 and
y0 <= y < y1. Maps without evidence are misses. Coordinates are original pixels, (x, y), origin top-left.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from grounding.core.boxes import seen_points
from grounding.core.geometry import Box, Geometry
from grounding.core.text import Span, TokenizedText
from grounding.datasets.text_lines import GROUPS, Line
from grounding.engine.selection import Selection
from grounding.evaluation.pointing import RANDOM
from grounding.evaluation.statistics import mean, ratio
from grounding.explanation.explanation import Entry, Explanation

POSITION = "position"
OCR_BASELINES = (POSITION, RANDOM)
# Kind of the entries that explain another token at the position of a generated one.
WHERE = "where"


# ---------------------------------------------------------------- recognition


def edit_distance(one: str, two: str) -> int:
    """Return the Levenshtein distance: the fewest insertions, deletions and substitutions of characters."""
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(two, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


# ---------------------------------------------------------------- selection


@dataclass(frozen=True)
class OtherTokens(Selection):
    """Select each visible token, and at its position another token of the same text, drawn at random.

    The draw depends on `seed` and the text alone, not on the other texts of a batch.
    """

    caption: bool = False
    seed: int = 0

    def spans(self, tokens: TokenizedText) -> tuple[Span, ...]:
        """Return the spans of the tokens, then those of the other tokens."""
        own = super().spans(tokens)
        draw = random.Random(f"{self.seed}/{tokens.text}")
        drawn = []
        for span in own:
            others = {other.label: other.token_id for other in own if other.label.strip()}
            others.pop(span.label, None)
            if span.label.strip() and others:
                label = draw.choice(sorted(others))
                drawn.append(replace(span, kind=WHERE, token=label, token_id=others[label], label=label))
        return (*own, *drawn)


# ---------------------------------------------------------------- one line


@dataclass(frozen=True)
class Hit:
    """1 if a map peaks in the own box, or in a box of the same characters `elsewhere`; a probability for `random`."""

    own: float
    elsewhere: float = 0.0
    degenerate: bool = False


@dataclass(frozen=True)
class MapHits:
    """Hits of one method on one line: of its tokens, and of the other tokens at their positions."""

    tokens: tuple[Hit, ...] = ()
    other_tokens: tuple[Hit, ...] = ()


@dataclass(frozen=True)
class LineScore:
    """Score of one line: generated text, edit distance, and hits by method key; no hits without an exact match."""

    line: Line
    prediction: str
    distance: int
    hits: Mapping[str, MapHits] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether the generated text equals the label."""
        return self.distance == 0


@dataclass(frozen=True)
class TokenCase:
    """An entry to score: position of its token, boxes to peak in, and boxes of the same characters elsewhere."""

    entry: int
    position: int
    own: tuple[Box, ...]
    elsewhere: tuple[Box, ...] = ()


def score_line(line: Line, explanation: Explanation) -> LineScore:
    """Score the generated text and the maps of one line."""
    prediction = explanation.caption
    distance = edit_distance(prediction, line.text)
    if distance:
        return LineScore(line, prediction, distance)
    cases = token_cases(line, explanation.entries)
    hits = {}
    for key in explanation.methods:
        hits[key] = MapHits(*(tuple(hit_of(_peak(explanation, c.entry, key), c) for c in part) for part in cases))
    count = sum(entry.kind == "token" for entry in explanation.entries)
    return LineScore(line, prediction, distance, hits | baseline_hits(*cases, explanation.geometry, count))


def token_cases(line: Line, entries: Sequence[Entry]) -> tuple[tuple[TokenCase, ...], tuple[TokenCase, ...]]:
    """Return the cases of the visible tokens of an exactly recognised line, and of the other tokens there."""
    tokens, other_tokens = [], []
    positions: dict[tuple[int, int], int] = {}
    indices = (i for i, entry in enumerate(entries) if entry.kind == "token")
    for position, i in enumerate(indices):
        start, end = entries[i].start, entries[i].end
        positions.setdefault((start, end), position)
        if own := character_boxes(line, [(start, end)]):
            others = [s for s in occurrences(line.text, line.text[start:end]) if s[1] <= start or end <= s[0]]
            tokens.append(TokenCase(i, position, own, character_boxes(line, others)))
    for i, entry in enumerate(entries):
        if entry.kind == WHERE:
            boxes = character_boxes(line, occurrences(line.text, entry.label))
            other_tokens.append(TokenCase(i, positions[entry.start, entry.end], boxes))
    return tuple(tokens), tuple(other_tokens)


def occurrences(text: str, part: str) -> list[tuple[int, int]]:
    """Return [start, end) of every occurrence of `part` in `text`, overlapping ones included."""
    starts = range(len(text) - len(part) + 1) if part else ()
    return [(i, i + len(part)) for i in starts if text.startswith(part, i)]


def character_boxes(line: Line, spans: Iterable[tuple[int, int]]) -> tuple[Box, ...]:
    """Return the boxes of the visible characters in [start, end) spans of the line's text."""
    return tuple(line.boxes[i] for span in spans for i in range(*span) if not line.text[i].isspace())


def baseline_hits(
    tokens: Sequence[TokenCase], other_tokens: Sequence[TokenCase], geometry: Geometry, count: int
) -> dict[str, MapHits]:
    """Score the baselines `position` and `random` on a line of `count` tokens.

    `position`: centre of the seen patch nearest to (width * (t + 0.5) / count, height / 2) for token t; of several, the
    first in row-major order. `random`: a uniform draw of a seen patch centre, in expectation.
    """
    points = seen_points(geometry, "patch")

    def nearest(case: TokenCase) -> Float[np.ndarray, "1 2"]:
        place = np.array([geometry.width * (case.position + 0.5) / count, geometry.height / 2])
        return points[[int(np.argmin(((points - place) ** 2).sum(1).round(9)))]]

    parts = (tokens, other_tokens)
    return {
        POSITION: MapHits(*(tuple(hit_of(nearest(c), c) for c in part) for part in parts)),
        RANDOM: MapHits(*(tuple(hit_of(points, c) for c in part) for part in parts)),
    }


def hit_of(points: Float[np.ndarray, "n 2"], case: TokenCase) -> Hit:
    """Return the share of the points in the boxes of a case; without points it is a miss."""
    if not len(points):
        return Hit(0.0, degenerate=True)
    own = in_boxes(points, case.own)
    return Hit(float(own.mean()), float((in_boxes(points, case.elsewhere) & ~own).mean()))


def in_boxes(points: Float[np.ndarray, "n 2"], boxes: Sequence[Box]) -> Bool[np.ndarray, "n"]:
    """Return whether each point (x, y) lies in any of the half-open boxes."""
    found = np.zeros(len(points), bool)
    for x0, y0, x1, y1 in boxes:
        found |= ((points >= (x0, y0)) & (points < (x1, y1))).all(1)
    return found


def _peak(explanation: Explanation, entry: int, key: str) -> Float[np.ndarray, "n 2"]:
    """Return the peak of a map as an array of one point, or of none for a map without evidence."""
    peak = explanation.map(entry, key).peak
    return np.array([] if peak is None else [peak], np.float64).reshape(-1, 2)


# ---------------------------------------------------------------- all lines


def recognition_summary(scores: Sequence[LineScore], seed: int) -> dict[str, Any]:
    """Return character error rate and share of exactly recognised lines, with intervals."""
    cer = ratio([s.distance for s in scores], [len(s.line.text) for s in scores], seed)
    exact = mean([[float(s.exact)] for s in scores], seed)
    return {
        "lines": len(scores),
        "cer": cer.value,
        "cer_ci": cer.interval,
        "exact": exact.value,
        "exact_ci": exact.interval,
    }


def map_summary(scores: Sequence[LineScore], key: str, seed: int, *, other_tokens: bool = False) -> dict[str, Any]:
    """Return the numbers of one method over the exactly recognised lines, fractions from 0 to 1.

    `other_tokens` adds those of the other tokens at the position of each token.
    """
    lines = [(score.line, score.hits[key]) for score in scores if score.exact]
    numbers = {
        **_in_box([hits.tokens for _, hits in lines], seed),
        "elsewhere": mean([[hit.elsewhere for hit in hits.tokens] for _, hits in lines], seed).value,
        "degenerate": None if key in OCR_BASELINES else sum(hit.degenerate for _, hits in lines for hit in hits.tokens),
    }
    if other_tokens:
        others = _in_box([hits.other_tokens for _, hits in lines], seed)
        numbers |= {"aimed": others["in_box"], "aimed_ci": others["ci"], "aimed_n": others["n"]}
    groups = {
        name: _in_box([hits.tokens for line, hits in lines if name in line.groups], seed)
        for name in line_groups(score.line for score in scores)
    }
    return {**numbers, "groups": groups}


def line_groups(lines: Iterable[Line]) -> tuple[str, ...]:
    """Return the groups that some of the lines belong to, in the order of `GROUPS`."""
    found = {name for line in lines for name in line.groups}
    return tuple(name for name in GROUPS if name in found)


def _in_box(hits: Sequence[Sequence[Hit]], seed: int) -> dict[str, Any]:
    estimate = mean([[hit.own for hit in line] for line in hits], seed)
    return {"in_box": estimate.value, "ci": estimate.interval, "n": estimate.count}
