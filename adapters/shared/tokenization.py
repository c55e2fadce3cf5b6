"""Texts through a Hugging Face tokenizer: character spans kept, nothing cut off or replaced in silence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grounding.core.errors import ModelError, TextError
from grounding.core.printable import quote
from grounding.core.text import TokenizedText, check_text

WORDS_NAMED = 10


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ModelError for a tokenizer that cannot say which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed")


def tokenise(tokenizer: Any, text: str, limit: int) -> tuple[TokenizedText, tuple[str, ...]]:
    """The tokens of one text, at most `limit` of them (special ones kept), and what the user must know about it.

    Literal special tokens in the text ("<|endoftext|>") are read as ordinary characters, or positions would shift.
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
        warnings.append(f"the text is longer than the model's {limit} tokens; not read: {quote(dropped, 200)}")
    tokens = TokenizedText(text, tuple(ids), tuple(offsets), tuple(special), dropped)
    unknown = [text[slice(*offsets[i])] for i in tokens.visible if ids[i] == getattr(tokenizer, "unk_token_id", None)]
    if unknown:
        distinct = list(dict.fromkeys(unknown))
        more = f" and {len(distinct) - WORDS_NAMED} more" if len(distinct) > WORDS_NAMED else ""
        words = ", ".join(quote(word, 40) for word in distinct[:WORDS_NAMED])
        warnings.append(f"words this model does not know: {words}{more}")
    return tokens, tuple(warnings)


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A character span without the blanks at its ends: byte-level tokens carry the blank before a word."""
    span_ids = text[start:end]
    blanks = len(span_ids) - len(span_ids.lstrip())
    return (start, end) if blanks == len(span_ids) else (start + blanks, start + len(span_ids.rstrip()))


def _cut(
    text: str, ids: list[int], offsets: list[tuple[int, int]], special: list[bool], limit: int
) -> tuple[list[int], list[tuple[int, int]], list[bool], str]:
    """The first tokens and all special ones at the end: CLIP silently reads a wrong position without its end token."""
    tail = next((i for i, flag in enumerate(reversed(special)) if not flag), 0)
    head = limit - tail
    keep = [*range(head), *range(len(ids) - tail, len(ids))]
    start = offsets[head][0]
    return [ids[i] for i in keep], [offsets[i] for i in keep], [special[i] for i in keep], text[start:].strip()


def _special_literals(tokenizer: Any, text: str) -> Sequence[str]:
    found = [token for token in dict.fromkeys(tokenizer.all_special_tokens) if token and token in text]
    if not found:
        return ()
    return (f"the text holds {', '.join(map(repr, found))}, which is read as ordinary characters",)


def pad(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (T, L) padded to the longest, not to the model's limit, and the attention mask (T, L)."""
    length = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), length), pad_id, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, device=device)
        mask[row, : len(sequence)] = 1
    return ids, mask
