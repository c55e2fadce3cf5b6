"""Selection of the entries of a text: caption, tokens, words, phrases, questions about other tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from grounding.core.errors import OptionError, TextError
from grounding.core.text import Span, TokenizedText


@dataclass(frozen=True)
class Selection:
    """The entries of a text that are explained: the caption, its tokens, words or phrases, questions about tokens.

    Parameters
    ----------
    caption: explain the whole text.
    tokens: True for all tokens, False for none, or a list of tokens by text or by index ("@3" or 3).
    words: explain words in place of tokens, also where `tokens` names some.
    phrases: phrases by their words (the first occurrence) or by their characters (start, end); of the latter, phrases
        that the model does not read are left out.
    special: explain special tokens of a generated text too, above all its end.
    where: at each chosen token, explain the evidence for this other token in its place.
    contrast: (first, second): explain the evidence for the first token rather than the second, at the chosen tokens,
        else where the text has the first, or the second.

    `where` and `contrast` replace the tokens. Raises OptionError where they are combined with words or phrases.
    """

    caption: bool = True
    tokens: bool | Sequence[str | int] = True
    words: bool = False
    phrases: Sequence[str | tuple[int, int]] = ()
    special: bool = False
    where: str = ""
    contrast: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        # A string alone means a list of one, not a list of letters.
        for name in ("tokens", "phrases"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, [getattr(self, name)])
        if not isinstance(self.tokens, bool):
            named = [f"@{name}" if isinstance(name, int) else name for name in self.tokens]
            object.__setattr__(self, "tokens", named)
        if (self.where or self.contrast) and (self.words or self.phrases):
            raise OptionError("where and contrast are about single tokens and cannot be combined with words or phrases")

    def spans(self, tokens: TokenizedText) -> tuple[Span, ...]:
        """The entries of one text, in reading order within each kind. Raises TextError for a missing entry."""
        if not tokens.ids:  # a target that no text can change
            return (tokens.caption(),)
        if tokens.classes:
            return self._classes(tokens)
        if self.where or self.contrast:
            return tuple(self._questions(tokens))
        chosen: list[Span] = [tokens.caption()] if self.caption and tokens.visible else []
        parts = tokens.words() if self.words and tokens.visible else self._single(tokens)
        if isinstance(self.tokens, bool):
            chosen += parts if self.tokens else ()
        else:
            chosen += tokens.choose(self._named, parts)
        for phrase in self.phrases:
            found = tokens.phrase(phrase) if isinstance(phrase, str) else tokens.phrase_at(*phrase)
            chosen += [] if found is None else [found]
        return tuple(chosen)

    def _classes(self, tokens: TokenizedText) -> tuple[Span, ...]:
        """Entries of classes, which have no parts."""
        if self.words or self.phrases or not isinstance(self.tokens, bool):
            raise OptionError("a class has no tokens, words or phrases to choose: it is explained as a whole")
        return tokens.class_spans() if self.caption else ()

    @property
    def _named(self) -> list[str]:
        return [] if isinstance(self.tokens, bool) else [str(name) for name in self.tokens]

    def _single(self, tokens: TokenizedText) -> tuple[Span, ...]:
        """Tokens without special ones, unless they are selected or the text has no others."""
        return tokens.tokens(special=self.special or not tokens.visible)

    def _questions(self, tokens: TokenizedText) -> Iterator[Span]:
        """Questions about other tokens. Raises TextError where their position is unclear."""
        every = self._single(tokens)
        named = every if isinstance(self.tokens, bool) else tokens.choose(self._named, every)
        if self.where:
            yield from (
                replace(p, kind="where", token=self.where, token_id=None, label=f"{self.where}?") for p in named
            )
        if self.contrast:
            first, second = self.contrast
            if isinstance(self.tokens, bool):
                named = next((found for name in (first, second) if (found := tokens.labelled(name, every))), ())
            if not named:
                raise TextError(
                    f"neither {first!r} nor {second!r} is in {tokens.text!r}: choose the position by --tokens"
                )
            label = f"{first} \u2212 {second}"
            yield from (
                replace(p, kind="contrast", token=first, other_token=second, token_id=None, label=label) for p in named
            )
