"""Relevance propagation (Chefer et al. 2021): attention weighted by its own gradient, from block to block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from grounding.adapter.structure import ModelStructure
from grounding.core.errors import OptionError
from grounding.methods.attention import index_of
from grounding.methods.base import Reading, method
from grounding.methods.chains import normalised, normalised_relevance_row, relevance_row
from grounding.methods.trace import Trace


def _reads(options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    count = len(structure.attention("vision"))
    blocks = slice(index_of(options["start_layer"], count, "relevance.start_layer") if count else 0, None)
    led = Reading(gradient=True)
    if structure.pooling == "fusion":
        return {"fusion": led, "vision": Reading(blocks, gradient=options["encoder"] != "rollout")}
    if structure.pooling != "cross":
        if options["encoder"] == "rollout":
            raise OptionError(
                "option relevance.encoder: rollout is for vision stacks that are read through another one"
            )
        return {"vision": Reading(blocks, gradient=True)}
    return {"decoder": led, "cross": led, "vision": Reading(blocks, gradient=options["encoder"] == "relevance")}


@method("Relevance", {"attention", "attention_gradient"}, reads=_reads)
def relevance(
    trace: Trace, *, start_layer: int = 0, encoder: Literal["rollout", "relevance"] | None = None
) -> Float[Tensor, "k rows columns"]:
    """Relevance, "GAE" (Chefer et al. 2021): R <- R + Abar^l R from R = I, Abar^l = E_h (G^l A^l)+, the read-out's row.

    `start_layer` is the first vision block that takes part (negative: from the end). Values >= 0.
    Cost: one backward per target through the blocks that take part.

    Of an encoder-decoder the bi-modal rule: per decoder block R_ss <- R_ss + Abar_ss R_ss and R_sq likewise, then
    R_sq <- R_sq + N(R_ss)^T Abar_sq N(R_qq), N(R) = rownorm(R - I) + I with 0/0 = 0; the row that writes the token.
    `encoder` says what stands for N(R_qq): the encoder's attention rollout (the default, without a gradient), or its
    relevance, at one backward through the encoder per target. Of a fusion encoder the self rule over its sequence, then
    on from its image tokens through the vision stack; there `encoder` is relevance unless told otherwise.
    """
    blocks = slice(start_layer, None)
    if trace.has("cross"):
        row = _decoder_row(trace)
        if encoder == "relevance":
            return trace.patches(normalised_relevance_row(trace, row, _led(trace, "vision", blocks)))
    else:
        row = _fusion_row(trace) if trace.has("fusion") else trace.pooling_row()
        if encoder != "rollout":
            return trace.patches(relevance_row(trace, row, _led(trace, "vision", blocks)))
    for weights in reversed(trace.attentions(blocks=blocks)):
        row = trace.through(row, weights.mean(1))
    return trace.patches(row)


def _led(trace: Trace, stack: str, blocks: slice = slice(None)) -> list[Float[Tensor, "B Q S"]]:
    """E_h (G A)+ of the blocks of a stack, first to last."""
    pairs = zip(trace.attentions(stack, blocks), trace.attention_gradients(stack, blocks), strict=True)
    return [(weights * gradient).clamp(min=0).mean(1) for weights, gradient in pairs]


def _fusion_row(trace: Trace) -> Float[Tensor, "k N"]:
    """The target's row of R over the fusion sequence, its image tokens."""
    return trace.image_part(relevance_row(trace, trace.text_rows(), _led(trace, "fusion"), "fusion"))


def _decoder_row(trace: Trace) -> Float[Tensor, "k N"]:
    """The target's row of R_sq, with R_qq = I."""
    among, across = _led(trace, "decoder"), _led(trace, "cross")
    length = among[0].shape[-1]
    text = torch.eye(length, dtype=among[0].dtype, device=among[0].device).expand(len(among[0]), -1, -1)
    image = torch.zeros_like(across[0])
    for own, cross in zip(among, across, strict=True):
        text, image = text + own @ text, image + own @ image
        image = image + normalised(text).mT @ cross
    return trace.chain(trace.text_rows(), image, "cross")
