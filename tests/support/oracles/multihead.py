"""Attention of `nn.MultiheadAttention` by its definition: loops over samples, heads and queries, in float64."""

import torch


def logits(module, query, key, forbidden, added):
    """(B, H, L, S) of batch-first inputs; `forbidden` (B, H, L, S) bool, `added` (B, H, L, S) float."""
    size = module.embed_dim // module.num_heads
    q, k = (projected(module, x, i) for i, x in enumerate((query, key)))
    found = torch.empty(len(query), module.num_heads, query.shape[1], key.shape[1], dtype=query.dtype)
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in found.shape)).tolist():
        own = slice(h * size, (h + 1) * size)
        found[b, h, i, j] = (q[b, i, own] * k[b, j, own]).sum() / size**0.5 + added[b, h, i, j]
    return found.masked_fill(forbidden, -torch.inf)


def output(module, weights, value):
    """(B, L, D) from weights (B, H, L, S): per head the weighted mean of the values, joined, projected."""
    v = projected(module, value, 2)
    size = module.embed_dim // module.num_heads
    heads = [
        torch.einsum("bls,bsd->bld", weights[:, h], v[..., h * size : (h + 1) * size]) for h in range(module.num_heads)
    ]
    found = torch.cat(heads, -1) @ module.out_proj.weight.T
    return found if module.out_proj.bias is None else found + module.out_proj.bias


def projected(module, x, index):
    """Queries (0), keys (1) or values (2) of all heads side by side."""
    width = module.embed_dim
    own = slice(index * width, (index + 1) * width)
    separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)[index]
    matrix = module.in_proj_weight[own] if separate is None else separate
    return x @ matrix.T if module.in_proj_bias is None else x @ matrix.T + module.in_proj_bias[own]
