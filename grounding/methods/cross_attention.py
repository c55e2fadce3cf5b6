"""Maps from the attention of text on the picture: where a text position looked, and where looking helped."""

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
    """E_h A of one cross-attention block (`layer`) at the target's place, or one `head` of it. Values in [0, 1].

    Where the decoder looked, not what it saw: another token at the same place has the same map. Cost: the pass alone.
    """
    [weights] = trace.attentions("cross", slice(layer, layer + 1 or None))
    return trace.patches(trace.chain(trace.text_rows(), one_head("cross_attention", weights, head), "cross"))


def _fusion(options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    return {"fusion": Reading(one_block("attention_gradcam", options, structure, "fusion"), gradient=True)}


@method("Attention Grad-CAM", {"attention", "attention_gradient"}, reads=_fusion)
def attention_gradcam(trace: Trace, *, layer: int = -2, head: int | None = None) -> Float[Tensor, "k rows columns"]:
    """E_h [A (G)+] of the target's rows in one block of a fusion encoder over the image tokens, G = d score / d A
    (ALBEF, Li et al. 2021). Values >= 0.

    The default is the last block but one: in the last, a matching head reads the CLS row alone, and the rows of the
    text have no gradient. Cost: one backward per target down to that block.
    """
    blocks = slice(layer, layer + 1 or None)
    [weights], [gradient] = trace.attentions("fusion", blocks), trace.attention_gradients("fusion", blocks)
    led = one_head("attention_gradcam", weights * gradient.clamp(min=0), head)
    return trace.patches(trace.image_part(trace.chain((trace.text_rows() > 0).to(led.dtype), led, "fusion")))


@method("Gradient × cross-attention", {"attention", "attention_gradient"}, reads=_gradients)
def gradient_x_cross_attention(
    trace: Trace, *, layer: int = -1, head: int | None = None
) -> Float[Tensor, "k rows columns"]:
    """E_h (A G)+ of one cross-attention block, G = d score / d A, at the target's place: attention Grad-CAM as of
    ALBEF (Li et al. 2021). Of a target that is a mean over places, the sum over them. Values >= 0.

    Cost: one backward per target down to the block; of the last block, where each place depends on its own row alone,
    one for all tokens of a text.
    """
    blocks = slice(layer, layer + 1 or None)
    [weights], [gradient] = trace.attentions("cross", blocks), trace.attention_gradients("cross", blocks)
    led = one_head("gradient_x_cross_attention", (weights * gradient).clamp(min=0), head)
    return trace.patches(trace.chain((trace.text_rows() > 0).to(led.dtype), led, "cross"))
