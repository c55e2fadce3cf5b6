"""Cache of image features and recorded signals, reused for later texts on the same images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

# What `Adapter.encode_images` returns: a tensor, or a tuple of them.
Features = Tensor | tuple[Tensor, ...]


@dataclass(eq=False)
class VisionCache:
    """Image features, and outputs of the vision side by module path, recorded without gradients.

    It belongs to the images that it was computed from, and is valid while the model is unchanged.
    """

    features: Features | None = None
    signals: dict[str, Tensor] = field(default_factory=dict)

    def get(self, paths: Collection[str] = ()) -> tuple[Features, Mapping[str, Tensor]] | None:
        """Return the features and the signals at `paths`, None if any of them is missing."""
        if self.features is None or not self.signals.keys() >= set(paths):
            return None
        return self.features, {path: self.signals[path] for path in paths}

    def put(self, features: Features, signals: Mapping[str, Tensor] | None = None) -> None:
        """Keep the features of a pass, off the graph, and further signals."""
        self.features = map_features(features, Tensor.detach)
        self.signals |= signals or {}


def map_features(features: Features, function: Callable[[Tensor], Tensor]) -> Features:
    """Return the features with a function applied to each tensor."""
    return tuple(map(function, features)) if isinstance(features, tuple) else function(features)
