"""Attention methods: attention rollout, gradient rollout, and the attention weights of one block.

A rollout is a product of matrices of which one row is needed: e^T (A_L ... A_1), computed as row vector times matrix
from the score backwards through the hops of `ModelStructure.path`. This gives the same numbers as the product of the
matrices for a fraction of its cost. The start row e is that of `Trace.start`: the tokens that the vision stack's
pooling reads, or the target's positions in a text. If the path begins on the text side, the map depends on the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from grounding.adapter.structure import Hop, ModelStructure
from grounding.core.errors import LayerError
from grounding.methods.base import Reading, method, whole_path
from grounding.methods.options import Fraction
from grounding.methods.trace import Trace

LAST = slice(-1, None)


def entering(path: tuple[Hop, ...]) -> dict[str, Reading]:
    """Return the attention that `row_before` reads for the last hop of a path."""
    return {hop.stack: Reading(_blocks(hop)) for hop in path[:-1]}


def row_before(trace: Trace, last: Hop) -> Float[Tensor, "k N"]:
    """Return the row that enters a hop: the rollout from the score through the hops before it.

    A hop of kind `self` takes the mean over heads of all blocks, one of kind `cross` or `pool` that of one block: the
    last in which the rows where chains start have a gradient (`Hop.live`). No score reads these rows in later blocks.
    """
    row = trace.start()
    for hop in trace.path[: trace.path.index(last)]:
        if hop.kind == "self":
            for weights in reversed(trace.attentions(hop.stack)):
                row = trace.through(row, weights.mean(1), hop.stack)
        else:
            [weights] = trace.attentions(hop.stack, _blocks(hop))
            row = trace.chain(row, weights.mean(1), hop.stack)
        row = trace.carried(row, hop)
    return row


def _all_blocks(_options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    path = whole_path(structure)
    return {**entering(path), path[-1].stack: Reading(_blocks(path[-1]))}


def _all_gradients(_options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    path = whole_path(structure)
    return {**entering(path), path[-1].stack: Reading(_blocks(path[-1]), gradient=True)}


def _blocks(hop: Hop) -> slice:
    return slice(None) if hop.kind == "self" else slice(hop.live, hop.live + 1 or None)


@method("Attention rollout", {"attention"}, reads=_all_blocks)
def rollout(
    trace: Trace, *, fusion: Literal["mean", "max", "min"] = "mean", discard: Fraction = 0.0
) -> Float[Tensor, "k rows columns"]:
    """Attention rollout: the pooling row of prod_l rownorm(fusion_h A^l + I), last block first.

    Source: Abnar & Zuidema 2020, arXiv:2005.00928; `fusion` mean and `discard` 0 are the paper's.
    Departures: `fusion` joins the heads (mean, max or min); `discard` sets that fraction of the smallest weights of
    each row to zero before the identity is added. All factors are row-normalised, also for max and min. Both options
    apply to the last stack on the path, mostly the image encoder. Of cross-attention and of an attention pooling head
    the last block whose rows the score reads is one factor, E_h A.
    Range: [0, 1]. Sign: never negative.
    Cost: the forward pass. The map depends on the text only where the chain starts in text attention.
    """
    last = trace.path[-1]
    row = row_before(trace, last)
    for weights in reversed(trace.attentions(last.stack, _blocks(last))):
        fused = getattr(torch, f"a{fusion}")(weights, 1) if fusion != "mean" else weights.mean(1)
        row = _step(trace, row, _discard(fused, discard), last)
    return trace.patches(row, last)


@method("Gradient rollout", {"attention", "attention_gradient"}, reads=_all_gradients)
def gradient_rollout(trace: Trace) -> Float[Tensor, "k rows columns"]:
    """Attention rollout weighted by gradients: E_h (A^l G^l)+ in place of E_h A^l, with G^l = d score / d A^l.

    Source: rollout as of Abnar & Zuidema 2020, arXiv:2005.00928, over the gradient-weighted attention of Chefer et al.
    2021, arXiv:2103.15679. The combination is that of public implementations and has no paper of its own.
    Departures: each A^l is paired with the gradient of the same block.
    Range: [0, 1]. Sign: never negative.
    Cost: one backward pass through the vision stack per target.
    """
    last = trace.path[-1]
    row, blocks = row_before(trace, last), _blocks(last)
    pairs = zip(
        reversed(trace.attentions(last.stack, blocks)),
        reversed(trace.attention_gradients(last.stack, blocks)),
        strict=True,
    )
    for weights, gradient in pairs:
        row = _step(trace, row, (weights * gradient).clamp(min=0).mean(1), last)
    return trace.patches(row, last)


def _step(trace: Trace, row: Float[Tensor, "k N"], matrix: Float[Tensor, "B Q S"], hop: Hop) -> Float[Tensor, "k M"]:
    return trace.through(row, matrix, hop.stack) if hop.kind == "self" else trace.chain(row, matrix, hop.stack)


def _one(options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    path = whole_path(structure)
    return {**entering(path), path[-1].stack: Reading(one_block("attention", options, structure, path[-1].stack))}


@method("Attention", {"attention"}, reads=_one)
def raw_attention(trace: Trace, *, layer: int = -1, head: int | None = None) -> Float[Tensor, "k rows columns"]:
    """Attention weights of one block (`layer`) in the pooling row, of one `head` or averaged over heads.

    Source: the softmax(Q K^T / sqrt(d)) of Vaswani et al. 2017, arXiv:1706.03762.
    Range: [0, 1]. Sign: never negative.
    Cost: the forward pass.
    """
    last = trace.path[-1]
    [weights] = trace.attentions(last.stack, slice(layer, layer + 1 or None))
    row = trace.chain(row_before(trace, last), one_head("attention", weights, head), last.stack)
    return trace.patches(row, last)


def one_block(name: str, options: Mapping[str, Any], structure: ModelStructure, stack: str) -> slice:
    """Return the block of a stack that the option `layer` of a method selects; a negative index counts from the end.

    Raises LayerError with the valid range.
    """
    attention = structure.stack(stack).attention
    if not attention:
        return slice(None)
    layer = index_of(options["layer"], len(attention), f"{name}.layer")
    return slice(layer, layer + 1)


def one_head(name: str, weights: Float[Tensor, "B H Q S"], head: int | None) -> Float[Tensor, "B Q S"]:
    """Return the weights of one head, or their mean over heads. Raises LayerError with the valid range."""
    return weights.mean(1) if head is None else weights[:, index_of(head, weights.shape[1], f"{name}.head")]


def index_of(index: int, count: int, option: str) -> int:
    """Return a non-negative index for one that may count from the end. Raises LayerError with the valid range."""
    if not -count <= index < count:
        raise LayerError(f"option {option}: {index} is not in {-count} to {count - 1}")
    return index % count


def _discard(matrix: Float[Tensor, "B N N"], fraction: float) -> Float[Tensor, "B N N"]:
    count = int(fraction * matrix.shape[-1])
    if count == 0:
        return matrix
    return matrix.scatter(-1, matrix.topk(count, -1, largest=False).indices, 0)
