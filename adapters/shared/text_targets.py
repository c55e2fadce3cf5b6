"""Texts of dual encoders: tokenization, and one direction of the joint embedding for each text or part of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adapters.shared.tokenization import pad, tokenize
from grounding.adapter.inputs import Inputs
from grounding.core.text import Asked, Span, TokenizedText, check_text

Flat = Sequence[tuple[int, Span]]


def prepare_texts(inputs: Inputs, tokenizer: Any, texts: Sequence[Sequence[Asked]], limit: int, pad_id: int) -> Inputs:
    """Add the texts of each image to the inputs: token ids and mask (T, L), padded to the longest text.

    A text of more than `limit` tokens is truncated, with a warning. Raises TextError.
    """
    found = [tokenize(tokenizer, check_text(text), limit) for own in texts for text in own]
    ids, mask = pad([tokens.ids for tokens, _ in found], pad_id, inputs.tensors["pixel_values"].device)
    return replace(
        inputs,
        tokens=tuple(tokens for tokens, _ in found),
        text_image=tuple(b for b, own in enumerate(texts) for _ in own),
        tensors={**inputs.tensors, "input_ids": ids, "attention_mask": mask},
        text_warnings=tuple(warnings for _, warnings in found),
        per_text=("input_ids", "attention_mask"),
    )


def text_directions(
    flat: Flat,
    token_target: str | None,
    whole: Float[Tensor, "T E"],
    alone: Callable[[Flat], Float[Tensor, "k E"]],
    left_out: Callable[[Flat], Float[Tensor, "k E"]],
) -> Float[Tensor, "K E"]:
    """One direction per (text, span): embedding of the whole text, of the span as a text of its own (`alone`), or the
    whole text's embedding minus the one with the span masked (`left_out`)."""
    seeds = torch.empty(len(flat), whole.shape[1], dtype=whole.dtype, device=whole.device)
    groups: dict[str, list[int]] = {"whole": [], "alone": [], "left out": []}
    for k, (_, span) in enumerate(flat):
        groups[scored_as(span, token_target)].append(k)
    for name, make in (("whole", lambda own: whole[[t for t, _ in own]]), ("alone", alone), ("left out", left_out)):
        if groups[name]:
            seeds[groups[name]] = make([flat[k] for k in groups[name]])
    return seeds


def scored_as(span: Span, token_target: str | None) -> str:
    """How to score a span of a caption: `whole`, `alone` or `left out`."""
    if span.kind == "caption":
        return "whole"
    return "alone" if span.alone or token_target == "alone" else "left out"


def span_ids(tokens: TokenizedText, span: Span) -> list[int]:
    """Token ids of a span as a text of its own: its tokens between the caption's special tokens."""
    first, last = tokens.visible[0], tokens.visible[-1]
    return [*tokens.ids[:first], *(tokens.ids[i] for i in span.positions), *tokens.ids[last + 1 :]]


def mask_without(mask: Int[Tensor, "T L"], flat: Flat) -> Int[Tensor, "k L"]:
    """Attention masks of the texts with each span's tokens masked."""
    masks = mask[[t for t, _ in flat]].clone()
    for row, (_, span) in enumerate(flat):
        masks[row, list(span.positions)] = 0
    return masks
