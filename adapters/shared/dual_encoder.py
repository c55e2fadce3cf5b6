"""Base class of dual encoders: an image and a text encoder with a joint embedding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from adapters.shared.last_block import LastBlock, patch_mask
from adapters.shared.text_targets import Flat, mask_without, prepare_texts, scored_as, span_ids, text_directions
from adapters.shared.tokenization import pad
from grounding.adapter.base import Adapter, Features
from grounding.adapter.inputs import ImageInputs, Inputs, Targets
from grounding.adapter.recorder import Recorder
from grounding.core.text import Query, Span

TEXT_BATCH = 64


class DualEncoder(Adapter):
    """Base class of adapters for dual encoders; `encode_images` returns image embeddings (B, E), not normalised.

    Targets: `similarity`, the cosine of image and text; `logits`, the model's own score: the cosine times its scale,
    plus its bias; `norm`, the length of the image embedding before it is normalised, which no text can change.

    A part of a caption is scored by leave-one-out (score with the whole caption minus score with the part's tokens
    masked, positions kept) or `alone` (as a text of its own). Every target is one direction in the joint embedding,
    `data["seeds"]` (K, E), and `data["offset"]` (K,): score = <seed, normalised image embedding> + offset.
    """

    target_kinds: ClassVar[tuple[str, ...]] = ("similarity", "logits", "norm")
    text_independent: ClassVar[tuple[str, ...]] = ("norm",)
    model: Any  # its parts have no static types
    tokenizer: Any

    @abstractmethod
    def text_features(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "T E"]:
        """Text embeddings, computed by the model's own forward pass."""

    def scale_and_bias(self) -> tuple[float, float]:
        """The model's scale and bias: its logits are the cosine times the scale plus the bias."""
        return float(self.model.logit_scale.detach().double().exp()), 0.0

    @property
    @abstractmethod
    def limit(self) -> int:
        """The largest number of tokens of a text."""

    @property
    def pad_id(self) -> int:
        """Id of the token that pads a text."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, self.tokenizer.sep_token_id, 0)
        return next(int(i) for i in known if i is not None)

    def prepare_texts(self, images: ImageInputs, queries: Sequence[Sequence[Query]]) -> Inputs:
        """Inputs with token ids and attention mask (T, L), padded to the longest text. Raises TextError."""
        return prepare_texts(images, self.tokenizer, queries, self.limit, self.pad_id)

    def targets(
        self, inputs: Inputs, spans: Sequence[Sequence[Span]], kind: str, token_target: str | None = None
    ) -> Targets:
        """One direction in the joint embedding per span. Raises TargetError."""
        kind, token_target = self.check_target(kind, token_target)
        found = Targets.of_spans(inputs, spans, kind, token_target)
        return found if kind in self.text_independent else replace(found, data=self.directions(inputs, found))

    def directions(self, inputs: Inputs, targets: Targets) -> dict[str, Tensor]:
        """Seeds (K, E) and offsets (K,) of targets of kind `similarity` or `logits`."""
        whole = self.embed_texts(inputs.tensors["input_ids"], inputs.tensors["attention_mask"])
        seeds = text_directions(
            targets.flat,
            targets.token_target,
            whole,
            lambda own: self.embed_alone([span_ids(inputs.texts[t], span) for t, span in own]),
            lambda own: self.leave_out(inputs, own, whole),
        )
        if targets.kind != "logits":
            return {"seeds": seeds}
        scale, bias = self.scale_and_bias()
        left_out = [scored_as(span, targets.token_target) == "left out" for span in targets.spans]
        # The bias cancels in a difference of two scores.
        offset = torch.tensor([0.0 if out else bias for out in left_out], dtype=seeds.dtype, device=seeds.device)
        return {"seeds": seeds * scale, "offset": offset}

    def score(self, inputs: Inputs, features: Features, targets: Targets) -> Float[Tensor, "K"]:  # noqa: ARG002
        """<seed, normalised image embedding> + offset, or the length of the image embedding."""
        assert isinstance(features, Tensor)
        image = targets.image.to(features.device)
        if targets.kind == "norm":
            return features.norm(dim=-1)[image]
        embedded = F.normalize(features, dim=-1)[image]
        return _along(embedded, targets.data, slice(None))

    def score_embeddings(self, embedded: Float[Tensor, "k E"], targets: Targets, mine: Any) -> Float[Tensor, "k"]:
        """The scores of the targets selected by `mine` (mask or indices) from an image embedding of each."""
        if targets.kind == "norm":
            return embedded.norm(dim=-1)
        return _along(F.normalize(embedded, dim=-1), targets.data, mine)

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "T E"]:
        """Normalised text embeddings."""
        with Recorder(self.model):
            parts = [
                self.text_features(i, m) for i, m in zip(ids.split(TEXT_BATCH), mask.split(TEXT_BATCH), strict=True)
            ]
            return F.normalize(torch.cat(parts), dim=-1)

    def embed_alone(self, sequences: Sequence[Sequence[int]]) -> Float[Tensor, "k E"]:
        """Normalised embeddings of texts given by their token ids."""
        return self.embed_texts(*pad(sequences, self.pad_id, self.device))

    def leave_out(self, inputs: Inputs, own: Flat, whole: Float[Tensor, "T E"]) -> Float[Tensor, "k E"]:
        """Text embedding minus the embedding with a span's tokens masked."""
        ids, mask = inputs.tensors["input_ids"], inputs.tensors["attention_mask"]
        texts = [t for t, _ in own]
        return whole[texts] - self.embed_texts(ids[texts], mask_without(mask, own))


def _along(image: Float[Tensor, "k E"], data: Mapping[str, Tensor], mine: Any) -> Float[Tensor, "k"]:
    found = (image * data["seeds"][mine].to(image.dtype)).sum(-1)
    return found + data["offset"][mine].to(image.dtype) if "offset" in data else found


@dataclass(frozen=True, eq=False)
class ClsShortcut:
    """The pooled gradient at the last block of an image encoder whose CLS is projected into a joint embedding.

    `blocks` makes the last block for a backward rule; `project(block, rows)` returns embeddings (k, E) of output rows
    of the block; `prefix` tokens precede the patches. `layers` are the input of the block's attention, and the block's
    own input.
    """

    adapter: DualEncoder
    layers: Mapping[str, tuple[str, ...]]
    blocks: Callable[[str | None], LastBlock]
    project: Callable[[LastBlock, Tensor], Tensor]
    prefix: int = 1

    def pooled_gradient(
        self, layer: str, inputs: Inputs, targets: Targets, outputs: Mapping[str, Tensor], rule: str | None
    ) -> Float[Tensor, "K D"]:
        """Pooled gradients from the CLS row of the last block, see `LastBlock.pooled_gradients`."""
        [before] = self.layers[layer] or (layer,)
        last, hidden = self.blocks(rule), outputs[before].detach()

        def scores(row: Tensor, mine: Tensor) -> Tensor:
            return self.adapter.score_embeddings(self.project(last, row), targets, mine)

        owner = targets.image.to(hidden.device)
        geometry = inputs.images.geometry(0)
        patch = patch_mask(hidden, self.prefix, geometry.rows * geometry.columns)
        return last.pooled_gradients(hidden, owner, torch.zeros_like(owner), patch, scores, before_norm=layer == before)

    def features(self, layer: str, output: Tensor, images: ImageInputs) -> Features | None:  # noqa: ARG002
        """None: an attention block follows these layers."""
        return None
