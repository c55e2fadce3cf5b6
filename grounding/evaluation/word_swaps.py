"""Does the model itself tell a caption from one that is wrong in a single word? The score's side of the swap test.

A data set says which words may stand for each other (`swaps.json`: `groups` of words, and the `combinations` of them
that its phrases can have). A caption's phrase gets one such word replaced; captions that would be true of another
phrase of the picture, or name what was held out, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grounding.adapter.base import Adapter
from grounding.core.errors import DataError
from grounding.core.printable import quote
from grounding.datasets.records import Caption, Record, normal

FILE = "swaps.json"
# Texts that are scored in one pass.
BATCH = 32


@dataclass(frozen=True)
class Swaps:
    """`groups` of words that may stand for each other, `combinations` of such words that occur together."""

    groups: tuple[tuple[str, ...], ...]
    combinations: frozenset[frozenset[str]]

    @classmethod
    def read(cls, folder: Path) -> Swaps | None:
        """Those of a data set, None where it has none. Raises DataError for a file that cannot be read."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            groups = tuple(tuple(map(normal, group)) for group in content["groups"])
            return cls(groups, frozenset(frozenset(text.split()) for text in content["combinations"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{quote(path)} cannot be read: {error}") from None

    def telling(self, phrase: str) -> frozenset[str]:
        """The words of a phrase that are in a group."""
        known = {word for group in self.groups for word in group}
        return frozenset(word for word in normal(phrase).split() if word in known)

    def of(self, phrase: str) -> Iterator[str]:
        """Every phrase that differs in one word of a group and is a combination that occurs."""
        words = phrase.split()
        for place, word in enumerate(words):
            group = next((group for group in self.groups if word.lower() in group), ())
            for other in group:
                changed = _with_article([*words[:place], other, *words[place + 1 :]], place)
                if other != word.lower() and self.telling(" ".join(changed)) in self.combinations:
                    yield " ".join(changed)


def _with_article(words: list[str], place: int) -> list[str]:
    """The words with an indefinite article before `place` that fits: a wrong one would give the swap away."""
    if place and words[place - 1].lower() in ("a", "an"):
        return [*words[: place - 1], "an" if words[place][:1].lower() in "aeiou" else "a", *words[place:]]
    return words


def changed_captions(caption: Caption, record: Record, swaps: Swaps, heldout: frozenset[str]) -> list[str]:
    """The caption with one word of one phrase swapped, in every way that is true of nothing in the picture."""
    present = {swaps.telling(phrase.text) for each in record.captions for phrase in each.phrases}
    made = (
        caption.text[: phrase.start] + other + caption.text[phrase.end :]
        for phrase in caption.phrases
        for other in swaps.of(phrase.text)
        if swaps.telling(other) not in present and normal(other) not in heldout
    )
    return list(dict.fromkeys(made))


def beaten(adapter: Adapter, record: Record, swaps: Swaps, heldout: frozenset[str], kind: str | None) -> list[float]:
    """For every wrong form of the first caption 1 where the true one has the higher score, else 0."""
    if not record.captions:
        return []
    caption, adapter = record.captions[0], adapter.aimed(kind)
    seen = adapter.prepare_images([str(record.image)])
    scores: list[float] = []
    texts = [caption.text, *changed_captions(caption, record, swaps, heldout)]
    for first in range(0, len(texts), BATCH):
        inputs = adapter.prepare_texts(seen, [texts[first : first + BATCH]])
        targets = adapter.targets(inputs, [[tokens.caption()] for tokens in inputs.tokens], kind)
        scores += adapter.scores(inputs, targets).tolist()
    return [float(scores[0] > score) for score in scores[1:]]
