"""Cache of image features and recorded signals, reused for later texts on the same images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

# What `Adapter.encode_images` returns: a tensor, or a tuple of them.
Features = Tensor | tuple[Tensor, ...]


@dataclass(eq=False)
class VisionCache:
    """Image features, and outputs and attention weights of the vision side by module path, recorded without gradients.

    It belongs to the images that it was computed from, and is valid while the model is unchanged.
    """

    features: Features | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    # An attention module has both.
    weights: dict[str, Tensor] = field(default_factory=dict)

    def has(self, outputs: Collection[str] = (), weights: Collection[str] = ()) -> bool:
        """Return whether the features, and the outputs and weights at these paths, are in the cache."""
        return self.features is not None and self.outputs.keys() >= set(outputs) and self.weights.keys() >= set(weights)

    def put(
        self,
        features: Features,
        outputs: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keep the features of a pass, off the graph, and further outputs and weights."""
        self.features = map_features(features, Tensor.detach)
        self.outputs |= outputs or {}
        self.weights |= weights or {}


def map_features(features: Features, function: Callable[[Tensor], Tensor]) -> Features:
    """Return the features with a function applied to each tensor."""
    return tuple(map(function, features)) if isinstance(features, tuple) else function(features)
