"""Tokens, words and phrases as character spans of the text the user typed: [start, end), in code points."""

from __future__ import annotations

import operator
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING

from grounding.core.errors import OptionError, TextError

if TYPE_CHECKING:
    pass
if TYPE_CHECKING:
    pass

# More would fill the memory of most machines, and no reader wants them.
MOST_BEAMS = 64
# How a word is made from sub-word pieces; said in --help and in the documentation.
WORD_RULE = (
    "a word is a run of letters and digits (inner apostrophes and hyphens included) or a run of other visible signs; "
    "a piece belongs to the word its first character lies in"
)


# How a blank is shown, and may be named.
BLANK = "\u2423"


@dataclass(frozen=True)
class Span:
    """One entry: a part of a text. `positions` are its tokens' places in the model's sequence, special tokens counted.

    `kind` is caption, token, word, phrase, class or image. `alone` marks a span that is scored as a text of its own.
    Kind `where` asks for the token `asked` (or the one with the id `asked_id`) in place of the one that stands there,
    `contrast` for it rather than `against`.
    """

    kind: str
    label: str
    start: int
    end: int
    positions: tuple[int, ...] = ()
    token_id: int | None = None
    alone: bool = False
    asked: str = ""
    against: str = ""
    asked_id: int | None = None


@dataclass(frozen=True)
class Generate:
    """In place of a text: what the model itself writes of the picture, as far as its architecture can.

    `max_length` is the largest number of tokens, `beams` that of the search; None: as the checkpoint has it.
    """

    max_length: int | None = None
    beams: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_length", "beams"):
            value, most = getattr(self, name), MOST_BEAMS if name == "beams" else inf
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                limits = f"from 1 to {most}" if most < inf else "1 or more"
                raise OptionError(f"{name.replace('_', '-')} must be a whole number, {limits}, got {value!r}")


@dataclass(frozen=True)
class Classes:
    """In place of a text: the classes that are asked for, each by name or index; none: the one that is predicted."""

    asked: tuple[str | int, ...] = ()


# What is asked of a picture.
Asked = str | Generate | Classes


