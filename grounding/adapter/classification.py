"""Adapters of models that score classes: explain the logit of a class in place of the score of a text."""

from __future__ import annotations

import operator
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from grounding.adapter.base import Adapter, TokenProbability
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.vision_cache import encoded_of
from grounding.core.errors import ModelError, TargetError, TextError
from grounding.core.registry import did_you_mean
from grounding.core.text import Alternative, Asked, Classes, Span, TokenizedText

# Number of most probable classes that are stored with an explanation.
TOP = 5
# Default class names of transformers.
DEFAULT_NAME = re.compile(r"LABEL_\d+")
# Number of class names in a message.
LISTED_NAMES = 8


@dataclass(frozen=True)
class ClassNames:
    """Names of classes 0, 1, ...; a class may have several, separated by commas: "great white shark, white shark".

    `what` is the noun for the model in messages.
    """

    names: tuple[str, ...]
    what: str = "the model"

    def __len__(self) -> int:
        return len(self.names)

    def find(self, wanted: Any, hint: str = "") -> int:
        """Return the index of a class, given its index, its name or one of its names; case is ignored.

        Raises TargetError for no class (the message ends in `hint`) and for a name of several classes, TextError for
        an empty name.
        """
        if not isinstance(wanted, str):
            return self._checked(wanted)
        name = _folded(wanted)
        if not name:
            raise TextError("a class name is empty: give a name or an index")
        found = self._whole.get(name) or self._parts.get(name) or []
        if not found and re.fullmatch(r"-?\d+", name):
            return self._checked(int(name))
        if not found:
            listed = ", ".join(repr(one) for one in self.names[:LISTED_NAMES]) + (
                ", ..." if len(self) > LISTED_NAMES else ""
            )
            near = did_you_mean(name, list(dict.fromkeys([*self._whole, *self._parts])))
            raise TargetError(f"{self.what} has no class {wanted!r}{near} (it has {len(self)}: {listed}){hint}")
        if len(found) > 1:
            listed = ", ".join(f"{index} {self.names[index]!r}" for index in found)
            raise TargetError(f"{wanted!r} names {len(found)} classes of {self.what}: {listed}; give the index")
        return found[0]

    def contains(self, name: str) -> bool:
        """Whether a class has this name, alone or among others."""
        return _folded(name) in self._whole or _folded(name) in self._parts

    @property
    def unnamed(self) -> bool:
        """Whether all names are default names, which state only the index."""
        return all(DEFAULT_NAME.fullmatch(name) for name in self.names)

    def _checked(self, wanted: Any) -> int:
        try:
            index = operator.index(wanted)
        except TypeError:
            index = None
        if index is None or isinstance(wanted, bool):
            raise TargetError(f"a class is given by name or index, not by {wanted!r} ({type(wanted).__name__})")
        if not 0 <= index < len(self):
            range_ = f"its {len(self)} classes are 0 to {len(self) - 1}" if len(self) > 1 else "its only class is 0"
            raise TargetError(f"{self.what} has no class {index}: {range_}")
        return index

    @cached_property
    def _whole(self) -> dict[str, list[int]]:
        return _by_name((_folded(name), index) for index, name in enumerate(self.names))

    @cached_property
    def _parts(self) -> dict[str, list[int]]:
        parts = ((_folded(part), index) for index, name in enumerate(self.names) for part in name.split(","))
        return _by_name(dict.fromkeys(parts))


