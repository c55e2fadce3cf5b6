"""Inputs and Targets: the frozen data that adapters, engine and methods exchange.

Axis letters, the same in all packages:
B images, V views, T texts, K targets, P patches (= rows x columns, row-major), N tokens of a stack (prefix + patches),
L text tokens, D width, H heads, Q queries, S keys, E width of a joint embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grounding.adapter.vision_cache import VisionCache
from grounding.core.errors import ModelError
from grounding.core.geometry import DETAIL, OVERVIEW, Geometry
from grounding.core.images import Picture
from grounding.core.text import Span, TokenizedText

__all__ = ["DETAIL", "OVERVIEW", "ImageInputs", "Inputs", "Targets", "View"]


@dataclass(frozen=True)
class View:
    """An image as the model gets it: the whole, a crop, a mosaic of tiles (`detail`), a thumbnail (`overview`).

    `image` is the index of the image in its batch, `geometry` maps original pixels to input pixels of this view, with
    its patch grid. Every image has one `detail`, from which peaks and boxes are computed, and at most one `overview`.
    """

    image: int
    geometry: Geometry
    name: str = DETAIL


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """B prepared images, from `Adapter.prepare_images`.

    Parameters
    ----------
    images: the opened images.
    views: the V >= B views, ordered by image.
    tensors: inputs of the model by name; the leading axis counts images, or is `packed`.
    warnings: for each image messages to the user.
    packed: name of a tensor -> for each image how many rows of the leading axis are its own, for tensors in which the
        patches or tiles of all images follow each other.
    cache: cache of the engine.
    """

    images: tuple[Picture, ...]
    views: tuple[View, ...]
    tensors: Mapping[str, Tensor]
    warnings: tuple[tuple[str, ...], ...] = ()
    packed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    cache: VisionCache = field(init=False, repr=False, default_factory=VisionCache)

    def __post_init__(self) -> None:
        if not self.warnings:
            object.__setattr__(self, "warnings", ((),) * len(self.images))
        details = [view.image for view in self.views if view.name == DETAIL]
        if details != list(range(len(self.images))):
            raise ModelError(f"each image needs one {DETAIL} view, in order: got views of images {details}")

    def __len__(self) -> int:
        return len(self.images)

    def view(self, image: int, name: str = DETAIL) -> int | None:
        """Return the index of an image's view of this name, None if it has none."""
        return next((v for v, view in enumerate(self.views) if view.image == image and view.name == name), None)

    def geometry(self, image: int, name: str = DETAIL) -> Geometry:
        """Return the geometry of a view of an image, by default of `detail`."""
        found = self.view(image, name)
        assert found is not None
        return self.views[found].geometry

    def select(self, indices: Sequence[int]) -> ImageInputs:
        """Return the images at `indices`, in this order; an image may be repeated."""
        views = tuple(replace(v, image=new) for new, b in enumerate(indices) for v in self.views if v.image == b)
        tensors = {name: tensor[self._rows(name, indices)] for name, tensor in self.tensors.items()}
        return ImageInputs(
            images=tuple(self.images[b] for b in indices),
            views=views,
            tensors=tensors,
            warnings=tuple(self.warnings[b] for b in indices),
            packed={name: tuple(counts[b] for b in indices) for name, counts in self.packed.items()},
        )

    def _rows(self, name: str, indices: Sequence[int]) -> list[int]:
        if name not in self.packed:
            return list(indices)
        counts = self.packed[name]
        return [sum(counts[:b]) + row for b in indices for row in range(counts[b])]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Prepared inputs of a model: B images from `Adapter.prepare_images`, T texts from `Adapter.prepare_texts`.

    Parameters
    ----------
    images: the prepared images.
    texts: the tokenized texts.
    text_image: for each text the index of its image.
    tensors: inputs of the model that belong to the texts, by name: `input_ids` (T, L), ...; the leading axis counts
        texts.
    notes: cache of the adapter for these texts.
    """

    images: ImageInputs
    texts: tuple[TokenizedText, ...]
    text_image: tuple[int, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
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
    chain_start: (K, Q) weights, summing to 1, of the positions in the text's sequence where chains of attention start.
        Needed where the score is read from a sequence.
    read_rows: (K, Q) weights, summing to 1, of the positions at which a target is read, if each position has its own
        score: targets of one sequence can then share a backward pass.
    sequence: (K,) index of the sequence in which a target is read; None: the sequence of its text.
    baseline_sequence: (K,) index of a second sequence whose score is subtracted (a text without a token; -1: none).
    options: options of this kind of target, option -> value; see `Adapter.target_options`.
    """

    kind: str
    image: Int[Tensor, "K"]
    text: Int[Tensor, "K"]
    spans: tuple[Span, ...]
    data: Mapping[str, Tensor] = field(default_factory=dict)
    token_target: str | None = None
    chain_start: Float[Tensor, "K Q"] | None = None
    read_rows: Float[Tensor, "K Q"] | None = None
    sequence: Int[Tensor, "K"] | None = None
    baseline_sequence: Int[Tensor, "K"] | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_spans(
        cls, inputs: Inputs, spans: Sequence[Sequence[Span]], kind: str, token_target: str | None = None
    ) -> Targets:
        """Return one target for each span in `spans[t]` of each text t, in this order, without `data`."""
        owner = torch.tensor([text for text, chosen in enumerate(spans) for _ in chosen], dtype=torch.long)
        image = torch.tensor(inputs.text_image, dtype=torch.long)[owner]
        return cls(kind, image, owner, tuple(span for chosen in spans for span in chosen), token_target=token_target)

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def sequences(self) -> Int[Tensor, "K"]:
        """(K,) index of the sequence of each target."""
        return self.text if self.sequence is None else self.sequence

    @property
    def flat(self) -> list[tuple[int, Span]]:
        """The text and the span of each target."""
        return list(zip(self.text.tolist(), self.spans, strict=True))

    def select(self, indices: Sequence[int]) -> Targets:
        """Return the targets at `indices`, in that order."""
        index = self.image.new_tensor(list(indices))

        def chosen(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index.to(tensor.device)]

        return replace(
            self,
            image=self.image[index],
            text=self.text[index],
            spans=tuple(self.spans[i] for i in indices),
            data={name: tensor[index.to(tensor.device)] for name, tensor in self.data.items()},
            chain_start=chosen(self.chain_start),
            read_rows=chosen(self.read_rows),
            sequence=chosen(self.sequence),
            baseline_sequence=chosen(self.baseline_sequence),
        )
