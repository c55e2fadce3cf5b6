"""Grad-ECLIP: the attention gradient of the pooling token, weighted by how its query matches the keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from grounding.adapter.structure import Hop, ModelStructure
from grounding.methods.attention import LAST
from grounding.methods.base import NoAttentionError, Reading, method, whole_path
from grounding.methods.trace import Trace


def _hop(structure: ModelStructure) -> Hop:
    """The first hop, from one token. Raises NoAttentionError if the score does not read a single token of the image."""
    first = whole_path(structure)[0]
    one = first.kind == "pool" or (first.kind == "self" and structure.pooling == "cls")
    if not one or structure.stack(first.stack).items == "sequence":
        raise NoAttentionError("one pooling token's attention")
    return first


def _reads(_options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    return {_hop(structure).stack: Reading(LAST, gradient=True)}


@method("Grad-ECLIP", {"attention_gradient", "query_key"}, signed=True, reads=_reads)
def grad_eclip(trace: Trace, *, form: Literal["model", "heads", "plain"] = "model") -> Float[Tensor, "k rows columns"]:
    """Grad-ECLIP: lambda_p sum_c g_c v_pc at the attention that the pooling reads, g = d score / d (its output before
    the output projection), v the values, lambda_p the cosine of the pooling token's query and key p, scaled to 0..1
    over the patches (1 where all are equal).

    Source: Zhao et al. 2024, arXiv:2502.18816, eq. 7-8.
    Departures: computed as lambda_p sum_h G_hp, G the gradient of the attention weights in the pooling token's row: the
    sum of g_c v_pc over the channels of a head is G_hp exactly. The published code runs this attention again with a
    single head of full width, which is another model with another score; here the heads are the model's own. `form`:
    model, one cosine over the width of all heads; heads, sum_h lambda_hp G_hp with a cosine per head; plain, without
    lambda. Query and key are those of the attention itself (published code: behind the output projection). The final
    ReLU is left to the view (option `threshold`).
    Range: unbounded. Sign: signed; positive values raise the score.
    Cost: one backward pass per target, down to that attention.
    """
    hop = _hop(trace.structure)
    [gradient] = trace.attention_gradients(hop.stack, LAST)
    [(query, key)] = trace.queries_and_keys(hop.stack, LAST)
    row = trace.start().argmax(1).to(gradient.device)
    owner = trace.owner(hop.stack).to(gradient.device)
    heads = gradient[owner, :, row].movedim(1, 0)  # (H, k, S)
    if form == "plain":
        return trace.patches(heads.sum(0), hop)
    asked, keys = query[owner, :, row], key[owner]  # (k, H, d), (k, H, S, d)
    if form == "model":
        weights = _matches(asked.flatten(1), keys.movedim(1, 2).flatten(2))
        return _scaled(trace.patches(weights, hop)) * trace.patches(heads.sum(0), hop)
    own = zip(heads, asked.unbind(1), keys.unbind(1), strict=True)
    return torch.stack([_scaled(trace.patches(_matches(q, k), hop)) * trace.patches(g, hop) for g, q, k in own]).sum(0)


def _matches(query: Float[Tensor, "k d"], keys: Float[Tensor, "k S d"]) -> Float[Tensor, "k S"]:
    """The cosines of a query and the keys."""
    products = torch.einsum("kd,ksd->ks", query, keys)
    return products / (query.norm(dim=-1, keepdim=True) * keys.norm(dim=-1))


def _scaled(maps: Float[Tensor, "k rows columns"]) -> Float[Tensor, "k rows columns"]:
    """To 0..1 over the patches; where all are equal, 1."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high == low, 1.0, (maps - low) / torch.where(high == low, 1.0, high - low))
