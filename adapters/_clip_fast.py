"""CLIP from the last block onwards, for one shift per target: what Grad-CAM needs, at the price of one query row.

Only the CLS row of the last block is read, so only that query is computed; a shift of all patches enters through the
keys and values alone. With X the input of the attention, a shift d of its patches moves every key by W_k d, so the
logits by <q, W_k d>, and the read-out by (sum of patch weights) W_v d. A shift of the block's input H passes the layer
norm first; to first order (all that a gradient at zero sees) patch p then moves by

    (g * (d - mean d) - r_p xhat_p g) / sigma_p,   r_p = <xhat_p, d> / D,

xhat_p the normalised patch, g the norm's weight. Under the `layernorm` rule sigma counts as constant and r_p is zero.
Held against the slow way by the contract tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapters._plain import is_plain


@dataclass(frozen=True, eq=False)
class LastBlock:
    """The last vision block of a CLIP and what follows it. `rule` is None or "layernorm"."""

    model: Any  # a CLIPModel; its parts have no static types
    rule: str | None = None

    @property
    def block(self) -> Any:
        """The block itself."""
        return self.model.vision_model.encoder.layers[-1]

    @property
    def is_plain(self) -> bool:
        """Whether the parts that are recomputed here are CLIP's own, with nothing attached to them."""
        return all(
            is_plain(part)
            for part in (self.block, self.model.vision_model.post_layernorm, self.model.visual_projection)
        )

    def embed(
        self, hidden: Float[Tensor, "N D"], shift: Float[Tensor, "k D"], *, before_norm: bool
    ) -> Float[Tensor, "k E"]:
        """Normalised image embeddings of one picture for k shifts of all patches of the block's input (`before_norm`)
        or of its attention's input; `hidden` is the block's input. Right to first order in the shifts."""
        block, attention = self.block, self.block.self_attn
        inside = block.layer_norm1(hidden)  # (N, D)
        query = self._heads(attention.q_proj(inside[:1]))[:, 0] * attention.scale  # (H, d)
        keys, values = self._heads(attention.k_proj(inside)), self._heads(attention.v_proj(inside))  # (H, N, d)
        patch = torch.ones(len(hidden), dtype=hidden.dtype, device=hidden.device)
        patch[0] = 0
        if before_norm:
            patch, moved = self._through_norm(hidden, inside, shift, patch)
        else:
            moved = _Moved(shift, None, inside)
        logits = einsum(query, keys, "h d, h n d -> h n")[None] + self._key_shift(query, moved) * patch
        weights = logits.softmax(-1)  # (k, H, N)
        read = einsum(weights, values, "k h n, h n d -> k h d") + self._value_shift(weights.detach() * patch, moved)
        row = hidden[0] + attention.out_proj(rearrange(read, "k h d -> k (h d)"))
        row = row + block.mlp(self._norm(block.layer_norm2, row))
        pooled = self._norm(self.model.vision_model.post_layernorm, row)
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def _through_norm(
        self, hidden: Tensor, inside: Tensor, shift: Tensor, patch: Tensor
    ) -> tuple[Float[Tensor, "N"], _Moved]:
        """The shift as it comes out of the first layer norm: the patch mask over sigma, and the moved part."""
        norm = self.block.layer_norm1
        # Squares of half-precision features overflow.
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1) + norm.eps).sqrt()  # (N,)
        centred, deviation = centred.to(hidden.dtype), deviation.to(hidden.dtype)
        through = norm.weight * (shift - shift.mean(-1, keepdim=True))
        along = None
        if self.rule is None:
            along = (centred / deviation[:, None]) @ shift.T / shift.shape[-1]  # r: (N, k)
        return patch / deviation, _Moved(through, along, inside - norm.bias)

    def _key_shift(self, query: Tensor, moved: _Moved) -> Float[Tensor, "k H N"]:
        weight = self.block.self_attn.k_proj.weight
        logits = einsum(query, self._heads(moved.shift @ weight.T), "h d, h k d -> k h")[..., None]
        if moved.along is None:
            return logits
        along = self._heads(moved.direction @ weight.T)  # (H, N, d)
        return logits - einsum(query, along, moved.along, "h d, h n d, n k -> k h n")

    def _value_shift(self, weights: Float[Tensor, "k H N"], moved: _Moved) -> Float[Tensor, "k H d"]:
        weight = self.block.self_attn.v_proj.weight
        read = einsum(weights.sum(-1), self._heads(moved.shift @ weight.T), "k h, h k d -> k h d")
        if moved.along is None:
            return read
        along = self._heads(moved.direction @ weight.T)
        return read - einsum(weights, moved.along, along, "k h n, n k, h n d -> k h d")

    def _heads(self, rows: Float[Tensor, "n D"]) -> Float[Tensor, "H n d"]:
        return rearrange(rows, "n (h d) -> h n d", h=self.block.self_attn.num_heads)

    def _norm(self, norm: nn.LayerNorm, x: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        if self.rule is None:
            return norm(x)
        centred = x - x.mean(-1, keepdim=True)
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        deviation = (wide.var(-1, correction=0, keepdim=True) + norm.eps).sqrt().to(x.dtype)
        return centred / deviation * norm.weight + norm.bias


@dataclass(frozen=True, eq=False)
class _Moved:
    """A shift behind the first norm: `shift` (k, D) for every patch, less `along` (N, k) x `direction` (N, D)."""

    shift: Tensor
    along: Tensor | None
    direction: Tensor
