"""Row-vector arithmetic of relevance propagation: products of a row with the relevance matrix of a stack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from grounding.methods.trace import Trace


def relevance_row(
    trace: Trace, row: Float[Tensor, "k N"], blocks: Sequence[Float[Tensor, "B Q Q"]], stack: str
) -> Float[Tensor, "k N"]:
    """Return row times R (k, N), where R <- R + Abar R from R = I over the matrices Abar of `blocks`, first to last."""
    for matrix in reversed(blocks):
        row = row + trace.chain(row, matrix, stack)
    return row


def normalised_relevance_row(
    trace: Trace, row: Float[Tensor, "k N"], blocks: Sequence[Float[Tensor, "B Q Q"]], stack: str
) -> Float[Tensor, "k N"]:
    """Return row times N(R) (k, N), N(R) = rownorm(R - I) + I with 0/0 = 0, and R as in `relevance_row`."""
    sums = torch.zeros_like(blocks[0][..., 0])  # of the rows of R - I: R 1 - 1, one column through the blocks
    for matrix in blocks:
        sums = sums + torch.einsum("bqs,bs->bq", matrix, sums + 1)
    scaled = row * trace.per_target(_inverse(sums), stack)
    return row + relevance_row(trace, scaled, blocks, stack) - scaled


def normalised(relevance: Float[Tensor, "T L L"]) -> Float[Tensor, "T L L"]:
    """Return N(R) = rownorm(R - I) + I (Chefer et al. 2021, arXiv:2103.15679); rows of zeros in R - I stay zero."""
    identity = torch.eye(relevance.shape[-1], dtype=relevance.dtype, device=relevance.device)
    rest = relevance - identity
    return rest * _inverse(rest.sum(-1))[..., None] + identity


def _inverse(sums: Tensor) -> Tensor:
    """1 / sums, and 0 for 0."""
    return torch.where(sums == 0, 0.0, 1 / torch.where(sums == 0, 1.0, sums))
