"""The ingredients of Grad-CAM at one layer: features, gradients, channel weights and the signed map."""

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
from grounding.methods.options import THRESHOLD

if TYPE_CHECKING:
    from matplotlib.figure import Figure


CHANNELS = 8  # strongest channels in a figure, by default


@dataclass(frozen=True, eq=False, repr=False)
class Inspection:
    """Recorded values of one layer for one image and one entry, on the layer's own grid, row-major, not resized.

    `features` F, `gradients` g = d score / d F, `weights` w_d = mean_p g_pd, and `map`, signed, before any ReLU:
    sum_d w_d F_pd, unless `options` change it. With `compared`, the score is the difference of the scores of two
    sequences (a caption, and the caption without a token); the second half of the channels belongs to the second.
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
        """The map after the ReLU, or after the threshold that replaces it: >= 0."""
        return mapping.view(self.map, signed=True, threshold=self.options.get(THRESHOLD, 0.0))

    @property
    def status(self) -> Status:
        """Whether the map is evidence."""
        return mapping.diagnose(self.map, self.geometry.seen_cells, signed=True)

    def strongest(self, count: int) -> tuple[int, ...]:
        """The channels with the largest absolute weights, strongest first; of equal channels the first."""
        return tuple(np.argsort(-np.abs(self.weights), kind="stable")[:count].tolist())

    def channel(self, index: int) -> str:
        """The name of a channel."""
        half = len(self.weights) // 2
        return f"channel {index - half}, without it" if self.compared and index >= half else f"channel {index}"

    def figure(self, channels: int = CHANNELS, **options: Any) -> Figure:
        """Draw the strongest channels, the histogram of weights and the map before and after the ReLU.

        `options` are those of `FigureOptions`; only `cmap` and `oversampling` have an effect. Raises OptionError.
        """
        return VIEWS["inspection"]([self], channels, **options)
