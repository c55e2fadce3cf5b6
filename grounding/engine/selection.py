"""Selection of the entries of a text: caption, tokens, words, phrases, questions about other tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from grounding.core.errors import OptionError, TextError
from grounding.core.text import Span, TokenizedText


@dataclass(frozen=True)
class Selection:
    """Which entries a caption gets: itself, its tokens (`tokens`: all, none, or those named), phrases.

    With `words`, words stand in for tokens, also where they are named; with `special`, special tokens of a text that
    the model wrote are entries, too (its end, above all). `where` asks at each chosen token for evidence of another
    one in its place, `contrast` for evidence of the first rather than the second: at the tokens chosen by name, else
    where the text has the first (or the second). Both stand in for the tokens. A phrase is named by its words (its
    first occurrence) or by its characters (start, end); of the latter, those that the model does not read are left out.
    """

    caption: bool = True
    tokens: bool | Sequence[str | int] = True
    words: bool = False
    phrases: Sequence[str | tuple[int, int]] = ()
    special: bool = False
    where: str = ""
    contrast: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        # A text alone would be taken for a list of letters.
        for name in ("tokens", "phrases"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, [getattr(self, name)])
        if not isinstance(self.tokens, bool):
            named = [f"@{name}" if isinstance(name, int) else name for name in self.tokens]
            object.__setattr__(self, "tokens", named)
        if (self.where or self.contrast) and (self.words or self.phrases):
            raise OptionError("where and contrast ask about single tokens: not with words or phrases")

    def spans(self, tokens: TokenizedText) -> tuple[Span, ...]:
        """The entries of one text, in reading order within each kind. Raises TextError for what is not there."""
        if tokens.classes:
            return self._classes(tokens)
        if self.where or self.contrast:
            return tuple(self._asked(tokens))
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
        """Classes have no parts."""
        if self.words or self.phrases or not isinstance(self.tokens, bool):
            raise OptionError("a class has no tokens, words or phrases to choose: it is explained as a whole")
        return tokens.class_spans() if self.caption else ()

    @property
    def _named(self) -> list[str]:
        return [] if isinstance(self.tokens, bool) else [str(name) for name in self.tokens]

    def _single(self, tokens: TokenizedText) -> tuple[Span, ...]:
        """Tokens; of a text that has none but special ones, those."""
        return tokens.tokens(special=self.special or not tokens.visible)

    def _asked(self, tokens: TokenizedText) -> Iterator[Span]:
        """Questions about tokens that are not there. Raises TextError where it is unclear at which place."""
        places = self._single(tokens)
        named = places if isinstance(self.tokens, bool) else tokens.choose(self._named, places)
        if self.where:
            yield from (
                replace(p, kind="where", token=self.where, token_id=None, label=f"{self.where}?") for p in named
            )
        if self.contrast:
            first, second = self.contrast
            if isinstance(self.tokens, bool):
                named = next((found for name in (first, second) if (found := tokens.labelled(name, places))), ())
            if not named:
                raise TextError(f"neither {first!r} nor {second!r} is in {tokens.text!r}: choose the place by --tokens")
            label = f"{first} \u2212 {second}"
            yield from (
                replace(p, kind="contrast", token=first, other_token=second, token_id=None, label=label) for p in named
            )
