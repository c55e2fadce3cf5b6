"""Pooled gradients at the last attention block, at the cost of a few query rows.

A score depends on a few rows of the last block only (a CLS, a text token), so only those queries are computed; a shift
of all patches enters through the keys and values. With X the input of the attention, a shift d of its patches moves
every patch's key by W_k d, so its logit by <q, W_k d>, and the attention output by (sum of patch weights) W_v d. A
shift of the block's input H passes the layer norm first; to first order (exact for a gradient at zero) patch p moves by

    (g * (d - mean d) - r_p xhat_p g) / sigma_p,   r_p = <xhat_p, d> / D,

xhat_p the normalised patch, g the norm's weight. Under the `layernorm` rule sigma is a constant and r_p is zero.
The contract tests compare the results with the slow path.
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
from grounding.adapter.layernorm import layernorm


@dataclass(frozen=True, eq=False)
class LastBlock:
    """The parts of a pre-norm attention block: two norms, four projections, the MLP.

    `parts` are all modules that are recomputed, in the block and after it. They may be anything (a user's own wrapper
    of a projection): use the block only if `is_unmodified`. `rule` is None or "layernorm".
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
        """Whether all recomputed modules are of the library's own classes, without hooks or wrappers."""
        return all(is_unmodified(part) for part in self.parts)

    def rows(
        self,
        hidden: Float[Tensor, "N D"],
        positions: Int[Tensor, "k"],
        shift: Float[Tensor, "k D"],
        patch: Float[Tensor, "N"],
        *,
        before_norm: bool,
        kept: Bool[Tensor, "N"] | None = None,
    ) -> Float[Tensor, "k D"]:
        """Output rows of the block at `positions`, with shift i added to all patches for row i.

        `hidden` is the block's input, `patch` is 1 at patches and 0 elsewhere, `kept` marks tokens that are no padding.
        The shift is added to the block's input (`before_norm`) or to its attention's input. Right to first order in the
        shifts, at rows that are no patches.
        """
        inside = self.before(hidden)  # (N, D)
        query = self._heads(self.query(inside[positions]))  # (H, k, d)
        query = query * (self.query.out_features // self.heads) ** -0.5
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
        row = hidden[positions] + self.out(rearrange(read, "k h d -> k (h d)"))
        return row + self.mlp(self.norm(self.after, row))

    def pooled_gradients(
        self,
        hidden: Float[Tensor, "R N D"],
        sequence: Int[Tensor, "k"],
        positions: Int[Tensor, "k"],
        patch: Float[Tensor, "N"],
        scores: Callable[[Tensor, Tensor], Tensor],
        *,
        before_norm: bool,
        kept: Bool[Tensor, "k N"] | None = None,
    ) -> Float[Tensor, "k D"]:
        """d score / d (one vector added to all patches) for k scores, each computed from one output row of the block.

        Score i reads row `positions[i]` of sequence `sequence[i]`, whose input to the block is `hidden[sequence[i]]`.
        `scores(rows, mine)` computes the scores (m,) selected by the mask `mine` (k,) from their rows (m, D);
        `patch`, `before_norm` and `kept` are as in `rows`. One graph and one backward pass per sequence.
        """
        found = hidden.new_zeros(len(sequence), hidden.shape[-1])
        for r in sequence.unique().tolist():
            mine = sequence == r
            own = None if kept is None else kept[mine][0]
            with torch.enable_grad():
                shift = hidden.new_zeros(int(mine.sum()), hidden.shape[-1]).requires_grad_()
                rows = self.rows(hidden[r], positions[mine], shift, patch, before_norm=before_norm, kept=own)
                total = scores(rows, mine).sum()
            [found[mine]] = torch.autograd.grad(total, shift)
        return found

    def norm(self, norm: nn.LayerNorm, x: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        """The output of a LayerNorm, differentiable under the backward rule of this block."""
        return layernorm(norm, x, self.rule)

    def _through_norm(
        self, hidden: Tensor, inside: Tensor, shift: Tensor, patch: Tensor
    ) -> tuple[Float[Tensor, "N"], _Moved]:
        """The shift after the first layer norm: the patch mask over sigma, and the moved part."""
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


def patch_mask(hidden: Float[Tensor, "R N D"], first: int, count: int) -> Float[Tensor, "N"]:
    """1 at the `count` patches of a sequence, starting at position `first`, 0 at its other tokens."""
    patch = hidden.new_zeros(hidden.shape[1])
    patch[first : first + count] = 1
    return patch


@dataclass(frozen=True, eq=False)
class _Moved:
    """A shift after the first norm: `shift` (k, D) at every patch, minus `along` (N, k) x `direction` (N, D)."""

    shift: Tensor
    along: Tensor | None
    direction: Tensor
