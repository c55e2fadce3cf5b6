"""Cross-attention methods: attention from text positions to image tokens, with and without its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from grounding.adapter.structure import ModelStructure
from grounding.methods.attention import one_block, one_head
from grounding.methods.base import Reading, method
from grounding.methods.trace import Trace


def _weights(options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    return {"cross": Reading(one_block("cross_attention", options, structure, "cross"))}


def _gradients(options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    return {"cross": Reading(one_block("gradient_x_cross_attention", options, structure, "cross"), gradient=True)}


@method("Cross-attention", {"attention"}, reads=_weights)
def cross_attention(trace: Trace, *, layer: int = -1, head: int | None = None) -> Float[Tensor, "k rows columns"]:
    """Cross-attention weights E_h A of one decoder block (`layer`) at the target's positions, or those of one `head`.

    Source: the encoder-decoder attention of Vaswani et al. 2017, arXiv:1706.03762.
    Any other token at the same positions has the same map.
    Range: [0, 1]. Sign: never negative.
    Cost: the forward pass.
    """
    [weights] = trace.attentions("cross", slice(layer, layer + 1 or None))
    return trace.patches(trace.chain(trace.text_rows(), one_head("cross_attention", weights, head), "cross"))


def _fusion(options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    return {"fusion": Reading(one_block("attention_gradcam", options, structure, "fusion"), gradient=True)}


@method("Attention Grad-CAM", {"attention", "attention_gradient"}, reads=_fusion)
def attention_gradcam(trace: Trace, *, layer: int = -2, head: int | None = None) -> Float[Tensor, "k rows columns"]:
    """Attention Grad-CAM: E_h [A (G)+] over the image tokens in one block of a fusion encoder, G = d score / d A.

    Source: ALBEF (Li et al. 2021, arXiv:2107.07651), whose cross-attention is here the fusion encoder's attention
    from the target's rows to the image tokens; of several rows, the sum.
    Departures: the default `layer` is the last block but one. In the last block a matching head reads the CLS row
    only, so that the rows of the text have no gradient.
    Range: >= 0. Sign: never negative.
    Cost: one backward pass per target, down to that block.
    """
    blocks = slice(layer, layer + 1 or None)
    [weights], [gradient] = trace.attentions("fusion", blocks), trace.attention_gradients("fusion", blocks)
    weighted = one_head("attention_gradcam", weights * gradient.clamp(min=0), head)
    return trace.patches(trace.image_part(trace.chain((trace.text_rows() > 0).to(weighted.dtype), weighted, "fusion")))


@method("Gradient × cross-attention", {"attention", "attention_gradient"}, reads=_gradients)
def gradient_x_cross_attention(
    trace: Trace, *, layer: int = -1, head: int | None = None
) -> Float[Tensor, "k rows columns"]:
    """Cross-attention times its gradient: E_h (A G)+ of one decoder block (`layer`), G = d score / d A.

    Source: attention Grad-CAM of ALBEF (Li et al. 2021, arXiv:2107.07651), at the target's positions.
    Departures: of a target that is a mean over positions, the sum over their rows. `head` selects one head.
    Range: >= 0. Sign: never negative.
    Cost: one backward pass per target, down to that block. In the last block each position depends on its own row
    only: one backward pass serves all tokens of a text.
    """
    blocks = slice(layer, layer + 1 or None)
    [weights], [gradient] = trace.attentions("cross", blocks), trace.attention_gradients("cross", blocks)
    weighted = one_head("gradient_x_cross_attention", (weights * gradient).clamp(min=0), head)
    return trace.patches(trace.chain((trace.text_rows() > 0).to(weighted.dtype), weighted, "cross"))