class ClassAdapter(Adapter):
    """Base class of adapters whose target is the logit of a class.

    Subclasses implement `prepare_images`, `structure`, `labels` and `logits`. In place of a text there is one class, or
    several that share an Explanation; None is the predicted class, which costs one more forward pass.

    Attributes
    ----------
    labels: the names of the classes.
    by_itself: classes are independent: probabilities are sigmoids. Otherwise they are a softmax and sum to 1.
    measures: scores are quantities (regression) without probabilities.
    """

    kinds = ("class",)
    token_targets = ()
    sample_text: ClassVar[Asked] = Classes()
    labels: ClassNames
    by_itself: bool = False
    measures: bool = False

    @abstractmethod
    def logits(self, inputs: Inputs) -> Float[Tensor, "B C"]:
        """Return the logits of all classes, differentiable."""

    def asked(self, text: Any) -> Asked:
        """Return a checked request: a class by name or index, or `Classes`; None for the predicted class.

        Raises TargetError, TextError.
        """
        classes = text if isinstance(text, Classes) else Classes() if text is None else Classes((text,))
        for one in classes.asked:
            self.labels.find(one)
        return classes

    def asked_by(self, target: Any, texts: Any) -> tuple[str | None, Any]:
        """Return the kind `class` and the classes, given as `target` or in place of texts.

        Raises TargetError for a name that is neither class nor kind, and for one that is both.
        """
        if isinstance(target, str) and target in self.kinds and texts is None and self.labels.contains(target):
            raise TargetError(
                f"{target!r} is this model's kind of target and the name of a class: ask for the class by its index "
                f"or as [{target!r}], for the predicted class without a target"
            )
        if target is None or (isinstance(target, str) and (texts is not None or target in self.kinds)):
            return target, texts
        if texts is not None:
            raise TargetError(f"classes were given twice: {target!r} as targets, {texts!r} in place of texts")
        target = target.tolist() if hasattr(target, "tolist") else target  # arrays and their numbers
        many = isinstance(target, list | tuple | range)
        if many and not len(target):
            raise TargetError("an empty list of classes was given: leave the target out for the predicted class")
        # Checked before any image is opened; an index may be of any integer type.
        if isinstance(target, str):
            self.labels.find(target, f"; this model's kind of target is {', '.join(self.kinds)}")
        names = [one if isinstance(one, str) else self.labels.find(one) for one in (target if many else [target])]
        return self.kinds[0], self.asked(Classes(tuple(names)))

    @property
    def needs_text(self) -> bool:
        """False: without a class the predicted one is explained."""
        return False

    def looks_first(self, texts: Sequence[Sequence[Asked]]) -> bool:
        """Whether a class has to be predicted."""
        return any(isinstance(one, Classes) and not one.asked for own in texts for one in own)

    def prepare_texts(self, inputs: Inputs, texts: Sequence[Sequence[Asked]]) -> Inputs:
        """Return the inputs with classes in place of texts, one `TokenizedText` for each request."""
        requests = [(b, self.asked(text)) for b, own in enumerate(texts) for text in own]
        tokens, origins = [], []
        for b, one in requests:
            assert isinstance(one, Classes)
            known = [self.labels.find(name) for name in one.asked] or [int(encoded_of(self, inputs)[b].argmax())]
            indices = list(dict.fromkeys(known))
            tokens.append(TokenizedText.of_classes([self.labels.names[i] for i in indices], indices))
            origins.append("given" if one.asked else "predicted")
        return replace(
            inputs,
            tokens=tuple(tokens),
            text_image=tuple(b for b, _ in requests),
            text_warnings=(tuple(self._text_warnings()),) * len(requests),
            per_text=(),
            origins=tuple(origins),
        )

    def targets(
        self,
        inputs: Inputs,
        spans: Sequence[Sequence[Span]],
        kind: str | None = None,
        token_target: str | None = None,
    ) -> Targets:
        """Return one target per class: its logit."""
        kind, token_target = self.check_kind(kind, token_target)
        owner = torch.tensor([text for text, chosen in enumerate(spans) for _ in chosen])
        flat = tuple(span for chosen in spans for span in chosen)
        index = torch.tensor([span.token_id for span in flat])
        return Targets(kind, torch.tensor(inputs.text_image)[owner], owner, flat, {"class": index}, token_target)

    def encode_images(self, inputs: Inputs) -> Float[Tensor, "B C"]:
        """Return the logits of all classes. Raises ModelError if their number is not that of the names."""
        logits = self.logits(inputs)
        if logits.shape != (len(inputs.tensors["pixel_values"]), len(self.labels)):
            raise ModelError(
                f"{self.info.id} gives scores of shape {tuple(logits.shape)} for {len(inputs.tensors['pixel_values'])} "
                f"images and {len(self.labels)} class names: expected one per image and name"
            )
        return logits

    def score(self, inputs: Inputs, encoded: Float[Tensor, "B C"], targets: Targets) -> Float[Tensor, "K"]:  # noqa: ARG002
        """Return the logit of each target's class."""
        return encoded[targets.image.to(encoded.device), targets.data["class"].to(encoded.device)]

    def alternatives(self, inputs: Inputs, targets: Targets) -> Sequence[TokenProbability | None]:
        """Return the probability of each target's class, and the others among the `TOP` most probable classes."""
        if self.measures:
            return [None] * len(targets)
        logits = encoded_of(self, inputs).double()
        probabilities = logits.sigmoid() if self.by_itself else logits.softmax(-1)
        top = probabilities.topk(min(TOP, len(self.labels))).indices.tolist()
        pairs = zip(targets.image.tolist(), targets.data["class"].tolist(), strict=True)
        return [
            (
                float(probabilities[b, own]),
                tuple(Alternative(self.labels.names[i], i, float(probabilities[b, i])) for i in top[b] if i != own),
            )
            for b, own in pairs
        ]

    def _text_warnings(self) -> list[str]:
        warnings = []
        if self.labels.unnamed:
            warnings.append(
                f"{self.info.id} does not name its classes ({self.labels.names[0]}, ...): look up the meaning of an "
                "index in its documentation"
            )
        if self.by_itself:
            warnings.append(
                f"the classes of {self.info.id} are independent: probabilities are sigmoids and do not sum to 1"
            )
        return warnings


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())


def _by_name(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    made: dict[str, list[int]] = defaultdict(list)
    for name, index in pairs:
        made[name].append(index)
    return dict(made)
