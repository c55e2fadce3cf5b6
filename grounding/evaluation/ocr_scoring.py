"""How well a line was read, and how well the maps of its tokens point: from explanations, no model in sight.

A case is a visible token of a line that was read exactly; its own box is that of its character (of several: any of
their boxes). A hit is a peak, the centre of the strongest seen patch, inside: x0 <= x < x1, y0 <= y < y1. Maps without
evidence are misses. Coordinates are original pixels, (x, y), origin top-left.
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
BASELINES = (POSITION, RANDOM)
ASKED = "where"


# ---------------------------------------------------------------- reading


def edit_distance(one: str, two: str) -> int:
    """Fewest insertions, deletions and substitutions of characters that turn one text into the other (Levenshtein)."""
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(two, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


# ---------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Aimed(Selection):
    """Every visible token, and at its place another token of the same text, drawn with `seed`: the same for a text
    whatever stands beside it."""

    caption: bool = False
    seed: int = 0

    def spans(self, tokens: TokenizedText) -> tuple[Span, ...]:
        """The tokens, then the questions."""
        own = super().spans(tokens)
        draw = random.Random(f"{self.seed}/{tokens.text}")
        questions = []
        for span in own:
            others = {other.label: other.token_id for other in own if other.label.strip()}
            others.pop(span.label, None)
            if span.label.strip() and others:
                asked = draw.choice(sorted(others))
                questions.append(replace(span, kind=ASKED, token=asked, token_id=others[asked], label=asked))
        return (*own, *questions)


# ---------------------------------------------------------------- one line


@dataclass(frozen=True)
class Hit:
    """Where one map peaks: in its own box, in that of the same sign elsewhere. Probabilities for the random one."""

    own: float
    elsewhere: float = 0.0
    degenerate: bool = False


@dataclass(frozen=True)
class MapHits:
    """One method on one line: its tokens, and what was asked for in their places."""

    tokens: tuple[Hit, ...] = ()
    aimed: tuple[Hit, ...] = ()


@dataclass(frozen=True)
class LineScore:
    """One line: what was read, how many edits off, and hits by column key; without any where it was misread."""

    line: Line
    read: str
    distance: int
    hits: Mapping[str, MapHits] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether the line was read as it stands."""
        return self.distance == 0


@dataclass(frozen=True)
class Case:
    """An entry that is scored: its token's place t, the boxes it should peak in, and those of the sign elsewhere."""

    entry: int
    t: int
    own: tuple[Box, ...]
    elsewhere: tuple[Box, ...] = ()


def score_line(line: Line, explanation: Explanation) -> LineScore:
    """Reading and maps of one line."""
    read = explanation.caption
    distance = edit_distance(read, line.text)
    if distance:
        return LineScore(line, read, distance)
    tokens, aimed = cases_of(line, explanation.entries)
    hits = {}
    for key in explanation.methods:
        found = {case.entry: _peak(explanation, case.entry, key) for case in (*tokens, *aimed)}
        hits[key] = MapHits(*(tuple(hit_of(found[c.entry], c) for c in cases) for cases in (tokens, aimed)))
    count = sum(entry.kind == "token" for entry in explanation.entries)
    return LineScore(line, read, distance, hits | baselines(tokens, aimed, explanation.geometry, count))


def cases_of(line: Line, entries: Sequence[Entry]) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """The tokens of a line that was read exactly, without blanks; and the questions at their places."""
    tokens, aimed = [], []
    t_of: dict[tuple[int, int], int] = {}
    places = (i for i, entry in enumerate(entries) if entry.kind == "token")
    for t, i in enumerate(places):
        start, end = entries[i].start, entries[i].end
        t_of.setdefault((start, end), t)
        if own := boxes_at(line, [(start, end)]):
            others = [s for s in occurrences(line.text, line.text[start:end]) if s[1] <= start or end <= s[0]]
            tokens.append(Case(i, t, own, boxes_at(line, others)))
    for i, entry in enumerate(entries):
        if entry.kind == ASKED:
            asked = boxes_at(line, occurrences(line.text, entry.label))
            aimed.append(Case(i, t_of[entry.start, entry.end], asked))
    return tuple(tokens), tuple(aimed)


def occurrences(text: str, part: str) -> list[tuple[int, int]]:
    """[start, end) of every place where `part` stands in `text`, those that overlap included."""
    starts = range(len(text) - len(part) + 1) if part else ()
    return [(i, i + len(part)) for i in starts if text.startswith(part, i)]


