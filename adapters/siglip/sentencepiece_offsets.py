"""Character offsets for the SentencePiece tokenizer of SigLIP, which reports none.

It lower-cases a text, removes ASCII punctuation and normalises the rest, so its pieces are matched with the characters
of the text as given: both in lower case and in compatibility form, without blanks.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import SiglipTokenizer

from grounding.core.errors import TextError

BLANK = "\u2581"  # SentencePiece's sign for a blank


class OffsetTokenizer:
    """A `SiglipTokenizer` that is called as a fast tokenizer: with offsets and a mask of special tokens."""

    is_fast = True

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.padding_side, self.model_max_length = tokenizer.padding_side, tokenizer.model_max_length
        self.all_special_tokens = tokenizer.all_special_tokens
        self.pad_token_id, self.unk_token_id = tokenizer.pad_token_id, tokenizer.unk_token_id
        self.eos_token_id, self.sep_token_id = tokenizer.eos_token_id, None

    def __call__(self, text: str, **_: Any) -> dict[str, list[Any]]:
        """Token ids with the end token, their character offsets in `text`, and the mask of special tokens.

        Raises TextError where a piece matches no characters of the text.
        """
        pieces = self.tokenizer.tokenize(text, split_special_tokens=True)
        ids = self.tokenizer.convert_tokens_to_ids(pieces)
        return {
            "input_ids": [*ids, self.eos_token_id],
            "offset_mapping": [*piece_offsets(text, pieces), (0, 0)],
            "special_tokens_mask": [*(0 for _ in ids), 1],
        }


def with_offsets(tokenizer: Any) -> Any:
    """The tokenizer, or one with offsets around a `SiglipTokenizer`."""
    return OffsetTokenizer(tokenizer) if isinstance(tokenizer, SiglipTokenizer) else tokenizer


def piece_offsets(text: str, pieces: Sequence[str]) -> list[tuple[int, int]]:
    """The characters [start, end) of each piece in the text; a piece that is a blank has the blank before the next.

    Raises TextError where a piece matches no characters of the text.
    """
    characters = list(_characters(text))
    found: list[tuple[int, int]] = []
    at = 0
    for piece in pieces:
        own = _plain(piece.replace(BLANK, ""))
        matched = characters[at : at + len(own)]
        if "".join(character for character, _, _ in matched) != own:
            raise TextError(f"the tokenizer's piece {piece!r} matches no part of {text!r}: no offsets can be given")
        if own:
            found.append((matched[0][1], matched[-1][2]))
            at += len(own)
        else:
            start = characters[at][1] if at < len(characters) else len(text)
            found.append((start - 1 if text[:start][-1:].isspace() else start, start))
    return found


def _characters(text: str) -> Iterator[tuple[str, int, int]]:
    """The characters of the text as a piece has them, each with the [start, end) that it comes from."""
    start = 0
    while start < len(text):
        end = start + 1
        if text[start] in string.punctuation:
            start = end
            continue
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        for character in _plain(text[start:end]):
            yield character, start, end
        start = end


def _plain(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if not c.isspace() and c != BLANK)
