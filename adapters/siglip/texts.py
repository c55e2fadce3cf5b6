"""Texts of SigLIP: token ids padded to the full length, and masks that leave out a part of a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def pad_to(
    sequences: Sequence[Sequence[int]], length: int, pad_id: int, side: str, device: torch.device
) -> Int[Tensor, "T L"]:
    """Token ids padded to `length` on the `side` ("left" or "right") of the tokenizer."""
    ids = torch.full((len(sequences), length), pad_id, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        first = first_position(len(sequence), length, side)
        ids[row, first : first + len(sequence)] = torch.tensor(sequence)
    return ids.to(device)


def first_position(count: int, length: int, side: str) -> int:
    """The position of the first of `count` tokens in a sequence padded to `length`."""
    return length - count if side == "left" else 0


def without(mask: Int[Tensor, "k L"], positions: Sequence[Sequence[int]], firsts: Sequence[int]) -> Int[Tensor, "k L"]:
    """The masks with 0 at the given token `positions` of each text, whose first token is at `firsts`."""
    mask = mask.clone()
    for row, (own, first) in enumerate(zip(positions, firsts, strict=True)):
        mask[row, [first + position for position in own]] = 0
    return mask
