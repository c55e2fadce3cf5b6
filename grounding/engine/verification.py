"""Check that a model scores the same while its attention is recorded, once for each model and set of modules."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grounding.adapter.base import Adapter
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.recorder import Recorder
from grounding.adapter.replicate import one_image_per_target
from grounding.core.errors import ModelError

# Largest difference of the two scores, as a fraction of the score or of 1: attention implementations round differently.
TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2

_checked: WeakKeyDictionary[nn.Module, set[tuple[str, frozenset[str]]]] = WeakKeyDictionary()


class RecordedScore:
    """Compares the score of the first target in a pass with recorded attention with that of a pass without.

    The plain pass, of one image, is made at construction, once for each model, kind of target and set of attention
    modules.
    """

    def __init__(self, adapter: Adapter, inputs: Inputs, targets: Targets, attention: Iterable[str]) -> None:
        self._adapter, self._key = adapter, (targets.kind, frozenset(attention))
        self._done = _checked.setdefault(adapter.model, set())
        self._plain: float | None = None
        if self._key[1] and self._key not in self._done:
            self._plain = _plain_score(adapter, *one_image_per_target(inputs, targets.select([0])))

    def check(self, recorded: Float[Tensor, "K"]) -> None:
        """Raise ModelError if the scores differ: the recorded weights would not be those of the model."""
        if self._plain is None:
            return
        found, plain = float(recorded[0].detach()), self._plain
        allowed = TOLERANCE if torch.finfo(recorded.dtype).bits >= 32 else HALF_TOLERANCE
        if abs(found - plain) > allowed * max(1.0, abs(plain)):
            raise ModelError(
                f"{self._adapter.info.id} scores {plain:.4g}, but {found:.4g} while its attention is recorded: it "
                "computes attention in a way that the recorded weights do not describe; use methods that read no "
                "attention (gradcam)"
            )
        self._done.add(self._key)


def _plain_score(adapter: Adapter, inputs: Inputs, targets: Targets) -> float | None:
    """The score of one target without recording; None for scores of another shape, which the pass itself refuses."""
    with Recorder(adapter.model):
        found = adapter.score(inputs, adapter.encode_images(inputs.images), targets)
    return float(found[0]) if found.shape == (1,) else None
