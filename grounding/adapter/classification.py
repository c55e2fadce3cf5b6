"""Adapters of models that score classes: explain the logit of a class in place of the score of a text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from grounding.adapter.base import Adapter, Features, TokenProbability
from grounding.adapter.class_names import ClassNames
from grounding.adapter.inputs import ImageInputs, Inputs, Targets
from grounding.core.errors import ModelError
from grounding.core.text import Alternative, Classes, Query, Span, TokenizedText

__all__ = ["ClassAdapter", "ClassNames"]

# Number of most probable classes that are stored with an explanation.
TOP = 5


class ClassAdapter(Adapter):
    """Base class of adapters whose target is the logit of a class.

    Subclasses implement `structure`, `prepare_images` and `encode_images`, and set `class_names`. In place of a text
    there is one class, or several that share an Explanation; without one the engine asks for the predicted class.

    Attributes
    ----------
    class_names: the names of the classes.
    by_itself: classes are independent: probabilities are sigmoids. Otherwise they are a softmax and sum to 1.
    measures: scores are quantities (regression) without probabilities.
    """

    target_kinds = ("class",)
    token_targets = ()
    sample: ClassVar[Query] = Query(Classes())
    class_names: ClassNames
    by_itself: bool = False
    measures: bool = False

    @abstractmethod
    def encode_images(self, images: ImageInputs) -> Float[Tensor, "B C"]:
        """Return the logits of all classes, differentiable (or features, if `logits` is overridden)."""

    def logits(self, features: Features) -> Float[Tensor, "B C"]:
        """Return the logits of all classes from the result of `encode_images`.

        Raises ModelError if their number is not that of the names.
        """
        assert isinstance(features, Tensor)
        if features.ndim != 2 or features.shape[1] != len(self.class_names):
            raise ModelError(
                f"{self.info.id} gives scores of shape {tuple(features.shape)} for {len(features)} images and "
                f"{len(self.class_names)} class names: expected one per image and name"
            )
        return features

    def prepare_texts(self, images: ImageInputs, queries: Sequence[Sequence[Query]]) -> Inputs:
        """Return the inputs with classes in place of texts, one `TokenizedText` for each query."""
        texts = tuple(self._chosen(query) for own in queries for query in own)
        return Inputs(images, texts, tuple(b for b, own in enumerate(queries) for _ in own))

    def targets(
        self, inputs: Inputs, spans: Sequence[Sequence[Span]], kind: str, token_target: str | None = None
    ) -> Targets:
        """Return one target per class: its logit."""
        kind, token_target = self.check_target(kind, token_target)
        found = Targets.of_spans(inputs, spans, kind, token_target)
        return replace(found, data={"class": torch.tensor([span.token_id for span in found.spans])})

    def score(self, inputs: Inputs, features: Features, targets: Targets) -> Float[Tensor, "K"]:  # noqa: ARG002
        """Return the logit of each target's class."""
        logits = self.logits(features)
        return logits[targets.image.to(logits.device), targets.data["class"].to(logits.device)]

    def probabilities(self, inputs: Inputs, features: Features, targets: Targets) -> Sequence[TokenProbability | None]:  # noqa: ARG002
        """Return the probability of each target's class, and the others among the `TOP` most probable classes."""
        if self.measures:
            return [None] * len(targets)
        logits = self.logits(features).double()
        probabilities = logits.sigmoid() if self.by_itself else logits.softmax(-1)
        top = probabilities.topk(min(TOP, len(self.class_names))).indices.tolist()
        pairs = zip(targets.image.tolist(), targets.data["class"].tolist(), strict=True)
        names = self.class_names.names
        return [
            (
                float(probabilities[b, own]),
                tuple(Alternative(names[i], i, float(probabilities[b, i])) for i in top[b] if i != own),
            )
            for b, own in pairs
        ]

    def _chosen(self, query: Query) -> TokenizedText:
        assert isinstance(query.text, Classes)
        indices = list(dict.fromkeys(self.class_names.find(name) for name in query.text.asked))
        chosen = TokenizedText.of_classes([self.class_names.names[i] for i in indices], indices)
        origin = "predicted" if query.text.predicted else "given"
        return replace(chosen, origin=origin, warnings=tuple(self._text_warnings()))

    def _text_warnings(self) -> list[str]:
        warnings = []
        if self.class_names.unnamed:
            warnings.append(
                f"{self.info.id} does not name its classes ({self.class_names.names[0]}, ...): look up the meaning of "
                "an index in its documentation"
            )
        if self.by_itself:
            warnings.append(
                f"the classes of {self.info.id} are independent: probabilities are sigmoids and do not sum to 1"
            )
        return warnings
