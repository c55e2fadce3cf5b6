"""Inputs and Targets: the frozen data that adapters, engine and methods exchange.

Axis letters, the same in all packages:
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
    """Prepared inputs of a model: B images from `Adapter.prepare_images`, T texts from `Adapter.prepare_texts`.

    Parameters
    ----------
    images: the opened images.
    geometry: for each image the map from original to input pixels, with the patch grid of the default layer.
    tensors: inputs of the model by name: `pixel_values` (B, C, H, W), `input_ids` (T, L), ...
    warnings: for each image messages to the user.
    tokens: the tokenized texts.
    text_image: for each text the index of its image.
    text_warnings: for each text messages to the user.
    per_image, per_text: names of the tensors whose leading axis counts images, or texts.
    memory: cache of the engine: outputs of the vision stack recorded without gradients, for later texts of the same
        images; valid while the model is unchanged.
    origins: for each text `given`, `generated`, `forced` or `predicted`; empty: all given.
    notes: cache of the adapter for these texts.
    """

    images: tuple[Picture, ...]
    geometry: tuple[Geometry, ...]
    tensors: Mapping[str, Tensor]
    warnings: tuple[tuple[str, ...], ...] = ()
    tokens: tuple[TokenizedText, ...] = ()
    text_image: tuple[int, ...] = ()
    text_warnings: tuple[tuple[str, ...], ...] = ()
    per_image: tuple[str, ...] = ("pixel_values",)
    per_text: tuple[str, ...] = ()
    memory: dict[str, Tensor] = field(default_factory=dict)
    origins: tuple[str, ...] = ()
    notes: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Targets:
    """K targets: the scalars that are explained.

    Parameters
    ----------
    kind: what is measured (`similarity`, `logit`, ...).
    image, text: (K,) indices of the image and the text of each target.
    spans: for each target the part of its text.
    data: tensors from which the adapter computes the scores, with K as leading axis.
    token_target: how a part of a text is scored.
    rows: (K, Q) weights, summing to 1, of the positions at which a target is read, if each position has its own score.
    unit: (K,) index of the text side's sequence in which a target is read; None: the sequence of its text.
    other: (K,) index of a second sequence whose score is subtracted (a text without a token; -1: none).
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
        """(K,) index of the sequence of each target."""
        return self.text if self.unit is None else self.unit

    def select(self, indices: Sequence[int]) -> Targets:
        """Return the targets at `indices`, in that order."""
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
