"""The data that flows between the parts: frozen, tensors inside, no behaviour beyond selection.

Axis letters, the same everywhere:
B images, T texts, K targets, P patches (= rows x columns, row-major), N tokens of a stack (prefix + patches),
L text tokens, D width, H heads, Q queries, S keys, E width of a joint embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from jaxtyping import Int
from torch import Tensor

from grounding.geometry import Geometry
from grounding.images import Picture
from grounding.text import Span, Tokens


@dataclass(frozen=True, eq=False)
class Inputs:
    """What `Adapter.see` makes of B pictures and `Adapter.read` adds of T texts.

    `tensors` are the model's own inputs (`pixel_values` (B, C, H, W), `input_ids` (T, L), ...), `text_image[t]` is the
    index of the picture that text t belongs to, `warnings[b]` and `text_warnings[t]` say what a user must know;
    `per_picture` names the tensors that have the pictures first. `memory` is the engine's: what it recorded of the
    vision stack without gradients, for later texts of the same pictures while the model stays as it is.
    """

    pictures: tuple[Picture, ...]
    geometry: tuple[Geometry, ...]
    tokens: tuple[Tokens, ...]
    text_image: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    warnings: tuple[tuple[str, ...], ...] = ()
    text_warnings: tuple[tuple[str, ...], ...] = ()
    per_picture: tuple[str, ...] = ("pixel_values",)
    memory: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Targets:
    """K flat targets: the scalars that are explained.

    `image` and `text` (K,) say where each belongs, `spans[k]` which part of its text it is about, `kind` what is
    measured (`similarity`, `logit`, ...), `token_target` how a part of a caption is scored. `data` holds whatever the
    adapter needs to compute the scores, every tensor with K first.
    """

    kind: str
    image: Int[Tensor, "K"]
    text: Int[Tensor, "K"]
    spans: tuple[Span, ...]
    data: Mapping[str, Tensor] = field(default_factory=dict)
    token_target: str | None = None

    def __len__(self) -> int:
        return len(self.spans)

    def select(self, indices: Sequence[int]) -> Targets:
        """The targets at `indices`, in that order."""
        index = self.image.new_tensor(list(indices))
        return replace(
            self,
            image=self.image[index],
            text=self.text[index],
            spans=tuple(self.spans[i] for i in indices),
            data={name: tensor[index.to(tensor.device)] for name, tensor in self.data.items()},
        )


@dataclass(frozen=True)
class Stack:
    """One run of attention blocks, as module paths in the model, first to last.

    `blocks` are the blocks themselves, `inputs` the modules whose output enters each block's attention (its first
    layer norm), `attention` the modules that compute the attention weights (H, Q, S).
    """

    blocks: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sites:
    """Where things are in one architecture, as data.

    `tap` is the default layer for Grad-CAM: a live one. `readout` says how the vision stack is read: `cls`, `mean`,
    `attention_pool`, or `none` (all tokens go on). `prefix` counts the tokens before the patches (CLS, registers).
    `text_stacks` are the stacks whose attention rows see the text.
    """

    stacks: Mapping[str, Stack]
    tap: str
    readout: str
    prefix: int
    text_stacks: frozenset[str] = frozenset()
