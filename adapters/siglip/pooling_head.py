"""Pooled gradients at the attention pooling head of SigLIP in closed form, without a graph through attention.

The head has one learned query. With Z (N, D) the patches after the final norm, its attention output is

    o = W_o [sum_n a_hn v_hn]_h + b_o,   a_h = softmax_n(<q_h, W_k z_n> / sqrt(d)),   v_n = W_v z_n + b_v,

and the embedding is o + mlp(norm(o)). Let g be d score / d o and e = W_o^T g, with e_h the part of head h.

One vector s added to all z_n moves all logits of a head by the same number, so that the weights stay and o moves by
W_o W_v s: the pooled gradient after the norm is W_v^T e.

Added to all inputs x_n of the norm, it reaches each z_n by the norm's Jacobian. With w the norm's weight, sigma_n its
deviation, xhat_n its normalised input, y_n = w xhat_n, u_n = W_v y_n, ubar_h = sum_n a_hn u_hn and
c_h = W_k^T q_h / sqrt(d), d score / d z_n is

    G_n = sum_h a_hn W_v,h^T e_h + b_hn c_h,   b_hn = a_hn <e_h, u_hn - ubar_h>

(a constant in v_n and in the logits cancels: y_n replaces z_n), and the pooled gradient

    center(w * sum_n G_n / sigma_n) - sum_n xhat_n r_n / sigma_n,   r_n = mean(y_n * G_n).

Under the `layernorm` rule sigma_n is a constant and r_n is zero. The tests compare the results with the slow path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from adapters.shared.dual_encoder import DualEncoder
from grounding.adapter.inputs import ImageInputs, Inputs, Targets
from grounding.adapter.layernorm import layernorm
from grounding.adapter.vision_cache import Features

NORM, HEAD = "vision_model.post_layernorm", "vision_model.head"
ATTENTION = f"{HEAD}.attention"
# Name of the mask (B, N) of patches that are no padding, in models whose images have different grids.
PATCH_MASK = "pixel_attention_mask"


@dataclass(frozen=True, eq=False)
class PoolingHeadShortcut:
    """The pooled gradient at the norm before the pooling head, and at the input of this norm.

    Both modules must be unmodified. `layers` are their paths, with the other modules whose outputs are read.
    """

    adapter: DualEncoder
    head: Any
    norm: Any
    layers: Mapping[str, tuple[str, ...]]

    def pooled_gradient(
        self, layer: str, inputs: Inputs, targets: Targets, outputs: Mapping[str, Tensor], rule: str | None
    ) -> Float[Tensor, "K D"]:
        """Pooled gradients of all targets, from one backward pass through the head's MLP."""
        attended = outputs[ATTENTION].detach()[:, 0]  # (B, D)
        owner = targets.image.to(attended.device)
        with torch.enable_grad():
            rows = attended[owner].requires_grad_()
            pooled = rows + self.head.mlp(layernorm(self.head.layernorm, rows, rule))
            total = self.adapter.score_embeddings(pooled, targets, slice(None)).sum()
        [gradient] = torch.autograd.grad(total, rows)
        inner = gradient @ self.head.attention.out_proj.weight  # e: (K, D)
        if layer == NORM:
            return inner @ self._matrix(2)
        found = torch.empty_like(inner)
        masks = inputs.images.tensors.get(PATCH_MASK)
        for b in owner.unique().tolist():
            mine = owner == b
            kept = None if masks is None else masks[b].bool()
            hidden, normed = (outputs[path][b].detach() for path in (layer, NORM))
            found[mine] = self._before_norm(hidden, normed, inner[mine], kept, rule)
        return found

    def features(self, layer: str, output: Tensor, images: ImageInputs) -> Features | None:
        """The image embeddings from the last block's output; None for the norm, which attention follows."""
        if layer == NORM:
            return None
        mask = images.tensors.get(PATCH_MASK)
        return self.head(self.norm(output), *([] if mask is None else [mask]))

    def _before_norm(
        self,
        hidden: Float[Tensor, "N D"],
        normed: Float[Tensor, "N D"],
        inner: Float[Tensor, "k D"],
        kept: Bool[Tensor, "N"] | None,
        rule: str | None,
    ) -> Float[Tensor, "k D"]:
        """The pooled gradients at the input of the norm, for the targets of one image."""
        if kept is not None:
            hidden, normed = hidden[kept], normed[kept]
        # Squares of half-precision features overflow.
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        inverse = (centred.square().mean(-1) + self.norm.eps).rsqrt()  # 1 / sigma: (N,)
        unit, inverse = (centred * inverse[:, None]).to(hidden.dtype), inverse.to(hidden.dtype)
        scaled = normed - self.norm.bias  # y
        directions = self._query_directions()  # c: (H, D)
        logits = directions @ scaled.T
        weights = logits.softmax(-1)  # a: (H, N)
        values = self._heads(scaled @ self._matrix(2).T)  # u: (H, N, d)
        read = weights * einsum(self._heads(inner), values, "h k d, h n d -> k h n")  # a <e, u>
        changes = read - weights * read.sum(-1, keepdim=True)  # b
        spread = weights @ inverse  # (H,)
        through_values = rearrange(self._heads(inner) * spread[:, None, None], "h k d -> k (h d)") @ self._matrix(2)
        through_keys = einsum(changes, inverse, directions, "k h n, n, h d -> k d")
        pooled = self.norm.weight * (through_values + through_keys)
        pooled = pooled - pooled.mean(-1, keepdim=True)
        if rule is not None:
            return pooled
        # <y_n, W_v,h^T e_h> is <u_hn, e_h>.
        along = read.sum(1) + einsum(changes, logits, "k h n, h n -> k n")
        along = along / hidden.shape[-1]  # r: (k, N)
        return pooled - (along * inverse) @ unit

    def _query_directions(self) -> Float[Tensor, "H D"]:
        """For each head the direction in which a token's logit grows: c_h."""
        attention = self.head.attention
        bias = attention.in_proj_bias.chunk(3)[0]
        query = self._heads(self.head.probe[0] @ self._matrix(0).T + bias)[:, 0]  # (H, d)
        keys = rearrange(self._matrix(1), "(h d) e -> h d e", h=attention.num_heads)
        return einsum(query * query.shape[-1] ** -0.5, keys, "h d, h d e -> h e")

    def _matrix(self, index: int) -> Float[Tensor, "D D"]:
        """The projection of the query (0), of keys (1) or values (2)."""
        return self.head.attention.in_proj_weight.detach().chunk(3)[index]

    def _heads(self, rows: Float[Tensor, "n D"]) -> Float[Tensor, "H n d"]:
        return rearrange(rows, "n (h d) -> h n d", h=self.head.attention.num_heads)
