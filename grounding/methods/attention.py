"""Maps from attention weights: chains of them (rollout), chains led by gradients (relevance), and the weights as such.

Chains are row vectors times matrices, from the read-out backwards through the blocks: e^T (A_L ... A_1) costs a
fraction of the matrix product and is the same number. Where the vision stack is read by cross-attention (an
encoder-decoder), the chain starts with the cross-attention row of the last block at the target's place; where picture
and text go on in one sequence (a fusion encoder), with the rollout of that stack from the target's place. There these
maps see the text.
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
    """What the read-out's row is made of."""
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
    """Attention rollout (Abnar & Zuidema 2020): J = prod_l rownorm(fusion_h A^l + I), the read-out's row.

    `fusion` joins the heads; `discard` drops that fraction of the smallest weights of each row before the identity
    is added. Every factor's rows sum to 1 whatever the options: `max` and `min` are normalised too, which a widely
    copied implementation forgets. Values in [0, 1], never negative. Cost: the forward pass alone; without a gradient
    the text can only enter through attention.
    """
    row = trace.pooling_row()
    for weights in reversed(trace.attentions()):
        fused = getattr(torch, f"a{fusion}")(weights, 1) if fusion != "mean" else weights.mean(1)
        row = trace.through(row, _discard(fused, discard))
    return trace.patches(row)


@method("Gradient rollout", {"attention", "attention_gradient"}, reads=_all_gradients)
def gradient_rollout(trace: Trace) -> Float[Tensor, "k rows columns"]:
    """Rollout of E_h (A^l G^l)+ in place of E_h A^l, G^l = d score / d A^l; each A^l with its own G^l.

    Values in [0, 1]. Cost: one backward through the vision stack per target.
    """
    row = trace.pooling_row()
    for weights, gradient in zip(reversed(trace.attentions()), reversed(trace.attention_gradients()), strict=True):
        row = trace.through(row, (weights * gradient).clamp(min=0).mean(1))
    return trace.patches(row)


def _one(options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    return {"vision": Reading(one_block("attention", options, structure, "vision")), **_readout(structure)}


@method("Attention", {"attention"}, reads=_one)
def raw_attention(trace: Trace, *, layer: int = -1, head: int | None = None) -> Float[Tensor, "k rows columns"]:
    """The read-out's attention row of one block (`layer`), one `head` or the mean over heads. Values in [0, 1]."""
    [weights] = trace.attentions(blocks=slice(layer, layer + 1 or None))
    return trace.patches(trace.chain(trace.pooling_row(), one_head("attention", weights, head)))


def one_block(name: str, options: Mapping[str, Any], structure: ModelStructure, stack: str) -> slice:
    """The block of a stack that the option `layer` of a method names, counted from the end where negative.

    Raises LayerError with the range.
    """
    if not structure.attention(stack):
        return slice(None)
    layer = index_of(options["layer"], len(structure.attention(stack)), f"{name}.layer")
    return slice(layer, layer + 1)


def one_head(name: str, weights: Float[Tensor, "B H Q S"], head: int | None) -> Float[Tensor, "B Q S"]:
    """One head, or the mean over heads. Raises LayerError with the range."""
    return weights.mean(1) if head is None else weights[:, index_of(head, weights.shape[1], f"{name}.head")]


def index_of(index: int, count: int, option: str) -> int:
    """An index that may count from the end. Raises LayerError with the range."""
    if not -count <= index < count:
        raise LayerError(f"option {option}: {index} is not in {-count} to {count - 1}")
    return index % count


def _discard(matrix: Float[Tensor, "B N N"], fraction: float) -> Float[Tensor, "B N N"]:
    count = int(fraction * matrix.shape[-1])
    if count == 0:
        return matrix
    return matrix.scatter(-1, matrix.topk(count, -1, largest=False).indices, 0)
