"""The data that flows between the parts: frozen, tensors inside, no behaviour beyond selection.

Axis letters, the same everywhere:
B images, T texts, K targets, P patches (= rows x columns, row-major), N tokens of a stack (prefix + patches),
L text tokens, D width, H heads, Q queries, S keys, E width of a joint embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from jaxtyping import Float, Int
from torch import Tensor

from grounding.core.geometry import Geometry
from grounding.core.images import Picture
from grounding.core.text import Span, TokenizedText


@dataclass(frozen=True, eq=False)
class Inputs:
    """What `Adapter.prepare_images` makes of B pictures and `Adapter.prepare_texts` adds of T texts.

    `tensors` are the model's own inputs (`pixel_values` (B, C, H, W), `input_ids` (T, L), ...), `text_image[t]` is the
    index of the picture that text t belongs to, `warnings[b]` and `text_warnings[t]` say what a user must know;
    `per_image` and `per_text` name the tensors that have the pictures, or the texts, first. `origins[t]` says where
    text t is from (`given`, `generated`, `forced`; none: all given). `memory` is the engine's: what it recorded of the
    vision stack without gradients, for later texts of the same pictures while the model stays as it is; `notes` are
    the adapter's own, of these texts.
    """

    images: tuple[Picture, ...]
    geometry: tuple[Geometry, ...]
    tokens: tuple[TokenizedText, ...]
    text_image: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    warnings: tuple[tuple[str, ...], ...] = ()
    text_warnings: tuple[tuple[str, ...], ...] = ()
    per_image: tuple[str, ...] = ("pixel_values",)
    per_text: tuple[str, ...] = ()
    memory: dict[str, Tensor] = field(default_factory=dict)
    origins: tuple[str, ...] = ()
    notes: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Targets:
    """K flat targets: the scalars that are explained.

    `image` and `text` (K,) say where each belongs, `spans[k]` which part of its text it is about, `kind` what is
    measured (`similarity`, `logit`, ...), `token_target` how a part of a caption is scored. `unit` (K,) says which of
    the text side's sequences a target is read in (none: that of its text), `rows` (K, Q) at which places of it, as
    weights that sum to 1, where each place is read by itself. `other` (K,) is the sequence that a target's own is
    compared with (a caption without a token; -1: none): its score is the difference of the two's. `data` holds whatever
    the adapter needs to compute the scores, every tensor with K first.
    """

    kind: str
    image: Int[Tensor, "K"]
    text: Int[Tensor, "K"]
    spans: tuple[Span, ...]
    data: Mapping[str, Tensor] = field(default_factory=dict)
    token_target: str | None = None
    rows: Float[Tensor, "K Q"] | None = None
    unit: Int[Tensor, "K"] | None = None
    other: Int[Tensor, "K"] | None = None

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def units(self) -> Int[Tensor, "K"]:
        """The sequence of each target."""
        return self.text if self.unit is None else self.unit

    def select(self, indices: Sequence[int]) -> Targets:
        """The targets at `indices`, in that order."""
        index = self.image.new_tensor(list(indices))
        return replace(
            self,
            image=self.image[index],
            text=self.text[index],
            spans=tuple(self.spans[i] for i in indices),
            data={name: tensor[index.to(tensor.device)] for name, tensor in self.data.items()},
            rows=None if self.rows is None else self.rows[index.to(self.rows.device)],
            unit=None if self.unit is None else self.unit[index],
            other=None if self.other is None else self.other[index],
        )
