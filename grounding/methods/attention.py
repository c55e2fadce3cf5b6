"""Attention methods: attention rollout, gradient rollout, and the attention weights of one block.

A rollout is a product of matrices of which one row is needed: e^T (A_L ... A_1), computed as row vector times matrix
from the pooling backwards through the blocks. This gives the same numbers as the product of the matrices for a fraction
of its cost. The start row e depends on the pooling of the vision stack (`Trace.pooling_row`): CLS token, mean over
patches, the cross-attention row of the last decoder block at the target's positions (encoder-decoders), or the rollout
through the fusion stack from the target's positions (fusion encoders). In the last two cases the map depends on the
text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from grounding.adapter.structure import ModelStructure
from grounding.core.errors import LayerError
from grounding.methods.base import Reading, method
from grounding.methods.options import Fraction
from grounding.methods.trace import Trace


def _readout(structure: ModelStructure) -> dict[str, Reading]:
    """The attention that `Trace.pooling_row` reads."""
    last = {"cross": Reading(slice(-1, None)), "fusion": Reading()}
    return {structure.pooling: last[structure.pooling]} if structure.pooling in last else {}


def _all_blocks(_options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    return {"vision": Reading(), **_readout(structure)}


def _all_gradients(_options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    return {"vision": Reading(gradient=True), **_readout(structure)}


@method("Attention rollout", {"attention"}, reads=_all_blocks)
def rollout(
    trace: Trace, *, fusion: Literal["mean", "max", "min"] = "mean", discard: Fraction = 0.0
) -> Float[Tensor, "k rows columns"]:
    """Attention rollout: the pooling row of prod_l rownorm(fusion_h A^l + I), last block first.

    Source: Abnar & Zuidema 2020, arXiv:2005.00928; `fusion` mean and `discard` 0 are the paper's.
    Departures: `fusion` joins the heads (mean, max or min); `discard` sets that fraction of the smallest weights of
    each row to zero before the identity is added. All factors are row-normalised, also for max and min.
    Range: [0, 1]. Sign: never negative.
    Cost: the forward pass. The map depends on the text only where the chain starts in text attention.
    """
    row = trace.pooling_row()
    for weights in reversed(trace.attentions()):
        fused = getattr(torch, f"a{fusion}")(weights, 1) if fusion != "mean" else weights.mean(1)
        row = trace.through(row, _discard(fused, discard))
    return trace.patches(row)


@method("Gradient rollout", {"attention", "attention_gradient"}, reads=_all_gradients)
def gradient_rollout(trace: Trace) -> Float[Tensor, "k rows columns"]:
    """Attention rollout weighted by gradients: E_h (A^l G^l)+ in place of E_h A^l, with G^l = d score / d A^l.

    Source: rollout as of Abnar & Zuidema 2020, arXiv:2005.00928, over the gradient-weighted attention of Chefer et al.
    2021, arXiv:2103.15679. The combination is that of public implementations and has no paper of its own.
    Departures: each A^l is paired with the gradient of the same block.
    Range: [0, 1]. Sign: never negative.
    Cost: one backward pass through the vision stack per target.
    """
    row = trace.pooling_row()
    for weights, gradient in zip(reversed(trace.attentions()), reversed(trace.attention_gradients()), strict=True):
        row = trace.through(row, (weights * gradient).clamp(min=0).mean(1))
    return trace.patches(row)


def _one(options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    return {"vision": Reading(one_block("attention", options, structure, "vision")), **_readout(structure)}


@method("Attention", {"attention"}, reads=_one)
def raw_attention(trace: Trace, *, layer: int = -1, head: int | None = None) -> Float[Tensor, "k rows columns"]:
    """Attention weights of one block (`layer`) in the pooling row, of one `head` or averaged over heads.

    Source: the softmax(Q K^T / sqrt(d)) of Vaswani et al. 2017, arXiv:1706.03762.
    Range: [0, 1]. Sign: never negative.
    Cost: the forward pass.
    """
    [weights] = trace.attentions(blocks=slice(layer, layer + 1 or None))
    return trace.patches(trace.chain(trace.pooling_row(), one_head("attention", weights, head)))


def one_block(name: str, options: Mapping[str, Any], structure: ModelStructure, stack: str) -> slice:
    """Return the block of a stack that the option `layer` of a method selects; a negative index counts from the end.

    Raises LayerError with the valid range.
    """
    if not structure.attention(stack):
        return slice(None)
    layer = index_of(options["layer"], len(structure.attention(stack)), f"{name}.layer")
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
