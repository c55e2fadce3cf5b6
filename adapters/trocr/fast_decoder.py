"""Exact pooled gradients of all tokens of a TrOCR text from one decoder graph, at the cost of a few decoder passes.

Grad-CAM needs d logit / d (one shift added to all patches). The decoder depends on the encoder only through the keys
and values of its cross-attention, so a shift d of all patches adds W_k d to every patch's key and W_v d to its value:
with u = W_k d and v = W_v d per head, m the mask of patches, q a query and P the attention weights,

    scores  += (q u) m        output += (P m) v

and a backward pass needs a gradient at u and v (H, d) per block, not at all N keys and values.
A layer before the encoder's final LayerNorm is linearised through it (exact for a gradient at zero): patch i moves by

    (g * (d - mean d) - r_i xhat_i g) / sigma_i,    r_i = <xhat_i, d> / D,

so that m becomes m / sigma and a third leaf r (N,) joins u and v: scores -= (q Khat_i) r_i m_i / sigma_i with Khat_i
the key without its bias terms, and likewise for the values. Under the `layernorm` rule sigma is a constant and there
is no r.

Decoder rows are computed in segments, with the keys and values of earlier segments on the graph: the backward pass of a
token runs through no later segment. The tokens of a segment share one backward pass, batched over their directions
(`torch.func.vmap`), in which `_ReadBack` stacks them as rows of one product with the image's keys or values. There
sum_i P_i dP_i is the gradient times the attention output, and q Khat_i is a score minus a constant: no product with the
Khat is needed. The gradient starts at the decoder's last state with the token's own row of the output matrix, so no
(rows x vocabulary) gradient is computed. The contract tests compare the result with the slow path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import TrOCRForCausalLM

from adapters.shared.unmodified import is_unmodified
from grounding.adapter.layernorm import layernorm

# Rows of the decoder per segment: more lengthen each backward pass, fewer need more of them.
SEGMENT = 10


@dataclass(frozen=True, eq=False)
class _Memory:
    """The image in one block: keys and values (H, N, d), m (N,), and the part of keys and values that r does not change
    (H, 1, d); None without r."""

    keys: Tensor
    values: Tensor
    reach: Tensor
    still: tuple[Tensor, Tensor] | None


class _Read(torch.autograd.Function):
    """Attention of queries (H, q, d) on the image, with gradients also at the shifts u, v and r, which are zero."""

    @staticmethod
    def forward(query: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        scores = query @ others[-1].keys.mT
        weights = scores.softmax(-1)
        return weights @ others[-1].values, scores, weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.recorded = inputs[0].detach(), *(t.detach() for t in outputs), inputs[-1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        query, u, v, *r = _ReadBack.apply(gradient, *ctx.recorded)
        return query, u, v, r[0] if r else None, None


class _ReadBack(torch.autograd.Function):
    """The gradients of `_Read`; only the incoming gradient is batched, and its batch is stacked with the query rows."""

    @staticmethod
    def forward(*_: Any) -> tuple[Tensor, ...]:
        raise NotImplementedError("only ever batched")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is differentiated twice."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, gradient: Tensor, *recorded: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        query, read, scores, weights, memory = recorded
        size = {"b": info.batch_size}
        begin = rearrange(gradient.movedim(in_dims[0], 0), "b h q d -> h (b q) d")
        towards = rearrange(begin @ memory.values.mT, "h (b q) n -> h b q n", **size)  # at the weights
        begin = rearrange(begin, "h (b q) d -> h b q d", **size)
        mean = (begin * read[:, None]).sum(-1)  # of `towards`, by the weights
        along: list[Tensor] = []
        if memory.still is not None:
            moved = scores - query @ memory.still[0].mT  # q Khat
            constant = einsum(begin, memory.still[1], "h b q d, h one d -> h b q")
            both = (towards * (weights * (moved + 1))[:, None]).sum((0, 2))
            both = both - einsum(mean, weights * moved, "h b q, h q n -> b n")
            along = [(einsum(constant, weights, "h b q, h q n -> b n") - both) * memory.reach]
        towards = towards.sub_(mean[..., None]).mul_(weights[:, None])  # at the scores
        found = (
            rearrange(rearrange(towards, "h b q n -> h (b q) n") @ memory.keys, "h (b q) d -> b h q d", **size),
            einsum(towards @ memory.reach, query, "h b q, h q d -> b h d")[:, :, None],
            einsum(begin, weights @ memory.reach, "h b q d, h q -> b h d")[:, :, None],
            *along,
        )
        return found, (0,) * len(found)


@dataclass(frozen=True, eq=False)
class _Image:
    """The encoder states that the decoder reads, and how a shift at the layer changes them.

    `states` (N, C) are the encoder's, `reach` (N,) is m (divided by sigma if a norm is between), `still` (1, C) is the
    part of each state that r does not change (None without r), `back` maps gradients at the shifted states and at r to
    a gradient at the layer.
    """

    states: Tensor
    reach: Tensor
    still: Tensor | None
    back: Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class FastDecoder:
    """The decoder for one text of one image. `features` (N, D) are the layer's output, the first `prefix` no patches.

    `before_norm`: the layer is the last encoder block, not the norm after it. `rule` is None or "layernorm".
    """

    model: Any  # a VisionEncoderDecoderModel; its parts have no static types
    features: Float[Tensor, "N D"]
    prefix: int
    before_norm: bool
    rule: str | None = None
    _own_keys: list[list[Tensor]] = field(default_factory=list)
    _own_values: list[list[Tensor]] = field(default_factory=list)

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the decoder is a `TrOCRForCausalLM`, and all modules that are recomputed here are unmodified."""
        parts = [model.decoder, model.encoder.layernorm, getattr(model, "enc_to_dec_proj", nn.Identity())]
        own = isinstance(model.decoder, TrOCRForCausalLM) and isinstance(model.encoder.layernorm, nn.LayerNorm)
        return own and all(is_unmodified(part) for part in parts if not isinstance(part, nn.Identity))

    def pooled_gradients(
        self, ids: Int[Tensor, "L"], pairs: Int[Tensor, "n 2"], log_probability: bool = False
    ) -> Float[Tensor, "n D"]:
        """d logit / d (one vector added to all patches), for n pairs of (row, token id) of the decoder's inputs `ids`.

        With `log_probability`: of the token's log-probability.
        """
        made = self.features.new_zeros(len(pairs), self.features.shape[-1])
        image = self._image
        with torch.enable_grad():
            leaves = self._leaves()
            hidden = self._embed(ids)
            self._own_keys.extend([] for _ in self._blocks)
            self._own_values.extend([] for _ in self._blocks)
            for first in range(0, int(pairs[:, 0].max()) + 1, SEGMENT):
                last = self._segment(hidden[first : first + SEGMENT], first, leaves)
                mine = ((pairs[:, 0] >= first) & (pairs[:, 0] < first + SEGMENT)).nonzero().flatten()
                if len(mine):
                    begin = self._directions(last.detach(), pairs[mine] - pairs.new_tensor([first, 0]), log_probability)
                    made[mine] = image.back(*self._gather(_batched(last, leaves, begin)))
        return made

    # ------------------------------------------------------------------ the image

    @cached_property
    def _image(self) -> _Image:
        patch = torch.ones(len(self.features), dtype=self.features.dtype, device=self.features.device)
        patch[: self.prefix] = 0
        norm = self.model.encoder.layernorm
        if not self.before_norm:
            return _Image(self.features, patch, None, lambda states, _along: states)
        # Squares of half-precision features overflow.
        wide = self.features.to(torch.promote_types(self.features.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1) + norm.eps).sqrt()
        normal = (centred / deviation[:, None]).to(self.features.dtype)

        def back(states: Tensor, along: Tensor | None) -> Tensor:
            moved = states * norm.weight
            moved = moved - moved.mean(-1, keepdim=True)
            return moved if along is None else moved + along @ normal / normal.shape[-1]

        still = norm.bias[None] if self.rule is None else None
        return _Image(norm(self.features), patch / deviation.to(patch.dtype), still, back)

    @property
    def _project(self) -> Any:
        """Projection from encoder to decoder width, None if they are the same."""
        return getattr(self.model, "enc_to_dec_proj", None)

    @cached_property
    def _cross(self) -> list[_Memory]:
        """The image's keys and values in each block."""
        image, made = self._image, []
        for block in self._blocks:
            still = None if image.still is None else self._both(block.encoder_attn, image.still)
            made.append(_Memory(*self._both(block.encoder_attn, image.states), image.reach, still))
        return made

    def _both(self, attention: Any, states: Float[Tensor, "n D"]) -> tuple[Tensor, Tensor]:
        """Keys and values (H, n, d) of encoder states."""
        states = states if self._project is None else self._project(states)
        return self._heads(attention, attention.k_proj(states)), self._heads(attention, attention.v_proj(states))

    def _leaves(self) -> list[Tensor]:
        """Leaves of the backward passes: zero shifts u of each block, then v of each, and r if a norm is between."""
        shapes = [self._cross[0].keys[:, :1].shape] * 2 * len(self._blocks)
        shapes += [] if self._image.still is None else [self._image.reach.shape]
        return [self.features.new_zeros(shape).requires_grad_() for shape in shapes]

    def _gather(self, gradients: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Convert gradients (n, ...) at the leaves to those at the shifted encoder states (n, D) and at r (n, N)."""
        count = len(self._blocks)
        states = gradients[0].new_zeros(())
        for block, keys, values in zip(self._blocks, gradients[:count], gradients[count : 2 * count], strict=True):
            for part, moved in ((block.encoder_attn.k_proj, keys), (block.encoder_attn.v_proj, values)):
                states = states + rearrange(moved, "n h 1 d -> n (h d)") @ part.weight
        states = states if self._project is None else states @ self._project.weight
        return states, None if self._image.still is None else gradients[-1]

    # ------------------------------------------------------------------ the decoder, row by row

    @property
    def _blocks(self) -> Any:
        return self.model.decoder.model.decoder.layers

    def _embed(self, ids: Int[Tensor, "L"]) -> Float[Tensor, "L C"]:
        decoder = self.model.decoder.model.decoder
        with torch.no_grad():
            hidden = decoder.embed_tokens(ids[None]) + decoder.embed_positions(ids[None], past_key_values_length=0)
            return (hidden if decoder.layernorm_embedding is None else decoder.layernorm_embedding(hidden))[0]

    def _segment(self, hidden: Float[Tensor, "q C"], first: int, leaves: list[Tensor]) -> Float[Tensor, "q C"]:
        """Last decoder states of the rows from `first` on, with the keys and values of earlier segments."""
        rows = torch.arange(first, first + len(hidden), device=hidden.device)
        for number, block in enumerate(self._blocks):
            hidden = layernorm(block.self_attn_layer_norm, hidden + self._among(number, hidden, rows), self.rule)
            hidden = layernorm(block.encoder_attn_layer_norm, hidden + self._across(number, hidden, leaves), self.rule)
            hidden = layernorm(
                block.final_layer_norm, hidden + block.fc2(block.activation_fn(block.fc1(hidden))), self.rule
            )
        return hidden

    def _among(self, number: int, hidden: Tensor, rows: Tensor) -> Tensor:
        """Causal self-attention of these rows."""
        attention = self._blocks[number].self_attn
        query = self._heads(attention, attention.q_proj(hidden) * attention.scaling)
        self._own_keys[number].append(self._heads(attention, attention.k_proj(hidden)))
        self._own_values[number].append(self._heads(attention, attention.v_proj(hidden)))
        keys, values = torch.cat(self._own_keys[number], 1), torch.cat(self._own_values[number], 1)
        later = torch.arange(keys.shape[1], device=rows.device) > rows[:, None]
        weights = (query @ keys.mT).masked_fill(later, -torch.inf).softmax(-1)
        return attention.out_proj(rearrange(weights @ values, "h q d -> q (h d)"))

    def _across(self, number: int, hidden: Tensor, leaves: list[Tensor]) -> Tensor:
        """Cross-attention on the image, differentiable at the leaves."""
        attention = self._blocks[number].encoder_attn
        query = self._heads(attention, attention.q_proj(hidden) * attention.scaling)
        count = len(self._blocks)
        shifts = leaves[number], leaves[count + number], next(iter(leaves[2 * count :]), None)
        read, *_ = _Read.apply(query, *shifts, self._cross[number])
        return attention.out_proj(rearrange(read, "h q d -> q (h d)"))

    def _directions(self, last: Tensor, pairs: Int[Tensor, "n 2"], log_probability: bool) -> Float[Tensor, "n q C"]:
        """d score / d last states: the token's row of the output matrix at its own position, zero elsewhere."""
        output = self.model.decoder.output_projection
        row, token = pairs.unbind(1)
        begin = last.new_zeros(len(pairs), *last.shape)
        towards = output.weight[token]
        if log_probability:
            towards = towards - output(last).softmax(-1)[row] @ output.weight
        begin[torch.arange(len(pairs), device=row.device), row] = towards
        return begin

    @staticmethod
    def _heads(attention: Any, rows: Float[Tensor, "n C"]) -> Float[Tensor, "H n d"]:
        return rearrange(rows, "n (h d) -> h n d", h=attention.num_heads)


def _batched(last: Tensor, leaves: list[Tensor], begin: Float[Tensor, "n q C"]) -> list[Tensor]:
    """Gradients (n, ...) at the leaves for n directions at `last`, in one batched backward pass."""

    def one(direction: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(last, leaves, direction, retain_graph=True)

    return list(torch.func.vmap(one)(begin))
