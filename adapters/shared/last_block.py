"""The last attention block from one row per target onwards, with one shift per target of all patches: what Grad-CAM
needs, at the price of a few query rows.

Only some rows of the last block are read (a CLS, a text token), so only those queries are computed; a shift of all
patches enters through the keys and values alone. With X the input of the attention, a shift d of its patches moves
every patch's key by W_k d, so its logit by <q, W_k d>, and the read-out by (sum of patch weights) W_v d. A shift of the
block's input H passes the layer norm first; to first order (all that a gradient at zero sees) patch p then moves by

    (g * (d - mean d) - r_p xhat_p g) / sigma_p,   r_p = <xhat_p, d> / D,

xhat_p the normalised patch, g the norm's weight. Under the `layernorm` rule sigma counts as constant and r_p is zero.
Held against the slow way by the contract tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from adapters.shared.unmodified import is_unmodified


@dataclass(frozen=True, eq=False)
class LastBlock:
    """A pre-norm block by its parts, whatever a family calls them: two norms, four projections, the MLP.

    `parts` is all that is recomputed, of the block and behind it: what stands there may be anything (a user's own
    wrapper of a projection), and only where all of it `is_unmodified` is the rest used. `rule` is None or "layernorm".
    """

    before: Any
    query: Any
    key: Any
    value: Any
    out: Any
    after: Any
    mlp: Callable[[Tensor], Tensor]
    heads: int
    parts: Sequence[nn.Module] = ()
    rule: str | None = None

    @property
    def is_unmodified(self) -> bool:
        """Whether the parts that are recomputed are the family's own, with nothing attached to them."""
        return all(is_unmodified(part) for part in self.parts)

    def rows(
        self,
        hidden: Float[Tensor, "N D"],
        places: Int[Tensor, "k"],
        shift: Float[Tensor, "k D"],
        patch: Float[Tensor, "N"],
        *,
        before_norm: bool,
        kept: Bool[Tensor, "N"] | None = None,
    ) -> Float[Tensor, "k D"]:
        """The block's output at the row `places[k]`, with shift k added to all patches (`patch`: 1 there, else 0) of
        the block's input (`before_norm`) or of its attention's input; `hidden` is the block's input, `kept` the tokens
        that are no padding. Right to first order in the shifts, at rows that are no patches."""
        inside = self.before(hidden)  # (N, D)
        query = self._heads(self.query(inside[places])) * (self.query.out_features // self.heads) ** -0.5  # (H, k, d)
        keys, values = self._heads(self.key(inside)), self._heads(self.value(inside))  # (H, N, d)
        if before_norm:
            patch, moved = self._through_norm(hidden, inside, shift, patch)
        else:
            moved = _Moved(shift, None, inside)
        logits = einsum(query, keys, "h k d, h n d -> k h n") + self._key_shift(query, moved) * patch
        if kept is not None:
            logits = logits.masked_fill(~kept, -torch.inf)
        weights = logits.softmax(-1)  # (k, H, N)
        read = einsum(weights, values, "k h n, h n d -> k h d") + self._value_shift(weights.detach() * patch, moved)
        row = hidden[places] + self.out(rearrange(read, "k h d -> k (h d)"))
        return row + self.mlp(self.norm(self.after, row))

    def norm(self, norm: nn.LayerNorm, x: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        """A layer norm under the rule."""
        if self.rule is None:
            return norm(x)
        centred = x - x.mean(-1, keepdim=True)
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        deviation = (wide.var(-1, correction=0, keepdim=True) + norm.eps).sqrt().to(x.dtype)
        return centred / deviation * norm.weight + norm.bias

    def _through_norm(
        self, hidden: Tensor, inside: Tensor, shift: Tensor, patch: Tensor
    ) -> tuple[Float[Tensor, "N"], _Moved]:
        """The shift as it comes out of the first layer norm: the patch mask over sigma, and the moved part."""
        norm = self.before
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

    def _key_shift(self, query: Float[Tensor, "H k d"], moved: _Moved) -> Float[Tensor, "k H N"]:
        weight = self.key.weight
        logits = einsum(query, self._heads(moved.shift @ weight.T), "h k d, h k d -> k h")[..., None]
        if moved.along is None:
            return logits
        along = self._heads(moved.direction @ weight.T)  # (H, N, d)
        return logits - einsum(query, along, "h k d, h n d -> k h n") * moved.along.T[:, None]

    def _value_shift(self, weights: Float[Tensor, "k H N"], moved: _Moved) -> Float[Tensor, "k H d"]:
        weight = self.value.weight
        read = einsum(weights.sum(-1), self._heads(moved.shift @ weight.T), "k h, h k d -> k h d")
        if moved.along is None:
            return read
        along = self._heads(moved.direction @ weight.T)
        return read - einsum(weights * moved.along.T[:, None], along, "k h n, h n d -> k h d")

    def _heads(self, rows: Float[Tensor, "n D"]) -> Float[Tensor, "H n d"]:
        return rearrange(rows, "n (h d) -> h n d", h=self.heads)


@dataclass(frozen=True, eq=False)
class _Moved:
    """A shift behind the first norm: `shift` (k, D) for every patch, less `along` (N, k) x `direction` (N, D)."""

    shift: Tensor
    along: Tensor | None
    direction: Tensor
