"""Swap test of the model's score: does the true caption score higher than one with a single word swapped?

`swaps.json` of a data set has `groups` of interchangeable words, and the `combinations` of such words that occur in its
phrases. One word of one phrase of a caption is replaced. Captions that are true of another phrase of the image, or that
contain a held-out phrase, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grounding.adapter.base import Adapter
from grounding.core.errors import DataError
from grounding.core.images import Picture
from grounding.core.printable import quote
from grounding.datasets.records import Caption, Record, normal
from grounding.engine.queries import check_query, prepare_inputs
from grounding.engine.signals import scores

SWAPS_FILE = "swaps.json"
# Texts per forward pass.
TEXTS_PER_BATCH = 32


@dataclass(frozen=True)
class Swaps:
    """`groups` of interchangeable words, and the `combinations` of such words that occur together in a phrase."""

    groups: tuple[tuple[str, ...], ...]
    combinations: frozenset[frozenset[str]]

    @classmethod
    def read(cls, folder: Path) -> Swaps | None:
        """Read the file of a data set; None if it has none. Raises DataError for a malformed file."""
        path = folder / SWAPS_FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            groups = tuple(tuple(map(normal, group)) for group in content["groups"])
            return cls(groups, frozenset(frozenset(text.split()) for text in content["combinations"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{quote(path)} cannot be read: {error}") from None

    def known_words(self, phrase: str) -> frozenset[str]:
        """Return the words of a phrase that are in a group."""
        known = {word for group in self.groups for word in group}
        return frozenset(word for word in normal(phrase).split() if word in known)

    def variants(self, phrase: str) -> Iterator[str]:
        """Yield every phrase with one word replaced by another of its group, if that combination occurs."""
        words = phrase.split()
        for index, word in enumerate(words):
            group = next((group for group in self.groups if word.lower() in group), ())
            for other in group:
                variant = " ".join(_with_article([*words[:index], other, *words[index + 1 :]], index))
                if other != word.lower() and self.known_words(variant) in self.combinations:
                    yield variant


def _with_article(words: list[str], index: int) -> list[str]:
    """Return the words with the indefinite article before `index` corrected: a wrong one would reveal the swap."""
    if index and words[index - 1].lower() in ("a", "an"):
        return [*words[: index - 1], "an" if words[index][:1].lower() in "aeiou" else "a", *words[index:]]
    return words


def swapped_captions(caption: Caption, record: Record, swaps: Swaps, heldout: frozenset[str]) -> list[str]:
    """Return the caption with one word of one phrase swapped, in all ways that are true of nothing in the image."""
    present = {swaps.known_words(phrase.text) for each in record.captions for phrase in each.phrases}
    swapped = (
        caption.text[: phrase.start] + variant + caption.text[phrase.end :]
        for phrase in caption.phrases
        for variant in swaps.variants(phrase.text)
        if swaps.known_words(variant) not in present and normal(variant) not in heldout
    )
    return list(dict.fromkeys(swapped))


def swap_test(
    adapter: Adapter, image: Picture, record: Record, swaps: Swaps, heldout: frozenset[str], kind: str | None
) -> list[float]:
    """Return for every swapped form of the first caption 1 if the true caption has the higher score, else 0.

    `image` is the opened image of `record`; `kind` the target whose score is compared (None: the default).
    """
    if not record.captions:
        return []
    caption, (kind, _) = record.captions[0], adapter.check_target(kind)
    prepared = adapter.prepare_images([image])
    found: list[float] = []
    texts = [caption.text, *swapped_captions(caption, record, swaps, heldout)]
    for first in range(0, len(texts), TEXTS_PER_BATCH):
        queries = [check_query(adapter, text, kind) for text in texts[first : first + TEXTS_PER_BATCH]]
        inputs = prepare_inputs(adapter, prepared, [queries])
        targets = adapter.targets(inputs, [[text.caption()] for text in inputs.texts], kind)
        found += scores(adapter, inputs, targets).tolist()
    return [float(found[0] > score) for score in found[1:]]