@dataclass(frozen=True)
class TokenizedText:
    """A tokenised text. `ids`, `offsets` and `special` run over the model's sequence, special tokens included.

    `offsets[i]` is the character span of token i in `text`; `dropped` is the part of the text that was cut off; `marks`
    are what special tokens are called, empty for the end of the text. `stopped`: the model that wrote the text was
    stopped before its end. `classes`: names of the classes that stand in place of a text, which is then empty; `ids`
    are their indices.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    special: tuple[bool, ...]
    dropped: str = ""
    marks: tuple[str, ...] = ()
    stopped: bool = False
    classes: tuple[str, ...] = ()

    @classmethod
    def of_classes(cls, names: Sequence[str], indices: Sequence[int]) -> TokenizedText:
        """Classes in place of a text."""
        count = len(names)
        return cls("", tuple(indices), ((0, 0),) * count, (True,) * count, classes=tuple(names))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def visible(self) -> tuple[int, ...]:
        """Positions of the tokens that stand for text."""
        return tuple(i for i, special in enumerate(self.special) if not special)

    def span(self, kind: str, start: int, end: int) -> Span:
        """The span of characters [start, end) with the positions of all tokens that touch it."""
        touching = tuple(i for i in self.visible if min(end, self.offsets[i][1]) > max(start, self.offsets[i][0]))
        return Span(kind, self.text[start:end], start, end, touching)

    def class_spans(self) -> tuple[Span, ...]:
        """One span per class that stands in place of the text."""
        return tuple(Span("class", name, 0, 0, (i,), self.ids[i], alone=True) for i, name in enumerate(self.classes))

    def caption(self) -> Span:
        """The whole text; of classes the first."""
        if self.classes:
            return self.class_spans()[0]
        return replace(self.span("caption", 0, len(self.text)), alone=True)

    def tokens(self, *, special: bool = False) -> tuple[Span, ...]:
        """One span per visible token, or per token. Byte-level parts of one sign share its characters."""
        return tuple(
            Span(
                "token",
                self.marks[i] if self.special[i] and self.marks else self.text[slice(*self.offsets[i])],
                *self.offsets[i],
                (i,),
                self.ids[i],
            )
            for i in (range(len(self)) if special else self.visible)
        )

    def words(self) -> tuple[Span, ...]:
        """One span per occurrence of a word that was read to its end; see WORD_RULE."""
        spans = [span for span in word_spans(self.text) if span[1] <= self.read]
        pieces: dict[tuple[int, int], list[int]] = {}
        for i in self.visible:
            start = self.offsets[i][0]
            home = next((span for span in spans if span[0] <= start < span[1]), None)
            if home is not None:
                pieces.setdefault(home, []).append(i)
        return tuple(
            Span(
                "word",
                self.text[start:end],
                start,
                end,
                tuple(positions),
                self.ids[positions[0]] if len(positions) == 1 else None,
            )
            for (start, end), positions in pieces.items()
        )

    @property
    def read(self) -> int:
        """Where the part of the text ends that the model reads."""
        return len(self.text) if not self.dropped else max(self.offsets[i][1] for i in self.visible)

    def phrase(self, phrase: str) -> Span:
        """The first occurrence of `phrase` in the text (case ignored, whole words), to be scored alone.

        Raises TextError where the phrase is empty, does not occur, or lies where the model does not read.
        """
        wanted = phrase.strip()
        if not wanted:
            raise TextError("a phrase is empty: give some of the caption's words")
        text, wanted = _fold(self.text), _fold(wanted)
        starts = (i for i in range(len(text)) if text.startswith(wanted, i))
        start = next((i for i in starts if _whole_words(self.text, i, i + len(wanted))), None)
        if start is None:
            raise TextError(f"phrase {phrase!r} does not occur in the caption {self.text!r} as whole words")
        if start + len(wanted) > self.read:
            raise TextError(f"phrase {phrase!r} lies in the part of the caption that the model does not read")
        return replace(self.span("phrase", start, start + len(wanted)), alone=True)

    def phrase_at(self, start: int, end: int) -> Span | None:
        """The phrase of characters [start, end), to be scored alone; None where the model does not read all of it."""
        found = replace(self.span("phrase", start, end), alone=True)
        return found if found.positions and end <= self.read else None

    def choose(self, wanted: Sequence[str], spans: Sequence[Span]) -> tuple[Span, ...]:
        """The `spans` that are asked for, by text (every occurrence; as it is written, or else with case ignored) or by
        index: `@3`, or `3` where no token is called so.

        Raises TextError for one that is not there, with the list of what there is.
        """
        chosen: list[int] = []
        for name in wanted:
            hits = [spans.index(span) for span in self.labelled(name, spans)]
            index = name.removeprefix("@")
            if not hits and index.isdecimal() and int(index) < len(spans):
                hits = [int(index)]
            if not hits:
                listing = ", ".join(f"{i}:{span.label!r}" for i, span in enumerate(spans))
                raise TextError(f"{name!r} is not in the caption; it has {listing}")
            chosen += hits
        return tuple(spans[i] for i in sorted(set(chosen)))

    @staticmethod
    def labelled(name: str, spans: Sequence[Span]) -> tuple[Span, ...]:
        """The `spans` with that text: as it is written, or else with case ignored."""
        name = " " if name == BLANK else name
        exact = tuple(span for span in spans if span.label == name)
        return exact or tuple(span for span in spans if _fold(span.label) == _fold(name))


def _fold(text: str) -> str:
    """Lower case, one character for one: character offsets stay as they are (casefold may change the length)."""
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _whole_words(text: str, start: int, end: int) -> bool:
    """Whether [start, end) cuts no word in two. Scripts written without blanks may be cut between any two signs."""

    def joined(i: int) -> bool:
        pair = text[i - 1 : i + 1]
        return len(pair) == 2 and all(_is_letter(c) and unicodedata.east_asian_width(c) not in "WF" for c in pair)

    return not (start > 0 and joined(start)) and not joined(end)


def _continues(character: str) -> bool:
    """Combining marks, joiners and variation selectors belong to the character before them."""
    return unicodedata.category(character) in {"Mn", "Mc", "Me", "Cf"}


def _is_letter(character: str) -> bool:
    return character.isalnum() or character == "_"


def word_spans(text: str) -> tuple[tuple[int, int], ...]:
    """Character spans of the words of `text`, in order: see WORD_RULE."""
    spans: list[tuple[int, int]] = []
    start, kind = 0, ""
    for i, character in enumerate(text):
        here = _kind(text, i, character, kind)
        if here != kind:
            if kind:
                spans.append((start, i))
            start, kind = i, here
    if kind:
        spans.append((start, len(text)))
    return tuple(spans)


def _kind(text: str, i: int, character: str, before: str) -> str:
    """ "word", "sign" or "" (blank) for the character at i, given the kind of the one before it."""
    if before and _continues(character):
        return before
    if _is_letter(character):
        return "word"
    if character.isspace() or _continues(character):
        return ""
    inner = before == "word" and character in "'’-" and i + 1 < len(text) and _is_letter(text[i + 1])
    return "word" if inner else "sign"


def check_text(text: object) -> str:
    """The text, if it can be used. Raises TextError where it is no string, empty or blank."""
    if not isinstance(text, str):
        raise TextError(f"a caption must be text, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(f"the caption is not valid Unicode at character {error.start}") from None
    if not any(c.isprintable() and not c.isspace() for c in text):
        raise TextError("the caption is empty: give at least one word")
    return text


@dataclass(frozen=True)
class Alternative:
    """A token that could have stood in another's place, with the probability the model gave it there."""

    label: str
    token_id: int
    probability: float


def find_label(which: int | str, labels: Sequence[str], occurrence: int = 0) -> int:
    """The place of an entry among `labels`, by index or by label: as it is written, or else with case ignored.

    Raises TextError listing what there is.
    """
    if not isinstance(which, str):
        which = operator.index(which)
        if -len(labels) <= which < len(labels):
            return which % len(labels)
        raise TextError(f"entry {which} is not in 0 to {len(labels) - 1}")
    hits = [i for i, label in enumerate(labels) if label == which]
    hits = hits or [i for i, label in enumerate(labels) if label.lower() == which.lower()]
    if occurrence >= len(hits):
        listing = ", ".join(f"{i}:{label!r}" for i, label in enumerate(labels))
        raise TextError(f"no entry {which!r} (occurrence {occurrence}); there are {listing}")
    return hits[occurrence]