def boxes_at(line: Line, spans: Iterable[tuple[int, int]]) -> tuple[Box, ...]:
    """The boxes of the visible characters in [start, end) spans of the line's text."""
    return tuple(line.boxes[i] for span in spans for i in range(*span) if not line.text[i].isspace())


def baselines(tokens: Sequence[Case], aimed: Sequence[Case], geometry: Geometry, count: int) -> dict[str, MapHits]:
    """`position`: the centre of the seen patch nearest to (width * (t + 0.5) / count, height / 2), the first in
    row-major order where several are. `random`: any seen patch centre alike, the exact expectation."""
    points = seen_points(geometry, "patch")

    def along(case: Case) -> Float[np.ndarray, "1 2"]:
        place = np.array([geometry.width * (case.t + 0.5) / count, geometry.height / 2])
        return points[[int(np.argmin(((points - place) ** 2).sum(1).round(9)))]]

    return {
        POSITION: MapHits(*(tuple(hit_of(along(c), c) for c in cases) for cases in (tokens, aimed))),
        RANDOM: MapHits(*(tuple(hit_of(points, c) for c in cases) for cases in (tokens, aimed))),
    }


def hit_of(points: Float[np.ndarray, "n 2"], case: Case) -> Hit:
    """The share of the points in the case's boxes; without any point it is a miss."""
    if not len(points):
        return Hit(0.0, degenerate=True)
    own = within(points, case.own)
    return Hit(float(own.mean()), float((within(points, case.elsewhere) & ~own).mean()))


def within(points: Float[np.ndarray, "n 2"], boxes: Sequence[Box]) -> Bool[np.ndarray, "n"]:
    """Whether points (x, y) lie in any of the boxes, half-open."""
    found = np.zeros(len(points), bool)
    for x0, y0, x1, y1 in boxes:
        found |= ((points >= (x0, y0)) & (points < (x1, y1))).all(1)
    return found


def _peak(explanation: Explanation, entry: int, key: str) -> Float[np.ndarray, "n 2"]:
    """The peak of a map as one point, or none where it is no evidence."""
    peak = explanation.map(entry, key).peak
    return np.array([] if peak is None else [peak], np.float64).reshape(-1, 2)


# ---------------------------------------------------------------- all lines


def reading_summary(scores: Sequence[LineScore], seed: int) -> dict[str, Any]:
    """Character error rate and share of lines read exactly, with intervals."""
    cer = ratio([s.distance for s in scores], [len(s.line.text) for s in scores], seed)
    exact = mean([[float(s.exact)] for s in scores], seed)
    return {
        "lines": len(scores),
        "cer": cer.value,
        "cer_ci": cer.interval,
        "exact": exact.value,
        "exact_ci": exact.interval,
    }


def map_summary(scores: Sequence[LineScore], key: str, seed: int, *, aimed: bool = False) -> dict[str, Any]:
    """The numbers of one method over the lines that were read exactly, fractions from 0 to 1.

    `aimed` adds those of what was asked for in the place of each token.
    """
    lines = [(score.line, score.hits[key]) for score in scores if score.exact]
    found = {
        **_in_box([hits.tokens for _, hits in lines], seed),
        "elsewhere": mean([[hit.elsewhere for hit in hits.tokens] for _, hits in lines], seed).value,
        "degenerate": None if key in BASELINES else sum(hit.degenerate for _, hits in lines for hit in hits.tokens),
    }
    if aimed:
        asked = _in_box([hits.aimed for _, hits in lines], seed)
        found |= {"aimed": asked["in_box"], "aimed_ci": asked["ci"], "aimed_n": asked["n"]}
    parts = {
        name: _in_box([hits.tokens for line, hits in lines if name in line.groups], seed)
        for name in groups_of(score.line for score in scores)
    }
    return {**found, "groups": parts}


def groups_of(lines: Iterable[Line]) -> tuple[str, ...]:
    """The groups that some of the lines belong to, in a fixed order."""
    found = {name for line in lines for name in line.groups}
    return tuple(name for name in GROUPS if name in found)


def _in_box(hits: Sequence[Sequence[Hit]], seed: int) -> dict[str, Any]:
    estimate = mean([[hit.own for hit in line] for line in hits], seed)
    return {"in_box": estimate.value, "ci": estimate.interval, "n": estimate.count}
