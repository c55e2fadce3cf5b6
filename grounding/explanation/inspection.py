"""What Grad-CAM is made of at one layer: features, gradients, channel weights, the signed map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from grounding.core.geometry import Geometry
from grounding.core.images import Picture
from grounding.explanation import maps as mapping
from grounding.explanation.explanation import Entry
from grounding.explanation.maps import Status
from grounding.explanation.views import VIEWS
from grounding.methods.base import THRESHOLD

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Inspection:
    """What one layer has of one picture and one entry, on the layer's own grid, row-major; nothing is resized.

    `features` F and `gradients` g = d score / d F, `weights` w_d = mean_p g_pd, and `map`, signed, before any ReLU:
    sum_d w_d F_pd, unless the method's options say otherwise. With `compared`, the score is the difference of two
    sequences (a caption, and the caption without a token), and the second half of the channels is the other one's.
    """

    image: Picture
    caption: str
    entry: Entry
    geometry: Geometry
    layer: str
    title: str
    features: Float[np.ndarray, "rows columns D"]
    gradients: Float[np.ndarray, "rows columns D"]
    weights: Float[np.ndarray, "D"]
    map: Float[np.ndarray, "rows columns"]
    target: str
    model: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    compared: bool = False
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.features.shape))
        return f"<Inspection of {self.entry.label!r} at {self.layer}: {shape} features>"

    @property
    def view(self) -> Float[np.ndarray, "rows columns"]:
        """The map after the ReLU (or the threshold in its place): >= 0."""
        return mapping.view(self.map, signed=True, threshold=self.options.get(THRESHOLD, 0.0))

    @property
    def status(self) -> Status:
        """Whether the map is evidence."""
        return mapping.diagnose(self.map, self.geometry.seen_cells, signed=True)

    def strongest(self, count: int) -> tuple[int, ...]:
        """The channels of the largest absolute weights, the strongest first; of equals the first."""
        return tuple(np.argsort(-np.abs(self.weights), kind="stable")[:count].tolist())

    def channel(self, index: int) -> str:
        """What a channel is called."""
        half = len(self.weights) // 2
        return f"channel {index - half}, without it" if self.compared and index >= half else f"channel {index}"

    def figure(self, channels: int = 8, **options: Any) -> Figure:
        """The strongest channels, the histogram of weights and the map before and after; options as in
        `grounding.inspection_figure.figure`."""
        return VIEWS["inspection"]([self], channels, **options)
