"""Relevance propagation (GAE, Chefer et al. 2021): gradient-weighted attention accumulated over the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from grounding.adapter.structure import Hop, ModelStructure
from grounding.core.errors import OptionError
from grounding.methods.attention import LAST, index_of
from grounding.methods.base import Reading, method, whole_path
from grounding.methods.chains import normalised, normalised_relevance_row, relevance_row
from grounding.methods.trace import Trace


def _uses_rollout(structure: ModelStructure, encoder: str | None) -> bool:
    """Whether the last stack on the path takes part by its attention rollout: by default behind cross-attention."""
    return encoder == "rollout" or (encoder is None and any(hop.kind == "cross" for hop in structure.path[:-1]))


def _reads(options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    path = whole_path(structure)
    last = path[-1]
    count = len(structure.stack(last.stack).attention) if last.kind == "self" else 0
    blocks = slice(index_of(options["start_layer"], count, "relevance.start_layer") if count else 0, None)
    if options["encoder"] == "rollout" and len(path) == 1:
        raise OptionError(
            "option relevance.encoder: rollout requires a decoder or a fusion encoder behind the vision stack"
        )
    read: dict[str, Reading] = {}
    for hop in path:
        if hop.kind == "pool":
            read[hop.stack] = Reading(LAST, gradient=True)
        elif hop is last and hop.kind == "self":
            read[hop.stack] = Reading(blocks, gradient=not _uses_rollout(structure, options["encoder"]))
        else:
            read |= {name: Reading(gradient=True) for name in (hop.among, hop.stack) if name}
    return read


@method("Relevance", {"attention", "attention_gradient"}, reads=_reads)
def relevance(
    trace: Trace, *, start_layer: int = 0, encoder: Literal["rollout", "relevance"] | None = None
) -> Float[Tensor, "k rows columns"]:
    """Relevance (GAE): the pooling row of R, where R <- R + Abar^l R from R = I over the vision blocks l, and
    Abar^l = E_h (G^l A^l)+ with G^l = d score / d A^l.

    Source: Chefer et al. 2021, arXiv:2103.15679.

    An attention pooling head is one more layer of the chain. Encoder-decoders use its bi-modal rule: per decoder block
    R_ss <- R_ss + Abar_ss R_ss, R_sq <- R_sq + Abar_ss R_sq, then R_sq <- R_sq + N(R_ss)^T Abar_sq N(R_qq), with
    N(R) = rownorm(R - I) + I and 0/0 = 0. The map is the row of R_sq at the target's positions. Fusion encoders use the
    self rule over the joint sequence, and continue from its image tokens through the vision stack.

    Departures: `encoder` selects the matrix in place of N(R_qq): the attention rollout of the encoder (default of
    encoder-decoders; no gradient), or its relevance as in the paper (default of fusion encoders). `start_layer` is the
    first vision block that takes part; a negative index counts from the end.
    Range: >= 0. Sign: never negative.
    Cost: one backward pass per target through the blocks that take part.
    """
    row, crossed = trace.start(), False
    for hop in trace.path:
        last = hop is trace.path[-1]
        if hop.kind == "cross":
            row, crossed = _decoder_row(trace, row, hop), True
        elif hop.kind == "pool":
            row = trace.chain(row, _gradient_weighted(trace, hop.stack, LAST)[0], hop.stack)
        elif last and _uses_rollout(trace.structure, encoder):
            for weights in reversed(trace.attentions(hop.stack, slice(start_layer, None))):
                row = trace.through(row, weights.mean(1), hop.stack)
        else:
            blocks = _gradient_weighted(trace, hop.stack, slice(start_layer if last else 0, None))
            step = normalised_relevance_row if crossed else relevance_row
            row = step(trace, row, blocks, hop.stack)
        row = trace.carried(row, hop)
    return trace.patches(row, trace.path[-1])


def _gradient_weighted(trace: Trace, stack: str, blocks: slice = slice(None)) -> list[Float[Tensor, "B Q S"]]:
    """Return E_h (G A)+ of the blocks of a stack, first to last."""
    pairs = zip(trace.attentions(stack, blocks), trace.attention_gradients(stack, blocks), strict=True)
    return [(weights * gradient).clamp(min=0).mean(1) for weights, gradient in pairs]


def _decoder_row(trace: Trace, row: Float[Tensor, "k L"], hop: Hop) -> Float[Tensor, "k N"]:
    """Return the row of R_sq at the target's positions, with R_qq = I."""
    across = _gradient_weighted(trace, hop.stack)
    among = _gradient_weighted(trace, hop.among) if hop.among else [None] * len(across)
    length = across[0].shape[-2]
    text = torch.eye(length, dtype=across[0].dtype, device=across[0].device).expand(len(across[0]), -1, -1)
    image = torch.zeros_like(across[0])
    for own, cross in zip(among, across, strict=True):
        if own is not None:
            text, image = text + own @ text, image + own @ image
        image = image + normalised(text).mT @ cross
    return trace.chain(row, image, hop.stack)
