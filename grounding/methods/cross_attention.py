"""Attention from the rows where a score is read, with and without its gradient, in one block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from grounding.adapter.structure import Hop, ModelStructure
from grounding.core.errors import LayerError, OptionError
from grounding.methods.attention import entering, one_block, one_head, row_before
from grounding.methods.base import NoAttentionError, Reading, method, whole_path
from grounding.methods.trace import Trace


def cross_hop(structure: ModelStructure) -> Hop:
    """Return the hop of kind `cross`. Raises NoAttentionError if the path has none."""
    found = next((hop for hop in structure.path if hop.kind == "cross"), None)
    if found is None:
        raise NoAttentionError("cross attention")
    return found


def joint_hop(structure: ModelStructure) -> Hop:
    """Return the hop of kind `self` over a joint sequence of image and text. Raises NoAttentionError if there is
    none."""
    first = next(iter(structure.path), None)
    if first is None or first.kind != "self" or structure.stack(first.stack).items != "sequence":
        raise NoAttentionError("fusion attention")
    return first


def _named_hop(structure: ModelStructure, stack: str | None) -> Hop:
    """The hop through a stack, by default the first. Raises OptionError listing the stacks on the path."""
    path = whole_path(structure)
    found = next((hop for hop in path if stack in (None, hop.stack)), None)
    if found is None:
        raise OptionError(
            f"option grad_x_attention.stack: no stack {stack!r} leads from the score to the patches (there are: "
            f"{', '.join(hop.stack for hop in path)})"
        )
    return found


def _cross(options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    stack = cross_hop(structure).stack
    return {stack: Reading(one_block("cross_attention", options, structure, stack))}


@method("Cross-attention", {"attention"}, reads=_cross)
def cross_attention(trace: Trace, *, layer: int = -1, head: int | None = None) -> Float[Tensor, "k rows columns"]:
    """Cross-attention weights E_h A of one decoder block (`layer`) at the target's positions, or those of one `head`.

    Source: the encoder-decoder attention of Vaswani et al. 2017, arXiv:1706.03762.
    Any other token at the same positions has the same map.
    Range: [0, 1]. Sign: never negative.
    Cost: the forward pass.
    """
    hop = cross_hop(trace.structure)
    [weights] = trace.attentions(hop.stack, slice(layer, layer + 1 or None))
    return trace.patches(trace.chain(trace.start(), one_head("cross_attention", weights, head), hop.stack), hop)


def _any(options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    hop = _named_hop(structure, options["stack"])
    before = structure.path[: structure.path.index(hop) + 1]
    options = {"layer": hop.live if options["layer"] is None else options["layer"]}
    block = one_block("grad_x_attention", options, structure, hop.stack)
    return {**entering(before), hop.stack: Reading(block, gradient=True)}


@method("Gradient × attention", {"attention", "attention_gradient"}, reads=_any)
def grad_x_attention(
    trace: Trace, *, stack: str | None = None, layer: int | None = None, head: int | None = None
) -> Float[Tensor, "k rows columns"]:
    """Attention times its gradient: E_h (A G)+ in one block of a stack, G = d score / d A, in the rows of the target.

    Source: ALBEF (Li et al. 2021, arXiv:2107.07651), at the cross-attention from the text's rows to the image tokens;
    of several rows, the sum.
    Departures: `stack` may be any on the path from the score to the patches, by default the first: cross-attention,
    the attention of a fusion encoder or an attention pooling head, else the image encoder's own in the rows that its
    pooling reads. `layer` is by default its last block in which these rows have a gradient; `head` selects one head.
    Range: >= 0. Sign: never negative.
    Cost: one backward pass per target, down to that block. Where each position of the last block depends on its own
    row only, one backward pass serves all tokens of a text. Raises LayerError in a block without a gradient.
    """
    hop = _named_hop(trace.structure, stack)
    return _grad_x_attention(trace, "grad_x_attention", hop, hop.live if layer is None else layer, head)


def _fusion(options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    stack = joint_hop(structure).stack
    return {stack: Reading(one_block("attention_gradcam", options, structure, stack), gradient=True)}


@method("Attention Grad-CAM", {"attention", "attention_gradient"}, reads=_fusion)
def attention_gradcam(trace: Trace, *, layer: int = -2, head: int | None = None) -> Float[Tensor, "k rows columns"]:
    """Attention Grad-CAM: `grad_x_attention` in one block of a fusion encoder, over the image tokens.

    Source: ALBEF (Li et al. 2021, arXiv:2107.07651), whose cross-attention is here the fusion encoder's attention
    from the target's rows to the image tokens; of several rows, the sum.
    Departures: the default `layer` is the last block but one. In the last block a matching head reads the CLS row
    only, so that the rows of the text have no gradient.
    Range: >= 0. Sign: never negative.
    Cost: one backward pass per target, down to that block.
    """
    return _grad_x_attention(trace, "attention_gradcam", joint_hop(trace.structure), layer, head)


def _gradients(options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    hop = cross_hop(structure)
    options = {"layer": hop.live if options["layer"] is None else options["layer"]}
    return {hop.stack: Reading(one_block("gradient_x_cross_attention", options, structure, hop.stack), gradient=True)}


@method("Gradient × cross-attention", {"attention", "attention_gradient"}, reads=_gradients)
def gradient_x_cross_attention(
    trace: Trace, *, layer: int | None = None, head: int | None = None
) -> Float[Tensor, "k rows columns"]:
    """Cross-attention times its gradient: `grad_x_attention` in one decoder block (`layer`; default: the last in which
    these rows have a gradient).

    Source: attention Grad-CAM of ALBEF (Li et al. 2021, arXiv:2107.07651), at the target's positions.
    Departures: of a target that is a mean over positions, the sum over their rows. `head` selects one head.
    Range: >= 0. Sign: never negative.
    Cost: one backward pass per target, down to that block. In the last block each position depends on its own row
    only: one backward pass serves all tokens of a text.
    """
    hop = cross_hop(trace.structure)
    return _grad_x_attention(trace, "gradient_x_cross_attention", hop, hop.live if layer is None else layer, head)


def _grad_x_attention(
    trace: Trace, name: str, hop: Hop, layer: int, head: int | None
) -> Float[Tensor, "k rows columns"]:
    """E_h (A G)+ of one block in the rows that enter a hop: those where the score is read, each counted once."""
    blocks = slice(layer, layer + 1 or None)
    [weights], [gradient] = trace.attentions(hop.stack, blocks), trace.attention_gradients(hop.stack, blocks)
    row = row_before(trace, hop)
    if hop is trace.path[0]:
        row = (row > 0).to(weights.dtype)
    if not trace.chain((row != 0).to(weights.dtype), gradient.abs().sum(1), hop.stack).any():
        live = "" if layer == hop.live else f"; use layer={hop.live}"
        raise LayerError(
            f"{name}: block {layer} of the {hop.stack} stack is dead: the score does not depend on the attention of "
            f"these rows there (gradient exactly zero){live}"
        )
    return trace.patches(trace.chain(row, one_head(name, (weights * gradient).clamp(min=0), head), hop.stack), hop)
