"""Configuration that all evaluations with boxes for phrases share: captions, peak, box threshold, seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grounding.core.boxes import Peak
from grounding.core.demo import is_demo
from grounding.core.errors import OptionError
from grounding.evaluation.pointing import BOX_THRESHOLD, MIN_IOU, Captions
from grounding.evaluation.statistics import CONFIDENCE, RESAMPLES

# Reason for which an image with fewer entities than `min_entities` is skipped.
TOO_FEW_ENTITIES = "min_entities"
DEMO_MIN_ENTITIES = 3


@dataclass(frozen=True)
class PointingConfig:
    """Configuration of the pointing game.

    `captions`: score the phrases of the first caption of an image, or of all.
    `peak`: the strongest patch or the strongest pixel of a map, see `pointing.measure_map`.
    `min_entities`: skip images with fewer chains that have boxes. None: 3 in the demo scenes, where two objects make
    pointing easy, else 1.
    `threshold`: share of a map's range above which its box is drawn. None: one half.
    `seed`: seed of the bootstrap intervals.

    Raises OptionError.
    """

    captions: Captions = "first"
    peak: Peak = "patch"
    min_entities: int | None = None
    threshold: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.min_entities is not None and self.min_entities < 1:
            raise OptionError(f"min_entities must be at least 1, got {self.min_entities}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise OptionError(f"threshold is a share of a map's range, above 0 and at most 1; got {self.threshold}")

    def min_entities_of(self, folder: Path) -> int:
        """Return how many chains with boxes an image of this data set needs."""
        if self.min_entities is not None:
            return self.min_entities
        return DEMO_MIN_ENTITIES if is_demo(folder) else 1

    @property
    def box_threshold(self) -> float:
        """The threshold, or its default."""
        return BOX_THRESHOLD if self.threshold is None else self.threshold

    def to_document(self) -> dict[str, Any]:
        """Return what the numbers depend on, as the evaluation document stores it."""
        return {
            "captions": self.captions,
            "min_entities": self.min_entities,
            "peak": self.peak,
            "interpolation": "bilinear" if self.peak == "pixel" else None,
            "iou": MIN_IOU,
            "threshold": self.box_threshold,
            "tuned": False,
            "centre": "the centre of the image",
            "random": f"exact, each seen {self.peak} equally likely",
            "interval": {"method": "percentile bootstrap over images", "resamples": RESAMPLES, "level": CONFIDENCE},
        }
