"""Texts of dual encoders: tokenization, and one direction of the joint embedding for each text or part of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adapters.shared.tokenization import pad, tokenize
from grounding.adapter.inputs import ImageInputs, Inputs
from grounding.core.text import Query, Span, TokenizedText, check_text

Flat = Sequence[tuple[int, Span]]


def prepare_texts(
    images: ImageInputs, tokenizer: Any, queries: Sequence[Sequence[Query]], limit: int, pad_id: int
) -> Inputs:
    """The inputs of the texts about each image: token ids and mask (T, L), padded to the longest text.

    A text of more than `limit` tokens is truncated, with a warning. Raises TextError.
    """
    texts = tuple(tokenize(tokenizer, check_text(query.text), limit) for own in queries for query in own)
    ids, mask = pad([text.ids for text in texts], pad_id, next(iter(images.tensors.values())).device)
    owner = tuple(b for b, own in enumerate(queries) for _ in own)
    return Inputs(images, texts, owner, {"input_ids": ids, "attention_mask": mask})


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
