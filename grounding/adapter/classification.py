"""Models that score classes: what is asked of a picture is one of its classes in place of a text."""

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

# Classes whose probabilities go with an explanation.
TOP = 5
# What a checkpoint calls classes that nobody named.
UNNAMED = re.compile(r"LABEL_\d+")
LISTED = 8


@dataclass(frozen=True)
class ClassNames:
    """The names of classes 0, 1, ... A name may be several, with commas between them: "great white shark, white shark".

    `what` is the model in words, for messages.
    """

    names: tuple[str, ...]
    what: str = "the model"

    def __len__(self) -> int:
        return len(self.names)

    def find(self, asked: Any, hint: str = "") -> int:
        """The index of a class that is asked for by index, by its name, or by one of the names it has, case ignored.

        Raises TargetError for what is none (it ends in `hint`) and for a name of several classes, TextError for an
        empty one.
        """
        if not isinstance(asked, str):
            return self._checked(asked)
        name = _folded(asked)
        if not name:
            raise TextError("a class name is empty: give a name or an index")
        found = self._whole.get(name) or self._parts.get(name) or []
        if not found and re.fullmatch(r"-?\d+", name):
            return self._checked(int(name))
        if not found:
            listed = ", ".join(repr(one) for one in self.names[:LISTED]) + (", ..." if len(self) > LISTED else "")
            near = did_you_mean(name, list(dict.fromkeys([*self._whole, *self._parts])))
            raise TargetError(f"{self.what} has no class {asked!r}{near} (it has {len(self)}: {listed}){hint}")
        if len(found) > 1:
            listed = ", ".join(f"{index} {self.names[index]!r}" for index in found)
            raise TargetError(f"{asked!r} names {len(found)} classes of {self.what}: {listed}; give the index")
        return found[0]

    def knows(self, name: str) -> bool:
        """Whether a class has this name, or has it among others."""
        return _folded(name) in self._whole or _folded(name) in self._parts

    @property
    def unnamed(self) -> bool:
        """Whether the names say nothing but the index."""
        return all(UNNAMED.fullmatch(name) for name in self.names)

    def _checked(self, asked: Any) -> int:
        try:
            index = operator.index(asked)
        except TypeError:
            index = None
        if index is None or isinstance(asked, bool):
            raise TargetError(f"a class is asked for by name or index, not by {asked!r} ({type(asked).__name__})")
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
    """Base of adapters whose target is the score (logit) of a class; they answer `prepare_images`, `structure`, `labels`, `logits`.

    In place of a text there is one class, or several that share an Explanation; none is the predicted one, for which
    the picture has to pass through the model once before. With `by_itself` every class has a probability of its own
    (sigmoid), else they sum to 1 (softmax); with `measures` scores are quantities (regression) and have none.
    """

    kinds = ("class",)
    token_targets = ()
    placeholder: ClassVar[Asked] = Classes()
    labels: ClassNames
    by_itself: bool = False
    measures: bool = False

    @abstractmethod
    def logits(self, inputs: Inputs) -> Float[Tensor, "B C"]:
        """The scores of all classes, differentiable."""

    def asked(self, text: Any) -> Asked:
        """A class by name or index, several as `Classes`; None: the predicted one. Raises TargetError, TextError."""
        asked = text if isinstance(text, Classes) else Classes() if text is None else Classes((text,))
        for one in asked.asked:
            self.labels.find(one)
        return asked

    def asked_by(self, target: Any, texts: Any) -> tuple[str | None, Any]:
        """The kind `class`, and the classes: those that `target` names, or those that came as texts.

        Raises TargetError for a name that is none, and for the name of the kind where a class has it, too.
        """
        if isinstance(target, str) and target in self.kinds and texts is None and self.labels.knows(target):
            raise TargetError(
                f"{target!r} is this model's kind of target and the name of a class: ask for that class by its index "
                f"or as [{target!r}], for the predicted one without a target"
            )
        if target is None or (isinstance(target, str) and (texts is not None or target in self.kinds)):
            return target, texts
        if texts is not None:
            raise TargetError(f"classes were given twice: {target!r} as targets, {texts!r} in place of texts")
        target = target.tolist() if hasattr(target, "tolist") else target  # arrays and their numbers
        many = isinstance(target, list | tuple | range)
        if many and not len(target):
            raise TargetError("an empty list of classes was asked for: leave the target out for the predicted class")
        # Checked before any picture is opened; an index may be any whole number's type.
        if isinstance(target, str):
            self.labels.find(target, f"; this model's kind of target is {', '.join(self.kinds)}")
        names = [one if isinstance(one, str) else self.labels.find(one) for one in (target if many else [target])]
        return self.kinds[0], self.asked(Classes(tuple(names)))

    @property
    def needs_text(self) -> bool:
        """A class is predicted where none is given."""
        return False

    def looks_first(self, texts: Sequence[Sequence[Asked]]) -> bool:
        """For the predicted class."""
        return any(isinstance(one, Classes) and not one.asked for own in texts for one in own)

    def prepare_texts(self, inputs: Inputs, texts: Sequence[Sequence[Asked]]) -> Inputs:
        """Classes in place of texts, each list of them one item."""
        asked = [(b, self.asked(text)) for b, own in enumerate(texts) for text in own]
        tokens, origins = [], []
        for b, one in asked:
            assert isinstance(one, Classes)
            known = [self.labels.find(name) for name in one.asked] or [int(encoded_of(self, inputs)[b].argmax())]
            indices = list(dict.fromkeys(known))
            tokens.append(TokenizedText.of_classes([self.labels.names[i] for i in indices], indices))
            origins.append("given" if one.asked else "predicted")
        return replace(
            inputs,
            tokens=tuple(tokens),
            text_image=tuple(b for b, _ in asked),
            text_warnings=(tuple(self._doubts()),) * len(asked),
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
        """The logit of each class."""
        kind, token_target = self.check_kind(kind, token_target)
        owner = torch.tensor([text for text, chosen in enumerate(spans) for _ in chosen])
        flat = tuple(span for chosen in spans for span in chosen)
        index = torch.tensor([span.token_id for span in flat])
        return Targets(kind, torch.tensor(inputs.text_image)[owner], owner, flat, {"class": index}, token_target)

    def encode_images(self, inputs: Inputs) -> Float[Tensor, "B C"]:
        """The logits of all classes. Raises ModelError where they are not as many as there are names."""
        found = self.logits(inputs)
        if found.shape != (len(inputs.tensors["pixel_values"]), len(self.labels)):
            raise ModelError(
                f"{self.info.id} gives scores of shape {tuple(found.shape)} for {len(inputs.tensors['pixel_values'])} "
                f"pictures and {len(self.labels)} class names: expected one per picture and name"
            )
        return found

    def score(self, inputs: Inputs, encoded: Float[Tensor, "B C"], targets: Targets) -> Float[Tensor, "K"]:  # noqa: ARG002
        """The logit of each target's class."""
        return encoded[targets.image.to(encoded.device), targets.data["class"].to(encoded.device)]

    def alternatives(self, inputs: Inputs, targets: Targets) -> Sequence[TokenProbability | None]:
        """The probability of each class, and those of the `TOP` most probable classes that are others."""
        if self.measures:
            return [None] * len(targets)
        logits = encoded_of(self, inputs).double()
        chances = logits.sigmoid() if self.by_itself else logits.softmax(-1)
        top = chances.topk(min(TOP, len(self.labels))).indices.tolist()
        pairs = zip(targets.image.tolist(), targets.data["class"].tolist(), strict=True)
        return [
            (
                float(chances[b, own]),
                tuple(Alternative(self.labels.names[i], i, float(chances[b, i])) for i in top[b] if i != own),
            )
            for b, own in pairs
        ]

    def _doubts(self) -> list[str]:
        doubts = []
        if self.labels.unnamed:
            doubts.append(
                f"{self.info.id} does not name its classes ({self.labels.names[0]}, ...): what an index means is "
                "written elsewhere"
            )
        if self.by_itself:
            doubts.append(
                f"{self.info.id} judges every class by itself: probabilities are sigmoids and do not sum to 1"
            )
        return doubts


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())


def _by_name(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    made: dict[str, list[int]] = defaultdict(list)
    for name, index in pairs:
        made[name].append(index)
    return dict(made)
