"""Leave-one-out text embeddings of CLIP and MetaCLIP 2 at half the cost, by sharing the causal prefix of a caption.

Masking a token changes nothing before it in any block, because a query attends to no later key. So each variant
recomputes only the tokens after its first masked one, and takes the keys and values of the others from the whole
caption. No query attends to a masked token. Exact up to rounding for a causal text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import MetaClip2Model


def embed_left_out(
    model: Any,
    ids: Int[Tensor, "T L"],
    mask: Int[Tensor, "T L"],
    texts: Sequence[int],
    masked: Sequence[Sequence[int]],
) -> Float[Tensor, "V E"]:
    """Normalised embeddings of V variants, by a CLIPModel or MetaClip2Model: text `texts[v]` with the tokens at
    `masked[v]` masked."""
    end = end_positions(model, ids)
    kept = torch.stack([_without(mask[t].bool(), positions) for t, positions in zip(texts, masked, strict=True)])
    variants = _Variants.of(kept, torch.tensor(texts, device=ids.device), [min(p) for p in masked], end)
    whole = model.text_model.embeddings(input_ids=ids)  # (T, L, D)
    packed = whole[variants.text[variants.owner], variants.position]  # (M, D)
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    whole_sees = causal & mask.bool()[:, None, None, :]
    variant_sees = causal & kept[:, None, None, :]
    for block in model.text_model.encoder.layers:
        keys, values, whole = _whole_block(block, whole, whole_sees)
        packed = _variant_block(block, packed, keys, values, variants, variant_sees)
    last = packed[variants.last]
    pooled = model.text_model.final_layer_norm(last)
    return F.normalize(model.text_projection(pooled), dim=-1)


def end_positions(model: Any, ids: Int[Tensor, "T L"]) -> Int[Tensor, "T"]:
    """Position at which the model reads each text: its first end token; in old configurations of CLIP (end token 2) the
    largest id."""
    end_token = model.text_model.eos_token_id
    # The end token of MetaCLIP 2 has the id 2.
    by_largest = end_token == 2 and not isinstance(model, MetaClip2Model)
    return ids.argmax(-1) if by_largest else (ids == end_token).int().argmax(-1)


@dataclass(frozen=True, eq=False)
class _Variants:
    """M tokens to recompute, packed: `owner` (M,) is the variant and `position` (M,) the position of each; `text` (V,)
    is the text of each variant, `last` (V,) the index of its end token among the M."""

    owner: Tensor
    position: Tensor
    text: Tensor
    last: Tensor

    @classmethod
    def of(cls, kept: Bool[Tensor, "V L"], text: Tensor, first: Sequence[int], end: Tensor) -> _Variants:
        positions = torch.arange(kept.shape[1], device=kept.device)
        changed = positions[None] > torch.tensor(first, device=kept.device)[:, None]
        owner, position = (kept & changed & (positions[None] <= end[text][:, None])).nonzero(as_tuple=True)
        return cls(owner, position, text, (position == end[text][owner]).nonzero()[:, 0])


def _without(mask: Tensor, positions: Sequence[int]) -> Tensor:
    mask = mask.clone()
    mask[list(positions)] = False
    return mask


def _whole_block(block: Any, x: Tensor, sees: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (T, H, L, d) of the whole captions in one block, and the block's output (T, L, D)."""
    attention = block.self_attn
    inside = block.layer_norm1(x)
    query, keys, values = (
        rearrange(project(inside), "t l (h d) -> t h l d", h=attention.num_heads)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    read = F.scaled_dot_product_attention(query, keys, values, attn_mask=sees, scale=attention.scale)
    return keys, values, _finish(block, x, rearrange(read, "t h l d -> t l (h d)"))


def _variant_block(
    block: Any, packed: Tensor, keys: Tensor, values: Tensor, variants: _Variants, sees: Tensor
) -> Tensor:
    """Output (M, D) of one block for the packed tokens: linear layers packed, attention padded to (V, H, L, d)."""
    attention = block.self_attn
    inside = block.layer_norm1(packed)
    query, key, value = (
        rearrange(project(inside), "m (h d) -> m h d", h=attention.num_heads)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    keys, values = keys[variants.text], values[variants.text]  # copies, one per variant
    queries = torch.zeros_like(keys)
    at = (variants.owner, slice(None), variants.position)
    queries[at], keys[at], values[at] = query, key, value
    read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=sees, scale=attention.scale)
    return _finish(block, packed, rearrange(read[at], "m h d -> m (h d)"))


def _finish(block: Any, x: Tensor, read: Tensor) -> Tensor:
    x = x + block.self_attn.out_proj(read)
    return x + block.mlp(block.layer_norm2(x))
