"""Grad-CAM of every token that a TrOCR wrote, from one decoder graph: exact, at the price of a few decoder passes.

Grad-CAM needs d logit / d (one shift added to all patches). The decoder sees the encoder through the keys and values of
its cross-attention alone, so a shift d of all patches only adds W_k d to every patch's key and W_v d to its value: with
u = W_k d and v = W_v d per head, m the mask of patches, q a query and P the attention weights,

    scores  += (q u) m        output += (P m) v

and what a backward pass has to carry is a gradient at u and v (H, d) per block, not at all N keys and values.
A tap before the encoder's final LayerNorm is linearised through it (all that a gradient at zero sees): patch i moves by

    (g * (d - mean d) - r_i xhat_i g) / sigma_i,    r_i = <xhat_i, d> / D,

so that m becomes m / sigma and a third leaf r (N,) joins u and v: scores -= (q Khat_i) r_i m_i / sigma_i with Khat_i
the key without its bias terms, and the like for the values. Under the `layernorm` rule sigma counts as constant and r
falls away.

Rows of the decoder are computed in segments, keys and values of earlier ones kept on the graph: the gradient of a token
never runs through rows behind its own segment. The tokens of a segment share one backward, batched over their
directions (`torch.func.vmap`); keys and values are the same for all of them, which `_Shared` says to the batching, or
it would copy them per token. The gradient starts at the decoder's last state with the token's own row of the output
matrix, so that no (rows x vocabulary) gradient is ever made. Held against the slow way by the contract tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrOCRForCausalLM

from adapters._plain import is_plain

# Rows of the decoder per segment: more make longer detours, fewer make more passes.
SEGMENT = 10


class _Shared(torch.autograd.Function):
    """x @ m with a constant m (H, a, b) that is the same for the whole batch: the batch joins the rows of x."""

    @staticmethod
    def forward(x: Tensor, m: Tensor) -> Tensor:
        return x @ m

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], _output: Tensor) -> None:
        ctx.matrix = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Shared.apply(gradient, ctx.matrix.mT), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], x: Tensor, m: Tensor) -> tuple[Tensor, int]:
        assert in_dims[0] is not None
        rows = rearrange(x.movedim(in_dims[0], 0), "b h q a -> h (b q) a")
        return rearrange(rows @ m, "h (b q) c -> b h q c", b=info.batch_size), 0


@dataclass(frozen=True, eq=False)
class _Picture:
    """The picture as the decoder sees it, and how a shift of its patches gets there.

    `states` (N, C) are the encoder's, `reach` (N,) is m, over sigma where a norm lies between, `direction` (N, C) is
    xhat g where r counts, `back` brings gradients at the shifted states and at r to the tap.
    """

    states: Tensor
    reach: Tensor
    direction: Tensor | None
    back: Callable[[Tensor, Tensor | None], Tensor]


@dataclass(eq=False)
class _Leaves:
    """Where the backward passes end: zero shifts of keys and values per block, and r."""

    keys: list[Tensor]
    values: list[Tensor]
    along: Tensor | None

    @property
    def all(self) -> list[Tensor]:
        """In a fixed order."""
        return [*self.keys, *self.values, *([] if self.along is None else [self.along])]


@dataclass(frozen=True, eq=False)
class FastDecoder:
    """The decoder of one picture's text. `features` (N, D) are those of the tap, `prefix` of them no patches.

    `before_norm`: the tap is the last encoder block, not the norm behind it. `rule` is None or "layernorm".
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
        """Whether the decoder is TrOCR's own, and nothing that is recomputed here has been changed."""
        parts = [model.decoder, model.encoder.layernorm, getattr(model, "enc_to_dec_proj", nn.Identity())]
        own = isinstance(model.decoder, TrOCRForCausalLM) and isinstance(model.encoder.layernorm, nn.LayerNorm)
        return own and all(is_plain(part) for part in parts if not isinstance(part, nn.Identity))

    def shifts(
        self, ids: Int[Tensor, "L"], pairs: Int[Tensor, "n 2"], log_probability: bool = False
    ) -> Float[Tensor, "n D"]:
        """d logit / d shift of all patches of the tap, for n pairs of (row, token id); rows get `ids`.

        With `log_probability`, of the token's log-probability.
        """
        made = self.features.new_zeros(len(pairs), self.features.shape[-1])
        picture = self._picture
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
                    gradients = _batched(last, leaves.all, begin)
                    made[mine] = picture.back(*self._gather(gradients, leaves))
        return made

    # ------------------------------------------------------------------ the picture's side

    @cached_property
    def _picture(self) -> _Picture:
        patch = torch.ones(len(self.features), dtype=self.features.dtype, device=self.features.device)
        patch[: self.prefix] = 0
        norm = self.model.encoder.layernorm
        if not self.before_norm:
            return _Picture(self.features, patch, None, lambda states, _along: states)
        # Squares of half-precision features overflow.
        wide = self.features.to(torch.promote_types(self.features.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1) + norm.eps).sqrt()
        normal = (centred / deviation[:, None]).to(self.features.dtype)

        def back(states: Tensor, along: Tensor | None) -> Tensor:
            moved = states * norm.weight
            moved = moved - moved.mean(-1, keepdim=True)
            return moved if along is None else moved + along @ normal / normal.shape[-1]

        direction = normal * norm.weight if self.rule is None else None
        return _Picture(norm(self.features), patch / deviation.to(patch.dtype), direction, back)

    @cached_property
    def _project(self) -> Callable[[Tensor], Tensor]:
        """From encoder to decoder width, where they differ."""
        return getattr(self.model, "enc_to_dec_proj", None) or (lambda states: states)

    @cached_property
    def _cross(self) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
        """Per block keys and values (H, N, d) of the picture, and what r moves of each."""
        picture, made = self._picture, []
        states = self._project(picture.states)
        towards = None if picture.direction is None else self._linear(picture.direction)
        for block in self._blocks:
            attention = block.encoder_attn
            pair = [self._heads(attention, part(states)) for part in (attention.k_proj, attention.v_proj)]
            moved: list[Tensor | None] = [None, None]
            if towards is not None:
                weights = (attention.k_proj.weight, attention.v_proj.weight)
                moved = [self._heads(attention, F.linear(towards, weight)) for weight in weights]
            made.append((pair[0], pair[1], moved[0], moved[1]))
        return made

    def _linear(self, states: Tensor) -> Tensor:
        """`_project` without its bias."""
        project = getattr(self.model, "enc_to_dec_proj", None)
        return states if project is None else F.linear(states, project.weight)

    def _leaves(self) -> _Leaves:
        shape = self._cross[0][0][:, :1].shape
        zeros = [[self.features.new_zeros(shape).requires_grad_() for _ in self._blocks] for _ in range(2)]
        along = self.features.new_zeros(len(self.features)).requires_grad_()
        return _Leaves(zeros[0], zeros[1], None if self._picture.direction is None else along)

    def _gather(self, gradients: list[Tensor], leaves: _Leaves) -> tuple[Tensor, Tensor | None]:
        """Gradients (n, ...) at the leaves as those at the shifted encoder states (n, D) and at r (n, N)."""
        count = len(self._blocks)
        states = gradients[0].new_zeros(())
        for block, keys, values in zip(self._blocks, gradients[:count], gradients[count : 2 * count], strict=True):
            for part, moved in ((block.encoder_attn.k_proj, keys), (block.encoder_attn.v_proj, values)):
                states = states + rearrange(moved, "n h 1 d -> n (h d)") @ part.weight
        project = getattr(self.model, "enc_to_dec_proj", None)
        states = states if project is None else states @ project.weight
        return states, None if leaves.along is None else gradients[-1]

    # ------------------------------------------------------------------ the decoder, row by row

    @property
    def _decoder(self) -> Any:
        return self.model.decoder.model.decoder

    @property
    def _blocks(self) -> Any:
        return self._decoder.layers

    def _embed(self, ids: Int[Tensor, "L"]) -> Float[Tensor, "L C"]:
        decoder = self._decoder
        with torch.no_grad():
            hidden = decoder.embed_tokens(ids[None]) + decoder.embed_positions(ids[None], past_key_values_length=0)
            return (hidden if decoder.layernorm_embedding is None else decoder.layernorm_embedding(hidden))[0]

    def _segment(self, hidden: Float[Tensor, "q C"], first: int, leaves: _Leaves) -> Float[Tensor, "q C"]:
        """The decoder's last states of some rows, those before `first` being known."""
        rows = torch.arange(first, first + len(hidden), device=hidden.device)
        for number, block in enumerate(self._blocks):
            hidden = self._norm(block.self_attn_layer_norm, hidden + self._among(number, hidden, rows))
            across = self._across(number, hidden, leaves)
            hidden = self._norm(block.encoder_attn_layer_norm, hidden + across)
            hidden = self._norm(block.final_layer_norm, hidden + block.fc2(block.activation_fn(block.fc1(hidden))))
        return hidden

    def _among(self, number: int, hidden: Tensor, rows: Tensor) -> Tensor:
        """Attention among the rows up to these."""
        attention = self._blocks[number].self_attn
        query = self._heads(attention, attention.q_proj(hidden) * attention.scaling)
        self._own_keys[number].append(self._heads(attention, attention.k_proj(hidden)))
        self._own_values[number].append(self._heads(attention, attention.v_proj(hidden)))
        keys, values = torch.cat(self._own_keys[number], 1), torch.cat(self._own_values[number], 1)
        later = torch.arange(keys.shape[1], device=rows.device) > rows[:, None]
        weights = (query @ keys.mT).masked_fill(later, -torch.inf).softmax(-1)
        return attention.out_proj(rearrange(weights @ values, "h q d -> q (h d)"))

    def _across(self, number: int, hidden: Tensor, leaves: _Leaves) -> Tensor:
        """Attention on the picture, with the leaves' shifts in it."""
        attention, reach = self._blocks[number].encoder_attn, self._picture.reach
        keys, values, towards_keys, towards_values = self._cross[number]
        query = self._heads(attention, attention.q_proj(hidden) * attention.scaling)
        spread = reach.expand(len(query), 1, -1)  # (H, 1, N)
        scores = _Shared.apply(query, keys.mT) + _Shared.apply(query.detach() @ leaves.keys[number].mT, spread)
        if leaves.along is not None and towards_keys is not None:
            scores = scores - (query.detach() @ towards_keys.mT * reach) * leaves.along
        weights = scores.softmax(-1)
        read = _Shared.apply(weights, values) + (weights.detach() @ reach)[..., None] @ leaves.values[number]
        if leaves.along is not None and towards_values is not None:
            read = read - _Shared.apply(weights.detach() * reach * leaves.along, towards_values)
        return attention.out_proj(rearrange(read, "h q d -> q (h d)"))

    def _directions(self, last: Tensor, pairs: Int[Tensor, "n 2"], log_probability: bool) -> Float[Tensor, "n q C"]:
        """d score / d last states: the token's row of the output matrix at its own place, zero elsewhere."""
        output = self.model.decoder.output_projection
        row, token = pairs.unbind(1)
        begin = last.new_zeros(len(pairs), *last.shape)
        towards = output.weight[token]
        if log_probability:
            towards = towards - output(last).softmax(-1)[row] @ output.weight
        begin[torch.arange(len(pairs), device=row.device), row] = towards
        return begin

    def _norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        if self.rule is None:
            return norm(x)
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        deviation = (wide.var(-1, correction=0, keepdim=True) + norm.eps).sqrt().to(x.dtype)
        return (x - x.mean(-1, keepdim=True)) / deviation * norm.weight + norm.bias

    @staticmethod
    def _heads(attention: Any, rows: Float[Tensor, "n C"]) -> Float[Tensor, "H n d"]:
        return rearrange(rows, "n (h d) -> h n d", h=attention.num_heads)


def _batched(last: Tensor, leaves: list[Tensor], begin: Float[Tensor, "n q C"]) -> list[Tensor]:
    """Gradients (n, ...) at the leaves for n directions at `last`, in one batched backward."""

    def one(direction: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(last, leaves, direction, retain_graph=True)

    return list(torch.func.vmap(one)(begin))
