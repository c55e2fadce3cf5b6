"""Relevance propagation (GAE, Chefer et al. 2021): gradient-weighted attention accumulated over the blocks."""

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
    with_gradient = Reading(gradient=True)
    if structure.pooling == "fusion":
        return {"fusion": with_gradient, "vision": Reading(blocks, gradient=options["encoder"] != "rollout")}
    if structure.pooling != "cross":
        if options["encoder"] == "rollout":
            raise OptionError(
                "option relevance.encoder: rollout requires a decoder or a fusion encoder behind the vision stack"
            )
        return {"vision": Reading(blocks, gradient=True)}
    return {
        "decoder": with_gradient,
        "cross": with_gradient,
        "vision": Reading(blocks, gradient=options["encoder"] == "relevance"),
    }


@method("Relevance", {"attention", "attention_gradient"}, reads=_reads)
def relevance(
    trace: Trace, *, start_layer: int = 0, encoder: Literal["rollout", "relevance"] | None = None
) -> Float[Tensor, "k rows columns"]:
    """Relevance (GAE): the pooling row of R, where R <- R + Abar^l R from R = I over the vision blocks l, and
    Abar^l = E_h (G^l A^l)+ with G^l = d score / d A^l.

    Source: Chefer et al. 2021, arXiv:2103.15679.

    Encoder-decoders use its bi-modal rule: per decoder block R_ss <- R_ss + Abar_ss R_ss, R_sq <- R_sq + Abar_ss R_sq,
    then R_sq <- R_sq + N(R_ss)^T Abar_sq N(R_qq), with N(R) = rownorm(R - I) + I and 0/0 = 0. The map is the row of
    R_sq at the target's positions. Fusion encoders use the self rule over the joint sequence, and continue from its
    image tokens through the vision stack.

    Departures: `encoder` selects the matrix in place of N(R_qq): the attention rollout of the encoder (default of
    encoder-decoders; no gradient), or its relevance as in the paper (default of fusion encoders). `start_layer` is the
    first vision block that takes part; a negative index counts from the end.
    Range: >= 0. Sign: never negative.
    Cost: one backward pass per target through the blocks that take part.
    """
    blocks = slice(start_layer, None)
    if trace.has("cross"):
        row = _decoder_row(trace)
        if encoder == "relevance":
            return trace.patches(normalised_relevance_row(trace, row, _gradient_weighted(trace, "vision", blocks)))
    else:
        row = _fusion_row(trace) if trace.has("fusion") else trace.pooling_row()
        if encoder != "rollout":
            return trace.patches(relevance_row(trace, row, _gradient_weighted(trace, "vision", blocks)))
    for weights in reversed(trace.attentions(blocks=blocks)):
        row = trace.through(row, weights.mean(1))
    return trace.patches(row)


def _gradient_weighted(trace: Trace, stack: str, blocks: slice = slice(None)) -> list[Float[Tensor, "B Q S"]]:
    """Return E_h (G A)+ of the blocks of a stack, first to last."""
    pairs = zip(trace.attentions(stack, blocks), trace.attention_gradients(stack, blocks), strict=True)
    return [(weights * gradient).clamp(min=0).mean(1) for weights, gradient in pairs]


def _fusion_row(trace: Trace) -> Float[Tensor, "k N"]:
    """Return the row of R over the fusion sequence at the target's positions, restricted to the image tokens."""
    return trace.image_part(relevance_row(trace, trace.text_rows(), _gradient_weighted(trace, "fusion"), "fusion"))


def _decoder_row(trace: Trace) -> Float[Tensor, "k N"]:
    """Return the row of R_sq at the target's positions, with R_qq = I."""
    among, across = _gradient_weighted(trace, "decoder"), _gradient_weighted(trace, "cross")
    length = among[0].shape[-1]
    text = torch.eye(length, dtype=among[0].dtype, device=among[0].device).expand(len(among[0]), -1, -1)
    image = torch.zeros_like(across[0])
    for own, cross in zip(among, across, strict=True):
        text, image = text + own @ text, image + own @ image
        image = image + normalised(text).mT @ cross
    return trace.chain(trace.text_rows(), image, "cross")
