"""Tokenize texts with a Hugging Face tokenizer: character offsets, and a warning for all that is cut or unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grounding.core.errors import ModelError, TextError
from grounding.core.printable import quote
from grounding.core.text import TokenizedText, check_text

WORDS_NAMED = 10


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ModelError for a tokenizer without character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed")


def tokenize(tokenizer: Any, text: str, limit: int) -> TokenizedText:
    """Tokenize one text to at most `limit` tokens, the special ones kept, with warnings about all that is lost.

    Literal special tokens in the text ("<|endoftext|>") are tokenized as ordinary characters, or positions would shift.
    Raises TextError for an empty text.
    """
    check_text(text)
    encoded = tokenizer(
        text,
        add_special_tokens=True,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        truncation=False,
        verbose=False,
    )
    ids, offsets = list(encoded["input_ids"]), [_trimmed(text, *span) for span in encoded["offset_mapping"]]
    special = [bool(flag) for flag in encoded["special_tokens_mask"]]
    if all(special):
        raise TextError(f"the tokenizer finds no token in {text!r}")
    warnings = list(_special_literals(tokenizer, text))
    dropped = ""
    if len(ids) > limit:
        ids, offsets, special, dropped = _cut(text, ids, offsets, special, limit)
        warnings.append(f"the text is longer than the model's {limit} tokens; cut off: {quote(dropped, 200)}")
    tokens = TokenizedText(text, tuple(ids), tuple(offsets), tuple(special), dropped)
    unknown = [text[slice(*offsets[i])] for i in tokens.visible if ids[i] == getattr(tokenizer, "unk_token_id", None)]
    if unknown:
        distinct = list(dict.fromkeys(unknown))
        more = f" and {len(distinct) - WORDS_NAMED} more" if len(distinct) > WORDS_NAMED else ""
        words = ", ".join(quote(word, 40) for word in distinct[:WORDS_NAMED])
        warnings.append(f"words outside the vocabulary of this model: {words}{more}")
    return replace(tokens, warnings=tuple(warnings))


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A character span without the blanks at its ends: byte-level tokens include the blank before a word."""
    piece = text[start:end]
    blanks = len(piece) - len(piece.lstrip())
    return (start, end) if blanks == len(piece) else (start + blanks, start + len(piece.rstrip()))


def _cut(
    text: str, ids: list[int], offsets: list[tuple[int, int]], special: list[bool], limit: int
) -> tuple[list[int], list[tuple[int, int]], list[bool], str]:
    """The first tokens and all special ones at the end: without its end token CLIP would pool a wrong position."""
    tail = next((i for i, flag in enumerate(reversed(special)) if not flag), 0)
    head = limit - tail
    kept = [*range(head), *range(len(ids) - tail, len(ids))]
    start = offsets[head][0]
    return [ids[i] for i in kept], [offsets[i] for i in kept], [special[i] for i in kept], text[start:].strip()


def _special_literals(tokenizer: Any, text: str) -> Sequence[str]:
    found = [token for token in dict.fromkeys(tokenizer.all_special_tokens) if token and token in text]
    if not found:
        return ()
    return (f"the text contains {', '.join(map(repr, found))}, which is tokenized as ordinary characters",)


def pad(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (T, L), padded to the longest text and not to the model's limit, and the attention mask (T, L)."""
    length = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), length), pad_id, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, device=device)
        mask[row, : len(sequence)] = 1
    return ids, mask
