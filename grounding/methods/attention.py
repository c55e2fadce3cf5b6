"""Maps from attention weights: chains of them (rollout), chains led by gradients (relevance), and the weights as such.

Chains are row vectors times matrices, from the read-out backwards through the blocks: e^T (A_L ... A_1) costs a
fraction of the matrix product and is the same number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from grounding.errors import LayerError
from grounding.method import Fraction, method
from grounding.trace import Trace


@method("Attention rollout", {"attention"})
def rollout(
    trace: Trace, *, fusion: Literal["mean", "max", "min"] = "mean", discard: Fraction = 0.0
) -> Float[Tensor, "k rows columns"]:
    """Attention rollout (Abnar & Zuidema 2020): J = prod_l rownorm(fusion_h A^l + I), the read-out's row.

    `fusion` joins the heads; `discard` drops that fraction of the smallest weights of each row before the identity
    is added. Every factor's rows sum to 1 whatever the options: `max` and `min` are normalised too, which a widely
    copied implementation forgets. Values in [0, 1], never negative. Cost: the forward pass alone; without a gradient
    the text can only enter through attention.
    """
    row = trace.readout_row()
    for weights in reversed(trace.attentions()):
        fused = getattr(torch, f"a{fusion}")(weights, 1) if fusion != "mean" else weights.mean(1)
        row = _through(row, _discard(fused, discard))
    return trace.patches(row)


@method("Gradient rollout", {"attention", "attention_gradient"})
def gradient_rollout(trace: Trace) -> Float[Tensor, "k rows columns"]:
    """Rollout of E_h (A^l G^l)+ in place of E_h A^l, G^l = d score / d A^l; each A^l with its own G^l.

    Values in [0, 1]. Cost: one backward through the vision stack per target.
    """
    row = trace.readout_row()
    for weights, gradient in zip(reversed(trace.attentions()), reversed(trace.attention_gradients()), strict=True):
        row = _through(row, (weights * gradient).clamp(min=0).mean(1))
    return trace.patches(row)


def _from_start(options: Mapping[str, Any], count: int) -> slice:
    return slice(_block(options["start_layer"], count, "relevance.start_layer"), None)


def _one(options: Mapping[str, Any], count: int) -> slice:
    layer = _block(options["layer"], count, "attention.layer")
    return slice(layer, layer + 1)


@method("Relevance", {"attention", "attention_gradient"}, blocks=_from_start)
def relevance(trace: Trace, *, start_layer: int = 0) -> Float[Tensor, "k rows columns"]:
    """Relevance, "GAE" (Chefer et al. 2021): R <- R + Abar^l R from R = I, Abar^l = E_h (G^l A^l)+, the read-out's row.

    `start_layer` is the first block that takes part (negative: from the end). Values >= 0.
    Cost: one backward per target through the blocks that take part.
    """
    blocks = slice(start_layer, None)
    pairs = zip(trace.attentions(blocks=blocks), trace.attention_gradients(blocks=blocks), strict=True)
    row = trace.readout_row()
    for weights, gradient in reversed(list(pairs)):
        row = row + _chain(row, (weights * gradient).clamp(min=0).mean(1))
    return trace.patches(row)


@method("Attention", {"attention"}, blocks=_one)
def raw_attention(trace: Trace, *, layer: int = -1, head: int | None = None) -> Float[Tensor, "k rows columns"]:
    """The read-out's attention row of one block (`layer`), one `head` or the mean over heads. Values in [0, 1]."""
    [weights] = trace.attentions(blocks=slice(layer, layer + 1 or None))
    if head is not None:
        weights = weights[:, [_block(head, weights.shape[1], "attention.head")]]
    return trace.patches(_chain(trace.readout_row(), weights.mean(1)))


def _chain(row: Float[Tensor, "k Q"], matrix: Float[Tensor, "k Q S"]) -> Float[Tensor, "k S"]:
    return torch.einsum("kq,kqs->ks", row.to(matrix.dtype), matrix)


def _through(row: Float[Tensor, "k N"], matrix: Float[Tensor, "k N N"]) -> Float[Tensor, "k N"]:
    """row times rownorm(matrix + I), without making that matrix."""
    row = row.to(matrix.dtype) / (matrix.sum(-1) + 1)
    return row + _chain(row, matrix)


def _discard(matrix: Float[Tensor, "k N N"], fraction: float) -> Float[Tensor, "k N N"]:
    count = int(fraction * matrix.shape[-1])
    if count == 0:
        return matrix
    return matrix.scatter(-1, matrix.topk(count, -1, largest=False).indices, 0)


def _block(index: int, count: int, option: str) -> int:
    """An index that may count from the end. Raises LayerError with the range."""
    if not -count <= index < count:
        raise LayerError(f"option {option}: {index} is not in {-count} to {count - 1}")
    return index % count
