"""Tokens, words and phrases as character spans of a text: [start, end), in code points of the text as given."""

from __future__ import annotations

import operator
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from grounding.core.errors import OptionError, TextError

# More beams exhaust the memory of most machines.
MOST_BEAMS = 64
# How sub-word tokens are joined to words; quoted by --help and the documentation.
WORD_RULE = (
    "a word is a run of letters and digits (inner apostrophes and hyphens included) or a run of other visible signs; "
    "a piece belongs to the word of its first character"
)


# The sign that displays a blank; accepted as its name.
BLANK = "\u2423"


@dataclass(frozen=True)
class Span:
    """A part of a text that is explained: characters [start, end).

    `kind` is caption, token, word, phrase, class, image, where or contrast. `positions` are the indices of its tokens
    in the model's sequence, special tokens counted. `token_id` is the id of the explained token, if it is one token
    (of a class, its index). `alone` marks a span that is scored as a text of its own.

    Kind `where` explains the score of `token` at these positions in place of the token that is there; `contrast` the
    score of `token` minus that of `other_token`. Their `token_id` is the id of `token`, None where the adapter has to
    look it up.
    """

    kind: str
    label: str
    start: int
    end: int
    positions: tuple[int, ...] = ()
    token_id: int | None = None
    alone: bool = False
    token: str = ""
    other_token: str = ""


@dataclass(frozen=True)
class Generate:
    """A request that the model generate the text, in place of a text; for architectures that can generate.

    `max_length` is the maximum number of tokens, `beams` the number of beams of the search; None: the setting of the
    checkpoint. Raises OptionError for other numbers than 1 or more (`beams`: 1 to MOST_BEAMS).
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
    """Classes to explain, in place of a text, each by name or index; empty for the predicted class.

    `predicted` marks the class that the model itself predicted.
    """

    asked: tuple[str | int, ...] = ()
    predicted: bool = False


@dataclass(frozen=True)
class TokenizedText:
    """A tokenized text: one item of `ids`, `offsets` and `special` per token of the model's sequence.

    `offsets[i]` is the character span of token i in `text`, `special[i]` whether it is a special token, `marks[i]` the
    name of a special token, empty for the end of the text. `dropped` is the part of the text that was truncated.
    `stopped`: generation ended at a limit, before the end of the text. `classes`: the names of classes in place of a
    text, which is then empty; `ids` are their indices. `origin` is where the text comes from: given, generated, forced
    or predicted; `warnings` are messages to the user about it.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    special: tuple[bool, ...]
    dropped: str = ""
    marks: tuple[str, ...] = ()
    stopped: bool = False
    classes: tuple[str, ...] = ()
    origin: str = "given"
    warnings: tuple[str, ...] = ()

    @classmethod
    def of_classes(cls, names: Sequence[str], indices: Sequence[int]) -> TokenizedText:
        """Return classes in place of a text: one special token per class."""
        count = len(names)
        return cls("", tuple(indices), ((0, 0),) * count, (True,) * count, classes=tuple(names))

    @classmethod
    def of_image(cls) -> TokenizedText:
        """Return the absence of a text, for targets that no text can change."""
        return cls("", (), (), ())

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def visible(self) -> tuple[int, ...]:
        """Positions of the tokens that are not special."""
        return tuple(i for i, special in enumerate(self.special) if not special)

    def span(self, kind: str, start: int, end: int) -> Span:
        """Return the span of characters [start, end), with the positions of all tokens that overlap it."""
        touching = tuple(i for i in self.visible if min(end, self.offsets[i][1]) > max(start, self.offsets[i][0]))
        return Span(kind, self.text[start:end], start, end, touching)

    def class_spans(self) -> tuple[Span, ...]:
        """Return one span per class; empty for a text."""
        return tuple(Span("class", name, 0, 0, (i,), self.ids[i], alone=True) for i, name in enumerate(self.classes))

    def caption(self) -> Span:
        """Return the span of the whole text; of classes, of the first class; without a text, of the image."""
        if self.classes:
            return self.class_spans()[0]
        if not self.ids:
            return Span("image", "image", 0, 0, alone=True)
        return replace(self.span("caption", 0, len(self.text)), alone=True)

    def tokens(self, *, special: bool = False) -> tuple[Span, ...]:
        """Return one span per visible token, with `special` per token. Byte-level tokens of one character share it."""
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
        """Return one span per occurrence of a word that is not truncated; see WORD_RULE."""
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
        """The end of the part of the text that is in the model's sequence, in characters."""
        return len(self.text) if not self.dropped else max(self.offsets[i][1] for i in self.visible)

    def phrase(self, phrase: str) -> Span:
        """Return the first occurrence of `phrase` in the text (case ignored, whole words), to be scored alone.

        Raises TextError if the phrase is empty, does not occur, or is in the truncated part.
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
            raise TextError(f"phrase {phrase!r} is in the part of the caption that the model does not read")
        return replace(self.span("phrase", start, start + len(wanted)), alone=True)

    def phrase_at(self, start: int, end: int) -> Span | None:
        """Return the phrase of characters [start, end), to be scored alone; None if it is truncated."""
        found = replace(self.span("phrase", start, end), alone=True)
        return found if found.positions and end <= self.read else None

    def choose(self, wanted: Sequence[str], spans: Sequence[Span]) -> tuple[Span, ...]:
        """Return the `spans` named in `wanted`, in their order, each once.

        A name is a text (all occurrences; exact matches, or else with case ignored) or an index: `@3`, or `3` if no
        token is called so. Raises TextError with the list of spans for a name without a match.
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
        """Return the `spans` with this text: exact matches, or else those with case ignored."""
        name = " " if name == BLANK else name
        exact = tuple(span for span in spans if span.label == name)
        return exact or tuple(span for span in spans if _fold(span.label) == _fold(name))


@dataclass(frozen=True)
class Query:
    """What is asked about an image.

    `text` is a text (compared with the image, or forced on a model that generates), `Generate`, `Classes`, a tokenized
    text (generated by the model), or None for a target that no text can change. `prompt` is what the model is given
    before the text: a question, a task token. It is not explained.
    """

    text: str | Generate | Classes | TokenizedText | None
    prompt: str | None = None


def _fold(text: str) -> str:
    """Lower case, character by character: offsets stay valid (casefold may change the length)."""
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _whole_words(text: str, start: int, end: int) -> bool:
    """Whether [start, end) splits no word. Scripts without blanks may be split between any two characters."""

    def joined(i: int) -> bool:
        pair = text[i - 1 : i + 1]
        return len(pair) == 2 and all(_is_letter(c) and unicodedata.east_asian_width(c) not in "WF" for c in pair)

    return not (start > 0 and joined(start)) and not joined(end)


def _continues(character: str) -> bool:
    """Whether a character belongs to the one before it: combining marks, joiners, variation selectors."""
    return unicodedata.category(character) in {"Mn", "Mc", "Me", "Cf"}


def _is_letter(character: str) -> bool:
    return character.isalnum() or character == "_"


def word_spans(text: str) -> tuple[tuple[int, int], ...]:
    """Return the character spans of the words of `text`, in order; see WORD_RULE."""
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
    """Return `text` if it can be used. Raises TextError for no string, invalid Unicode, or nothing visible."""
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
    """Another token (or class) at the position of an explained one, with its probability there."""

    label: str
    token_id: int
    probability: float


def find_label(which: int | str, labels: Sequence[str], occurrence: int = 0) -> int:
    """Return the index of an entry among `labels`, by index or label: exact matches, or else with case ignored.

    `occurrence` counts equal labels from 0. Raises TextError listing the labels.
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
