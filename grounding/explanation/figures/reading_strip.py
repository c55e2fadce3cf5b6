"""The reading strip: an image of text with its tokens along it, each at its strongest patch; one strip per method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from grounding.core.errors import GroundingError
from grounding.explanation.explanation import Explanation, MethodMaps
from grounding.explanation.figures import fonts, header, wording
from grounding.explanation.figures.label_placement import extent, spread
from grounding.explanation.figures.options import FigureOptions
from grounding.explanation.figures.pixels import Rgb, distorted, faded, fit, hatch, resized
from grounding.explanation.figures.sheet import ALERT, DPI, INK, Block, Paragraph, Sheet
from grounding.explanation.figures.strip_tokens import IMPROBABLE, LABEL, NOTE, Mark, Placed, draw_marks, marks_of
from grounding.explanation.labels import entry_title, likelihood, next_best
from grounding.explanation.reading_order import reading_order, right_to_left, token_indices

MARGIN = 0.25
NARROWEST, BROADEST = 7.0, 15.5  # inches between the margins
READABLE = 0.5  # inches: height of a line of text, where there is room for it
HIGHEST = 3.2  # height in inches of an image that is wider than high; other images may be twice as high
PARAGRAPH = 10.0  # width in inches
FAR = 1.2  # inches between a label and its peak from which a second row of labels is used
TOO_FAR = 2.5  # inches between a label and its peak from which the tokens are split into several strips
TRIED = 3  # numbers of strips that are compared
ROWS = 2
MOST_NAMED = 3
MOST_IMPROBABLE = 8


def strip(explanation: Explanation, method: str | None = None, **options: Any) -> Figure:
    """Draw the tokens of a generated text along its image, one strip per method, or for the method key `method` alone.

    The patch of each token's peak is outlined on the image; the token and its probability are below, joined by a line.
    Tokens behind earlier tokens (`reading_order`), tokens without evidence and tokens with a probability below one half
    are marked. Many tokens take two rows, and then several strips. `options` are those of `FigureOptions`, of which
    `oversampling` has an effect. The gid of an outline is `cell:<key>:<entry>`; its unit is inches, origin top-left.
    Raises OptionError, and GroundingError for an explanation without tokens, an unknown method, or a loaded explanation
    whose image is missing.
    """
    return draw(explanation, FigureOptions.of(options), method)


def draw(explanation: Explanation, options: FigureOptions, method: str | None = None) -> Figure:
    """The figure of `strip`, from validated options. Raises GroundingError."""
    if method is not None and method not in explanation.methods:
        raise GroundingError(f"no method {method!r} in this explanation (it has: {', '.join(explanation.methods)})")
    if not token_indices(explanation):
        raise GroundingError("no tokens to draw along the image: explain a text with its tokens")
    methods = [m for m in explanation.methods.values() if method in (None, m.key)]
    return _Strips(explanation, methods, options.oversampling).draw()


@dataclass
class _Strips:
    """The layout of one figure."""

    explanation: Explanation
    methods: Sequence[MethodMaps]
    oversampling: float
    placed: list[tuple[str, list[Placed]]] = field(default_factory=list)

    def draw(self) -> Figure:
        """The figure."""
        sheet = Sheet(self._lane + 2 * MARGIN)
        y = MARGIN + sheet.block(self._header(), MARGIN, MARGIN, min(self._lane, PARAGRAPH))
        for method in self.methods:
            y += 0.22 + sheet.block(self._heading(method), MARGIN, y + 0.22, self._lane)
            if not method.shared:
                for group in self._groups(self._marks[method.key]):
                    y = self._place(sheet, method.key, group, y + 0.06)
                y += sheet.block(list(self._remarks(method)), MARGIN, y, min(self._lane, PARAGRAPH))
        figure = sheet.figure(y + MARGIN)
        for key, placed in self.placed:
            draw_marks(figure.axes[0], key, placed)
        return figure

    @cached_property
    def _entries(self) -> tuple[int, ...]:
        return token_indices(self.explanation)

    @cached_property
    def _marks(self) -> dict[str, list[Mark]]:
        """The tokens by the key of each method with a map per token."""
        return {
            m.key: marks_of(self.explanation, m.key, self._entries, reading_order(self.explanation, m.key))
            for m in self.methods
            if not m.shared
        }

    @cached_property
    def _lane(self) -> float:
        """Width between the margins: enough for the labels of one row and for a readable line of text."""
        needed = max((extent([m.width for m in marks]) for marks in self._marks.values()), default=0.0)
        height, width = fit(self.explanation.geometry.width, self.explanation.geometry.height, 1000)
        return min(max(NARROWEST, 1.1 * needed, READABLE * width / height), BROADEST)

    @cached_property
    def _size(self) -> tuple[float, float]:
        """(width, height) of the image, inches."""
        height, width = fit(self.explanation.geometry.width, self.explanation.geometry.height, 1000)
        highest = HIGHEST * min(2.0, max(1.0, height / width))
        factor = min(self._lane / width, highest / height)
        return width * factor, height * factor

    @cached_property
    def _image(self) -> Rgb:
        """The image, hatched where the model did not see it."""
        geometry = self.explanation.geometry
        longest = round(max(self._size) * DPI * self.oversampling)
        size = fit(geometry.width, geometry.height, max(1, longest))
        image = resized(self.explanation.image.pil, size)
        unseen = np.ones(size, bool)
        unseen[geometry.seen_slices(size)] = False
        return hatch(image, faded(image), unseen)

    def _header(self) -> Block:
        improbable = self._improbable()
        return [
            *header.caption(self.explanation.caption),
            Paragraph(wording.facts(self.explanation), 8.0, INK),
            Paragraph(self._legend()),
            *([Paragraph(improbable, 7.0, ALERT)] if improbable else []),
            *header.warnings(self.explanation.warnings, space=0.06),
        ]

    def _legend(self) -> str:
        side = "right" if right_to_left(self.explanation.caption) else "left"
        known = [p for i in self._entries if (p := self.explanation.entries[i].probability) is not None]
        below = " (?: below 50%)" if any(p < IMPROBABLE for p in known) else ""
        percent = [f"%: probability of the token at its position{below}"] if known else []
        flagged = any(reading_order(self.explanation, key) for key in self._marks)
        back = [f"back: more than a patch to the {side} of an earlier token, on one line"] if flagged else []
        note = distorted(self.explanation.geometry.width, self.explanation.geometry.height)
        shape = [f"image {note}"] if note else []
        return " · ".join(["□ strongest patch of the token", *percent, *back, *shape])

    def _improbable(self) -> str:
        """The improbable tokens with their alternatives."""
        entries = [(i, self.explanation.entries[i]) for i in self._entries]
        improbable = [(i, e) for i, e in entries if e.probability is not None and e.probability < IMPROBABLE]
        names = []
        for i, entry in improbable[:MOST_IMPROBABLE]:
            others = next_best(entry)
            names.append(
                f"{self._name(i)} {likelihood(entry.probability or 0.0)}" + (f" (or: {others})" if others else "")
            )
        return f"Below 50%: {_listed(names, len(improbable))}" if names else ""

    def _heading(self, method: MethodMaps) -> Block:
        parts = [wording.short_layer(method.layer) if method.layer else "", wording.changed_options(method)]
        line = " · ".join(part for part in parts if part)
        note = "no evidence about single tokens: independent of the text, one map for all entries"
        return [
            Paragraph(method.title, 10.0, INK, "bold"),
            *([Paragraph(line, 7.0)] if line else []),
            *([Paragraph(note, 7.5, ALERT)] if method.shared else []),
        ]

    def _groups(self, marks: list[Mark]) -> list[list[Mark]]:
        """The tokens in reading order, in as few equal parts as keep their labels near the peaks."""
        found: list[tuple[float, list[list[Mark]]]] = []
        for count in range(1, len(marks) + 1):
            cuts = [round(i * len(marks) / count) for i in range(count + 1)]
            groups = [marks[a:b] for a, b in pairwise(cuts)]
            if all(extent([m.width for m in self._ordered(g)], ROWS) <= self._lane for g in groups):
                found.append((max(self._positions(g)[2] for g in groups), groups))
                if found[-1][0] <= TOO_FAR or len(found) == TRIED:
                    break
        return min(found, key=lambda one: one[0])[1]

    def _wishes(self, marks: list[Mark]) -> list[float]:
        """Preferred centre of each label, from the left margin: its peak, or between its neighbours without a peak."""
        left = (self._lane - self._size[0]) / 2
        known = [(i, left + (m.cell[0] + m.cell[2]) / 2 * self._size[0]) for i, m in enumerate(marks) if m.cell]
        if not known:
            known = [(-1, left), (len(marks), left + self._size[0])]
        positions, xs = zip(*known, strict=True)
        return [float(x) for x in np.interp(range(len(marks)), positions, xs)]

    def _ordered(self, marks: list[Mark]) -> list[Mark]:
        """Marks from left to right; marks at one position in the direction of the text."""
        sign = -1 if right_to_left(self.explanation.caption) else 1
        wishes = self._wishes(marks)
        return [marks[i] for i in sorted(range(len(marks)), key=lambda i: (wishes[i], sign * i))]

    def _positions(self, marks: list[Mark]) -> tuple[list[float], int, float]:
        """Centres of the labels from the left margin, number of rows, and largest distance of a label from its peak."""
        wishes, widths = sorted(self._wishes(marks)), [m.width for m in self._ordered(marks)]
        found = []
        for rows in range(1, ROWS + 1):
            centres = spread(wishes, widths, 0.0, self._lane, rows)
            if centres is not None:
                found.append((centres, rows, max(abs(c - w) for c, w in zip(centres, wishes, strict=True))))
        nearest = min(found, key=lambda one: one[2])
        return found[0] if found[0][2] <= FAR or nearest[2] > 0.6 * found[0][2] else nearest

    def _place(self, sheet: Sheet, key: str, marks: list[Mark], y: float) -> float:
        """Add the image at `y` and its labels below; return where they end."""
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
        position = f"at character {item.start}"
        return f"{title} {position}" if title.startswith("(") else f"'{title}' {position}"

    def _remarks(self, method: MethodMaps) -> Iterator[Paragraph]:
        """Notes below a strip: tokens behind earlier tokens, tokens without evidence."""
        back = reading_order(self.explanation, method.key)
        if back:
            side = "right" if right_to_left(self.explanation.caption) else "left"
            verb = "peaks" if len(back) == 1 else "peak"
            names = _listed([self._name(i) for i in back[:MOST_NAMED]], len(back))
            yield Paragraph(f"reading order: {names} {verb} {side} of an earlier token", 7.5, ALERT)
        without = [m.entry for m in self._marks[method.key] if m.cell is None]
        if without:
            reason = self.explanation.map(without[0], method.key).status.reason
            names = _listed([self._name(i) for i in without[:MOST_NAMED]], len(without))
            yield Paragraph(f"no evidence: {names}" + (f" ({reason})" if reason else ""), 7.5, ALERT)


def _listed(names: Sequence[str], count: int) -> str:
    """Names, and how many of `count` are not named."""
    more = count - len(names)
    return ", ".join(names) + (f", and {more} more" if more else "")
