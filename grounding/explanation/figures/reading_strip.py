"""The strip: a line of text with its tokens along it, each at the patch that speaks most for it; one per method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from grounding.core.errors import GroundingError
from grounding.explanation.explanation import Explanation, MethodMaps
from grounding.explanation.figures import fonts, wording
from grounding.explanation.figures.label_placement import extent, spread
from grounding.explanation.figures.pixels import Rgb, distorted, faded, fit, hatch, resized
from grounding.explanation.figures.sheet import ALERT, DPI, INK, Block, Line, Sheet
from grounding.explanation.figures.strip_tokens import IMPROBABLE, LABEL, NOTE, Mark, Placed, draw_marks, marks_of
from grounding.explanation.labels import entry_title, likelihood, next_best
from grounding.explanation.reading_order import reading_order, right_to_left, token_indices

__all__ = ["reading_order", "strip"]

MARGIN = 0.25
NARROWEST, BROADEST = 7.0, 15.5  # inches between the margins
READABLE = 0.5  # inches: height of a line of text, where there is room for it
HIGHEST = 3.2  # inches of a picture that is wider than high; others may be twice as high
PARAGRAPH = 10.0  # inches
FAR = 1.2  # inches from where it belongs: a label so far off had better stand in a second row
TOO_FAR, MORE_GROUPS = 2.5, 3  # inches at which tokens are given to several strips; how many more are tried
ROWS = 2
MOST_NAMED = 3
MOST_DOUBTED = 8
OVERSAMPLING = 2


def strip(explanation: Explanation, column: str | None = None) -> Figure:
    """A picture of a text with the tokens that a model wrote along it, one strip per method, or for `column` alone.

    On the picture stands the patch cell of each token's peak, below it the token with its probability, joined by a
    thin line. Tokens that lie behind what was read before (`reading_order`), those without evidence and those of a
    probability below one half are marked. Many tokens stand in two rows, and then in several strips of the picture.
    In the figure artists are found by gid: `cell:<key>:<entry>` is a box, in inches from the top left.
    Raises GroundingError where there are no tokens, no such method, or the picture of a loaded explanation is gone.
    """
    if column is not None and column not in explanation.methods:
        raise GroundingError(f"no method {column!r} in this explanation (it has: {', '.join(explanation.methods)})")
    if not token_indices(explanation):
        raise GroundingError("no tokens to draw along the picture: explain a text with its tokens")
    columns = [c for c in explanation.methods.values() if column in (None, c.key)]
    return _Strips(explanation, columns).draw()


@dataclass
class _Strips:
    """One figure in the making."""

    explanation: Explanation
    columns: Sequence[MethodMaps]
    placed: list[tuple[str, list[Placed]]] = field(default_factory=list)

    def draw(self) -> Figure:
        """The figure."""
        sheet = Sheet(self._lane + 2 * MARGIN)
        y = MARGIN + sheet.block(self._words(), MARGIN, MARGIN, min(self._lane, PARAGRAPH))
        for column in self.columns:
            y += 0.22 + sheet.block(self._heading(column), MARGIN, y + 0.22, self._lane)
            if not column.shared:
                for group in self._groups(self._marks[column.key]):
                    y = self._place(sheet, column.key, group, y + 0.06)
                y += sheet.block(list(self._remarks(column)), MARGIN, y, min(self._lane, PARAGRAPH))
        made = sheet.figure(y + MARGIN)
        for key, placed in self.placed:
            draw_marks(made.axes[0], key, placed)
        return made

    @cached_property
    def _entries(self) -> tuple[int, ...]:
        return token_indices(self.explanation)

    @cached_property
    def _marks(self) -> dict[str, list[Mark]]:
        """The tokens by each method that tells them apart."""
        return {
            c.key: marks_of(self.explanation, c.key, self._entries, reading_order(self.explanation, c.key))
            for c in self.columns
            if not c.shared
        }

    @cached_property
    def _lane(self) -> float:
        """Width between the margins: what the labels of one row need, and a line of text to be read."""
        needed = max((extent([m.width for m in marks]) for marks in self._marks.values()), default=0.0)
        height, width = fit(self.explanation.geometry.width, self.explanation.geometry.height, 1000)
        return min(max(NARROWEST, 1.1 * needed, READABLE * width / height), BROADEST)

    @cached_property
    def _size(self) -> tuple[float, float]:
        """(width, height) of the picture, inches."""
        height, width = fit(self.explanation.geometry.width, self.explanation.geometry.height, 1000)
        highest = HIGHEST * min(2.0, max(1.0, height / width))
        factor = min(self._lane / width, highest / height)
        return width * factor, height * factor

    @cached_property
    def _image(self) -> Rgb:
        """The picture, hatched where the model saw nothing of it."""
        geometry = self.explanation.geometry
        longest = round(max(self._size) * DPI * OVERSAMPLING)
        size = fit(geometry.width, geometry.height, max(1, longest))
        image = resized(self.explanation.image.pil, size)
        unseen = np.ones(size, bool)
        unseen[geometry.seen_slices(size)] = False
        return hatch(image, faded(image), unseen)

    def _words(self) -> Block:
        """What stands once: the text, model and picture, what the signs mean, all warnings."""
        explanation = self.explanation
        text = [Line(f"“{explanation.caption}”", 12.0, INK, "bold")] if explanation.caption else []
        return [
            *text,
            Line(wording.facts(explanation), 8.0, INK),
            Line(self._legend()),
            *([Line(doubts, 7.0, ALERT)] if (doubts := self._doubts()) else []),
            *(Line(f"Warning: {w}", 7.5, ALERT, space=0.0 if i else 0.06) for i, w in enumerate(explanation.warnings)),
        ]

    def _legend(self) -> str:
        side = "right" if right_to_left(self.explanation.caption) else "left"
        known = [p for i in self._entries if (p := self.explanation.entries[i].probability) is not None]
        below = " (?: below 50%)" if any(p < IMPROBABLE for p in known) else ""
        percent = [f"%: probability of the token at its place{below}"] if known else []
        flagged = any(reading_order(self.explanation, key) for key in self._marks)
        back = [f"back: more than a patch to the {side} of what was read before, on one line"] if flagged else []
        note = distorted(self.explanation.geometry.width, self.explanation.geometry.height)
        shape = [f"picture {note}"] if note else []
        return " · ".join(["□ patch that speaks most for the token", *percent, *back, *shape])

    def _doubts(self) -> str:
        """The improbable tokens with what could have stood there."""
        found = [(i, self.explanation.entries[i]) for i in self._entries]
        doubted = [(i, e) for i, e in found if e.probability is not None and e.probability < IMPROBABLE]
        names = []
        for i, entry in doubted[:MOST_DOUBTED]:
            others = next_best(entry)
            names.append(
                f"{self._name(i)} {likelihood(entry.probability or 0.0)}" + (f" (or: {others})" if others else "")
            )
        return f"Below 50%: {_listed(names, len(doubted))}" if names else ""

    def _heading(self, column: MethodMaps) -> Block:
        parts = [wording.short_layer(column.layer) if column.layer else "", wording.changed_options(column)]
        line = " · ".join(part for part in parts if part)
        note = "no evidence about single tokens: does not see the text, one map for all entries"
        return [
            Line(column.title, 10.0, INK, "bold"),
            *([Line(line, 7.0)] if line else []),
            *([Line(note, 7.5, ALERT)] if column.shared else []),
        ]

    def _groups(self, marks: list[Mark]) -> list[list[Mark]]:
        """As few parts of equal length, in reading order, as have room for their labels not too far from the peaks."""
        found: list[tuple[float, list[list[Mark]]]] = []
        for count in range(1, len(marks) + 1):
            cuts = [round(i * len(marks) / count) for i in range(count + 1)]
            groups = [marks[a:b] for a, b in pairwise(cuts)]
            if all(extent([m.width for m in self._ordered(g)], ROWS) <= self._lane for g in groups):
                found.append((max(self._positions(g)[2] for g in groups), groups))
                if found[-1][0] <= TOO_FAR or len(found) == MORE_GROUPS:
                    break
        return min(found, key=lambda one: one[0])[1]

    def _wishes(self, marks: list[Mark]) -> list[float]:
        """Where each label would stand, from the left margin; between its neighbours where there is no peak."""
        left = (self._lane - self._size[0]) / 2
        known = [(i, left + (m.cell[0] + m.cell[2]) / 2 * self._size[0]) for i, m in enumerate(marks) if m.cell]
        if not known:
            known = [(-1, left), (len(marks), left + self._size[0])]
        places, xs = zip(*known, strict=True)
        return [float(x) for x in np.interp(range(len(marks)), places, xs)]

    def _ordered(self, marks: list[Mark]) -> list[Mark]:
        """From left to right; at the same place in the direction of the text."""
        sign = -1 if right_to_left(self.explanation.caption) else 1
        wishes = self._wishes(marks)
        return [marks[i] for i in sorted(range(len(marks)), key=lambda i: (wishes[i], sign * i))]

    def _positions(self, marks: list[Mark]) -> tuple[list[float], int, float]:
        """Centres of the labels from the left margin, the number of rows, and the longest way from its peak."""
        wishes, widths = sorted(self._wishes(marks)), [m.width for m in self._ordered(marks)]
        found = []
        for rows in range(1, ROWS + 1):
            centres = spread(wishes, widths, 0.0, self._lane, rows)
            if centres is not None:
                found.append((centres, rows, max(abs(c - w) for c, w in zip(centres, wishes, strict=True))))
        nearest = min(found, key=lambda one: one[2])
        return found[0] if found[0][2] <= FAR or nearest[2] > 0.6 * found[0][2] else nearest

    def _place(self, sheet: Sheet, key: str, marks: list[Mark], y: float) -> float:
        """Put the picture at `y` and its labels below; return where they end."""
        width, height = self._size
        frame = (MARGIN + (self._lane - width) / 2, y, width, height)
        sheet.images.append((frame, self._image, f"strip:{key}"))
        centres, rows, far = self._positions(marks)
        fan = 0.14 + 0.14 * min(2.0, far)
        first = y + height + fan + 0.04
        notes = max(len(m.notes) for m in marks)
        depth = fonts.height_of(1, LABEL) + fonts.height_of(notes, NOTE) + 0.05
        self.placed.append((key, [
            Placed(mark, MARGIN + x, first + depth * (i % rows), frame, fan)
            for i, (mark, x) in enumerate(zip(self._ordered(marks), centres, strict=True))
        ]))  # fmt: skip
        return first + depth * min(rows, len(marks)) + 0.04

    def _name(self, entry: int) -> str:
        item = self.explanation.entries[entry]
        title = entry_title(self.explanation, item)
        place = f"at sign {self.explanation.entries[entry].start}"
        return f"{title} {place}" if title.startswith("(") else f"'{title}' {place}"

    def _remarks(self, column: MethodMaps) -> Iterator[Line]:
        """What is odd about a strip: tokens behind what was read before, tokens without evidence."""
        back = reading_order(self.explanation, column.key)
        if back:
            side = "right" if right_to_left(self.explanation.caption) else "left"
            verb = "peaks" if len(back) == 1 else "peak"
            names = _listed([self._name(i) for i in back[:MOST_NAMED]], len(back))
            yield Line(f"reading order: {names} {verb} {side} of what was read before", 7.5, ALERT)
        without = [m.entry for m in self._marks[column.key] if m.cell is None]
        if without:
            reason = self.explanation.map(without[0], column.key).status.reason
            names = _listed([self._name(i) for i in without[:MOST_NAMED]], len(without))
            yield Line(f"no evidence: {names}" + (f" ({reason})" if reason else ""), 7.5, ALERT)


def _listed(names: Sequence[str], count: int) -> str:
    """Names, and how many of `count` there are besides."""
    more = count - len(names)
    return ", ".join(names) + (f", and {more} more" if more else "")
